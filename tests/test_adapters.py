"""`adapters`: each method starts exactly at the pre-trained model, trains what it says, and is clipped right in all
families."""

import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from memarc_utils.adapters import AdaptedLayer, add_bottleneck_adapters, add_lora, select_bias_terms
from memarc_utils.adapters import select_linear_probe, train_everything, trainable_share
from memarc_utils.backbones import tiny_backbone
from memarc_utils.dp_sgd import verify_sensitivity
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from tests.models import CASE_IDS, CASES, padded_batch, plain_losses, private_sgd, shake, tiny

# What trains besides the adapters: the head, unless it is tied to the embeddings.
HEADS = {"bert": ("bert.pooler.", "classifier."), "roberta": ("classifier.",),
         "distilbert": ("pre_classifier.", "classifier."),
         "classification": ("score.",), "untied": ("lm_head.",), "tied": ()}
TARGETS = {"bert": 2, "roberta": 2, "distilbert": 2, "gpt2": 1, "opt": 2, "llama": 2}  # layers a block


def head_prefixes(family, task, tie):
    return HEADS.get(family) or HEADS[task if task == "classification" else "tied" if tie else "untied"]


def logits(model, batch):
    return model(**{name: t for name, t in batch.items() if name != "labels"}).logits


@pytest.mark.parametrize("freeze_a", [False, True], ids=["lora", "ffa-lora"])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_lora_starts_at_the_pretrained_model_and_trains_adapters_and_head(case, freeze_a):
    model = tiny(*case)
    batch = padded_batch(model, case[1])
    with torch.no_grad():
        before = logits(model, batch)
        adapted = add_lora(model, rank=4, freeze_a=freeze_a)
        assert float((logits(adapted, batch) - before).abs().max()) == 0.0
    assert adapted is model and type(model).__module__.startswith("transformers.")
    assert sum(isinstance(m, LoraLayer) for m in model.modules()) == 2 * TARGETS[case[0]]
    for name, parameter in model.named_parameters():
        trains = ("lora_B" in name or ("lora_A" in name and not freeze_a) or name.startswith(head_prefixes(*case)))
        assert parameter.requires_grad == trains, name
    shake(model)
    private = private_sgd(model)
    private.backward(plain_losses(model, batch))
    private.step()  # every one of them is reached


@pytest.mark.parametrize("alpha, scale", [(None, 2.0), (12.0, 3.0)])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lora_is_its_formula(family, alpha, scale):
    """W x + b + (α/r) B A x by hand, α = 2 r by default; GPT-2 keeps Wᵀ."""
    model = add_lora(tiny(family), rank=4, alpha=alpha)
    shake(model, scale=0.5)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    x = torch.randn(3, 32)
    base = layer.base_layer.weight if family == "bert" else layer.base_layer.weight.t()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        want = x @ base.t() + layer.base_layer.bias + scale * (x @ a.t()) @ b.t()
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_lora_on_layers_of_ones_choice():
    model = add_lora(tiny("bert"), rank=2, target_modules=("dense",))
    adapted = {name for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert "bert.encoder.layer.1.intermediate.dense" in adapted and not any("query" in name for name in adapted)


def test_lora_refuses_and_leaves_the_model_alone():
    model = tiny("bert")
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank must be a whole number >= 1, got {rank}"):
            add_lora(model, rank=rank)
    with pytest.raises(ValueError, match="no_such_layer"):
        add_lora(model, target_modules=("no_such_layer",))
    assert all(p.requires_grad for p in model.parameters()) and not any(isinstance(m,
                                                                                   LoraLayer) for m in model.modules())
    add_lora(model)
    with pytest.raises(ValueError, match="has LoRA layers already: load the backbone anew"):
        add_lora(model)
    with pytest.raises(ValueError, match="no block view of Linear; supported are"):
        add_lora(nn.Linear(2, 2), target_modules=("weight",))


UNTIED = [case for case in CASES if not case[2]]


@pytest.mark.parametrize("case", UNTIED, ids=[i for case, i in zip(CASES, CASE_IDS) if case in UNTIED])
def test_linear_probe_trains_the_head_alone(case):
    model = select_linear_probe(tiny(*case, dropout=0.5))
    model.train()
    base = getattr(model, model.base_model_prefix)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(head_prefixes(*case)), name
    blocks = [m for name, m in base.named_modules() if "layer" in name or name.startswith("h.")]
    assert blocks and not any(m.training for m in blocks)
    private = private_sgd(model)
    private.backward(plain_losses(model, padded_batch(model, case[1])))
    private.step()


def test_train_everything_undoes_the_choice():
    model = add_lora(tiny("bert"))
    assert train_everything(model) is model and all(p.requires_grad for p in model.parameters())


def test_trainable_share_counts_each_parameter_once():
    """A tied weight is one parameter; hand counts."""
    model = tiny("gpt2", "causal_lm", True)
    trainable, total, share = trainable_share(model)
    assert trainable == total == sum(p.numel() for p in set(model.parameters())) and share == 1.0
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layer[0].requires_grad_(False)
    assert trainable_share(layer) == (10, 26, 10 / 26)
    adapted = add_lora(tiny("bert", layers=2), rank=4)
    adapters = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert adapters == 2 * 2 * (4 * 32 + 32 * 4)


# What an adapter is put on, per family: the last layer of the attention and of the MLP.
LAST = {"bert": ("attention.output.dense", "output.dense"), "roberta": ("attention.output.dense", "output.dense"),
        "distilbert": ("attention.out_lin", "ffn.lin2"), "gpt2": ("attn.c_proj", "mlp.c_proj"),
        "opt": ("self_attn.out_proj", "fc2"), "llama": ("self_attn.o_proj", "mlp.down_proj")}


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_adapters_start_at_the_pretrained_model_and_train_with_the_head(case):
    model = tiny(*case)
    batch = padded_batch(model, case[1])
    with torch.no_grad():
        before = logits(model, batch)
        adapted = add_bottleneck_adapters(model, reduction=4)
        assert float((logits(adapted, batch) - before).abs().max()) == 0.0
    assert adapted is model
    places = [name for name, m in model.named_modules() if isinstance(m, AdaptedLayer)]
    assert len(places) == 2 * 2 and all(name.endswith(LAST[case[0]]) for name in places)
    for name, parameter in model.named_parameters():
        trains = ".down." in name or ".up." in name or name.startswith(head_prefixes(*case))
        assert parameter.requires_grad == trains, name
    shake(model, scale=0.5)
    with torch.no_grad():
        assert float((logits(model, batch) - before).abs().max()) > 1e-3  # no adapter stands idle beside the path
    private = private_sgd(model)
    private.backward(plain_losses(model, batch))
    private.step()  # every one of them is reached


def test_an_adapter_is_its_formula():
    """h + U gelu(D h + b) + c, h = W x + a; any number of leading axes."""
    model = shake(add_bottleneck_adapters(tiny("bert"), width=5), scale=0.5)
    adapted = model.bert.encoder.layer[0].output.dense
    x = torch.randn(3, 7, 128)
    with torch.no_grad():
        h = x @ adapted.layer.weight.t() + adapted.layer.bias
        inner = h @ adapted.down.weight.t() + adapted.down.bias
        gelu = inner * (1 + torch.erf(inner / 2 ** 0.5)) / 2
        want = h + gelu @ adapted.up.weight.t() + adapted.up.bias
        torch.testing.assert_close(adapted(x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapted(x.flatten(0, 1)), want.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert adapted.down.weight.shape == (5, 32) and adapted.up.weight.shape == (32, 5)


@pytest.mark.parametrize("after, last", [(("attention",), 0), (("mlp",), 1)])
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_adapters_behind_one_half_of_the_block(family, after, last):
    model = add_bottleneck_adapters(tiny(family), after=after)
    places = [name for name, m in model.named_modules() if isinstance(m, AdaptedLayer)]
    other = LAST[family][1 - last].removeprefix("attention.")
    assert len(places) == 2 and all(name.endswith("." + LAST[family][last]) for name in places)
    assert after == ("mlp",) or not any(name.endswith("." + other) and "attention" not in name for name in places)
    assert places and model.get_submodule(places[0]).down.out_features == 32 // 16  # the default reduction


def test_adapters_keep_the_dtype_of_the_layer():
    model = add_bottleneck_adapters(tiny("bert").to(torch.bfloat16), width=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("arguments, words", [
    (dict(reduction=5), "a divisor of the model's width 32, got 5"), (dict(reduction=0), "a divisor"),
    (dict(width=0), "width must be a whole number >= 1, got 0"), (dict(width=2, reduction=2), "not both"),
    (dict(after=()), "after must be"), (dict(after=("mlp", "head")), "after must be"),
    (dict(after=("mlp", "mlp")), "after must be"),
])
def test_adapters_refuse_and_leave_the_model_alone(arguments, words):
    model = tiny("bert")
    with pytest.raises(ValueError, match=words):
        add_bottleneck_adapters(model, **arguments)
    assert all(p.requires_grad for p in model.parameters()) and not any(isinstance(m, AdaptedLayer) for m in model.modules())


@pytest.mark.parametrize("first, words", [
    (add_bottleneck_adapters, "bottleneck adapters"), (add_lora, "LoRA layers"),
    (lambda model: attach_side_network(model, SideNetworkConfig(reduction=2)), "a side network")])
def test_adapters_are_added_once_and_alone(first, words):
    model = first(tiny("bert"))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"has {words} already: load the backbone anew"):
        add_bottleneck_adapters(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_bias_terms_and_the_head_train(case):
    model = tiny(*case)
    batch = padded_batch(model, case[1])
    with torch.no_grad():
        before = logits(model, batch)
        chosen = select_bias_terms(model, add_missing=case[0] == "llama")
        assert chosen is model and float((logits(model, batch) - before).abs().max()) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.endswith(".bias") or name.startswith(head_prefixes(*case))), name
    assert "lm_head.bias" not in model.state_dict() and "score.bias" not in model.state_dict()
    shake(model, scale=0.5)
    with torch.no_grad():
        assert float((logits(model, batch) - before).abs().max()) > 1e-3
    private = private_sgd(model)
    private.backward(plain_losses(model, batch))
    private.step()


def test_layer_norm_biases_train_and_rms_norm_is_left():
    bert, llama = select_bias_terms(tiny("bert")), select_bias_terms(tiny("llama"), add_missing=True)
    norms = [m for m in bert.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all(m.bias.requires_grad and not m.weight.requires_grad for m in norms)
    norms = [m for m in llama.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert norms and all(getattr(m, "bias", None) is None and not m.weight.requires_grad for m in norms)


def test_added_biases_are_the_layers_own_and_start_at_zero():
    model = tiny("llama")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no bias to train: pass add_missing=True"):
        select_bias_terms(model)
    assert all(p.requires_grad for p in model.parameters())  # nothing was changed
    select_bias_terms(model, add_missing=True)
    layers = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 2 * 7 and all(torch.equal(m.bias, torch.zeros(m.out_features)) for m in layers)
    assert "model.layers.1.mlp.down_proj.bias" in model.state_dict()
    layer, x = layers[0], torch.randn(3, 32)
    with torch.no_grad():
        layer.bias.fill_(0.25)
        torch.testing.assert_close(layer(x), x @ layer.weight.t() + 0.25)
    count = len(list(model.parameters()))
    select_bias_terms(model, add_missing=True)  # nothing is missing any more: the same choice, values kept
    assert len(list(model.parameters())) == count and float(layer.bias.detach().sum()) == 0.25 * 32


METHODS = {
    "full": train_everything, "probe": select_linear_probe, "lora": lambda model: add_lora(model, rank=4),
    "ffa-lora": lambda model: add_lora(model, rank=4, freeze_a=True),
    "adapters": lambda model: add_bottleneck_adapters(model, reduction=8),
    "biases": lambda model: select_bias_terms(model, add_missing=True),
}


# A head that is tied to the embeddings stays frozen, so a probe of such a model would train nothing.
TRAINABLE = [(case, method) for case in CASES for method in METHODS if method != "probe" or case in UNTIED]
TRAINABLE_IDS = [f"{CASE_IDS[CASES.index(case)]}-{method}" for case, method in TRAINABLE]


@pytest.mark.parametrize("case, method", TRAINABLE, ids=TRAINABLE_IDS)
def test_one_example_moves_the_sum_by_at_most_c(case, method):
    """Padded rows, every parameter away from its start, all families: the engine against a loop without it."""
    model = shake(METHODS[method](tiny(*case)))
    batch = padded_batch(model, case[1])
    report = verify_sensitivity(model, plain_losses, batch, max_grad_norm=0.1)
    assert report.holds and report.max_contribution > 0.05, str(report)


def test_shares_of_the_methods():
    """Hand counts on BERT with d = 32, two blocks of d -> 128 -> d, and a pooler and a classifier as the head."""
    head = 32 * 32 + 32 + 2 * 32 + 2
    biases = 32 + 2 * (4 * 32 + 32 + 128 + 32 + 32)  # embedding norm; per block q k v o, norm, in, out, norm
    assert trainable_share(select_bias_terms(tiny("bert")))[0] == biases + head
    adapters = 2 * 2 * (8 * 32 + 8 + 32 * 8 + 32)
    assert trainable_share(add_bottleneck_adapters(tiny("bert"), width=8))[0] == adapters + head
    assert trainable_share(select_linear_probe(tiny("bert")))[0] == head
    tied = select_bias_terms(tiny("gpt2", "causal_lm", True))
    assert trainable_share(tied)[1] == trainable_share(tiny("gpt2", "causal_lm", False))[1] - 101 * 32


def test_a_head_that_is_not_known_is_refused():
    from transformers import BertConfig, BertForMaskedLM
    small = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    for prepare in (add_lora, add_bottleneck_adapters, select_linear_probe, select_bias_terms):
        with pytest.raises(ValueError, match="cls.predictions.bias lies beside the backbone|cls.* lies beside the backbone"):
            prepare(BertForMaskedLM(small))


def test_a_probe_of_a_tied_head_has_nothing_to_train():
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        select_linear_probe(tiny_backbone("gpt2", task="causal_lm"))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"alpha": math.nan}, "alpha must be a number above 0"), ({"alpha": 0.0}, "alpha must be"), ({"alpha": -1.0}, "alpha must be"),
    ({"rank": True}, "rank must be"), ({"target_modules": ()}, "must be a tuple of names"),
    ({"target_modules": ("word_embeddings",)}, "is a Embedding, and LoRA is for linear"),
])
def test_lora_refuses_what_would_not_train(arguments, message):
    model = tiny_backbone("bert")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        add_lora(model, **arguments)
    assert [p.requires_grad for p in model.parameters()] == before and not any("lora" in name for name, _ in model.named_parameters())


def test_an_adapter_width_that_is_no_number_leaves_the_model_alone():
    model = tiny_backbone("bert")
    with pytest.raises(ValueError, match="width must be a whole number"):
        add_bottleneck_adapters(model, width=True)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("prepare", [add_lora, train_everything, select_bias_terms, add_bottleneck_adapters])
def test_a_probe_before_another_method_does_not_take_its_dropout(prepare):
    model = prepare(select_linear_probe(tiny_backbone("bert", dropout=0.5))).train()
    ids = torch.randint(3, 90, (2, 6))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("prepare", [add_lora, train_everything, select_bias_terms, add_bottleneck_adapters, select_linear_probe])
def test_a_side_network_takes_no_second_method(prepare):
    model = attach_side_network(tiny_backbone("bert"))
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="side network already"):
        prepare(model)
    assert [p.requires_grad for p in model.parameters()] == before
    for adapt in (add_lora, add_bottleneck_adapters):
        with pytest.raises(ValueError, match="would get no gradient beside a side network"):
            attach_side_network(adapt(tiny_backbone("bert")))


def test_a_method_that_refuses_leaves_a_probe_as_it_was():
    """Its backbone still stays in evaluation mode."""
    probe = select_linear_probe(tiny_backbone("llama", dropout=0.5))
    with pytest.raises(ValueError, match="has no bias to train"):
        select_bias_terms(probe)
    assert not any(part.training for part in probe.train().model.modules())

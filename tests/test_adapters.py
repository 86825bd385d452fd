"""`adapters`: LoRA starts at the pre-trained model, is peft's, and trains what it says; the linear probe; shares."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from memarc_utils.adapters import add_lora, select_linear_probe, train_everything, trainable_share
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


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_linear_probe_trains_the_head_alone(case):
    if case[2]:
        pytest.skip("its head is the embedding: nothing would be left to train")
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

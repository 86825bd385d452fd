"""`side_network`: starts at the pre-trained model, keeps nothing of the backbone, trains what it says, looks where it
may."""

import copy

import pytest
import torch
from torch import nn

from memarc_utils.adapters import add_lora
from memarc_utils.side_blocks import Gate, SideBlock
from memarc_utils.side_network import SideNetwork, SideNetworkConfig, attach_side_network
from memarc_utils.training import parameter_groups
from tests.models import CASE_IDS, CASES, loop_gradients, padded_batch, plain_losses, private_sgd, seeded, shake, tiny

BLOCKS = ("mlp", "attention", "adapter")
DECODERS = [case for case in CASES if case[1] == "causal_lm"]
DECODER_IDS = [name for name, case in zip(CASE_IDS, CASES) if case in DECODERS]


def config(block="attention", **changes):
    return SideNetworkConfig(**{**dict(reduction=4, block=block, heads=2), **changes})


def logits(model, batch):
    return model(**{name: t for name, t in batch.items() if name != "labels"}).logits


def side_of(model):
    return next(m for m in model.modules() if isinstance(m, SideNetwork))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_starts_exactly_at_the_pretrained_model(case, block):
    """The upsample is zero, so not one bit of the output changes; and the same model comes back, with the same
    signature."""
    model = tiny(*case)
    batch = padded_batch(model, case[1])
    with torch.no_grad():
        before = logits(model, batch)
        attached = attach_side_network(model, config(block))
        after = logits(attached, batch)
    assert attached is model
    assert float((after - before).abs().max()) == 0.0
    with torch.no_grad():
        shake(model, scale=0.3)
        assert float((logits(model, batch) - before).abs().max()) > 1e-3  # and it does something once it has moved


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_only_side_and_head_train(case):
    model = tiny(*case)
    before = copy.deepcopy(model.state_dict())
    attach_side_network(model, config())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    side = side_of(model)
    assert all(not p.requires_grad for p in side.backbone.parameters())
    expected = {"downs", "gates", "side_blocks", "up"}
    heads = {"bert": {"bert.pooler", "classifier"}, "roberta": {"classifier"},
             "distilbert": {"pre_classifier", "classifier"}}.get(
        case[0], {"score"} if case[1] == "classification" else set() if case[2] else {"lm_head"})
    for name in trainable:
        assert any(f".{part}." in name for part in expected) or any(name.startswith(f"{head}.") for head in heads), name
    assert all(any(f".{part}." in name for name in trainable) for part in expected)
    assert all(any(name.startswith(f"{head}.") for name in trainable) for head in heads)
    if case[2]:  # a head that is tied to the embeddings stays frozen with them
        assert not model.get_output_embeddings().weight.requires_grad
    after = model.state_dict()
    moved = {name: next(k for k in after if k.replace(".backbone.", ".") == name) for name in before}
    assert all(torch.equal(before[name], after[new]) for name, new in moved.items())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], CASES[9]], ids=[CASE_IDS[i] for i in (0, 4, 6, 9)])
def test_nothing_of_the_backbone_is_kept(case, block):
    """The memory claim at its root: what autograd saves holds no frozen parameter, no backbone activation has a graph,
    and of width d only the inputs of the downsamples and of the head remain, whatever the depth."""
    saved = {}
    for layers in (2, 5):
        model = attach_side_network(tiny(*case, layers=layers), config(block))
        batch = padded_batch(model, case[1])
        frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        attached = []
        for module in side_of(model).backbone.modules():
            module.register_forward_hook(lambda *call: attached.append(getattr(call[-1], "requires_grad", False)))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            plain_losses(model, batch)
        assert attached and not any(attached)
        if case[2] is None or case[2] is False:  # a tied head multiplies by the frozen embedding after the ladder
            assert not [t for t in kept if t.data_ptr() in frozen]
        kept = [t for t in kept if not isinstance(t, nn.Parameter) and t.is_floating_point()]
        activations = {t.data_ptr(): t.numel() for t in kept}
        saved[layers] = sum(numbers == 4 * 7 * 32 for numbers in activations.values())  # B · T · d
        assert 4 * 7 * 128 not in activations.values()  # the inner width of the backbone's MLP
    assert saved[5] - saved[2] == 3  # one downsample's input for each further layer, nothing else of that width


def test_saves_less_than_lora():
    def saved_numbers(prepare):
        model = prepare(tiny("bert", hidden=64, layers=4))
        kept = {}
        def keep(tensor):
            kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            plain_losses(model, padded_batch(model, batch=4, tokens=20))
        return sum(t.numel() for t in kept.values() if not isinstance(t, nn.Parameter))

    side = saved_numbers(lambda m: attach_side_network(m, SideNetworkConfig(reduction=8, heads=2)))
    assert side < 0.5 * saved_numbers(lambda m: add_lora(m, rank=8))


def test_backbone_stays_in_evaluation_mode():
    """Its features are the same in every epoch, also after model.train(); dropout of the head comes back."""
    model = attach_side_network(tiny("bert", dropout=0.5), config())
    model.train()
    side = side_of(model)
    assert not any(m.training for m in side.backbone.modules())
    assert model.dropout.training and all(m.training for m in side.side_blocks.modules()) and side.pooler.training
    batch = padded_batch(model)
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(model.bert(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state)
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("block", BLOCKS)
def test_every_part_has_the_gradient_of_a_loop(block):
    """In float64: downsamples, gates, attention, MLP, upsample, pooler and classifier, each with a gradient that is not
    zero."""
    model = shake(attach_side_network(tiny("bert"), config(block)), scale=0.2).double()
    batch = padded_batch(model)
    want = loop_gradients(model, batch)
    private = private_sgd(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    private.sampler.backward(plain_losses(model, batch), torch.ones_like)
    got = private.clipped_sum()
    assert set(got) == set(names) == set(want)
    for name in names:
        assert float(want[name].abs().max()) > 1e-9, name
        torch.testing.assert_close(got[name], want[name].sum(0), rtol=1e-8, atol=1e-10)


def test_gate_is_the_ladders_formula():
    """LST: μ = sigmoid(α / 0.1), ½ at the start; and its rule is the derivative of its forward (gradcheck's finite
    differences)."""
    gate = Gate().double()
    s, z = (torch.randn(3, 4, 5, generator=seeded(k), dtype=torch.float64) for k in (0, 1))
    torch.testing.assert_close(gate(s, z), (s + z) / 2)
    with torch.no_grad():
        gate.alpha.fill_(0.07)
    private = private_sgd(gate)
    private.sampler.backward(gate(s, z).pow(2).flatten(1).sum(1), torch.ones_like)
    got = private.clipped_sum()["alpha"]
    private.detach()

    def total(alpha):
        mu = 1 / (1 + torch.exp(torch.tensor(-alpha / 0.1, dtype=torch.float64)))
        return float((mu * s + (1 - mu) * z).pow(2).sum())

    assert float(got) == pytest.approx((total(0.07 + 1e-6) - total(0.07 - 1e-6)) / 2e-6, rel=1e-6)


# -------------------------------------------------------------------------------------------------- where it may look
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", DECODERS, ids=DECODER_IDS)
def test_a_causal_model_does_not_look_ahead(case, block, with_mask):
    """Changing a later token leaves all earlier logits as they were."""
    model = shake(attach_side_network(tiny(*case), config(block)), scale=0.3)
    ids = torch.randint(3, 101, (2, 8), generator=seeded(1))
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] - 3 + 1) % 98 + 3
    mask = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
    with torch.no_grad():
        before, after = (model(input_ids=x, **mask).logits for x in (ids, changed))
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-6, atol=1e-6)
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3


def test_attention_lets_tokens_of_an_example_meet_and_the_mlp_does_not():
    batch, moves = torch.randn(1, 6, 8, generator=seeded(2)), {}
    changed = batch.clone()
    changed[:, 4] = changed[:, 4].flip(-1)
    for block, causal in (("mlp", False), ("attention", False), ("attention", True)):
        torch.manual_seed(0)
        layer = SideBlock(8, block, 2, causal)
        moved = (layer(batch, None) - layer(changed, None)).abs().sum(-1)[0] > 1e-6
        moves[block, causal] = moved.tolist()
    assert moves["mlp", False] == [False] * 4 + [True, False]
    assert moves["attention", False] == [True] * 6
    assert moves["attention", True] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("every, layers, taps",
                         [(1, 3, [0, 1, 2, 3]), (2, 4, [0, 2, 4]), (2, 3, [0, 1, 3]), (5, 3, [0, 3])])
def test_taps_always_include_the_last_block(every, layers, taps):
    model = attach_side_network(tiny("gpt2", layers=layers), config(layers=every))
    side = side_of(model)
    assert side.taps == taps
    assert len(side.downs) == len(taps) and len(side.side_blocks) == len(side.gates) == len(taps) - 1
    shake(model, scale=0.3)
    private = private_sgd(model)
    private.backward(plain_losses(model, padded_batch(model)))
    private.step()  # every part is reached


@pytest.mark.parametrize("case", DECODERS, ids=DECODER_IDS)
def test_cache_of_earlier_tokens(case):
    """Attention at side width keeps no cache and says so; tokens by themselves (mlp) can be generated one by one."""
    ids = torch.randint(3, 101, (2, 6), generator=seeded(3))
    model = attach_side_network(tiny(*case), config("attention"))
    with pytest.raises(ValueError,
                       match='keeps no cache of earlier tokens: call with use_cache=False, or take SideNetworkConfig'):
        model(input_ids=ids, use_cache=True)
    assert model(input_ids=ids).past_key_values is None
    model = shake(attach_side_network(tiny(*case), config("mlp")), scale=0.3)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        start = model(input_ids=ids[:, :4], use_cache=True)
        mask = torch.ones_like(ids)
        rest = model(input_ids=ids[:, 4:], past_key_values=start.past_key_values, attention_mask=mask,
                     use_cache=True).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole, rtol=1e-4, atol=1e-5)


def test_outputs_are_those_of_the_transformers_model():
    """Hidden states, tuples on request, inputs_embeds, resizing access: what a caller of the plain model uses."""
    model = shake(attach_side_network(tiny("bert"), config()), scale=0.3)
    batch = padded_batch(model)
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    with torch.no_grad():
        plain = model(**inputs)
        assert model(**inputs, output_hidden_states=True).hidden_states[0].shape == (4, 7, 32)
        assert torch.equal(model(**inputs, return_dict=False)[0], plain.logits)
        embedded = model.get_input_embeddings()(batch["input_ids"])
        assert torch.equal(model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits, plain.logits)
        assert model(**batch).loss.dim() == 0


# --------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("changes, message", [
    (dict(reduction=0), "reduction must be a whole number >= 1, got 0"),
    (dict(layers=-1), "layers must be 'all' or a whole number k >= 1"),
    (dict(heads=0), "heads must be a whole number >= 1"),
    (dict(block="ghost"), "block must be one of mlp, attention, adapter, got 'ghost'"),
])
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SideNetworkConfig(**changes)


def unchanged(model, before):
    return ({n: p.requires_grad for n, p in model.named_parameters()} == before
            and not any(isinstance(m, SideNetwork) or "train" in vars(m) for m in model.modules()))


@pytest.mark.parametrize("settings, message", [
    (dict(reduction=5), r"reduction 5 does not divide the backbone's width 32: take one of \[2, 4, 8, 16\]"),
    (dict(reduction=32, block="mlp"), "reduction 32 leaves a side width of 1: one channel less its mean is zero"),
    (dict(reduction=4, heads=3), "3 heads do not divide the side width 8 = 32 / 4: change heads or reduction"),
])
@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=[CASE_IDS[0], CASE_IDS[6]])
def test_configs_that_do_not_fit_leave_the_model_alone(case, settings, message):
    model = tiny(*case)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        attach_side_network(model, SideNetworkConfig(**settings))
    assert unchanged(model, before)
    attach_side_network(model, config())


def test_models_without_a_place_for_it_are_refused():
    model = attach_side_network(tiny("bert"), config())
    with pytest.raises(ValueError, match="has a side network already: load the backbone anew"):
        attach_side_network(model, config())
    with pytest.raises(ValueError, match="no block view of BertModel; supported are"):
        attach_side_network(tiny("bert").bert, config())
    with pytest.raises(ValueError, match="no block view of Linear"):
        attach_side_network(nn.Linear(2, 2), config())


def test_mask_must_be_the_tokenizers():
    model = attach_side_network(tiny("bert"), config())
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError,
                       match=r"the side attention needs a mask of shape \(batch, tokens\), got \(2, 1, 5, 5\)"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 5, 5))


def test_parameter_groups_let_the_upsample_lead():
    """The head, the upsample that starts at zero, and what has no gradient before those have moved: each at its own
    rate."""
    model = attach_side_network(tiny("bert"), config())
    names = {p: name for name, p in model.named_parameters()}
    groups = {group["lr"]: {names[p] for p in group["params"]} for group in parameter_groups(model, 1e-3, 1e-2, 1e-1)}
    assert groups[1e-1] == {"classifier.weight", "classifier.bias"}
    assert "bert.up.weight" in groups[1e-2]
    late = {name for name in names.values() if any(part in name for part in ("downs", "gates", "qkv.weight"))}
    assert late <= groups[1e-3]


def test_a_copy_is_a_model_of_its_own():
    model = shake(attach_side_network(tiny("bert"), config()), scale=0.3)
    batch = padded_batch(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = logits(model, batch)
        assert torch.equal(logits(copied, batch), before)
        for p in copied.parameters():
            p.zero_()
        assert torch.equal(logits(model, batch), before) and not logits(copied, batch).any()

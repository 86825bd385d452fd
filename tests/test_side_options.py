"""Every option of a side network: the exact start, gradients, sensitivity, frozen parts, initial weights, bfloat16."""

import itertools

import pytest
import torch
from torch import nn

from memarc_utils.backbones import tiny_backbone
from memarc_utils.dp_sgd import verify_sensitivity
from memarc_utils.saving import load_trainable, save_trainable
from memarc_utils.side_blocks import Mix, Orthogonal, Pooled, downsample
from memarc_utils.side_network import SideNetwork, SideNetworkConfig, attach_side_network
from tests.models import CASE_IDS, CASES, loop_gradients, padded_batch, plain_losses, private_sgd, seeded, shake, tiny
from tests.test_pairwise import pairwise

OPTIONS = {"case": list(range(len(CASES))), "block": ["mlp", "attention", "adapter"],
           "downsample": ["learned", "low_rank", "pooled", "orthogonal"], "gate": ["none", "scalar", "vector"],
           "layers": ["all", 2], "mix": ["residual", "gated"], "initial_weights": ["random", "magnitude"]}
SETTINGS = pairwise(OPTIONS)


def attached(setting, seed=0):
    number, *values = setting
    config = SideNetworkConfig(reduction=4, heads=2, **dict(zip(list(OPTIONS)[1:], values)))
    torch.manual_seed(seed)
    return attach_side_network(tiny(*CASES[number], layers=3, seed=seed), config)


def side_of(model):
    return next(m for m in model.modules() if isinstance(m, SideNetwork))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, [CASE_IDS[s[0]], *s[1:]])))
def test_every_option_starts_exactly_and_is_clipped(setting):
    """Output equal to the last bit before training, every part reached, one example moves the sum by at most C."""
    case = CASES[setting[0]]
    model, plain = attached(setting), tiny(*case, layers=3)
    batch = padded_batch(model, case[1], batch=3)
    with torch.no_grad():
        assert torch.equal(plain_losses(model, batch), plain_losses(plain, batch))
    shake(model, scale=0.1)
    with torch.no_grad():
        assert not torch.equal(plain_losses(model, batch), plain_losses(plain, batch))
    report = verify_sensitivity(model, plain_losses, batch, 0.05)
    assert report.holds and report.max_norm_error <= 1e-4 and report.max_contribution >= 0.02


def test_frozen_downsamples_train_nothing_and_record_nothing_wide():
    for kind in ("pooled", "orthogonal"):
        model = attached((0, "attention", kind, "scalar", "all", "residual", "random"))
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert not any(".downs." in name for name in names)
        private = private_sgd(shake(model))
        private.backward(plain_losses(model, padded_batch(model)))
        wide = [name for name, p in model.named_parameters() if p.requires_grad and 32 in p.shape and "head" not in name]
        assert all("up.weight" in name or "pooler" in name or "classifier" in name for name in wide)


def test_frozen_downsamples_keep_the_variance_of_white_features():
    h = torch.randn(4000, 1, 64, generator=seeded(1))
    for layer in (Pooled(64, 16), Orthogonal(64, 16, index=3)):
        z = layer(h)
        assert z.shape == (4000, 1, 16) and float(z.var()) == pytest.approx(1.0, rel=0.05)
        assert not list(layer.parameters())
    rows = Orthogonal(64, 16, index=3).rows
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, Orthogonal(64, 16, index=3).rows) and not torch.equal(rows, Orthogonal(64, 16, index=4).rows)
    assert [tuple(p.shape) for p in downsample("low_rank", 64, 8, 0).parameters()] == [(16, 64), (8, 16)]


def test_the_gated_mix_is_qsts_formula():
    mix = Mix(5).double()
    h, u = (torch.randn(3, 4, 5, generator=seeded(k), dtype=torch.float64) for k in (0, 1))
    assert torch.equal(mix(h, u), h)
    with torch.no_grad():
        mix.share.copy_(torch.linspace(0, 1, 5))
    batch = {"h": h, "u": u}
    want = loop_gradients(mix, batch, lambda m, one: m(one["h"], one["u"]).pow(2).flatten(1).sum(1))
    private = private_sgd(mix)
    private.sampler.backward(mix(h, u).pow(2).flatten(1).sum(1), torch.ones_like)
    torch.testing.assert_close(private.clipped_sum()["share"], want["share"].sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("number", [0, 2, 5, 7, 9], ids=[CASE_IDS[i] for i in (0, 2, 5, 7, 9)])
def test_initial_weights_by_magnitude_come_from_the_backbone(number):
    """Every weight of a side MLP stands in its backbone block's MLP, the channels are those of the largest weights, and no data
    was read: two calls give the same."""
    model = attached((number, "mlp", "learned", "scalar", "all", "residual", "magnitude"))
    side = side_of(model)
    again = side_of(attached((number, "mlp", "learned", "scalar", "all", "residual", "magnitude")))
    chosen = side.downs[0].weight
    assert torch.equal(chosen.sum(1), torch.ones(8)) and set(chosen.unique().tolist()) == {0.0, 1.0}
    backbone = {round(v, 6) for p in side.backbone.parameters() for v in p.flatten().tolist()}
    for block, other in zip(side.side_blocks, again.side_blocks):
        assert {round(v, 6) for v in block.up.weight.flatten().tolist()} <= backbone
        assert {round(v, 6) for v in block.down.weight.flatten().tolist()} <= backbone
        assert torch.equal(block.up.weight, other.up.weight)


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASE_IDS)
def test_a_backbone_in_bfloat16_keeps_side_and_head_in_float32(number):
    case = CASES[number]
    model = attach_side_network(tiny(*case).bfloat16(), SideNetworkConfig(reduction=4, heads=2))
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in kinds.items() if model.get_parameter(name).requires_grad)
    assert all(p.dtype == torch.bfloat16 for p in side_of(model).backbone.parameters())
    batch = padded_batch(model, case[1])
    with torch.no_grad():
        want = plain_losses(tiny(*case), batch)
        torch.testing.assert_close(plain_losses(model, batch).float(), want, rtol=0.05, atol=0.05)
    private = private_sgd(shake(model))
    private.backward(plain_losses(model, batch).float())
    private.step()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["learned", "low_rank"])
def test_a_downsample_keeps_its_input_as_it_came(kind, cached):
    """In bfloat16, half of float32's bytes, where the backbone or the cache has it so; one example's gradient is that of a loop, and
    moves the sum by no more than C."""
    model = shake(attach_side_network(tiny("bert").bfloat16(), SideNetworkConfig(reduction=4, heads=2, downsample=kind)))
    batch, kept = padded_batch(model), []
    if cached:
        features, final = side_of(model).cacheable_features(batch["input_ids"], batch["attention_mask"])
        batch["inputs_embeds"] = torch.cat([final.float().view(torch.bfloat16), features.flatten(2).bfloat16()], 2)
    private = private_sgd(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        inputs = {name: t for name, t in batch.items() if not (cached and name == "input_ids")}
        plain_losses(model, inputs)
    wide = {t.data_ptr(): t.dtype for t in kept if t.dim() == 3 and t.shape[:2] == (4, 7) and t.shape[-1] == 32}
    assert list(wide.values()).count(torch.bfloat16) >= len(side_of(model).taps)
    private.detach()
    report = verify_sensitivity(model, plain_losses, inputs, max_grad_norm=1.0)
    assert report.max_contribution <= 1 + 1e-5 and report.max_relative_error < 1e-4


def test_options_are_checked_before_anything_is_done():
    for name, known in (("downsample", "learned, low_rank, pooled, orthogonal"), ("gate", "none, scalar, vector"),
                        ("mix", "residual, gated"), ("initial_weights", "random, magnitude")):
        with pytest.raises(ValueError, match=f"{name} must be one of {known}, got 'fisher'"):
            SideNetworkConfig(**{name: "fisher"})
    for layers in (0, "some"):
        with pytest.raises(ValueError, match="layers must be 'all' or a whole number"):
            SideNetworkConfig(layers=layers)


def test_every_pair_of_options_occurs():
    for (i, first), (k, second) in itertools.combinations(enumerate(OPTIONS.values()), 2):
        assert {(s[i], s[k]) for s in SETTINGS} == set(itertools.product(first, second))
    assert isinstance(side_of(attached(SETTINGS[0])).side_blocks, nn.ModuleList)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_float64_backbone_gets_a_float64_side_network(family):
    model = tiny_backbone(family).double()
    ids = torch.randint(3, 90, (2, 6))
    before = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    after = attach_side_network(model)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert after.dtype == torch.float64 and torch.equal(after, before)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_last_hidden_state_is_what_the_head_reads(family):
    model = attach_side_network(tiny_backbone(family))
    side = next(m for m in model.modules() if type(m).__name__ == "SideNetwork")
    torch.nn.init.normal_(side.up.weight)
    ids = torch.randint(3, 90, (2, 6))
    found = side(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state) and len(found.hidden_states) == 3


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_generate_works_as_it_stands(family):
    model = attach_side_network(tiny_backbone(family, task="causal_lm"))
    assert model.generate(torch.randint(3, 90, (1, 4)), max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= 7


@pytest.mark.parametrize("block", ["attention", "mlp"])
def test_a_side_network_that_starts_from_the_backbone_is_loaded_back(block, tmp_path):
    config = SideNetworkConfig(initial_weights="magnitude", block=block)
    model = attach_side_network(tiny_backbone("bert"), config)
    backbone = tiny_backbone("bert")
    backbone.load_state_dict({k.replace("bert.backbone.", "bert."): v for k, v in model.state_dict().items() if k.replace("bert.backbone.", "bert.")
                              in backbone.state_dict()}, strict=False)
    save_trainable(model, tmp_path / "side")
    again = load_trainable(backbone, tmp_path / "side")
    ids = torch.randint(3, 90, (2, 6))
    assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)

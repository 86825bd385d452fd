"""`grad_sample` and `layer_rules`: each layer's per-example gradients against opacus and against a loop, and what is
refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.utils.per_sample_gradients_utils import compute_microbatch_grad_sample
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from memarc_utils.backbones import freeze
from memarc_utils.grad_sample import MODES, GradSampler
from memarc_utils.layer_rules import RULES, per_example_loop, register_rule, rule_for
from tests.models import (CASE_IDS, CASES, loop_gradients, loop_norms, padded_batch, plain_losses, seeded, shake, tiny,
                          without_shape_check)

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def engine_gradients(model, compute_losses, mode="book_keeping"):
    """Per-example gradients and norms as the engine sees them inside the batch: one backward for each example's factor.
    """
    sampler = GradSampler(model, mode)
    try:
        batch = len(compute_losses(model))
        found = []
        for i in range(batch):
            sampler.clear()
            norms, _ = sampler.backward(compute_losses(model), lambda n: (torch.arange(len(n)) == i).to(n.dtype))
            found.append(sampler.sums)
        return {name: torch.stack([sums[name] for sums in found]).detach() for name in sampler.recorded}, norms.detach()
    finally:
        sampler.detach()


def assert_same(got, want, rtol=1e-5):
    """Relative to the size of each parameter's gradients as a whole."""
    assert got.keys() == want.keys()
    for name, gradients in want.items():
        scale = float(gradients.double().norm()) or 1.0
        assert float((got[name].double() - gradients.double()).norm()) <= rtol * scale + 1e-10, name


def check_layer_against_opacus(layer, x):
    """L1 norm of the layer's output as the loss, as opacus's reference has it: one example, one backward pass."""
    want = compute_microbatch_grad_sample(x, layer, loss_reduction="sum")
    for mode in MODES:
        got, norms = engine_gradients(layer, lambda m: m(x).abs().flatten(1).sum(1), mode)
        assert_same(got, {name: g for name, g in want.items() if g.abs().sum() > 0 or name in got})
        torch.testing.assert_close(norms.double(), loop_norms(want), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ layer rules
@pytest.mark.parametrize("middle", [(), (6,), (2, 3), (2, 1, 3)], ids=["BD", "BTD", "4-D", "5-D"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [(3, 4), (40, 50)], ids=["dense", "pair"])
def test_linear_against_opacus(middle, bias, width):
    check_layer_against_opacus(nn.Linear(*width, bias=bias), torch.randn(4, *middle, width[0], generator=seeded()))


@few
@given(batch=st.integers(1, 5), middle=st.lists(st.integers(1, 4), max_size=2), columns=st.integers(1, 12),
       rows=st.integers(1, 12), bias=st.booleans())
def test_linear_of_any_shape_against_a_loop(batch, middle, columns, rows, bias):
    layer, x = nn.Linear(columns, rows, bias=bias), torch.randn(batch, *middle, columns, generator=seeded(1))
    got, norms = engine_gradients(layer, lambda m: m(x).square().flatten(1).sum(1))
    want = loop_gradients(layer, {"x": x}, lambda m, one: m(one["x"]).square().flatten(1).sum(1))
    assert_same(got, want)
    torch.testing.assert_close(norms.double(), loop_norms(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 5), (4, 2, 3, 5)], ids=["BD", "BTD", "4-D"])
@pytest.mark.parametrize("width", [7, 60])
def test_conv1d_by_hand(shape, width):
    """GPT-2's layer keeps the transposed weight: ∂/∂W_{dp} = Σ_t x_td g_tp with g = sign(y)."""
    layer, x = Conv1D(width, 5), torch.randn(shape, generator=seeded(2))
    weight = torch.zeros(4, 5, width)
    bias = torch.zeros(4, width)
    for i in range(4):
        for token in x[i].reshape(-1, 5):
            sign = torch.sign(token @ layer.weight.detach() + layer.bias.detach())
            weight[i] += torch.outer(token, sign)
            bias[i] += sign
    for mode in MODES:
        got, norms = engine_gradients(layer, lambda m: m(x).abs().flatten(1).sum(1), mode)
        assert_same(got, {"weight": weight, "bias": bias})
        torch.testing.assert_close(norms.double(), loop_norms({"w": weight, "b": bias}), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3), (4,)], ids=["BT", "BXT", "B"])
def test_embedding_against_opacus(padding_idx, shape):
    """Repeated rows add up; the row of padding_idx has no gradient."""
    layer, indices = nn.Embedding(5, 3, padding_idx=padding_idx), torch.randint(0, 5, shape, generator=seeded(3))
    with torch.no_grad():
        layer.weight.fill_(0.5)
    check_layer_against_opacus(layer, indices)
    if padding_idx is not None:
        got, _ = engine_gradients(layer, lambda m: m(indices).abs().flatten(1).sum(1))
        assert got["weight"][:, padding_idx].abs().sum() == 0


NORMS = [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.LayerNorm((3, 6)), nn.RMSNorm(6), nn.RMSNorm(6, eps=0.1),
         nn.RMSNorm((3, 6)), LlamaRMSNorm(6, eps=0.01), T5LayerNorm(6)]
NORM_IDS = ["LayerNorm", "LayerNorm without bias", "LayerNorm over two axes", "RMSNorm", "RMSNorm eps",
            "RMSNorm over two axes", "LlamaRMSNorm", "T5LayerNorm"]


@pytest.mark.parametrize("layer", NORMS, ids=NORM_IDS)
@pytest.mark.parametrize("shape", [(4, 3, 6), (4, 2, 3, 6)], ids=["BTD", "4-D"])
def test_norms_against_opacus(layer, shape):
    check_layer_against_opacus(shake(copy.deepcopy(layer), scale=0.3), torch.randn(shape, generator=seeded(4)))


def test_norm_of_vectors_against_opacus():
    check_layer_against_opacus(shake(nn.LayerNorm(6), scale=0.3), torch.randn(4, 6, generator=seeded(4)))


GRADIENT_CHECKS = [(nn.Linear(6, 5), (3, 2, 6)), (Conv1D(5, 6), (3, 2, 6)),
                   *((layer, (2, 3, 6)) for layer in NORMS[:6])]


@pytest.mark.parametrize("layer, shape, trains", [
    pytest.param(layer, shape, trains, id=f"{type(layer).__name__}{i}-{trains}") for i, (layer, shape) in enumerate(GRADIENT_CHECKS)
    for trains in ("all", "bias only") if trains == "all" or getattr(layer, "bias", None) is not None])
def test_the_gradient_that_goes_on_down_is_autograds(layer, shape, trains):
    """What a recorded layer hands to the layers below, in float64, also where only its bias trains and its input is not
    kept."""
    layer = shake(copy.deepcopy(layer).double(), scale=0.3)
    if trains == "bias only":
        layer.weight.requires_grad_(False)
    x = torch.randn(shape, generator=seeded(5), dtype=torch.float64, requires_grad=True)
    [want] = torch.autograd.grad(layer(x).pow(3).sum(), [x])
    sampler = GradSampler(layer, probe=False)  # which sends the last example's gradient down once more
    sampler.backward(layer(x).pow(3).flatten(1).sum(1), torch.ones_like)
    sampler.detach()
    torch.testing.assert_close(x.grad, want, rtol=1e-9, atol=1e-10)


def test_only_exact_forwards_have_a_rule():
    """A subclass that overrides forward may compute something else; one that does not is the same layer."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    assert rule_for(Renamed(2, 2)) is rule_for(nn.Linear(2, 2)) is not None
    assert rule_for(Doubled(2, 2)) is None
    model = nn.Sequential(nn.Linear(3, 4), Doubled(4, 2))
    x = torch.randn(5, 3, generator=seeded())
    with pytest.warns(UserWarning, match=r"no rule of its own for Doubled \(1.weight\).*loop over the examples.*register_rule\(Doubled"):
        got, _ = engine_gradients(model, lambda m: m(x).square().sum(1))
    assert_same(got, loop_gradients(model, {"x": x}, lambda m, one: m(one["x"]).square().sum(1)))


# -------------------------------------------------------------------------------------- registering a rule of one's own
class Scale(nn.Module):
    """A bare elementwise parameter, as gates and mixes have."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x, y):
        return torch.tanh(self.scale) * x + y


class MixesExamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * (x - x.mean(0))


class WithRegisteredScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.mix, self.above = nn.Linear(3, 3), Scale(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.above(self.mix(self.below(x), x))


@pytest.fixture
def fresh_rules():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("mode", MODES)
def test_registered_loop_is_exact(fresh_rules, mode):
    register_rule(Scale, per_example_loop)
    model, x = WithRegisteredScale().double(), torch.randn(4, 5, 3, generator=seeded(6), dtype=torch.float64)

    def losses(m, one):
        return m(one["x"]).square().flatten(1).sum(1)

    got, norms = engine_gradients(model, lambda m: losses(m, {"x": x}), mode)
    want = loop_gradients(model, {"x": x}, losses)
    assert_same(got, want, rtol=1e-10)
    torch.testing.assert_close(norms, loop_norms(want), rtol=1e-10, atol=0)


def test_registered_loop_refuses_a_layer_whose_examples_meet(fresh_rules):
    register_rule(MixesExamples, per_example_loop)
    model = MixesExamples()
    sampler = GradSampler(model)
    with pytest.raises(ValueError,
                       match="gives an example another output alone than in a batch.*Freeze its parameters or replace"):
        sampler.backward(model(torch.randn(4, 3, generator=seeded())).square().sum(1), torch.ones_like)
    sampler.detach()


def test_registered_rule_must_give_every_parameter_in_the_right_shape(fresh_rules):
    register_rule(Scale, lambda module, x, y, grad_output: {"scale": (grad_output * x).sum((0, 1))})
    model = WithRegisteredScale()
    sampler = GradSampler(model)
    with pytest.raises(ValueError, match=r"rule for mix.scale gave \(3,\), expected \(4, 3\)"):
        sampler.backward(model(torch.randn(4, 5, 3, generator=seeded())).square().flatten(1).sum(1), torch.ones_like)
    sampler.detach()
    RULES.clear()
    register_rule(Scale, lambda module, x, y, grad_output: {})
    register_rule(WithRegisteredScale, per_example_loop)
    lone = Scale(3)
    sampler = GradSampler(lone)
    x = torch.randn(4, 3, generator=seeded())
    with pytest.raises(ValueError, match=r"the rule registered for Scale gave no gradient of \['scale'\]"):
        sampler.backward(lone(x, x).sum(1), torch.ones_like)
    sampler.detach()


def test_registered_rule_takes_tensors_only(fresh_rules):
    register_rule(Scale, per_example_loop)
    layer = Scale(3)
    sampler = GradSampler(layer)
    with pytest.raises(ValueError,
                       match="a per-example rule takes tensors only.*give a non-tensor argument to the constructor"):
        layer(torch.ones(2, 3), 1.0)
    sampler.detach()


def test_register_rule_refuses(fresh_rules):
    class NoForward(nn.Linear):
        pass

    with pytest.raises(ValueError, match="takes a class derived from torch.nn.Module"):
        register_rule(int, per_example_loop)
    with pytest.raises(ValueError, match="has no forward of its own: register the class that defines it"):
        register_rule(NoForward, per_example_loop)
    with pytest.raises(ValueError, match="Linear has a built-in rule already: nothing to register"):
        register_rule(nn.Linear, per_example_loop)
    register_rule(Scale, per_example_loop)
    register_rule(Scale, per_example_loop)  # a second time is a correction, not an error


# ---------------------------------------------------------------------------------------- where the batch axis hides
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.parametrize("mode", MODES)
def test_whole_models_against_a_loop(case, mode):
    """Every parameter trains: broadcast positions, folded rows, tied heads, biases, norms, padding. The loop has no
    engine."""
    family, task, tie = case
    model = shake(tiny(*case))
    batch = padded_batch(model, task)
    got, norms = engine_gradients(model, lambda m: plain_losses(m, batch), mode)
    want = loop_gradients(model, batch)
    scale = max(float(g.double().norm()) for g in want.values())
    for name, gradients in want.items():  # a key's bias has an exactly zero gradient: compare with the model's scale
        assert float((got[name].double() - gradients.double()).norm()) <= 1e-5 * scale, name
    torch.testing.assert_close(norms.double(), loop_norms(want), rtol=1e-5, atol=0)


class Shared(nn.Module):
    """Uses one linear layer four times, and its embedding as the head through a second module with the same weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.norms[1].weight = self.norms[0].weight  # shared between norms, the biases are not
        self.layer.bias = self.norms[0].bias  # a bias shared across kinds of layers

    def forward(self, ids):
        h = self.embedding(ids)
        for i in range(4):
            h = h + torch.tanh(self.layer(self.norms[i % 2](h)))
        return self.head(h)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [3, 9], ids=["pairs", "dense"])
def test_shared_weights_are_clipped_as_one(mode, tokens):
    """Trap 2: tied embedding and head (8.42 C in a published system), a layer used four times (3.22 C)."""
    torch.manual_seed(0)
    model = Shared().double()
    ids = torch.randint(0, 11, (5, tokens), generator=seeded(7))

    def losses(m, one):
        return F.cross_entropy(m(one["ids"]).transpose(1, 2), one["ids"].roll(1, 1), reduction="none").sum(1)

    got, norms = engine_gradients(model, lambda m: losses(m, {"ids": ids}), mode)
    want = loop_gradients(model, {"ids": ids}, losses)
    assert_same(got, want, rtol=1e-10)
    torch.testing.assert_close(norms, loop_norms(want), rtol=1e-9, atol=0)


class Positions(nn.Module):
    """Positions looked up once, (1, T), and added to every example."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(13, 4), nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head((self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])).tanh().mean(1))


class Folded(nn.Module):
    """Rows folded to (B·T, d) in the order of the examples, as OPT has them."""

    def __init__(self):
        super().__init__()
        self.tokens, self.layer, self.head = nn.Embedding(13, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids):
        h = self.tokens(ids)
        return self.head(self.layer(h.reshape(-1, 4)).tanh().view(*ids.shape, 4).mean(1))


def ids_and_losses(batch=5, tokens=6, seed=8):
    ids = torch.randint(0, 13, (batch, tokens), generator=seeded(seed))

    def losses(m, one):
        return F.cross_entropy(m(one["ids"]), one["ids"][:, 0] % 3, reduction="none")

    return ids, losses


@pytest.mark.parametrize("model_class", [Positions, Folded])
@pytest.mark.parametrize("batch, tokens", [(5, 6), (1, 6), (5, 1), (5, 5)])
def test_broadcast_positions_and_folded_rows(model_class, batch, tokens):
    """Trap 11: the layer's own first axis is 1 or B·T, the batch is B."""
    torch.manual_seed(1)
    model = model_class().double()
    ids, losses = ids_and_losses(batch, tokens)
    got, norms = engine_gradients(model, lambda m: losses(m, {"ids": ids}))
    want = loop_gradients(model, {"ids": ids}, losses)
    assert_same(got, want, rtol=1e-10)
    torch.testing.assert_close(norms, loop_norms(want), rtol=1e-9, atol=0)


class TokensFirst(nn.Module):
    """A layer in the (T, B, d) layout."""

    def __init__(self):
        super().__init__()
        self.tokens, self.layer, self.head = nn.Embedding(13, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.layer(self.tokens(ids).transpose(0, 1)).tanh().mean(0))


class FoldedTokensFirst(TokensFirst):
    """Rows folded to (T·B, d): as many as B·T, in another order."""

    def forward(self, ids):
        h = self.layer(self.tokens(ids).transpose(0, 1).reshape(-1, 4)).tanh()
        return self.head(h.view(ids.shape[1], ids.shape[0], 4).mean(0))


class FirstOfPositions(Positions):
    """The broadcast lookup is indexed instead of broadcast: everything lands on example 0."""

    def forward(self, ids):
        return self.head((self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])[0]).tanh().mean(1))


class RelativeBias(nn.Module):
    """A (T, T) lookup, as T5's relative position bias: with T == B its rows look like examples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.bias, self.head = nn.Embedding(13, 4), nn.Embedding(20, 1), nn.Linear(4, 3)

    def forward(self, ids):
        position = torch.arange(ids.shape[1])
        scores = self.bias((position[:, None] - position[None]) + 6)[..., 0]
        return self.head((scores.softmax(-1) @ self.tokens(ids)).tanh().mean(1))


class Descriptions(nn.Module):
    """Encodes as many class descriptions as there happen to be examples, with the same layers."""

    def __init__(self):
        super().__init__()
        self.tokens, self.layer = nn.Embedding(13, 4), nn.Linear(4, 4)

    def forward(self, ids):
        classes = torch.arange(6)[:, None]
        return self.layer(self.tokens(ids).mean(1)) @ self.layer(self.tokens(classes).mean(1)).t()


class Prompt(nn.Module):
    """As many virtual tokens as there happen to be examples, looked up once for all."""

    def __init__(self):
        super().__init__()
        self.tokens, self.prompt, self.head = nn.Embedding(13, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, ids):
        prompt = self.prompt(torch.arange(6)).expand(len(ids), -1, -1)
        return self.head(torch.cat([prompt, self.tokens(ids)], 1).tanh().mean(1))


@pytest.mark.parametrize("model_class",
                         [TokensFirst, FoldedTokensFirst, FirstOfPositions, RelativeBias, Descriptions, Prompt])
def test_rows_that_are_no_examples_are_refused_even_where_their_number_fits(model_class):
    """B = T = 6: every first axis is 6 or 36, and still its rows are not the examples. Never in silence."""
    torch.manual_seed(2)
    model = model_class()
    ids, losses = ids_and_losses(6, 6)
    sampler = GradSampler(model)
    with pytest.raises(ValueError, match="example"):
        sampler.backward(losses(model, {"ids": ids}), torch.ones_like)
    sampler.detach()


@pytest.mark.parametrize("model_class", [TokensFirst, RelativeBias])
def test_rows_that_are_no_examples_are_refused_by_name(model_class):
    ids, losses = ids_and_losses(5, 6)
    sampler = GradSampler(model_class())
    with pytest.raises(ValueError,
                       match=r"cannot tell which example is which in the input of the layer that owns "
                             r"(layer|bias)\.weight"
                                         r".*called with 5 examples. Freeze that parameter, or"):
        losses(sampler.model, {"ids": ids})
    sampler.detach()


class BelowAZeroUpsample(TokensFirst):
    """The wrong layout below a layer that starts at zero: at the first step no gradient reaches it."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        nn.init.zeros_(self.up.weight)

    def forward(self, ids):
        h = self.tokens(ids)
        return self.head(h.mean(1) + self.up(self.layer(h.detach().transpose(0, 1)).tanh().mean(0)))


@pytest.mark.parametrize("micro_batches", [1, 40])
def test_rows_are_looked_at_again_while_no_gradient_has_reached_them(micro_batches):
    """However many micro-batches the first step has: the upsample moves at its end only."""
    torch.manual_seed(2)
    model = BelowAZeroUpsample()
    ids, losses = ids_and_losses(6, 6)
    sampler = GradSampler(model)
    for _ in range(micro_batches):
        sampler.backward(losses(model, {"ids": ids}), torch.ones_like)
    sampler.clear()  # what a step does
    with torch.no_grad():
        model.up.weight += torch.eye(4)
    with pytest.raises(ValueError, match="example"):
        sampler.backward(losses(model, {"ids": ids}), torch.ones_like)
    sampler.detach()


@pytest.mark.parametrize("losses", [
    lambda z: F.cross_entropy(z @ z.t(), torch.arange(len(z)), reduction="none"),  # in-batch negatives
    lambda z: z.square().sum(1) + z.mean(),
    lambda z: (z - z.mean(0)).square().sum(1),
], ids=["in-batch negatives", "mean added", "batch centred"])
def test_losses_that_mix_examples_are_refused(losses):
    """An example's loss whose gradient reaches another example's row."""
    model, x = nn.Linear(3, 4), torch.randn(6, 3, generator=seeded(9))
    sampler = GradSampler(model)
    with pytest.raises(ValueError, match="example"):
        sampler.backward(losses(model(x)), torch.ones_like)
    sampler.detach()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False),
                                  nn.InstanceNorm1d(4, track_running_stats=True)], ids=["affine", "bare", "instance"])
def test_layers_that_mix_examples_are_refused(norm):
    """Batch statistics: one example moves every other's gradient, and running statistics are private data without
    noise."""
    with pytest.raises(ValueError, match="1 is a (Batch|Instance)Norm1d: it mixes the examples.*Replace it by"):
        GradSampler(nn.Sequential(nn.Linear(3, 4), norm.requires_grad_(False), nn.Linear(4, 2)))


def test_frozen_batch_norm_is_an_elementwise_layer():
    """Kept in evaluation mode for good it uses constants: as exact as any other layer."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    model, x = nn.Sequential(nn.Linear(3, 4), freeze(norm), nn.Linear(4, 2)), torch.randn(5, 3, generator=seeded(16))
    model.train()
    got, _ = engine_gradients(model, lambda m: m(x).square().sum(1))
    assert_same(got, loop_gradients(model, {"x": x}, lambda m, one: m(one["x"]).square().sum(1)))


def test_examples_of_another_call_are_not_taken_for_this_ones():
    """After a whole call with six examples the parts are called with one row (cached features): it stays one example.
    """
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(6, 3, generator=seeded(10))
    sampler = GradSampler(model)
    sampler.backward(model(x).square().sum(1), torch.ones_like)
    sampler.clear()
    losses = model[1](model[0](x[:1])).square().sum(1)
    assert losses.shape == (1,)
    norms, _ = sampler.backward(losses, torch.ones_like)
    assert norms.shape == (1,)
    sampler.detach()


def test_number_of_losses_must_be_the_number_of_examples():
    model, x = nn.Linear(3, 4), torch.randn(6, 3, generator=seeded(11))
    sampler = GradSampler(model)
    for losses in (lambda: model(x).square().flatten(), lambda: model(x).square().sum(1)[:5],
                   lambda: model(x).square().sum().view(1)):
        with pytest.raises(ValueError,
                           match=r"called with 6 examples but backward got (24|5|1) losses: give exactly one loss"):
            sampler.backward(losses(), torch.ones_like)
    sampler.detach()


# --------------------------------------------------------------------------------------- what autograd is allowed to do
def test_autograd_never_writes_grad_of_a_trainable_parameter():
    """For every family with every parameter trainable, plain and under both kinds of backward."""
    for case in CASES:
        model = tiny(*case)
        batch = padded_batch(model, case[1])
        sampler = GradSampler(model)
        sampler.backward(plain_losses(model, batch), torch.ones_like)
        plain_losses(model, batch).sum().backward()
        assert all(p.grad is None for p in model.parameters()), case
        assert sampler.foreign_backward
        sampler.detach()


class Unwrapped(nn.Module):
    """Uses the embedding's weight as a plain matrix besides looking rows up in it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)

    def forward(self, ids):
        return F.linear(self.embedding(ids).mean(1), self.embedding.weight)


def weight_through_attention():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    model.in_proj_weight.requires_grad_(False), model.in_proj_bias.requires_grad_(False)
    return model, lambda m: m(*[torch.ones(3, 4, 8)] * 3, need_weights=False)[0].square().sum((1, 2))


def unbound_forward():
    model = nn.Linear(3, 3)
    return model, lambda m: nn.Linear.forward(m, torch.ones(2, 3)).square().sum(1) + m(torch.ones(2, 3)).sum(1)


def weight_penalty():
    model = nn.Linear(3, 3)
    return model, lambda m: m(torch.ones(2, 3)).square().sum(1) + m.weight.square().sum()


@pytest.mark.parametrize("make", [lambda: (Unwrapped(), lambda m: m(torch.tensor([[1, 2], [3, 4]])).square().sum(1)),
                                  weight_through_attention, unbound_forward, weight_penalty],
                         ids=["F.linear(h, emb.weight)", "MultiheadAttention.out_proj", "class forward",
                              "weight penalty"])
def test_a_gradient_past_the_clipper_is_refused(make):
    """Trap 2: 3.43 C in silence in a published system. Whatever uses a weight outside its layer fills .grad, and is
    refused."""
    model, losses = make()
    sampler = GradSampler(model)
    with pytest.raises(ValueError, match="a gradient reached .*weight.* by a way that the clipper does not see"):
        sampler.backward(losses(model), torch.ones_like)
    assert not sampler.sums
    sampler.detach()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    """Trap 11. Recomputed layers record during the backward pass, once."""

    class Checkpointed(Positions):
        def __init__(self):
            super().__init__()
            self.middle, self.reentrant = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), reentrant

        def forward(self, ids):
            h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
            h = checkpoint(self.middle, h, use_reentrant=self.reentrant)
            return self.head(h.mean(1))

    torch.manual_seed(3)
    model = Checkpointed().double()
    ids, losses = ids_and_losses()
    got, norms = engine_gradients(model, lambda m: losses(m, {"ids": ids}))
    model.reentrant = False  # torch.autograd.grad, which the loop uses, does not go with the other kind
    want = loop_gradients(model, {"ids": ids}, losses)
    assert_same(got, want, rtol=1e-10)
    torch.testing.assert_close(norms, loop_norms(want), rtol=1e-9, atol=0)


def test_checkpointing_of_a_transformers_model():
    """Positions that arrive as (1, T) inside a checkpointed block, and HF's own switch."""
    model = tiny("gpt2", "causal_lm", False)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    batch = padded_batch(model, "causal_lm")
    got, norms = engine_gradients(model, lambda m: plain_losses(m, batch))
    model.gradient_checkpointing_disable()
    assert_same(got, loop_gradients(model, batch))


def test_frozen_weights_keep_no_input():
    """A bias alone needs its output gradient only: no activation of the layer is saved for it (DP-BiTFiT, 2210.00036).
    """
    model = nn.Sequential(nn.Linear(6, 50), nn.Linear(50, 6))
    model[0].weight.requires_grad_(False), model[1].weight.requires_grad_(False)
    sampler, kept = GradSampler(model), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses = model(torch.ones(4, 7, 6)).sum((1, 2))
    assert sorted(t.numel() for t in kept if isinstance(t, nn.Parameter)) == [6, 50]
    assert not [t for t in kept if t.dim() == 3]
    sampler.backward(losses, torch.ones_like)
    assert sampler.recorded == {"0.bias", "1.bias"}
    sampler.detach()


def test_nothing_is_recorded_without_gradients():
    model = nn.Linear(3, 2)
    sampler = GradSampler(model)
    with torch.no_grad():
        assert model(torch.ones(4, 3)).grad_fn is None
    with torch.inference_mode():
        model(torch.ones(4, 3))
    assert not sampler.sums and not sampler.recorded
    sampler.detach()


def test_the_sums_hold_no_graph_and_memory_does_not_grow_with_micro_batches():
    """What is kept between micro-batches is one tensor a parameter: a graph behind it would keep every activation
    alive."""
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))
    sampler = GradSampler(model)
    norms, _ = sampler.backward(model(torch.ones(3, 2, 40)).square().sum((1, 2)), torch.ones_like)
    assert not norms.requires_grad
    assert not [name for name, total in sampler.sums.items() if total.requires_grad or total.grad_fn]
    sampler.detach()


def test_mixed_micro_batches_add_up():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(7, 3, generator=seeded(12), dtype=torch.float64)
    sampler = GradSampler(model)
    def clip(norms):
        return (0.5 / norms).clamp(max=1)
    sampler.backward(model(x).square().sum(1), clip)
    whole, sampler.sums = sampler.sums, {}
    for part in x.split([1, 4, 2]):
        sampler.backward(model(part).square().sum(1), clip)
    for name, total in whole.items():
        torch.testing.assert_close(sampler.sums[name], total, rtol=1e-12, atol=1e-14)
    sampler.detach()


# --------------------------------------------------------------------------------------------------------- precision
def test_autocast_around_forward_and_backward():
    """Under autocast the layers may run in bfloat16, but norms and sums agree with each other: nobody exceeds the
    bound."""
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 3 * torch.randn(4, 3, 64, generator=seeded(13))
    sampler = GradSampler(model)
    for i in range(4):
        sampler.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sampler.backward(model(x).float().square().sum((1, 2)),
                             lambda n: (torch.arange(4) == i) / n.clamp(min=1e-9))
        contribution = sum(float(total.double().square().sum()) for total in sampler.sums.values()) ** 0.5
        assert abs(contribution - 1) < 1e-4
    sampler.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_summed_in_float32(dtype):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(5, 3, 8, generator=seeded(14)).to(dtype)
    sampler = GradSampler(model)
    sampler.backward(model(x).float().square().sum((1, 2)), lambda n: (torch.arange(5) == 2) / n)
    assert {total.dtype for total in sampler.sums.values()} == {torch.float32}
    assert abs(sum(float(total.double().square().sum()) for total in sampler.sums.values()) ** 0.5 - 1) < 1e-4
    sampler.detach()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("mode", MODES)
def test_a_non_finite_example_adds_zero_and_hurts_nobody(bad, mode):
    """Trap 6: in published systems one such example destroys the weights."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 50)).double()
    x = torch.randn(5, 2, 40, generator=seeded(15), dtype=torch.float64)
    sampler = GradSampler(model, mode)
    sampler.backward(model(x[[0, 1, 3, 4]]).square().sum((1, 2)), torch.ones_like)
    want, sampler.sums = sampler.sums, {}
    x[2, 1, 3] = bad
    norms, finite = sampler.backward(model(x).square().sum((1, 2)), torch.ones_like)
    assert finite.tolist() == [True, True, False, True, True]
    for name, total in want.items():
        torch.testing.assert_close(sampler.sums[name], total, rtol=1e-12, atol=1e-12)
    sampler.detach()


@pytest.mark.parametrize("terms, scale", [("1e-4 apart", 1e5), ("1e-5 apart", 1e5), ("many tokens", 1e6),
                                          ("many tokens", 1e9), ("tied weights", 1e5)])
def test_cancelling_gradients_stay_within_the_bound(terms, scale):
    """Token gradients that nearly cancel: a norm that float32 measures as 0 would leave the rest (93 C, 11,150 C)
    unclipped."""
    worst = 0.0
    for seed in range(30):
        generator = seeded(seed)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        a, v = torch.randn(1, 1, 64, generator=generator), torch.randn(64, generator=generator)
        if terms.endswith("apart"):
            x = torch.cat([a, a + float(terms[:4]) * torch.randn(1, 1, 64, generator=generator)], 1)
            weights = torch.tensor([1.0, -1.0])
        else:
            x, weights = a.expand(1, 16, 64).clone(), torch.randn(16, generator=generator)
            weights -= weights.mean()
        sampler = GradSampler(model)
        outputs = model(x)
        if terms == "tied weights":
            outputs = outputs + model(x.flip(1) * (1 + 1e-6))
        sampler.backward((outputs * weights[:, None]).sum(1) @ v * scale, lambda n: (1 / n).clamp(max=1))
        worst = max(worst, float(sampler.sums["0.weight"].norm()))
        sampler.detach()
    assert worst <= 1.05


# --------------------------------------------------------------------------------------------- refusals before any work
def untouched(model):
    return all("forward" not in vars(m) and not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


class ScaledBlock(nn.Module):
    """Owns a bare parameter beside a layer that trains."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

    def forward(self, x):
        return self.scale * self.layer(x)


REFUSED = {
    "unknown mode": (lambda: nn.Linear(2, 2), dict(mode="ghost"),
                     "mode must be one of book_keeping, per_example, got 'ghost'"),
    "nothing trains": (lambda: nn.Linear(2, 2).requires_grad_(False), {},
                       "no parameter of the model has requires_grad=True: choose what to"),
    "no rule": (lambda: nn.Sequential(nn.Linear(2, 2), ScaledBlock()), {},
                r"no rule for 1.scale, owned by a ScaledBlock in which other layers train too: freeze it"),
    "unknown bookkeeping": (lambda: nn.Linear(2, 2), dict(bookkeeping="opacus"),
                            "bookkeeping must be one of memory, mixopt, got 'opacus'"),
    "bare parameter": (lambda: nn.MultiheadAttention(4, 2), {},
                       "no rule for in_proj_weight, owned by a MultiheadAttention"),
    "weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2))), {},
                    "the rule for Linear does not know 0.weight_g"),
    "parametrization": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), {},
                        "parametrizations.weight.original0 belongs to a parametrization.*Fold it in first"),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), {},
                      "the rule for Linear does not know weight_orig"),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), {},
                 "weight cannot be clipped: max_norm rescales rows .*set max_norm=None"),
    "scale_grad_by_freq": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), {}, "set scale_grad_by_freq=False"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_changed(name):
    """Trap 10: a setting is right or refused; and nothing half-done stays behind."""
    make, options, message = REFUSED[name]
    model = make()
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        GradSampler(model, **options)
    assert all("forward" not in vars(m) for m in model.modules())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_replaced_forward_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    sampler = GradSampler(model)
    with pytest.raises(ValueError,
                       match=r"the forward of 0, which owns 0.weight, was replaced on the instance \(is the model "
                             r"private already"):
        GradSampler(model)
    sampler.detach()
    assert untouched(model)
    GradSampler(model).detach()


def test_detach_gives_the_plain_model_back():
    model = tiny("bert")
    batch = padded_batch(model)
    before = loop_gradients(model, batch)
    sampler = GradSampler(model)
    assert not untouched(model)
    sampler.backward(plain_losses(model, batch), torch.ones_like)
    sampler.detach()
    assert untouched(model)
    assert_same(loop_gradients(model, batch), before, rtol=0)


def test_losses_must_be_one_per_example_with_gradient():
    model = nn.Linear(3, 2)
    sampler = GradSampler(model)
    backward = without_shape_check(GradSampler.backward)
    with pytest.raises(ValueError, match=r"one loss per example, a 1-D tensor; got \(\).*use reduction='none'"):
        backward(sampler, model(torch.ones(4, 3)).mean(), torch.ones_like)
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        backward(sampler, model(torch.ones(4, 3)), torch.ones_like)
    with pytest.raises(ValueError, match="got float"):
        backward(sampler, 0.5, torch.ones_like)
    with pytest.raises(ValueError, match="the losses carry no gradient: compute them outside torch.no_grad"):
        sampler.backward(model(torch.ones(4, 3)).sum(1).detach(), torch.ones_like)
    other = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="the losses do not depend on any trainable parameter"):
        sampler.backward(other(torch.ones(4, 3)).sum(1), torch.ones_like)
    sampler.detach()


def test_layers_may_be_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
            self.rms, self.head = LlamaRMSNorm(4), nn.Linear(4, 2)

        def forward(self, ids):
            return self.head(input=self.rms(hidden_states=self.norm(input=self.embedding(input=ids))))

    model, ids = Keywords(), torch.randint(0, 5, (3, 4), generator=seeded())
    got, _ = engine_gradients(model, lambda m: m(ids=ids).square().sum((1, 2)))
    assert_same(got, loop_gradients(model, {"ids": ids}, lambda m, one: m(one["ids"]).square().sum((1, 2))))

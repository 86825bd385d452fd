"""Ways to break the bound or the gradient that a hostile reading of the engine found; each is mended or refused."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memarc_utils.book_keeping import HeldGradient
from memarc_utils.dp_sgd import make_private, verify_sensitivity
from memarc_utils.grad_sample import GradSampler
from tests.models import loop_gradients, padded_batch, plain_losses, plan_for_tests, private_sgd, seeded, shake, t5, tiny

loops = pytest.mark.filterwarnings("ignore:no rule of its own")


def x_of(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def test_a_batch_that_failed_half_way_cannot_be_tried_again_on_top(monkeypatch):
    """Out of memory in the middle of the sums, then the same batch again: 2 C without the check."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), x_of(4, 3)
    private = private_sgd(model, plan_for_tests(max_grad_norm=0.1))
    add, calls = HeldGradient.add_weighted_sum, []

    def once_out_of_memory(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return add(self, *arguments)

    monkeypatch.setattr(HeldGradient, "add_weighted_sum", once_out_of_memory)
    with pytest.raises(MemoryError):
        private.backward(model(x).sum(1))
    for go_on in (lambda: private.backward(model(x).sum(1)), private.step):
        with pytest.raises(ValueError, match="stopped half way"):
            go_on()
    private.zero_grad()
    private.backward(model(x).sum(1))
    assert sum(float(g.square().sum()) for g in private.clipped_sum().values())**0.5 <= 0.1 * 4 * (1 + 1e-6)


class Neighbour(nn.Module):
    """Row i reads row i + 1; the last reads nobody, so its loss alone would show nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        h = self.layer(x)
        return torch.cat([h[:-1] + h[1:], h[-1:]])


class Gated(nn.Module):
    """A batch mean behind a gate that starts at zero: nothing shows in the first step."""

    def __init__(self):
        super().__init__()
        self.layer, self.gate = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x):
        h = self.layer(x)
        return h + self.gate(h.mean(0, keepdim=True).expand_as(h))


@pytest.mark.parametrize("model_class", [Neighbour, Gated])
def test_examples_that_meet_in_one_direction_or_later_are_found(model_class):
    model = model_class()
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0), lr=0.1)
    with pytest.raises(ValueError, match="one example's loss reaches other examples' rows"):
        for step in range(8):
            private.backward(model(x_of(6, 3, seed=step)).square().sum(1))
            private.step()


def test_the_probe_leaves_an_inputs_gradient_alone():
    x = x_of(4, 3).requires_grad_()
    model = nn.Linear(3, 2)
    private = private_sgd(model)
    private.backward(model(x).square().sum(1))
    torch.testing.assert_close(x.grad, 2 * model(x).detach() @ model.weight.detach())


class Buffered(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3), how
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x):
        mean = x.detach().mean(0)
        if self.how == "reassigned":
            self.average = 0.9 * self.average + 0.1 * mean
        elif self.how == "data":
            self.average.data.add_(mean)
        else:
            self.average.add_(mean)
        return self.layer(x)


@pytest.mark.parametrize("how", ["in place", "reassigned", "data"])
def test_a_buffer_that_a_forward_pass_writes_is_found(how):
    model = Buffered(how)
    private = private_sgd(model)
    with pytest.raises(ValueError, match="the buffer average was written since make_private"):
        private.backward(model(x_of(3, 3)).sum(1))


def test_many_tokens_that_cancel_are_summed_in_float64():
    """A thousand equal rows whose contributions cancel to 1e-4 of their sizes: rounding of float32's sum is 1 % of it."""
    tokens = 1000
    left = torch.full((1, tokens, 64), 1.1)
    right = x_of(1, 1, 64).expand(1, tokens, 64) * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.00025)[None, :, None]
    sampler = GradSampler(model := nn.Linear(64, 64, bias=False), probe=False)
    norms, _ = sampler.backward((model(left) * right).sum((1, 2)), lambda n: (1 / n).clamp(max=1))
    want = (right.double()[0].T @ left.double()[0]).norm()
    assert float(norms[0]) == pytest.approx(float(want), rel=1e-4)
    assert float(sampler.sums["weight"].norm()) <= 1 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_without_an_epsilon_of_its_own(dtype):
    """torch computes in float32 and takes float32's machine epsilon; small inputs show any other."""
    layer = nn.RMSNorm(8).to(dtype)
    x = (0.02 * x_of(3, 4, 8)).to(dtype).requires_grad_()
    weights = x_of(3, 4, 8, seed=1)
    want = torch.autograd.grad((layer(x).float() * weights).sum(), [layer.weight, x])
    sampler = GradSampler(layer, probe=False)
    sampler.backward((layer(x).float() * weights).sum((1, 2)), torch.ones_like)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert float((sampler.sums["weight"] - want[0].float()).norm()) <= tolerance * float(want[0].float().norm())
    assert float((x.grad.float() - want[1].float()).norm()) <= tolerance * float(want[1].float().norm())


class Owner(nn.Module):
    """A layer without a rule, whose forward is given."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.linspace(0.5, 1.5, 3)), forward
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def counting(layer, x):
    layer.calls += 1
    return layer.weight * x * layer.calls


CHANGING = {"counts its calls": (counting, dict(calls=0)),
            "Python's random": (lambda layer, x: layer.weight * x * random.random(), {}),
            "dropout": (lambda layer, x: F.dropout(layer.weight * x, 0.5), {})}


@loops
@pytest.mark.parametrize("how", CHANGING)
def test_a_layer_that_gives_something_else_when_it_is_computed_again(how):
    function, attributes = CHANGING[how]
    model = nn.Sequential(nn.Linear(3, 3), Owner(function, **attributes))
    private = private_sgd(model)
    with pytest.raises(ValueError, match="gave another output when it was computed again: it is random"):
        private.backward(model(x_of(4, 3)).sum(1))


@loops
def test_an_attribute_that_is_changed_between_two_calls():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled = Owner(lambda layer, x: layer.weight * x * layer.factor, factor=1.0)

        def forward(self, x):
            object.__setattr__(self.scaled, "factor", 75.0)
            h = self.scaled(x)
            object.__setattr__(self.scaled, "factor", 1.0)
            return self.scaled(h)

    model = Parent()
    with pytest.raises(ValueError, match="was changed since, so no rule can know its gradient"):
        private_sgd(model).backward(model(x_of(4, 3)).sum(1))


@loops
def test_a_layer_that_reads_another_layers_weight():
    outside = nn.Linear(3, 3)
    model = nn.Sequential(outside, Owner(lambda layer, x: layer.weight * F.linear(x, layer.other.weight), other=outside))
    private_sgd(model)
    with pytest.raises(ValueError, match="uses a tensor that trains and is neither its own nor an input"):
        model(x_of(4, 3))


@loops
def test_examples_that_meet_at_a_small_scale_or_behind_a_detach():
    def mean_detached(layer, x):
        return 1e-6 * layer.weight * (x - x.mean(0).detach())

    model = nn.Sequential(nn.Linear(3, 3), Owner(mean_detached))
    with pytest.raises(ValueError, match="gives an example another output alone than in a batch"):
        private_sgd(model).backward(model(x_of(4, 3)).sum(1))


@loops
def test_folded_rows_into_a_layer_without_a_rule_are_refused():
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Owner(lambda layer, x: layer.weight * x.softmax(1))

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).view_as(x)

    model = Folding()
    private_sgd(model)
    with pytest.raises(ValueError, match="gets its rows folded"):
        model(x_of(2, 4, 3))


class WritesBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(2)


def test_a_backward_that_writes_into_its_gradient_is_found():
    """The layer above has recorded that very tensor."""
    above = nn.Linear(40, 40)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.above = nn.Linear(40, 40), above

        def forward(self, x):
            h = self.above(self.below(x))
            return h + WritesBack.apply(h)

    model = Model().double()
    sampler = GradSampler(model, probe=False)
    x = x_of(3, 2, 40).double()
    try:
        sampler.backward(model(x).square().sum((1, 2)), torch.ones_like)
    except ValueError as error:
        assert "wrote into the gradient that it was given" in str(error)
    else:  # autograd handed out a tensor of its own: then the gradients must be right
        got = sampler.sums
        sampler.detach()
        want = loop_gradients(model, {"x": x}, lambda m, one: m(one["x"]).square().sum((1, 2)))
        for name in got:
            torch.testing.assert_close(got[name], want[name].sum(0), rtol=1e-4, atol=1e-5)
    held = HeldGradient(torch.Size([40, 40]), torch.float32)
    left = x_of(3, 2, 40)
    held.add_pair(left, x_of(3, 2, 40))
    assert not held.was_written()
    left.mul_(2)
    assert held.was_written()


@loops
def test_scalars_keywords_branches_and_autocast_in_layers_without_a_rule():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, x, shift=None, mask=None):
            return x * self.scale.exp() * (x > 0) + (0 if shift is None else shift)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.temperature = nn.Linear(3, 3), Temperature()

        def forward(self, x):
            return self.temperature(shift=x, x=self.layer(x), mask=None)

    model, x = Model(), x_of(4, 3)
    want = loop_gradients(model, {"x": x}, lambda m, one: m(one["x"]).square().sum(1))
    private = private_sgd(model, plan_for_tests(max_grad_norm=1e6))
    private.backward(model(x).square().sum(1))
    for name, got in private.clipped_sum().items():
        torch.testing.assert_close(got, want[name].sum(0), rtol=1e-5, atol=1e-6)
    private.detach()
    mixed = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 1), nn.PReLU())
    private = private_sgd(mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = mixed(x_of(3, 4)).float().flatten(1).square().sum(1)
    private.backward(losses)
    private.step()


def test_t5_under_a_reentrant_checkpoint_with_everything_trained():
    model = shake(t5())
    model.encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    batch = padded_batch(model, batch=4)
    private = private_sgd(model, plan_for_tests(max_grad_norm=1e6))
    private.backward(plain_losses(model, batch))
    got = private.clipped_sum()
    private.detach()
    want = loop_gradients(model.eval(), batch)
    for name in got:
        torch.testing.assert_close(got[name], want[name].sum(0), rtol=1e-4, atol=1e-6)


@loops
def test_layers_without_a_rule_run_on_meta_tensors():
    """The planner's way: no numbers, so nothing may depend on them."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Owner(lambda layer, x: layer.weight.to(x.device) * x).to("meta"), nn.LayerNorm(3))
        x = torch.empty(4, 3)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan_for_tests(), noise_generator=seeded())
    private.backward(model(x).sum(1))
    assert {name: g.device.type for name, g in private.clipped_sum().items()} == dict.fromkeys(private.sampler.recorded, "meta")


def test_a_reentrant_checkpoint_of_ones_own_is_verified_rightly():
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return checkpoint(lambda h: self.second(h).tanh(), self.first(x), use_reentrant=True)

    report = verify_sensitivity(Model(), lambda m, b: m(b["x"]).square().sum(1), {"x": x_of(4, 3)}, 0.1)
    assert report.holds, report


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_generate_and_state_dict_are_untouched(clipping):
    """Same keys and same text while the engine is attached, between a forward and its backward, and after it is detached."""
    model = shake(tiny("gpt2", "causal_lm", True), scale=0.3)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def text():
        return model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)

    keys, want = list(model.state_dict()), text()
    private = private_sgd(model, clipping=clipping)
    assert list(model.state_dict()) == keys and torch.equal(text(), want)
    losses = plain_losses(model, batch := padded_batch(model, "causal_lm"))
    assert torch.equal(text(), want)
    private.backward(losses)
    first = private.clipped_sum()
    private.zero_grad()
    private.backward(plain_losses(model, batch))
    assert all(torch.equal(first[name], total) for name, total in private.clipped_sum().items())
    private.detach()
    assert list(model.state_dict()) == keys and torch.equal(text(), want)

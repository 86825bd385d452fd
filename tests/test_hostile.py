"""Ways to break the bound or the gradient that a hostile reading of the engine found; each is mended or refused."""

import copy
import random
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from memarc_utils import training
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.adapters import add_lora, select_bias_terms
from memarc_utils.backbones import freeze, tiny_backbone
from memarc_utils.batch_selection import pad_rows
from memarc_utils.book_keeping import HeldGradient
from memarc_utils.dp_sgd import make_private, verify_sensitivity
from memarc_utils.feature_cache import cache_features
from memarc_utils.function_rules import per_example_loop
from memarc_utils.grad_sample import GradSampler
from memarc_utils.reversible import make_reversible
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from memarc_utils.training import classification_losses
from memarc_utils.zeroth_order import make_zeroth_order
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


# ------------------------------------------------------------------------------- sums in half precision, and other findings
def _reversible_with_biases():
    torch.manual_seed(0)
    return select_bias_terms(make_reversible(tiny_backbone("gpt2")))


@pytest.mark.parametrize("prepare", [_reversible_with_biases, lambda: attach_side_network(tiny_backbone("gpt2"),
                                                                                              SideNetworkConfig(gate="vector"))])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_sums_under_autocast_are_float32(prepare, clipping):
    """Layers that are computed again run under their forward's autocast; what is added up must not: in bfloat16 an example that one
    rounding lets in moves a long sum by more than C."""
    model = prepare().eval()
    plan = PrivacyPlan(dataset_size=1000, expected_batch_size=4, num_steps=5, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5)
    private = make_private(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), plan, clipping=clipping)

    def total(skip):
        private.zero_grad()
        for k in range(60):
            ids = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(k))[int(skip and k == 0):]
            with torch.autocast("cpu", torch.bfloat16):
                losses = F.cross_entropy(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float(),
                                         torch.zeros(len(ids), dtype=torch.long), reduction="none")
            private.backward(losses)
        return private.clipped_sum()

    everyone, without = total(False), total(True)
    assert {t.dtype for t in everyone.values()} == {torch.float32}
    assert sum(float((everyone[n].double() - without[n].double()).square().sum()) for n in everyone) ** 0.5 <= 1 + 1e-3
    private.detach()


class ClassToken(nn.Module):
    """Looks at views of its own parameter."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return x + self.token.view(1, 1, 8) + (x @ self.token.T) * self.token[0]


def test_a_layer_may_look_at_views_of_its_own_parameter_and_of_no_other():
    from memarc_utils.layer_rules import register_rule
    register_rule(ClassToken, per_example_loop)
    model = nn.Sequential(nn.Linear(8, 8), ClassToken(), nn.Linear(8, 1))
    report = verify_sensitivity(model, lambda m, b: m(b["x"]).square().mean((1, 2)), {"x": torch.randn(4, 3, 8)})
    assert report.holds and not report.untrained_parameters

    class Thief(ClassToken):
        def forward(self, x):
            return x + self.token.view(1, 1, 8) + first.weight.T[0]

    register_rule(Thief, per_example_loop)
    first = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="neither its own nor an input"):
        verify_sensitivity(nn.Sequential(first, Thief()), lambda m, b: m(b["x"]).square().mean((1, 2)), {"x": torch.randn(4, 3, 8)})


@pytest.mark.parametrize("prepare", [lambda m: m, make_reversible])
def test_two_calls_of_different_lengths_in_one_loss(prepare):
    """OPT folds its rows to B·T; what is computed again belongs to either call."""
    torch.manual_seed(0)
    model = prepare(tiny_backbone("opt").requires_grad_(True))

    def losses(model, batch):
        return sum(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum(1) for ids in (batch["first"], batch["second"]))

    ids = torch.randint(3, 90, (3, 11))
    assert verify_sensitivity(model, losses, {"first": ids[:, :6], "second": ids[:, 6:]}, 0.1).holds


def test_the_sensitivity_check_cuts_columns_of_tokens_alone():
    model = tiny_backbone("bert")
    ids, mask = torch.randint(3, 90, (3, 8)), torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 4 + [0] * 4])
    mixer = torch.randn(8, 2)

    def losses(model, batch):
        return F.cross_entropy(model(input_ids=batch["input_ids"] * batch["attention_mask"], attention_mask=batch["attention_mask"]).logits
                               + batch["features"] @ mixer, batch["labels"], reduction="none")

    batch = {"input_ids": ids, "attention_mask": mask, "features": torch.randn(3, 8), "labels": torch.tensor([0, 1, 0])}
    assert verify_sensitivity(model, losses, batch, 0.1).holds


def test_bfloat16_models_are_measured_by_what_bfloat16_can_tell():
    torch.manual_seed(0)
    model = tiny_backbone("bert").to(torch.bfloat16)
    batch = {"input_ids": torch.randint(3, 90, (3, 6)), "labels": torch.tensor([0, 1, 0])}
    report = verify_sensitivity(model, classification_losses, batch, 0.1)
    assert report.tolerance == 0.02 and report.holds


@pytest.mark.parametrize("batch", [{}, {"x": torch.tensor(1.0)}, {"x": torch.ones(2, 3), "y": torch.ones(3)}])
def test_the_sensitivity_check_refuses_what_is_no_batch(batch):
    with pytest.raises(ValueError, match="dict of tensors with the batch axis first"):
        verify_sensitivity(nn.Linear(3, 1), lambda m, b: m(b["x"])[:, 0], batch)


def test_the_sensitivity_check_needs_something_that_trains():
    with pytest.raises(ValueError, match="choose what to train first"):
        verify_sensitivity(nn.Linear(3, 1).requires_grad_(False), lambda m, b: m(b["x"])[:, 0], {"x": torch.ones(2, 3)})


def test_a_detached_optimizer_says_so():
    model = nn.Linear(3, 1)
    plan = PrivacyPlan(dataset_size=100, expected_batch_size=4, num_steps=5, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    private.detach()
    for use in (private.step, lambda: private.backward(model(torch.ones(2, 3))[:, 0])):
        with pytest.raises(ValueError, match="call make_private again"):
            use()


WRONG_TYPES = """
import torch
from torch import nn
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.adapters import add_bottleneck_adapters, add_lora
from memarc_utils.auditing import audit_quickly, guess
from memarc_utils.backbones import tiny_backbone
from memarc_utils.batch_selection import poisson_batches
from memarc_utils.data import tokenize_dataset
from memarc_utils.dp_sgd import make_private, verify_sensitivity
from memarc_utils.generation import generate_texts
from memarc_utils.memory import largest_batch, measure_step
from memarc_utils.reversible import ReversibleConfig, make_reversible
from memarc_utils.side_network import attach_side_network
from memarc_utils.zeroth_order import make_zeroth_order
model, bert = nn.Linear(3, 1), tiny_backbone("bert")
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
plan = PrivacyPlan(dataset_size=100, expected_batch_size=4, num_steps=5, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5)
loss = lambda model, batch: model(batch["x"])[:, 0]
cases = [(lambda: make_private(model, sgd, None), "PrivacyPlan"), (lambda: make_private(None, sgd, plan), "a model"),
         (lambda: make_private(model, sgd, plan, noise_generator=3), "torch.Generator"),
         (lambda: make_private(model, sgd, plan).load_state_dict(None), "private.state_dict()"),
         (lambda: verify_sensitivity(model, loss, (torch.ones(2, 3),)), "dict of tensors"),
         (lambda: verify_sensitivity(model, loss, {"x": torch.ones(2, 3)}, "1"), "max_grad_norm"),
         (lambda: attach_side_network(bert, {"reduction": 8}), "SideNetworkConfig"), (lambda: attach_side_network(bert, None), "SideNetworkConfig"),
         (lambda: add_lora(bert, alpha="a"), "alpha"), (lambda: add_lora(bert, target_modules="query"), "tuple of names"),
         (lambda: add_lora(None), "a model is needed"),
         (lambda: make_private(model, sgd, plan).state_dict([1, 2]), "poisson_batches"),
         (lambda: PrivacyPlan.from_dict({}), "plan.to_dict()"), (lambda: poisson_batches([(1, 2)] * 100, plan), "rows that are dicts"),
         (lambda: poisson_batches([{"x": 1}] * 100, None), "PrivacyPlan"), (lambda: poisson_batches([{"x": 1}] * 100, plan, True), "whole number"),
         (lambda: poisson_batches([{"x": 1}] * 100, plan, collate=3), "collate must be a function"),
         (lambda: poisson_batches([{"x": 1}] * 100, plan, generator=3), "generator must be a torch.Generator"),
         (lambda: poisson_batches([{"x": 1}] * 100, plan, pad_token_id=None), "pad_token_id must be a whole number"),
         (lambda: verify_sensitivity(None, loss, {"x": torch.ones(2, 3)}), "takes a model"),
         (lambda: add_lora(bert, target_modules=3), "tuple of names"), (lambda: add_bottleneck_adapters(bert, after=3), "after must be"),
         (lambda: make_zeroth_order(model, plan, 0.1, noise=[]), "noise must be one of"),
         (lambda: guess(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1, 1, 0, 0]), 2, 2), "give included.bool()"),
         (lambda: measure_step(None), "a function"), (lambda: largest_batch("tiny", "lora", 16, "24"), "a number above 0"),
         (lambda: largest_batch("tiny", "lora", 16, float("inf")), "a number above 0"),
         (lambda: ReversibleConfig(segment=True), "segment"), (lambda: ReversibleConfig(coefficients=0.5), "(λ, β)"),
         (lambda: make_reversible(bert, "lossless"), "ReversibleConfig"),
         (lambda: audit_quickly(model, loss, {"x": torch.ones(8, 3)}, plan, num_canaries=0), "10 at least"),
         (lambda: tokenize_dataset([{"text": "a", "label": 0}], None, 16), "Dataset.from_list"),
         (lambda: generate_texts(bert, None, ["a"]), "a tokenizer"),
         (lambda: make_zeroth_order(model, plan, 0.1).load_state_dict({}), "give what")]
for number, (call, message) in enumerate(cases):
    try:
        call()
    except ValueError as error:
        assert message in str(error), (number, str(error))
    else:
        raise SystemExit(f"case {number} was accepted")
    model.__dict__.pop("forward", None)
"""


def test_arguments_of_a_wrong_type_are_named():
    """In a process of its own: here the tests' type checks would come first."""
    done = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]


@pytest.mark.parametrize("state", [{}, {"plan": 1}])
def test_a_wrong_state_is_named(state):
    model = nn.Linear(3, 1)
    plan = PrivacyPlan(dataset_size=100, expected_batch_size=4, num_steps=5, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    with pytest.raises(ValueError, match="give what private.state_dict\\(\\) returned"):
        private.load_state_dict(state)


# ---------------------------------------------------------------------------- what is done in one mode only, or in both
@loops
def test_a_frozen_batch_norm_without_running_statistics_is_refused():
    """It takes the batch's own in evaluation mode too, so freezing makes it no constant."""
    def model(norm):
        return nn.Sequential(freeze(nn.Sequential(nn.Linear(3, 4), norm)), nn.Linear(4, 2))

    with pytest.raises(ValueError, match="0.1 is a BatchNorm1d.*evaluation mode too. Replace it by GroupNorm or LayerNorm$"):
        private_sgd(model(nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(ValueError, match="0.1 is a BatchNorm1d.*GroupNorm or LayerNorm$"):
        make_zeroth_order(model(nn.BatchNorm1d(4, track_running_stats=False)), plan_for_tests(), 0.1)
    private = private_sgd(model(nn.BatchNorm1d(4)))
    private.backward(private.model(x_of(5, 3)).square().sum(1))
    private_sgd(nn.Sequential(freeze(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2))), nn.Flatten(),
                              nn.Linear(4, 2)))  # each example by itself
    with pytest.raises(ValueError, match="the model is a BatchNorm1d.*keep it as it is with backbones.freeze"):
        private_sgd(nn.BatchNorm1d(4))


class Centred(nn.Module):
    """Meets below the lowest layer that trains, in one mode only; its dropouts are a layer, a rate of its own and one of its config."""

    def __init__(self, centred=True, noise=0.0):
        super().__init__()
        self.body, self.head, self.dropout = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2), nn.Dropout(0.5)
        self.attention_dropout, self.centred, self.noise = 0.5, centred, noise
        self.config = types.SimpleNamespace(hidden_dropout_prob=0.5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x = self.body(x)
        if self.training:
            x = x - x.mean(0) if self.centred else x
            x = x + self.noise * torch.randn_like(x)
        for rate in (self.attention_dropout, self.config.hidden_dropout_prob):
            x = F.dropout(x, rate, self.training)
        return self.head(self.dropout(x))


def test_the_sensitivity_check_measures_in_the_mode_of_the_training():
    def report(model):
        before = [m.training for m in model.modules()]
        found = verify_sensitivity(model, lambda m, b: 20 * m(b["x"]).square().sum(1), {"x": batch}, 1.0)
        assert before == [m.training for m in model.modules()]
        assert (model.dropout.p, model.attention_dropout, model.config.hidden_dropout_prob) == (0.5, 0.5, 0.5)
        return found

    batch = x_of(6, 3)
    batch[0] *= 1000
    torch.manual_seed(0)
    assert report(Centred()).max_contribution > 1.5
    assert report(Centred().eval()).holds
    assert report(Centred(centred=False)).holds, "its dropouts rest"
    with pytest.warns(UserWarning, match="in training mode the losses are random.*measured in evaluation mode"):
        assert report(Centred(noise=0.1)).holds


def test_the_sensitivity_check_sees_statistics_that_are_kept_in_training_mode_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            if self.training:
                self.mean.lerp_(x.detach().mean(0), 0.1)
            return self.layer(x - self.mean)

    model = Model()
    with pytest.raises(ValueError, match="the buffer mean was written"):
        verify_sensitivity(model, lambda m, b: m(b["x"]).square().sum(1), {"x": 5 + x_of(4, 3)})
    assert model.mean.abs().max() == 0, "the model comes back as it was"


def padded_on_the_left(rows, positions=True):
    longest = max(map(len, rows))
    def fill(row, value):
        return [value] * (longest - len(row)) + row
    batch = {"input_ids": torch.tensor([fill(row, 0) for row in rows]), "labels": torch.tensor([fill(row, -100) for row in rows]),
             "attention_mask": torch.tensor([fill([1] * len(row), 0) for row in rows])}
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)} if positions else batch


ONE_LONG = [torch.randint(3, 101, (n,), generator=seeded(n)).tolist() for n in (4, 4, 4, 4, 4, 4, 4, 9)]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_first_token_after_padding_is_no_target(family):
    """With a longer neighbour it was one, predicted from a pad token: one example moved the sum by 2.4 to 3.8 C."""
    model = tiny_backbone(family, "causal_lm").requires_grad_()
    batch = padded_on_the_left(ONE_LONG)
    if family == "opt":
        del batch["position_ids"]
    report = verify_sensitivity(model, training.causal_lm_losses, batch, max_grad_norm=0.1)
    assert report.holds and report.max_contribution <= 0.1 * (1 + 1e-4), report
    alone = [training.causal_lm_losses(model, padded_on_the_left([row]))[0] for row in ONE_LONG]
    torch.testing.assert_close(training.causal_lm_losses(model, batch), torch.stack(alone), rtol=1e-4, atol=1e-5)


def losses_with_the_first_token(model, batch):
    labels = batch["labels"][:, 1:]
    logits = model(**{name: t for name, t in batch.items() if name != "labels"}).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1) / (labels != -100).sum(1)


def test_padding_on_the_left_is_seen():
    """The checks that leave rows out cut what only they needed, on the left too."""
    model, batch = tiny_backbone("gpt2", "causal_lm").requires_grad_(), padded_on_the_left(ONE_LONG)
    assert not verify_sensitivity(model, losses_with_the_first_token, batch, max_grad_norm=0.1).holds
    zeroth = make_zeroth_order(model, plan_for_tests(dataset_size=8, expected_batch_size=8), 0.1)
    with pytest.raises(ValueError, match="the losses mix examples"):
        for _ in range(20):
            zeroth.step([batch], losses_with_the_first_token)


@pytest.mark.parametrize("family, task", [("gpt2", "causal_lm"), ("bert", "classification"), ("distilbert", "classification")])
def test_padding_on_the_left_is_refused_where_it_moves_an_example(family, task):
    model = tiny_backbone(family, task).requires_grad_()
    batch = padded_on_the_left(ONE_LONG, positions=False)
    batch["labels"] = batch["labels"] if task == "causal_lm" else torch.zeros(8, dtype=torch.long)
    losses = training.causal_lm_losses if task == "causal_lm" else classification_losses
    private = private_sgd(model)
    with pytest.raises(ValueError, match="padded on the left"):
        private.backward(losses(model, batch))
    private.detach()
    with pytest.raises(ValueError, match="padded on the left"):
        make_zeroth_order(model, plan_for_tests(), 0.1).step([batch], losses)


def test_a_hook_on_a_parameter_is_refused():
    """It would be handed None where a clipped sum is meant."""
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda gradient: None if gradient is None else gradient * 0)
    with pytest.raises(ValueError, match="weight has a gradient hook"):
        private = private_sgd(model)
        private.backward(model(x_of(4, 3)).square().sum(1))
        private.step()


def test_complex_parameters_are_refused():
    """Half of their gradient was trained."""
    with pytest.raises(ValueError, match="weight is complex"):
        private_sgd(nn.Linear(4, 4, dtype=torch.complex64))


def test_a_decoding_encoder_keeps_its_side_blocks_from_later_tokens():
    """An encoder with is_decoder=True is a language model: its side attention saw the targets."""
    config = transformers.RobertaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                        max_position_embeddings=66, is_decoder=True, pad_token_id=1, tie_word_embeddings=False)
    model = attach_side_network(transformers.RobertaForCausalLM(config).eval(), SideNetworkConfig(reduction=4, heads=2))
    shake(model)
    ids = torch.randint(3, 101, (2, 10), generator=seeded())
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 5) % 90 + 3], 1)
    with torch.no_grad():
        before, after = (model(input_ids=each, attention_mask=torch.ones_like(ids)).logits[:, :-1] for each in (ids, other))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("prepare", [add_lora, lambda model: make_reversible(add_lora(model))], ids=["lora", "reversible"])
def test_a_loss_that_calls_the_base_counts_as_a_call(prepare):
    """The layers of a reversible block record while it is computed again: the second micro-batch was taken for a second look at the first."""
    model = prepare(tiny_backbone("llama", "causal_lm", tie=True))
    shake(model)
    batch, private = padded_batch(model, "causal_lm"), private_sgd(model)
    private.backward(training.causal_lm_losses(model, batch))
    once = {name: total.clone() for name, total in private.clipped_sum().items()}
    losses = training.causal_lm_losses(model, batch)
    private.backward(losses)
    for name, total in private.clipped_sum().items():
        torch.testing.assert_close(total, 2 * once[name])
    with pytest.raises((ValueError, RuntimeError), match="without a model call before it|a second time"):
        private.backward(losses)


def test_padding_without_a_mask_is_refused_where_an_encoder_reads_it():
    """A row's padding is as long as its longest neighbour has it: one example moved the others' gradients."""
    model = tiny("bert").requires_grad_()
    batch = padded_batch(model)
    bare = {name: t for name, t in batch.items() if name != "attention_mask"}
    private = private_sgd(model)
    with pytest.raises(ValueError, match="no attention_mask is given"):
        private.backward(classification_losses(model, bare))
    private.zero_grad()
    whole = {name: t[:1] if name == "labels" else t[:1, :int(batch["attention_mask"][0].sum())] for name, t in bare.items()}
    private.backward(classification_losses(model, whole))


def test_a_copy_of_a_private_model_is_a_plain_one():
    model = tiny("bert").requires_grad_()
    private, batch = private_sgd(model), padded_batch(model)
    twin = copy.deepcopy(model)
    second = private_sgd(twin)
    second.backward(plain_losses(twin, batch))
    private.backward(plain_losses(model, batch))
    for name, total in private.clipped_sum().items():
        torch.testing.assert_close(total, second.clipped_sum()[name])


def test_a_batch_that_comes_as_a_dict():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(20, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, batch):
            ids = batch["ids"]
            return self.head((self.words(ids) + self.places(torch.arange(ids.shape[1])[None])).mean(1))

    batch = {"ids": torch.randint(0, 20, (4, 3), generator=seeded())}
    assert verify_sensitivity(Model(), lambda model, batch: model(batch).square().sum(1), batch, max_grad_norm=0.1).holds


def test_a_weight_that_a_forward_pass_puts_in_place_is_refused():
    class Hypernetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.maker, self.layer = nn.Linear(3, 4, bias=False), nn.Linear(3, 4)
            del self.layer.weight

        def forward(self, x):
            self.layer.weight = 2 * self.maker.weight
            return self.layer(x)

    model = Hypernetwork()
    private = private_sgd(model)
    with pytest.raises(ValueError, match="in the place of the parameter weight"):
        private.backward(model(x_of(4, 3)).square().sum(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(ValueError, match="TorchScript"):
        private_sgd(torch.jit.trace(nn.Linear(3, 2), x_of(4, 3)))


def test_heads_that_a_side_network_does_not_know_are_refused():
    config = transformers.BertConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = transformers.BertForQuestionAnswering(config)
    with pytest.raises(ValueError, match="qa_outputs.weight lies beside the backbone"):
        attach_side_network(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_of_several_kinds_are_not_made_reversible():
    """All blocks were given the first one's mask."""
    config = transformers.Qwen2Config(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      intermediate_size=64, layer_types=["full_attention", "sliding_attention"], use_sliding_window=True)
    with pytest.raises(ValueError, match="full_attention, sliding_attention"):
        make_reversible(transformers.Qwen2ForCausalLM(config))


def test_logits_that_are_changed_after_the_head_are_refused():
    model = tiny_backbone("llama", "causal_lm")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        training.causal_lm_losses(model, padded_batch(model, "causal_lm"))


@pytest.mark.parametrize("losses, message", [(training.causal_lm_losses, "no labels"), (classification_losses, "no labels")])
def test_a_batch_without_labels_is_named(losses, message):
    with pytest.raises(ValueError, match=message):
        losses(tiny_backbone("gpt2", "causal_lm"), {"input_ids": torch.ones(2, 3, dtype=torch.long)})


def test_autocast_is_measured_by_what_sixteen_bits_can_tell():
    model = tiny("bert").requires_grad_()

    def losses(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain_losses(model, batch)

    report = verify_sensitivity(model, losses, padded_batch(model), max_grad_norm=0.1)
    assert report.tolerance == 0.02 and report.max_relative_error <= 0.02


@pytest.mark.parametrize("downsample", ["learned", "pooled"])
def test_a_float64_side_network_reads_cached_features(downsample, tmp_path):
    model = attach_side_network(tiny("bert").double(), SideNetworkConfig(reduction=4, block="mlp", downsample=downsample))
    shake(model)
    rows = [{"input_ids": list(row), "labels": 0} for row in (range(3, 33), range(40, 52))]  # long enough for gradients in place of Gram matrices
    cached = cache_features(model, rows, folder=tmp_path)
    assert verify_sensitivity(model, plain_losses, pad_rows([cached[0], cached[1]]), max_grad_norm=0.1).holds


def _zeroth_on_two_ranks(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        with pytest.raises(ValueError, match="zeroth order is for one process"):
            make_zeroth_order(nn.Linear(3, 2), plan_for_tests(), 0.1)
    finally:
        torch.distributed.destroy_process_group()


def test_zeroth_order_refuses_several_processes(tmp_path):
    """Each would add its noise to a sum of its own, and the ranks' weights would part."""
    torch.multiprocessing.spawn(_zeroth_on_two_ranks, (tmp_path / "store",), nprocs=2)


def test_a_decoders_padding_needs_no_mask():
    """It looks back only: targets of several lengths, whose shifted tokens end in pads, are no leak."""
    config = transformers.T5Config(vocab_size=101, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = select_head_alone(transformers.T5ForConditionalGeneration(config).eval())
    labels = torch.randint(3, 90, (3, 5), generator=seeded())
    labels[1, 2:] = -100
    batch = {"input_ids": torch.randint(3, 90, (3, 6), generator=seeded()), "attention_mask": torch.ones(3, 6, dtype=torch.long), "labels": labels}

    def losses(model, batch):
        logits = model(**batch).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none").sum(1)

    private = private_sgd(model)
    private.backward(losses(model, batch))
    private.zero_grad()
    padded = {**batch, "input_ids": torch.cat([batch["input_ids"], torch.tensor([[0, 0], [5, 6], [5, 0]])], 1)}
    del padded["attention_mask"]
    with pytest.raises(ValueError, match="no attention_mask is given"):
        losses(model, padded)


def select_head_alone(model):
    model.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


class Wrapped(nn.Module):
    """As most tutorials write it."""

    def __init__(self):
        super().__init__()
        self.bert = tiny("bert").bert
        self.head = nn.Linear(self.bert.config.hidden_size, 2)

    def forward(self, ids, mask):
        return self.head(self.bert(ids, mask).last_hidden_state[:, 0])


def test_a_mask_by_position_is_looked_at():
    """It switched the checks of padding off: one example moved the sum by 2.5 to 3.4 C."""
    llama = tiny("llama").requires_grad_()
    batch = padded_batch(llama)
    wrong = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
    private = private_sgd(llama)
    with pytest.raises(ValueError, match="a masked position holds 5"):
        llama(wrong, batch["attention_mask"])
    private.detach()
    model = Wrapped().requires_grad_()
    private = private_sgd(model)
    with pytest.raises(ValueError, match="padded on the left"):
        model(batch["input_ids"].flip(1), batch["attention_mask"].flip(1))
    private.zero_grad()
    private.backward(model(batch["input_ids"], batch["attention_mask"]).square().sum(1))


def test_padding_to_a_multiple_without_a_mask_is_refused():
    """All rows end in pads, some in more: the width is still the longest one's."""
    model = tiny("bert").requires_grad_()
    ids = torch.randint(3, 90, (3, 8), generator=seeded())
    ids[0, 3:] = ids[1, 4:] = ids[2, 6:] = model.config.pad_token_id
    private = private_sgd(model)
    with pytest.raises(ValueError, match="no attention_mask is given"):
        model(input_ids=ids)
    private.zero_grad()
    private.backward(model(input_ids=ids, attention_mask=(ids != model.config.pad_token_id).long()).logits.square().sum(1))


def test_a_dict_whose_first_tensor_is_no_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

        def forward(self, batch):
            return self.head(self.words(batch["ids"]).mean(1)) * batch["weights"]

    batch = {"weights": torch.tensor([1.0, 2.0]), "ids": torch.randint(0, 20, (4, 3), generator=seeded())}
    model = Model()
    private_sgd(model).backward(model(batch).square().sum(1))


def test_a_token_that_is_the_pad_token_by_chance_is_no_padding():
    model = tiny("bert").requires_grad_()
    ids = torch.randint(3, 90, (4, 8), generator=seeded())
    ids[1, -1] = ids[2, 0] = model.config.pad_token_id
    private = private_sgd(model)
    private.backward(model(input_ids=ids).logits.square().sum(1))

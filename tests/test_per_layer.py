"""Per-layer clipping: each group to C/√G, inside the backward pass, nothing held but what shared layers still need."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memarc_utils import grad_sample
from memarc_utils.dp_sgd import verify_sensitivity
from memarc_utils.grad_sample import MODES, GradSampler
from tests.models import (CASE_IDS, CASES, distance, groups_of, loop_clipped_sum, loop_gradients, padded_batch,
                          plain_losses, plan_for_tests, private_sgd, seeded, shake, size, t5, tiny)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_clipped_sum_against_groups_written_out(case, mode):
    """The groups are found here by merging sets of names, the clipping is written out in float64."""
    model = shake(tiny(*case))
    batch = padded_batch(model, case[1])
    gradients, groups = loop_gradients(model, batch), groups_of(model)
    largest = max(float(g.double().flatten(1).norm(dim=1).max()) for g in gradients.values())
    bound = 0.3 * largest * math.sqrt(len(groups))  # some groups are clipped, some are not
    private = private_sgd(model, plan_for_tests(max_grad_norm=bound), mode=mode, clipping="per_layer")
    private.backward(plain_losses(model, batch))
    want = loop_clipped_sum(gradients, bound, "per_layer", groups)
    assert private.sampler.num_groups == len(groups)
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)
    assert 0 < size(want) < size({name: g.sum(0) for name, g in gradients.items()}) * 1.01


@pytest.mark.parametrize("make", [lambda: tiny("gpt2", "causal_lm", True), t5], ids=["tied", "t5"])
def test_one_example_moves_the_sum_by_at_most_c(make):
    """Everything clipped: the whole bound is used, C/√G a group, and not a bit more."""
    model = shake(make())
    task = "causal_lm" if hasattr(model, "lm_head") else "classification"
    report = verify_sensitivity(model, plain_losses, padded_batch(model, task, batch=3), 1e-3, clipping="per_layer")
    assert report.holds and report.max_contribution >= 0.9e-3


def held_at_most(model, batch, **options):
    """The largest number of parameters that are held at once in a backward pass."""
    most = 0

    class Watched(GradSampler):
        def _clip_and_add(self, group):
            nonlocal most
            most = max(most, len(self._held))
            super()._clip_and_add(group)

    sampler = Watched(model, probe=False, **options)
    sampler.backward(plain_losses(model, batch), lambda n: 1 / n.clamp_min(1))
    sampler.detach()
    return most


def test_a_layer_is_dropped_when_its_last_use_was_seen():
    """Depth costs nothing: at most the layer at hand and the tied embedding are held, where flat clipping holds all."""
    for layers in (1, 4):
        model = tiny("gpt2", "causal_lm", True, layers=layers)
        batch = padded_batch(model, "causal_lm")
        assert held_at_most(model, batch, per_layer=True) <= 3  # weight and bias of a layer, the tied weight
        assert held_at_most(model, batch) == len(list(model.parameters()))


class Reused(nn.Module):
    """One layer called three times, and one inside a checkpoint."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.layer, self.inner, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        for _ in range(2):
            if self.reentrant is None:
                h = torch.tanh(self.layer(self.inner(h)))
            else:
                h = checkpoint(lambda h: torch.tanh(self.layer(self.inner(h))), h, use_reentrant=self.reentrant)
        return h.square().sum((1, 2))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_layers_used_several_times_are_clipped_once(reentrant):
    torch.manual_seed(0)
    model, plain = Reused(reentrant), Reused()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 6, generator=seeded())
    gradients = loop_gradients(plain, {"x": x}, lambda m, one: m(one["x"]))
    private = private_sgd(model, plan_for_tests(max_grad_norm=0.1), clipping="per_layer")
    private.backward(model(x))
    want = loop_clipped_sum(gradients, 0.1, "per_layer", groups_of(plain))
    assert private.sampler.num_groups == 2
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)


def test_an_evaluation_in_between_changes_nothing():
    model = shake(tiny("bert"))
    batch = padded_batch(model)
    private = private_sgd(model, clipping="per_layer")
    private.backward(plain_losses(model, batch))
    want = private.clipped_sum()
    private.zero_grad()
    losses = plain_losses(model, batch)
    with torch.no_grad():
        model(**{name: t for name, t in batch.items() if name != "labels"})
    private.backward(losses)
    assert distance(private.clipped_sum(), want) == 0


def uncounted(model, x):
    """Losses of layer calls that the engine takes for part of an evaluation."""
    with torch.no_grad():
        model(x)
    return model.layer(torch.tanh(model.layer(x))).square().sum((1, 2)) + 0 * model.inner(x).sum((1, 2))


def test_a_use_that_was_not_counted_waits_for_the_end():
    model, x = Reused(), torch.randn(4, 3, 6, generator=seeded())
    gradients = loop_gradients(model, {"x": x}, lambda m, one: uncounted(m, one["x"]))
    private = private_sgd(model, plan_for_tests(max_grad_norm=0.1), clipping="per_layer")
    private.backward(uncounted(model, x))
    want = loop_clipped_sum(gradients, 0.1, "per_layer", groups_of(model))
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)


def test_two_forward_passes_before_two_backward_passes():
    model, x = Reused(), torch.randn(4, 3, 6, generator=seeded())
    private = private_sgd(model, plan_for_tests(max_grad_norm=0.1), clipping="per_layer")
    private.backward(model(x[:2]))
    private.backward(model(x[2:]))
    want = private.clipped_sum()
    private.zero_grad()
    first, second = model(x[:2]), model(x[2:])
    private.backward(first)
    private.backward(second)
    assert distance(private.clipped_sum(), want) <= 1e-6 * size(want)


def test_a_use_after_the_layer_was_clipped_is_refused():
    """One counted use and one that was not: whatever could let an example in twice raises, and the half-done sum cannot be
    stepped on, nor can the batch be tried again on top of it."""
    model, x = Reused(), torch.randn(4, 3, 6, generator=seeded())
    private = private_sgd(model, clipping="per_layer")

    def losses():
        h = torch.tanh(model.layer(x))  # counted
        with torch.no_grad():
            model(x)
        return model.layer(h).square().sum((1, 2)) + 0 * model.inner(x).sum((1, 2))  # these two are not

    with pytest.raises(ValueError, match=r"the layer layer was used again after its gradient was clipped.*clipping=\"flat\""):
        private.backward(losses())
    for go_on in (private.step, lambda: private.backward(model(x))):
        with pytest.raises(ValueError, match=r"stopped half way and part of it is in the sum: call private.zero_grad\(\)"):
            go_on()
    private.zero_grad()
    private.backward(model(x))
    private.step()


def test_a_group_that_is_not_finite_adds_zero_and_the_others_count():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, y):
            return self.good(x).sum(1) + self.bad(y).sum(1)

    model, x = Two(), torch.ones(3, 3)
    y = torch.ones(3, 3)
    y[1] = 1e30  # the squared norm overflows, the loss does not, whatever the weights
    private = private_sgd(model, plan_for_tests(max_grad_norm=math.sqrt(2)), clipping="per_layer")
    private.backward(model(x, y))
    assert private.examples_dropped == 1
    each = 1 / math.sqrt(8)  # of six weights and two biases, all equal, clipped to 1
    torch.testing.assert_close(private.clipped_sum()["good.weight"], torch.full((2, 3), 3 * each))
    torch.testing.assert_close(private.clipped_sum()["bad.weight"], torch.full((2, 3), 2 * each))


def test_noise_is_scaled_by_the_whole_bound():
    """σ C for any number of groups: their pieces stand at right angles."""
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(4)])
    plan = plan_for_tests(noise_multiplier=2.0, max_grad_norm=0.5, expected_batch_size=1)
    private = private_sgd(model, plan, clipping="per_layer")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    private.step()  # an empty batch: noise alone
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()])
    assert private.contribution_bound == pytest.approx(0.5)
    assert float(moved.std()) == pytest.approx(1.0, rel=0.02)


def test_tied_layers_clipped_apart_would_be_caught(monkeypatch):
    """Planted fault: were each layer its own group, a tied weight would enter once a layer, √2 C in all."""
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 2, bias=False), nn.Linear(5, 2, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.one(x) + self.two(x)

    model, batch = Tied(), {"x": torch.randn(3, 5, generator=seeded())}

    def measured():
        return verify_sensitivity(model, lambda m, b: m(b["x"]).sum(1), batch, 1e-3, clipping="per_layer")

    assert measured().holds
    monkeypatch.setattr(grad_sample, "groups_of", lambda modules: {
        member: k for k, m in enumerate(modules) for member in (m, *m.parameters(recurse=False))})
    assert not measured().holds and measured().max_contribution == pytest.approx(math.sqrt(2) * 1e-3, rel=1e-3)

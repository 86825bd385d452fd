"""`dp_sgd`: sensitivity of every family, equality with opacus, noise, what a step refuses, and resuming.

Traps, each met in a published system: 1 unwrapped loss, 2 shared weights, 4 noise repeated by a resume, 5 token mean,
6 non-finite example, 7 shuffle as Poisson, 8 divisor from the data, 9 untrained parameters, 10 options ignored,
11 crashes. The other tests of the engine use the same numbers.
"""

import copy
import dataclasses
import io
import math

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from scipy import stats
from torch import nn

from memarc_utils import book_keeping, dp_sgd, sensitivity
from memarc_utils.adapters import add_lora
from memarc_utils.backbones import load_backbone
from memarc_utils.batch_selection import poisson_batches
from memarc_utils.clipping import CLIPPINGS
from memarc_utils.dp_sgd import SensitivityReport, make_private, verify_sensitivity
from memarc_utils.grad_sample import MODES
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from memarc_utils.training import causal_lm_losses
from tests.models import (CASE_IDS, CASES, distance, groups_of, loop_clipped_sum, loop_gradients, loop_norms, padded_batch,
                          plain_losses, plan_for_tests, private_sgd, rows, seeded, shake, size, tiny,
                          without_shape_check)

PREPARATIONS = {
    "all": lambda model: model,
    "lora": lambda model: add_lora(model, rank=4),
    "side attention": lambda model: attach_side_network(model,
                                                        SideNetworkConfig(reduction=4, block="attention", heads=2)),
    "side mlp": lambda model: attach_side_network(model, SideNetworkConfig(reduction=4, block="mlp")),
}
SETTINGS = [(mode, clipping) for mode in MODES for clipping in CLIPPINGS]


def prepared(case, how):
    return shake(PREPARATIONS[how](tiny(*case, hidden=16 if how != "side attention" else 32, layers=1)))


# ------------------------------------------------------------------------------------------------ the promise, measured
@pytest.mark.parametrize("how", PREPARATIONS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=CASE_IDS)
def test_one_example_moves_the_sum_by_at_most_c(number, how):
    """Every family with everything, LoRA and a side network training; modes and clippings in turn, so every pair
    occurs."""
    case = CASES[number]
    mode, clipping = SETTINGS[(number + list(PREPARATIONS).index(how)) % len(SETTINGS)]
    model = prepared(case, how)
    report = verify_sensitivity(model, plain_losses, padded_batch(model, case[1], batch=3), max_grad_norm=0.1,
                                mode=mode, clipping=clipping)
    assert report.max_contribution <= 0.1 * (1 + 1e-4)
    assert report.max_contribution >= 0.05  # or nothing was measured
    assert report.max_relative_error <= 1e-4 and report.max_norm_error <= 1e-4
    assert report.untrained_parameters == [] and report.holds
    assert str(report).startswith("one example moves the sum by at most C")


@pytest.mark.parametrize("mode, clipping", SETTINGS)
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=[CASE_IDS[0], CASE_IDS[4]])
def test_clipped_sum_against_a_loop_written_here(case, mode, clipping):
    """The second route of `verify_sensitivity` itself: torch.autograd.grad one example at a time, factors in float64.
    """
    model = shake(tiny(*case))
    batch = padded_batch(model, case[1])
    gradients = loop_gradients(model, batch)
    bound = float(loop_norms(gradients).median())  # some are clipped, some are not
    private = private_sgd(model, plan_for_tests(max_grad_norm=bound), mode=mode, clipping=clipping)
    private.backward(plain_losses(model, batch))
    want = loop_clipped_sum(gradients, bound, clipping, groups_of(model))
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)
    torch.testing.assert_close(private.gradient_norms.double(), loop_norms(gradients), rtol=1e-5, atol=0)


def opacus_clipped_sum(model, batch, max_grad_norm):
    """The same sum by opacus's hooks: its per-example gradients, clipped here."""
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    for module in wrapped.modules():  # opacus records in training mode only; dropout has no parameters and stays off
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    plain_losses(wrapped, batch).sum().backward()
    return loop_clipped_sum({name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters()
                             if p.requires_grad}, max_grad_norm)


def freeze_where_opacus_cannot(model):
    """Positions that broadcast over the batch crash opacus, and it has no rule for transformers' RMSNorm."""
    for name, parameter in model.named_parameters():
        if "position" in name or ("norm" in name and model.config.model_type == "llama"):
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("family, task, tie", [CASES[0], CASES[1], CASES[2], CASES[8], CASES[9]])
@pytest.mark.parametrize("mode", MODES)
def test_whole_tiny_models_equal_opacus(family, task, tie, mode):
    model = freeze_where_opacus_cannot(shake(tiny(family, task, tie)))
    batch = padded_batch(model, task)
    want = opacus_clipped_sum(model, batch, 0.5)
    private = private_sgd(model, plan_for_tests(max_grad_norm=0.5), mode=mode)
    private.backward(plain_losses(model, batch))
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)


@pytest.fixture(scope="session")
def minilm_lora():
    torch.manual_seed(0)
    return shake(add_lora(load_backbone("default-encoder"), rank=8), scale=0.02)


@pytest.mark.parametrize("mode, max_grad_norm", [("book_keeping", 1.0), ("per_example", 1.0), ("book_keeping", 100.0)])
def test_minilm_with_lora_equals_opacus(minilm_lora, mode, max_grad_norm):
    """A real pre-trained encoder, padded batch; opacus is the independent route. All clipped, and none."""
    batch = padded_batch(minilm_lora, tokens=12)
    want = opacus_clipped_sum(minilm_lora, batch, max_grad_norm)
    private = private_sgd(minilm_lora, plan_for_tests(max_grad_norm=max_grad_norm), mode=mode)
    private.backward(plain_losses(minilm_lora, batch))
    got = private.clipped_sum()
    private.detach()
    assert len(got) == 26 and distance(got, want) <= 1e-5 * size(want)


# ---------------------------------------------------------------------------------- what verify_sensitivity must notice
def normalised_over_the_batch(model, batch):
    """What `outputs.loss` does: a mean over the batch's tokens (times B). A long neighbour makes a short example's loss
    small."""
    targets = (batch["labels"][:, 1:] != -100).sum()
    return plain_losses(model, batch) * (batch["labels"][:, 1:] != -100).sum(1) * len(batch["labels"]) / targets


def one_long_and_many_short():
    model = tiny("llama", "causal_lm", False, layers=1)
    batch = padded_batch(model, "causal_lm", batch=6, tokens=12)
    batch["attention_mask"][1:, 3:] = 0
    batch["labels"][1:, 3:] = -100
    batch["input_ids"][1:, 3:] = 0
    # five alike: their changes add up
    batch["input_ids"][2:], batch["labels"][2:] = batch["input_ids"][1:2], batch["labels"][1:2]
    return model, batch


def test_token_mean_over_the_batch_is_reported():
    """Trap 5. Nothing is differentiated across examples, so only comparing batches can see it."""
    model, batch = one_long_and_many_short()
    report = verify_sensitivity(model, normalised_over_the_batch, batch, max_grad_norm=8.0)
    assert report.max_contribution > 1.2 * 8.0 and report.max_relative_error > 0.1
    assert not report.holds and str(report).startswith("NOT SAFE")
    assert verify_sensitivity(model, plain_losses, batch, max_grad_norm=8.0).holds


def test_padding_seen_by_neighbours_is_reported():
    """A model that pads by itself and attends to its padding: the neighbour's length enters the loss."""
    model = shake(tiny("bert", layers=1))
    batch = padded_batch(model, batch=3)

    def without_mask(model, batch):
        longest = int(batch["attention_mask"].sum(1).max())
        return F.cross_entropy(model(input_ids=batch["input_ids"][:, :longest]).logits, batch["labels"],
                               reduction="none")

    report = verify_sensitivity(model, without_mask, batch, max_grad_norm=100.0)
    assert report.max_relative_error > 1e-3 and not report.holds


def test_untrained_parameters_are_reported():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    report = verify_sensitivity(Unused(), lambda m, b: m(b["x"]).square().sum(1), {"x": torch.ones(3, 3)})
    assert report.untrained_parameters == ["unused.weight", "unused.bias"] and not report.holds
    assert "untrained: unused.weight, unused.bias" in str(report)


def test_an_engine_that_mis_measures_is_caught(monkeypatch):
    """The check can fail: each planted fault of the engine shows up in the report."""
    model = shake(tiny("gpt2", "causal_lm", True, layers=1))
    batch = padded_batch(model, "causal_lm", batch=3)

    def measured():
        return verify_sensitivity(model, plain_losses, batch, max_grad_norm=0.1)

    assert measured().holds
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "clipping_factors", lambda n, *_: torch.ones_like(n))
        assert measured().max_contribution > 0.2
    with monkeypatch.context() as patch:
        patch.setattr(book_keeping.HeldGradient, "_cross_pair_lookup",
                      staticmethod(lambda pair, *_: torch.zeros(len(pair[0]))))
        assert measured().max_norm_error > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(book_keeping.HeldGradient, "add_weighted_sum", lambda self, *_: torch.full(self.shape, float("nan")))
        assert not measured().holds
    assert measured().holds


def test_report_with_a_non_finite_example_is_finite():
    """The example that is dropped contributes zero; the others are measured."""
    model, x = nn.Linear(5, 3), torch.randn(4, 5, generator=seeded())
    x[2] = float("inf")
    report = verify_sensitivity(model, lambda m, b: m(b["x"]).square().sum(1), {"x": x}, max_grad_norm=0.5)
    assert math.isfinite(report.max_contribution) and report.max_contribution <= 0.5 * (1 + 1e-4) and report.holds
    assert report.examples_dropped == 1 and "1 examples were not finite" in str(report)
    with pytest.raises(ValueError, match="no example of the batch has a finite gradient"):
        verify_sensitivity(model, lambda m, b: m(b["x"]).square().sum(1), {"x": x[2:3].repeat(3, 1)}, max_grad_norm=0.5)


def test_report_that_is_not_a_number_does_not_hold():
    assert not SensitivityReport(float("nan"), 0.0, 0.0, [], 1.0).holds
    assert not SensitivityReport(0.5, float("nan"), 0.0, [], 1.0).holds


def test_verify_sensitivity_leaves_the_model_as_it_was():
    model = tiny("bert", dropout=0.5).train()
    model.bert.encoder.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    verify_sensitivity(model, plain_losses, padded_batch(model, batch=2))
    assert [m.training for m in model.modules()] == modes
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="clipping must be one of"):
        verify_sensitivity(model, plain_losses, padded_batch(model), clipping="none")


# ------------------------------------------------------------------------------------------------------------- one step
def linear(seed=0, width=(3, 4)):
    torch.manual_seed(seed)
    return nn.Linear(*width)


def x_of(batch, width=3, seed=0):
    return torch.randn(batch, width, generator=seeded(seed))


def squares(model, x):
    return model(x).square().sum(1)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("actual", [1, 4, 9])
def test_divisor_is_the_public_batch_size(actual):
    """Trap 8. Neither the batch at hand nor the data's length divides the sum."""
    model = linear()
    for dataset_size in (1000, 1001):
        private = private_sgd(model, plan_for_tests(expected_batch_size=4, dataset_size=dataset_size))
        before = snapshot(model)
        private.backward(squares(model, x_of(actual)))
        total = private.clipped_sum()
        private.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[name] - total[name] / 4, rtol=0, atol=1e-7)
        private.detach()


def test_micro_batches_never_change_the_step():
    """A batch cut into pieces of 1, 3 or 100 examples gives the same clipped sum."""
    model = shake(tiny("bert", layers=1))
    batch = padded_batch(model, batch=7)
    sums = []
    for physical in (1, 3, 100):
        private = private_sgd(model)
        for start in range(0, 7, physical):
            private.backward(plain_losses(model, rows(batch, range(7)[start:start + physical])))
        sums.append(private.clipped_sum())
        private.detach()
    assert max(distance(s, sums[0]) for s in sums) <= 1e-6 * size(sums[0])


def test_an_empty_batch_takes_its_noise_step():
    model = linear()
    private, before = private_sgd(model, plan_for_tests(noise_multiplier=1.0)), snapshot(model)
    assert private.epsilon() == 0.0  # trap 11: not a crash
    private.step()
    assert private.steps_taken == 1 and private.epsilon() > 0
    assert all((parameter != before[name]).all() for name, parameter in model.named_parameters())
    private.backward(torch.zeros(0))  # a micro-batch without examples is no error either
    private.step()
    assert private.epsilon() == private.plan.epsilon(num_steps=2)


def test_no_noise_when_the_multiplier_is_zero():
    model = linear()
    private, before = private_sgd(model), snapshot(model)
    private.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert private.epsilon() == math.inf


def test_clipped_sum_is_a_copy_and_step_empties_it():
    model = linear()
    private = private_sgd(model)
    private.backward(squares(model, x_of(4)))
    copied = private.clipped_sum()
    copied["weight"].zero_()
    assert private.clipped_sum()["weight"].abs().sum() > 0
    assert not private.clipped_sum()["weight"].requires_grad and not private.gradient_norms.requires_grad
    private.step()
    assert private.clipped_sum() == {} and all(p.grad is None for p in model.parameters())


def test_zero_grad_starts_the_batch_anew():
    model = linear()
    private = private_sgd(model)
    private.backward(squares(model, x_of(4, seed=1)))
    private.zero_grad()
    private.backward(squares(model, x_of(4, seed=2)))
    got = private.clipped_sum()
    private.detach()
    want = loop_clipped_sum(loop_gradients(model, {"x": x_of(4, seed=2)}, lambda m, b: squares(m, b["x"])), 0.1)
    assert distance(got, want) <= 1e-6


def test_low_precision_parameters_are_stepped_in_their_type():
    model = linear().to(torch.bfloat16)
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))
    private.backward(squares(model, x_of(4).to(torch.bfloat16)).float())
    assert private.clipped_sum()["weight"].dtype == torch.float32
    private.step()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_non_finite_examples_are_dropped_and_counted():
    """Trap 6: one of them destroys the weights in published systems."""
    model = linear()
    private = private_sgd(model)
    x = x_of(5)
    x[1], x[3] = float("nan"), float("inf")
    private.backward(squares(model, x))
    got = private.clipped_sum()
    assert private.examples_dropped == 2
    private.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    private.detach()
    model = linear()
    want = loop_clipped_sum(loop_gradients(model, {"x": x[[0, 2, 4]]}, lambda m, b: squares(m, b["x"])), 0.1)
    assert distance(got, want) <= 1e-6
    private = private_sgd(model)
    private.backward(squares(model, x[[1, 3]]))  # nothing finite at all: a step of nothing
    private.step()
    assert private.examples_dropped == 2


# ---------------------------------------------------------------------------------------------------------------- noise
WIDE = (100, 200)


def noise_of_empty_steps(steps=1, noise_multiplier=1.5, max_grad_norm=0.7, expected_batch_size=4, seed=0, first=()):
    """What `steps` empty batches (after the micro-batches in `first`) add to the parameters, by plain SGD with rate 1.
    """
    model = linear(width=WIDE)
    plan = plan_for_tests(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm,
                          expected_batch_size=expected_batch_size)
    private = private_sgd(model, plan, seed=seed)
    moves = []
    for _ in range(steps):
        total = {}
        for x in first:
            private.backward(squares(model, x))
            total = private.clipped_sum()
        before = snapshot(model)
        private.step()
        moves.append({name: before[name] - p.detach() - total.get(name, torch.zeros(())) / expected_batch_size
                      for name, p in model.named_parameters()})
    return moves


@pytest.mark.parametrize("first", [[], [x_of(3, width=100)], [x_of(9, width=100), x_of(2, width=100)]],
                         ids=["empty", "3", "9+2"])
def test_noise_is_gaussian_of_deviation_sigma_c_over_b(first):
    """Kolmogorov-Smirnov against N(0, (σC/B)²), whatever the batch held; 2/3 and 3/2 of it are rejected."""
    [noise] = noise_of_empty_steps(first=first)
    sample, deviation = noise["weight"].double().flatten().numpy(), 1.5 * 0.7 / 4
    assert stats.kstest(sample, "norm", args=(0, deviation)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(sample, "norm", args=(0, wrong * deviation)).pvalue < 1e-6
    assert stats.kstest(noise["bias"].double().numpy(), "norm", args=(0, deviation)).pvalue > 1e-3


def test_secure_noise_has_the_same_distribution_and_other_bits():
    """Half the sum of four draws (trap 15): Kolmogorov-Smirnov as above, four times the random numbers."""
    model = linear(width=WIDE)
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.5, max_grad_norm=0.7), noise="secure")
    plain = torch.Generator().manual_seed(0)
    draws = [torch.empty(WIDE[1], WIDE[0]).view(-1).normal_(0, 1.5 * 0.7 / 2, generator=plain) for _ in range(4)]
    before = snapshot(model)
    private.step()
    moved = (before["weight"] - model.weight.detach()).flatten()
    torch.testing.assert_close(moved, sum(draws) / 4, rtol=1e-4, atol=1e-5)  # four draws of half the deviation, over B = 4
    sample, deviation = moved.double().numpy(), 1.5 * 0.7 / 4
    assert stats.kstest(sample, "norm", args=(0, deviation)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(sample, "norm", args=(0, wrong * deviation)).pvalue < 1e-6
    with pytest.raises(ValueError, match="noise must be one of gaussian, secure, got 'laplace'"):
        private_sgd(linear(), noise="laplace")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_noise_is_independent_of_dropout(dropout):
    """The same noise whatever dropout draws in between, and dropout's masks are the same with and without noise."""
    def noise_and_mask(noise_multiplier):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(20, 20), nn.Dropout(dropout)).train()
        private = private_sgd(model, plan_for_tests(noise_multiplier=noise_multiplier), lr=0.0)
        masks = []
        for _ in range(2):
            private.backward((out := model(torch.ones(3, 20))).square().sum(1))
            masks.append(out.detach() == 0)
            private.step()
        return private.noise_generator.get_state(), torch.stack(masks)

    (state, mask), (_, quiet) = noise_and_mask(1.0), noise_and_mask(0.0)
    assert torch.equal(mask, quiet)
    assert torch.equal(state, noise_and_mask(1.0)[0])
    assert bool(mask.any()) == (dropout > 0)


@pytest.mark.parametrize("changed", [dict(noise_multiplier=3.0), dict(max_grad_norm=1.4), dict(expected_batch_size=2)])
def test_noise_scales_with_sigma_and_c_and_the_divisor(changed):
    """Doubling σ or C, or halving B, doubles it: noise without C is the classical slip."""
    once, [twice] = noise_of_empty_steps()[0], noise_of_empty_steps(**changed)
    torch.testing.assert_close(twice["weight"], 2 * once["weight"], rtol=1e-4, atol=1e-5)


def test_noise_is_independent_across_steps_and_parameters():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(*WIDE, bias=False), nn.Linear(*WIDE, bias=False)

    model = Twins()
    private, draws = private_sgd(model, plan_for_tests(noise_multiplier=1.0)), []
    for _ in range(3):
        before = snapshot(model)
        private.step()
        draws += [(p.detach() - before[name]).flatten() for name, p in model.named_parameters()]
    correlations = torch.corrcoef(torch.stack(draws))
    count = draws[0].numel()
    assert (correlations - torch.eye(6)).abs().max() < 5 / count**0.5
    lag = torch.corrcoef(torch.stack([draws[0][1:], draws[0][:-1]]))[0, 1]
    assert abs(lag) < 5 / count**0.5


def test_noise_is_seeded_by_the_operating_system_unless_a_generator_is_given():
    def move(**options):
        model = linear()
        torch.manual_seed(0)  # re-seeding the global generator has no influence
        before = snapshot(model)
        make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), plan_for_tests(noise_multiplier=1.0),
                     **options).step()
        return model.weight - before["weight"]

    assert not torch.equal(move(), move())
    assert torch.equal(move(noise_generator=seeded(5)), move(noise_generator=seeded(5)))


def test_noise_leaves_the_global_generator_alone():
    model = linear()
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))
    state = torch.get_rng_state()
    private.step()
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------- make_private refuses
def optimizer_of(model):
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def refuse(match, model=None, optimizer=None, plan=None, **options):
    model = model or linear()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=match):
        without_shape_check(make_private)(model, optimizer, plan or plan_for_tests(), **options)
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())


def test_unknown_options_are_refused():
    """Trap 10: an option is implemented or refused, with those that exist."""
    refuse("clipping must be one of flat, automatic", clipping="per-layer")
    refuse("mode must be one of book_keeping, per_example", mode="ghost")


def test_global_noise_generator_is_refused():
    """Everything else that draws from it, or re-seeds it, would know the noise."""
    refuse("noise_generator is torch's global generator", noise_generator=torch.default_generator)


def test_unseeded_noise_generator_is_warned_of():
    """torch.Generator() always starts from the same published seed: noise that anybody can subtract."""
    assert torch.Generator().initial_seed() == torch.Generator().initial_seed()
    with pytest.warns(UserWarning,
                      match="noise_generator was never seeded.*Pass None"):
        make_private(*optimizer_of(linear()), plan_for_tests(), noise_generator=torch.Generator())


def test_wrong_optimizers_are_refused():
    model = nn.Sequential(linear(), linear(width=(4, 2)))
    with pytest.raises(ValueError, match="optimizer must be a torch.optim.Optimizer, got str"):
        without_shape_check(dp_sgd._check_optimizer)(model, "sgd")
    refuse("the optimizer does not hold 1.weight, 1.bias: build it over", model,
           torch.optim.SGD(model[0].parameters(), lr=1.0))
    stranger = nn.Parameter(torch.ones(()))
    refuse("holds trainable parameters that are not in the model", model,
           torch.optim.SGD([*model.parameters(), stranger], lr=1.0))
    refuse("LBFGS|closure", model, torch.optim.LBFGS(model.parameters()))


def test_frozen_parameters_may_be_in_the_optimizer():
    model = nn.Sequential(linear(), linear(width=(4, 2)))
    model[0].requires_grad_(False)
    private, before = private_sgd(model, plan_for_tests(noise_multiplier=1.0)), snapshot(model)
    private.backward(squares(model, x_of(3)))
    private.step()
    assert torch.equal(model[0].weight, before["0.weight"]) and not torch.equal(model[1].weight, before["1.weight"])


def test_models_that_cannot_be_private_are_refused():
    refuse("no parameter of the model has requires_grad=True", linear().requires_grad_(False))
    refuse("no rule for 1.in_proj_weight, owned by a MultiheadAttention in which other layers train too: freeze it",
           nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)))


def test_a_second_make_private_is_refused_and_the_first_goes_on():
    model = linear()
    private = private_sgd(model)
    with pytest.raises(ValueError, match="was replaced on the instance .is the model private already"):
        private_sgd(model)
    private.backward(squares(model, x_of(3)))
    private.step()
    assert private.detach() is model
    private_sgd(model).detach()


# --------------------------------------------------------------------------------------- what a step refuses: the leaks
def test_own_loss_backward_is_refused():
    """Trap 1: in a published system the step then runs unclipped, 186 instead of 0.04, and ε is reported all the same.
    """
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = make_private(model, optimizer, plan_for_tests())
    before = snapshot(model)
    squares(model, x_of(4)).mean().backward()
    optimizer.step()  # the habit of every training loop: there is nothing to step with
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError,
                       match="a backward pass other than private.backward .*then private.zero_grad.. and repeat the "
                             "batch"):
        private.step()
    private.backward(squares(model, x_of(4)))
    with pytest.raises(ValueError, match="a backward pass other than private.backward"):
        private.step()
    private.zero_grad()
    private.backward(squares(model, x_of(4)))
    private.step()
    assert private.steps_taken == 1


def test_gradients_written_by_hand_are_refused():
    model = linear()
    private = private_sgd(model)
    private.backward(squares(model, x_of(4)))
    model.bias.grad = torch.ones(4)
    with pytest.raises(ValueError, match="a gradient reached bias by a way that the clipper does not see"):
        private.step()
    private.zero_grad()
    private.step()


def test_weight_used_through_functional_is_refused():
    """Trap 2: F.linear(h, emb.weight), 3.43 C in silence in a published system."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)

        def forward(self, ids):
            return F.linear(self.embedding(ids).mean(1), self.embedding.weight)

    model = Tied()
    private, before = private_sgd(model), snapshot(model)
    with pytest.raises(ValueError, match="a gradient reached embedding.weight by a way"):
        private.backward(squares(model, torch.tensor([[1, 2], [3, 4]])))
    with pytest.raises(ValueError, match="a gradient reached embedding.weight by a way"):
        private.step()
    assert torch.equal(model.embedding.weight, before["embedding.weight"])


def test_gradient_left_on_a_frozen_parameter_is_not_applied():
    """A head was trained without privacy first; the body's .grad is still there when the body is frozen."""
    model = nn.Sequential(linear(), linear(width=(4, 2)))
    squares(model, x_of(4)).sum().backward()
    model[0].requires_grad_(False)
    model[1].zero_grad()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), snapshot(model)
    with pytest.raises(ValueError, match=r"0\.(weight|bias) still holds a gradient from before.*call optimizer.zero_grad"):
        make_private(model, optimizer, plan_for_tests())
    model[0].weight.grad = model[0].bias.grad = None
    private = make_private(model, optimizer, plan_for_tests())
    private.backward(squares(model, x_of(4)))
    model[0].weight.grad = torch.ones(4, 3)  # and one that comes later
    with pytest.raises(ValueError, match="0.weight"):
        private.step()
    assert torch.equal(model[0].weight, before["0.weight"])


def test_parameter_that_trains_during_backward_only_is_not_stepped():
    model = nn.Sequential(linear(), linear(width=(4, 2)))
    model[0].requires_grad_(False)
    private, before = private_sgd(model), snapshot(model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="0.weight"):
        private.backward(squares(model, x_of(4)))
        model[0].requires_grad_(False)
        private.step()
    assert torch.equal(model[0].weight, before["0.weight"])


def test_parameter_group_added_later_is_refused():
    model, temperature = linear(), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = make_private(model, optimizer, plan_for_tests())
    optimizer.add_param_group({"params": [temperature]})
    with pytest.raises(ValueError, match="not in the model|grad"):
        private.backward(squares(model, x_of(4)) * temperature)
        private.step()
    assert float(temperature.detach()) == 1.0


def test_adapters_added_later_are_refused():
    """Trap 9: adapters attached after the optimizer was made never train; 45 GPU-hours were lost that way."""
    model = tiny("bert").requires_grad_(False)
    model.classifier.requires_grad_(True)
    private = private_sgd(model)
    add_lora(model, rank=2)
    with pytest.raises(ValueError,
                       match="trainable parameters appeared after make_private: .*lora_A.*Add adapters and move"):
        private.backward(plain_losses(model, padded_batch(model)))
        private.step()


def test_parameters_frozen_or_replaced_later_are_refused():
    model = linear()
    private = private_sgd(model)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError,
                       match="no longer trainable or replaced since make_private: bias. Call private.detach"):
        private.backward(squares(model, x_of(4)))
        private.step()
    model = linear()
    private = private_sgd(model)
    model.weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="since make_private|after make_private"):
        private.backward(squares(model, x_of(4)))
        private.step()


def test_parameter_that_no_loss_reaches_is_refused_by_name():
    """Trap 9. Noise moves it, so movement proves nothing; an empty batch proves nothing either way."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))
    private.step()
    private.backward(squares(model, x_of(2)))
    with pytest.raises(ValueError,
                       match="no backward pass reached unused.weight, unused.bias: it would be moved by noise alone. "
                             "Freeze it"):
        private.step()
    assert private.steps_taken == 1


def test_zero_gradients_count_as_trained():
    """LoRA's A has a zero gradient at the start, a key's bias always: reached is not moved."""
    model = add_lora(tiny("bert"), rank=2)
    private = private_sgd(model)
    private.backward(plain_losses(model, padded_batch(model)))
    query = "bert.encoder.layer.0.attention.self.query"
    assert float(private.clipped_sum()[f"{query}.lora_A.default.weight"].abs().sum()) == 0
    private.step()


def test_running_statistics_of_private_data_are_refused():
    """A buffer that follows the batch is released without noise, and later losses depend on it."""

    class Queue(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            h = self.layer(x)
            self.mean.mul_(0.9).add_(h.detach().mean(0))
            return h

    model = Queue()
    private = private_sgd(model)
    with pytest.raises(ValueError, match="mean"):
        private.backward(squares(model, x_of(4)))
        private.step()


def test_hooks_that_step_by_themselves_are_refused():
    """An optimizer inside the backward pass would use a gradient and clear it before anybody looks."""
    model = linear()
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    private = private_sgd(model)
    with pytest.raises(ValueError, match="weight has a post-accumulate-grad hook, which could step past the clipper"):
        private.backward(squares(model, x_of(4)))


def test_too_many_steps_are_refused():
    model = linear()
    private = private_sgd(model, plan_for_tests(num_steps=2, noise_multiplier=1.0))
    private.step()
    private.step()
    after = snapshot(model)
    with pytest.raises(ValueError, match="the plan pays for 2 steps and all are taken: make a plan with more steps"):
        private.step()
    assert torch.equal(model.weight, after["weight"])
    assert private.epsilon() == private.plan.epsilon()


def test_an_interrupted_step_is_paid_for():
    """Whoever stops a run while the optimizer is at work has weights that have moved: the step counts."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private, before = make_private(model, optimizer, plan_for_tests(noise_multiplier=1.0)), snapshot(model)

    def stop(*_):
        raise KeyboardInterrupt

    hook = optimizer.register_step_post_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        private.step()
    hook.remove()
    assert not torch.equal(model.weight, before["weight"])
    assert private.steps_taken == 1 and private.epsilon() == private.plan.epsilon(num_steps=1)
    assert all(p.grad is None for p in model.parameters())


def test_stale_and_repeated_graphs_are_refused_by_torch():
    """Weights changed between forward and backward, or the same losses twice (one example would count 2 C)."""
    model = linear()
    private = private_sgd(model)
    losses = squares(model, x_of(4))
    with torch.no_grad():
        model.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        private.backward(losses)
    assert private.clipped_sum() == {}
    losses = squares(model, x_of(4))
    private.backward(losses)
    with pytest.raises(ValueError, match="private.backward came again without a model call before it"):
        private.backward(losses)


def test_two_losses_of_one_model_call_are_refused():
    """Two heads on a frozen body: each backward by itself is bounded by C, the example by 2 C."""
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first, self.second = linear().requires_grad_(False), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            h = self.body(x)
            return [head(h).square().sum(1) for head in (self.first, self.second)]

    private = private_sgd(model := TwoHeads())
    first, second = model(x_of(4))
    private.backward(first)
    with pytest.raises(ValueError, match="losses_a [+] losses_b"):
        private.backward(second)
    private.zero_grad()
    private.backward(sum(model(x_of(4))))
    private.step()


def test_swapped_parameters_are_refused():
    """functional_call computes with other tensors than the ones that are clipped and stepped."""
    model = linear()
    private = private_sgd(model)
    other = {name: 3 * p for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="a parameter of Linear was replaced since make_private"):
        private.backward(torch.func.functional_call(model, other, (x_of(4),)).square().sum(1))


def test_second_derivatives_are_refused():
    """A gradient penalty goes through the weights a second time, past the layers' forward."""
    model, x = nn.Sequential(linear(), nn.Tanh(), linear(width=(4, 2))), x_of(4).requires_grad_()
    private = private_sgd(model)
    losses = squares(model, x)
    [slope] = torch.autograd.grad(losses.sum(), [x], create_graph=True)
    with pytest.raises(ValueError):
        private.backward(losses + slope.square().sum(1))
        private.step()


def test_a_copy_of_a_private_model_computes_with_its_own_weights():
    """An average or a best model kept aside must not be the original in disguise, nor record into its sums."""
    model = linear()
    private = private_sgd(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.weight.zero_(), copied.bias.zero_()
        assert copied(x_of(4)).abs().max() == 0
    assert not squares(copied, x_of(4)).detach().any()
    private.backward(squares(model, x_of(4)))
    private.step()


# --------------------------------------------------------------------------------------------------------------- resume
def examples(count=40):
    generator = seeded(3)
    return [{"input_ids": torch.randint(3, 101, (3 + i % 4,), generator=generator).tolist(),
             "attention_mask": [1] * (3 + i % 4), "labels": i % 2} for i in range(count)]


RESUME_PLAN = dict(dataset_size=40, expected_batch_size=4, num_steps=6, noise_multiplier=1.0, delta=1e-3)


def session(seed, plan=None, **options):
    model = tiny("bert", hidden=16, layers=1)
    plan = plan or plan_for_tests(**RESUME_PLAN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    private = make_private(model, optimizer, plan, noise_generator=seeded(seed), **options)
    return model, private, poisson_batches(examples(), plan, 4, generator=seeded(seed + 100))


def run(model, private, batches, steps):
    moves = []
    for _, batch in zip(range(steps), batches):
        for micro_batch in batch:
            private.backward(plain_losses(model, micro_batch))
        private.step()
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return moves


def test_a_run_cut_in_two_is_the_same_run():
    """Trap 4. Six steps against three, a checkpoint read with weights_only=True, and three more in a process with other
    seeds."""
    whole_model, whole_private, whole_batches = session(seed=1)
    whole = run(whole_model, whole_private, whole_batches, 6)

    model, private, batches = session(seed=1)
    first = run(model, private, batches, 3)
    file = io.BytesIO()
    torch.save(private.state_dict(batches), file)
    file.seek(0)
    model, private, batches = session(seed=2)
    private.load_state_dict(torch.load(file, weights_only=True), batches)
    assert private.epsilon() == private.plan.epsilon(num_steps=3)
    second = run(model, private, batches, 6)

    assert len(second) == 3  # the sampler knows that three batches are left
    for got, want in zip(first + second, whole):
        assert torch.equal(got, want)
    assert private.epsilon() == whole_private.epsilon() == private.plan.epsilon()
    with pytest.raises(ValueError, match="the plan pays for 6 steps"):
        private.step()


def test_a_resumed_run_goes_on_with_its_dropout():
    """Weights after two steps at once, and after one, a state, and one more in a process that has drawn other random numbers."""
    def one(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
        return model, private_sgd(model, plan_for_tests(noise_multiplier=1.0), seed=3)

    def step(model, private, number):
        private.backward(model(x_of(5, seed=number)).square().sum(1))
        private.step()

    model, private = one(seed=1)
    step(model, private, 0)
    state = private.state_dict()
    step(model, private, 1)
    again, resumed = one(seed=2)
    resumed.load_state_dict(state)
    step(again, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_resumed_run_does_not_repeat_noise():
    """The noise of steps 4 to 6 is none of that of steps 1 to 3, though the process starts with the same seed."""
    plan = plan_for_tests(**RESUME_PLAN)

    def noise(steps, state=None):
        model = linear(width=WIDE)
        private = private_sgd(model, plan, seed=7)
        if state:
            private.load_state_dict(state)
        drawn = []
        for _ in range(steps):
            before = snapshot(model)
            private.step()
            drawn.append((model.weight.detach() - before["weight"]).flatten())
        return drawn, private.state_dict()

    first, state = noise(3)
    second, _ = noise(3, state)
    correlations = torch.corrcoef(torch.stack(first + second)) - torch.eye(6)
    assert correlations.abs().max() < 5 / first[0].numel()**0.5


def test_resuming_without_the_sampler_draws_fresh_noise():
    """Other batches under the same noise could be subtracted: two runs from one checkpoint must not share it."""
    plan, state = plan_for_tests(**RESUME_PLAN), None
    drawn = []
    for _ in range(2):
        model = linear(width=WIDE)
        private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), plan)
        state = state or private.state_dict()
        private.load_state_dict(state)
        before = snapshot(model)
        private.step()
        drawn.append((model.weight.detach() - before["weight"]).flatten())
    assert abs(torch.corrcoef(torch.stack(drawn))[0, 1]) < 5 / drawn[0].numel()**0.5


def test_untrained_parameters_are_looked_for_again_after_a_resume():
    model, private, batches = session(seed=1)
    run(model, private, batches, 2)
    state = private.state_dict(batches)
    model, private, batches = session(seed=1)
    private.load_state_dict(state, batches)
    run(model, private, batches, 1)
    assert private.steps_taken == 3


def test_verify_sensitivity_sees_what_a_neighbours_padding_does():
    """Labels of 0 under padding are targets: with the longest text they go."""
    model = tiny("gpt2", "causal_lm", True)
    ids = torch.randint(3, 90, (5, 16), generator=seeded(0))
    mask = (torch.arange(16) < torch.tensor([3, 3, 4, 3, 16])[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    wrong = verify_sensitivity(model, causal_lm_losses, {**batch, "labels": ids * mask}, 0.1)
    right = verify_sensitivity(model, causal_lm_losses, {**batch, "labels": ids.masked_fill(mask == 0, -100)}, 0.1)
    assert wrong.max_contribution > 0.105 and not wrong.holds and right.holds


def test_going_back_to_a_state_is_refused():
    """It would forget the steps since, whose ε is spent, and draw their noise again on other sums."""
    model, private, batches = session(seed=1)
    run(model, private, batches, 1)
    state = private.state_dict(batches)
    kept = {name: tensor.clone() for name, tensor in state["model"].items()}
    run(model, private, batches, 2)
    assert all(torch.equal(state["model"][name], kept[name]) for name in kept)  # later steps do not write into it
    with pytest.raises(ValueError, match="3 steps were taken, and going back to a state does not give their ε back"):
        private.load_state_dict(state, batches)


def test_batches_of_another_plan_are_refused():
    model, private, _ = session(seed=1)
    other = poisson_batches(range(private.plan.dataset_size), dataclasses.replace(private.plan, noise_multiplier=9.0))
    with pytest.raises(ValueError, match="the batches were made with another plan"):
        private.state_dict(other)
    shuffled = private_sgd(linear(), private.plan.with_sampling("shuffled"))
    with pytest.raises(ValueError, match="a shuffled plan pays for every example once an epoch"):
        shuffled.state_dict()


def test_states_that_do_not_fit_are_refused():
    model, private, batches = session(seed=1)
    iterator = iter(batches)
    next(iterator)
    with pytest.raises(ValueError, match="1 batches were drawn but 0 steps taken: every batch, the empty ones too"):
        private.state_dict(batches)
    private.step()
    state = private.state_dict(batches)
    bare = private.state_dict()
    iterator.close()
    private.backward(plain_losses(model, padded_batch(model, tokens=4)))
    with pytest.raises(ValueError, match="a batch is half done: take the state after private.step"):
        private.state_dict(batches)

    for change, name in ((dict(noise_multiplier=2.0), "noise_multiplier"), (dict(max_grad_norm=0.2), "max_grad_norm"),
                         (dict(dataset_size=41), "dataset_size"), (dict(num_steps=7), "num_steps")):
        model, other, batches = session(seed=1, plan=plan_for_tests(**{**RESUME_PLAN, **change}))
        before = snapshot(model)
        with pytest.raises(ValueError,
                           match=f"the checkpoint belongs to another run: {name} is .* there and .* here. Resume with "
                                 f"its own"):
            other.load_state_dict(state, batches)
        assert other.steps_taken == 0 and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    _, other, batches = session(seed=1, clipping="automatic")
    with pytest.raises(ValueError, match="clipping is 'flat' there and 'automatic' here"):
        other.load_state_dict(state, batches)
    _, other, batches = session(seed=1)
    with pytest.raises(ValueError, match="pass the sampler to both state_dict and load_state_dict, or to neither"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="pass the sampler to both"):
        other.load_state_dict(bare, batches)

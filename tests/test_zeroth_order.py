"""Zeroth-order training: the estimator against gradients, the clip, the noise, Laplace's ε by two routes, the trap of a
shared seed. Directions are read from outside, by what the loss sees of the parameters, never from the module."""

import io
import math

import numpy as np
import pytest
import torch
from tests.models import padded_batch, plain_losses, plan_for_tests, seeded, shake, tiny
from scipy import stats
from torch import nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_selection import poisson_batches
from memarc_utils.memory import measure_step
from memarc_utils.zeroth_order import laplace_epsilon, laplace_noise_multiplier, make_zeroth_order


class Quadratic(nn.Module):
    """ℓ_i(θ) = ½ θᵀAθ + x_i·θ over two parameters: central differences have no error here, ∇ℓ_i = Aθ + x_i."""

    def __init__(self, width=12, dtype=torch.float64):
        super().__init__()
        generator = seeded(5)
        draw = torch.randn(width, width, generator=generator, dtype=dtype)
        self.register_buffer("curvature", draw @ draw.T / width)
        start = torch.randn(width, generator=generator, dtype=dtype)
        self.first, self.second = nn.Parameter(start[:5].clone()), nn.Parameter(start[5:].clone())

    @property
    def theta(self):
        return torch.cat([self.first, self.second])

    def gradients(self, x):
        return (self.curvature @ self.theta + x).detach()


def quadratic_losses(model, batch):
    return 0.5 * model.theta @ model.curvature @ model.theta + batch["x"] @ model.theta


def inputs(size=4, width=12, scale=1.0, seed=0):
    return {"x": scale * torch.randn(size, width, generator=seeded(seed), dtype=torch.float64)}


class Spy:
    """A loss that notes θ at every call, so that z_k = (θ₊ − θ₋)/2λ is known from outside."""

    def __init__(self, losses=quadratic_losses):
        self.losses, self.seen = losses, []

    def __call__(self, model, batch):
        self.seen.append(model.theta.detach().clone())
        return self.losses(model, batch)

    def directions(self, perturbation=1e-3):
        pairs = zip(self.seen[::2], self.seen[1::2])
        found = torch.stack([(above - below) / (2 * perturbation) for above, below in pairs])
        self.seen = []
        return found


def zeroth(model, plan=None, learning_rate=1.0, **options):
    options = {"noise_generator": seeded(1), "direction_seed_generator": seeded(2), **options}
    return make_zeroth_order(model, plan or plan_for_tests(num_steps=100_000), learning_rate, **options)


def published(optimizer, batch, losses=quadratic_losses):
    """One step; returns (z, s): the directions, and the K numbers that the update gives away. θ is put back."""
    model, spy = optimizer.model, Spy(losses)
    start = model.theta.detach().clone()
    optimizer.step([batch], spy)
    update = start - model.theta.detach()
    z = spy.directions()
    scale = optimizer.learning_rate / (optimizer.plan.expected_batch_size * len(z))
    numbers = torch.linalg.lstsq(z.T, update[:, None] / scale).solution[:, 0]
    with torch.no_grad():
        model.first.copy_(start[:5]), model.second.copy_(start[5:])
    return z, numbers


def clipped_by_hand(differences, bound, order):
    norms = differences.abs().sum(1) if order == 1 else differences.square().sum(1).sqrt()
    return torch.stack([row if norm <= bound else row * bound / norm for row, norm in zip(differences, norms)]).sum(0)


# ----------------------------------------------------------------------------------------------------- the estimator
@pytest.mark.parametrize("num_directions", [1, 4])
def test_the_mean_is_the_gradient_and_the_variance_is_d_plus_one(num_directions):
    model, batch, draws = Quadratic(), inputs(), 1500
    optimizer = zeroth(model, plan_for_tests(num_steps=draws, max_grad_norm=1e9), num_directions=num_directions)
    start, updates = model.theta.detach().clone(), []
    for _ in range(draws):
        optimizer.step([batch], quadratic_losses)
        updates.append(start - model.theta.detach())
        with torch.no_grad():
            model.first.copy_(start[:5]), model.second.copy_(start[5:])
    updates, gradient = torch.stack(updates), model.gradients(batch["x"]).mean(0)
    expected = (len(gradient) + 1) / num_directions
    variance = (updates - gradient).square().sum(1).mean() / gradient.square().sum()
    assert abs(variance / expected - 1) < 0.15  # E‖z zᵀg − g‖² = (d + 1)‖g‖², over K
    bias = (updates.mean(0) - gradient).norm() / gradient.norm()
    assert bias < 3 * math.sqrt(expected / draws)
    assert bias < 0.3  # a missing 1/K, 1/B or 1/2 is off by 0.5 at least


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
@pytest.mark.parametrize("num_directions", [1, 3, 7])
@pytest.mark.parametrize("bound", [0.5, 6.0, 1e6])
def test_a_step_is_the_formula(noise, num_directions, bound):
    model, batch = Quadratic(), inputs(size=6)
    plan = plan_for_tests(max_grad_norm=bound)
    z, numbers = published(zeroth(model, plan, 0.3, num_directions=num_directions, noise=noise), batch)
    differences = model.gradients(batch["x"]) @ z.T
    expected = clipped_by_hand(differences, bound, {"gaussian": 2, "laplace": 1}[noise])
    assert torch.allclose(numbers, expected, rtol=1e-6, atol=1e-8)


def test_directions_are_standard_normal_and_differ_between_steps_directions_and_parameters():
    model = Quadratic()
    optimizer = zeroth(model, num_directions=4)
    z = torch.cat([published(optimizer, inputs())[0] for _ in range(500)])
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z.T.numpy()) - np.eye(12)).max() < 0.1
    assert len({tuple(row.tolist()) for row in z}) == len(z)


def test_micro_batches_do_not_change_the_step():
    whole, cut = Quadratic(), Quadratic()
    batch = inputs(size=5)
    zeroth(whole, num_directions=2).step([batch], quadratic_losses)
    zeroth(cut, num_directions=2).step(({"x": batch["x"][i:i + 2]} for i in range(0, 5, 2)), quadratic_losses)
    assert torch.allclose(whole.theta, cut.theta, rtol=1e-12)


# --------------------------------------------------------------------------------------------------------- privacy
@pytest.mark.parametrize(("noise", "order"), [("gaussian", 2), ("laplace", 1)])
@pytest.mark.parametrize("num_directions", [1, 5])
def test_one_example_moves_the_numbers_by_at_most_c(noise, order, num_directions):
    batch, bound = inputs(size=6, scale=3.0), 0.7
    batch["x"][2] *= 1e6

    def numbers(rows):
        optimizer = zeroth(Quadratic(), plan_for_tests(max_grad_norm=bound), num_directions=num_directions, noise=noise)
        return published(optimizer, {"x": batch["x"][rows]})[1]

    everyone = list(range(6))
    moved = [float((numbers(everyone) - numbers([j for j in everyone if j != i])).norm(order)) for i in everyone]
    assert max(moved) <= bound * (1 + 1e-6)
    assert max(moved) >= bound * (1 - 1e-6)  # reached, so a clip to less or by the other norm would show


@pytest.mark.parametrize(("noise", "law"), [("gaussian", "norm"), ("laplace", "laplace")])
@pytest.mark.parametrize("source", ["system", "generator"])
def test_noise_has_its_law_and_scale(noise, law, source):
    steps, directions, bound, multiplier = 800, 4, 0.5, 0.8
    plan = plan_for_tests(num_steps=steps, max_grad_norm=bound, noise_multiplier=multiplier)
    generator = seeded(3) if source == "generator" else None
    optimizer = zeroth(Quadratic(), plan, num_directions=directions, noise=noise, noise_generator=generator)
    silent = [published(optimizer, inputs(1), lambda model, batch: torch.zeros(1)) for _ in range(steps)]
    draws = torch.stack([numbers for _, numbers in silent])
    values, scale = draws.flatten().numpy(), multiplier * bound
    assert stats.kstest(values, law, args=(0, scale)).pvalue > 1e-5
    for factor in (2, 0.7, directions**-0.5):  # C lost, a wrong σ, 1/√K
        assert stats.kstest(values, law, args=(0, scale * factor)).pvalue < 1e-7
    assert (stats.kurtosis(values) < 1) == (noise == "gaussian")  # 0 or 3: the other law would show
    assert abs(np.corrcoef(draws.T.numpy()) - np.eye(directions)).max() < 0.16
    first = torch.stack([z[0, 0] for z, _ in silent])
    assert abs(np.corrcoef(first.numpy(), draws[:, 0].numpy())[0, 1]) < 0.16  # noise knows nothing of the direction


def test_an_empty_batch_takes_its_noise_step():
    model = Quadratic()
    optimizer = zeroth(model, plan_for_tests(noise_multiplier=1.0), num_directions=2)
    start = model.theta.detach().clone()
    optimizer.step([], quadratic_losses)
    assert optimizer.steps_taken == 1 and optimizer.epsilon() > 0
    assert (model.theta - start).norm() > 1e-3


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_an_example_that_is_not_finite_contributes_zero_and_is_counted(noise):
    bad, good = inputs(size=4), inputs(size=4)
    bad["x"][1], bad["x"][3] = math.inf, math.nan
    results = []
    for batch in (bad, {"x": good["x"][[0, 2]]}):
        optimizer = zeroth(Quadratic(), num_directions=2, noise=noise)
        optimizer.step([batch], quadratic_losses)
        results.append((optimizer.model.theta.detach(), optimizer.examples_dropped))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
    assert [dropped for _, dropped in results] == [2, 0]


# ---------------------------------------------------------------------------------------------------- the seed trap
def test_trap_noise_from_the_generator_just_reseeded_with_the_directions_seed():
    """The published order of calls: seed, draw z, measure, seed again, draw z again while updating, then the noise."""
    private, deviation, seed, width = 0.731, 50.0, 1234, 12
    shared = torch.Generator().manual_seed(seed)
    z = torch.randn(width, generator=shared)
    update = z * (private + deviation * torch.randn(1, generator=shared))
    attacker = torch.Generator().manual_seed(seed)
    known_z = torch.randn(width, generator=attacker)
    recovered = update @ known_z / (known_z @ known_z) - deviation * torch.randn(1, generator=attacker)
    assert abs(float(recovered) - private) < 1e-4

    errors = []
    for step in range(20):  # the same attack on ours: all seeds that directions come from are known, the noise is not
        plan = plan_for_tests(noise_multiplier=deviation, max_grad_norm=1.0)
        ours = zeroth(Quadratic(), plan, noise_generator=None, direction_seed_generator=seeded(step))
        _, (number,) = published(ours, inputs(1), lambda model, batch: torch.zeros(1))
        guesses = []
        for known in (step, int(torch.randint(2**63 - 1, (1, 2), generator=seeded(step))[0, 1])):
            attacker = torch.Generator().manual_seed(known)
            guesses += (deviation * torch.randn(40, generator=attacker, dtype=torch.float64)).tolist()
        errors.append(min(abs(float(number) - guess) for guess in guesses))
    assert np.median(errors) > 1e-3


def test_generators_that_share_anything_are_refused():
    for name in ("noise_generator", "direction_seed_generator"):
        with pytest.raises(ValueError, match=f"{name} is torch's global generator"):
            zeroth(Quadratic(), **{name: torch.default_generator})
    one = seeded(4)
    for other in (one, seeded(4), seeded(4 + 2**32)):  # the CPU's generator keeps 32 bits of its seed
        with pytest.raises(ValueError, match="from one seed"):
            zeroth(Quadratic(), noise_generator=one, direction_seed_generator=other)
    assert torch.equal(torch.randn(9, generator=seeded(4)), torch.randn(9, generator=seeded(4 + 2**32)))
    with pytest.warns(UserWarning, match="never seeded"):
        zeroth(Quadratic(), noise_generator=torch.Generator())


def test_the_system_never_repeats_noise_and_no_global_generator_moves():
    before = torch.get_rng_state()
    numbers = []
    for _ in range(2):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        plan = plan_for_tests(noise_multiplier=1.0)
        optimizer = zeroth(Quadratic(), plan, noise_generator=None, num_directions=2)
        numbers.append(published(optimizer, inputs())[1])
        assert torch.equal(before, torch.get_rng_state())
    assert (numbers[0] - numbers[1]).abs().min() > 0


# -------------------------------------------------------------------------------------------- what a step leaves behind
def test_parameters_come_back_to_rounding():
    model = Quadratic(dtype=torch.float32)
    start = model.theta.detach().clone()
    optimizer = zeroth(model, learning_rate=0.0, num_directions=8)
    for _ in range(250):
        optimizer.step([{"x": inputs()["x"].float()}], quadratic_losses)
    drift = (model.theta - start).abs().max() / start.abs().max()
    assert drift < 1e-5  # 6,000 additions; they walk as √6000 · 2⁻²⁴ ≈ 5e-6
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_an_interrupted_step_puts_the_parameters_back_and_is_not_counted(call):
    model, spy = Quadratic(), Spy()

    def losses(model, batch):
        if len(spy.seen) == call:
            raise RuntimeError("out of memory")
        return spy(model, batch)

    start = model.theta.detach().clone()
    optimizer = zeroth(model, num_directions=2, perturbation=0.5)
    model.train()
    with pytest.raises(RuntimeError):
        optimizer.step([inputs()], losses)
    assert torch.allclose(model.theta, start, rtol=1e-12, atol=1e-12)
    assert optimizer.steps_taken == 0 and model.training


def test_only_what_requires_a_gradient_moves_and_a_tied_parameter_once():
    model = Quadratic()
    model.third = model.first  # tied: named once
    model.second.requires_grad_(False)
    frozen = model.second.detach().clone()
    spy = Spy()
    optimizer = zeroth(model)
    optimizer.step([inputs()], spy)
    z = spy.directions()
    assert torch.equal(model.second, frozen)
    assert 0.2 < float(z[0, :5].square().mean()) < 4 and not z[0, 5:].any()


def test_dropout_is_off_during_a_step_and_comes_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    model[0].eval()
    model[1].train()
    seen = []

    def losses(model, batch):
        seen.append(any(module.training for module in model.modules()))
        return model(batch["x"])[:, 0]

    zeroth(model).step([{"x": torch.ones(2, 3)}], losses)
    assert seen == [False] * 3  # the third: half of the rows alone
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_memory_is_that_of_inference():
    model = tiny("bert")
    batch = padded_batch(model, batch=16, tokens=24)
    optimizer = zeroth(model, plan_for_tests(num_steps=10), num_directions=2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        optimizer.step([batch], plain_losses)
        assert saved == []
        plain_losses(model, batch)
    assert saved  # the hooks do see an ordinary forward pass

    def inference():
        with torch.no_grad():
            plain_losses(model.eval(), batch)

    def training():
        plain_losses(model.eval(), batch).mean().backward()
        model.zero_grad(set_to_none=True)

    largest = max(p.numel() * p.element_size() for p in model.parameters())
    ours, forward, backward = (measure_step(step, repeats=1).peak_bytes for step in (
        lambda: optimizer.step([batch], plain_losses), inference, training))
    assert ours <= max(forward, 3 * largest) + 20_000
    assert backward > 3 * ours


# ------------------------------------------------------------------------------------------------------------ resume
@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_a_run_cut_in_two_is_the_same_run(noise):
    def prepared():
        model = shake(tiny("bert"))
        rows = padded_batch(model, batch=20)
        data = [{name: t[i] for name, t in rows.items()} for i in range(20)]
        plan = PrivacyPlan(dataset_size=20, expected_batch_size=4, num_steps=6, noise_multiplier=1.0, max_grad_norm=0.1,
                           delta=1e-3)
        optimizer = zeroth(model, plan, 0.1, num_directions=2, noise=noise)
        return model, optimizer, poisson_batches(data, plan, 3, generator=seeded(9))

    def take(optimizer, batches, steps):
        for batch in batches:
            optimizer.step(batch, plain_losses)
            if optimizer.steps_taken == steps:
                return

    model, optimizer, batches = prepared()
    take(optimizer, batches, 6)
    first, optimizer_1, batches_1 = prepared()
    take(optimizer_1, batches_1, 3)
    file = io.BytesIO()
    torch.save(optimizer_1.state_dict(batches_1), file)
    file.seek(0)
    second, optimizer_2, batches_2 = prepared()
    optimizer_2.load_state_dict(torch.load(file, weights_only=True), batches_2)
    take(optimizer_2, batches_2, 6)
    for (name, one), other in zip(model.named_parameters(), second.parameters()):
        assert torch.equal(one, other), name
    assert optimizer_2.steps_taken == 6 and optimizer_2.epsilon() == optimizer.epsilon() > optimizer_1.epsilon() > 0
    with pytest.raises(ValueError, match="all are taken"):
        optimizer_2.step([], plain_losses)


def test_resume_refuses_another_run():
    state = zeroth(Quadratic(), num_directions=2).state_dict()
    with pytest.raises(ValueError, match="num_directions is 2 there and 1 here"):
        zeroth(Quadratic()).load_state_dict(state)
    with pytest.raises(ValueError, match="noise is 'gaussian' there and 'laplace' here"):
        zeroth(Quadratic(), num_directions=2, noise="laplace").load_state_dict(state)
    with pytest.raises(ValueError, match="noise_generator to both"):
        zeroth(Quadratic(), num_directions=2, noise_generator=None).load_state_dict(state)
    with pytest.raises(ValueError, match="trainable parameters are others: second"):
        zeroth(Quadratic(width=13), num_directions=2).load_state_dict(state)
    optimizer = zeroth(Quadratic())
    batches = poisson_batches([{"x": 1}] * 1000, optimizer.plan, generator=seeded(0))
    next(iter(batches))
    with pytest.raises(ValueError, match="1 batches were drawn but 0 steps taken"):
        optimizer.state_dict(batches)
    with pytest.raises(ValueError, match="the sampler to both"):
        optimizer.load_state_dict(optimizer.state_dict(), batches)
    state = optimizer.state_dict()
    optimizer.step([], quadratic_losses)
    with pytest.raises(ValueError, match="1 steps were taken, and going back to a state does not give their ε back"):
        optimizer.load_state_dict(state)
    other = poisson_batches([{"x": 1}] * 1000, plan_for_tests(noise_multiplier=7.0))
    with pytest.raises(ValueError, match="the batches were made with another plan"):
        optimizer.state_dict(other)


# -------------------------------------------------------------------------------------------------------- accounting
def test_gaussian_epsilon_is_the_plans():
    optimizer = zeroth(Quadratic(), plan_for_tests(noise_multiplier=1.0))
    assert optimizer.epsilon() == 0.0
    optimizer.step([], quadratic_losses)
    optimizer.step([], quadratic_losses)
    assert optimizer.epsilon() == optimizer.plan.epsilon(num_steps=2)
    assert optimizer.epsilon("rdp") == optimizer.plan.epsilon("rdp", num_steps=2)


def test_laplace_epsilon_of_an_optimizer():
    optimizer = zeroth(Quadratic(), plan_for_tests(noise_multiplier=2.0), noise="laplace")
    assert optimizer.epsilon() == optimizer.epsilon("pure") == 0.0
    optimizer.step([], quadratic_losses)
    assert optimizer.epsilon("pure") == pytest.approx(math.log(1 + 0.004 * (math.exp(0.5) - 1)))
    assert 0 < optimizer.epsilon() <= optimizer.epsilon("pure")
    with pytest.raises(ValueError, match='"pld" or "pure"'):
        optimizer.epsilon("rdp")


@pytest.mark.parametrize(("b", "q"), [(0.5, 1.0), (1.0, 0.1), (3.0, 0.02)])
def test_pure_epsilon_is_the_largest_log_ratio_of_the_densities(b, q):
    x = np.linspace(-20, 20, 400_001)
    with_it = (1 - q) * stats.laplace.pdf(x, 0, b) + q * stats.laplace.pdf(x, 1, b)
    ratio = np.log(with_it / stats.laplace.pdf(x, 0, b))
    got = laplace_epsilon(noise_multiplier=b, sample_rate=q, num_steps=7, delta=0.0)
    assert got == pytest.approx(7 * abs(ratio).max(), rel=1e-6)


@pytest.mark.parametrize("delta", [1e-5, 1e-2, 0.2])
def test_one_laplace_step_in_closed_form(delta):
    """δ(ε) = 1 − e^{(ε − ε₀)/2}, so ε = ε₀ + 2 log(1 − δ)."""
    got = laplace_epsilon(noise_multiplier=0.5, sample_rate=1.0, num_steps=1, delta=delta)
    assert got == pytest.approx(2 + 2 * math.log(1 - delta), abs=1e-3)


def laplace_delta_by_hand(epsilon, b, q, steps, points=2000):
    """δ(ε) by convolving one step's losses, rounded up to a grid (an upper bound), the worse of the two directions."""
    x = np.linspace(-40 * b, 1 + 40 * b, 2_000_001)
    without = stats.laplace.cdf(x, 0, b)
    mixed = (1 - q) * without + q * stats.laplace.cdf(x, 1, b)
    densities = (1 - q) * stats.laplace.pdf(x, 0, b) + q * stats.laplace.pdf(x, 1, b), stats.laplace.pdf(x, 0, b)
    loss = np.log(densities[0] / densities[1])
    width = abs(loss).max() / points
    worst = 0.0
    for masses, sign in ((np.diff(mixed), 1), (np.diff(without), -1)):
        ends = np.maximum(sign * loss[1:], sign * loss[:-1])
        index = np.ceil(ends / width - 1e-9).astype(int) + points + 1
        one = np.bincount(index, masses, 2 * points + 3)
        size = 2 ** math.ceil(math.log2(steps * len(one)))
        total = np.maximum(np.fft.irfft(np.fft.rfft(one, size) ** steps, size), 0)
        losses = (np.arange(size) - steps * (points + 1)) * width
        above = losses > epsilon
        worst = max(worst, float((total[above] * -np.expm1(epsilon - losses[above])).sum()))
    return worst


@pytest.mark.parametrize(("b", "q", "steps"), [(1.0, 0.1, 30), (0.4, 0.05, 10), (2.0, 1.0, 12), (3.0, 0.02, 400)])
def test_composed_laplace_epsilon_against_a_convolution(b, q, steps):
    delta = 1e-5
    got = laplace_epsilon(noise_multiplier=b, sample_rate=q, num_steps=steps, delta=delta)
    assert laplace_delta_by_hand(got * 1.01, b, q, steps) < delta < laplace_delta_by_hand(got * 0.99, b, q, steps)
    assert got < laplace_epsilon(noise_multiplier=b, sample_rate=q, num_steps=steps, delta=0.0)


@pytest.mark.parametrize("q", [1.0, 0.2])
@pytest.mark.parametrize("shift", [(0.5, 0.5), (0.9, 0.1), (0.3, 0.2)])
def test_several_numbers_moved_by_c_in_total_hide_at_least_as_well_as_one(q, shift):
    """Hockey-stick divergence of the two-number mechanism by quadrature, against the scalar one's: never above."""
    b, x = 0.7, np.linspace(-12, 13, 2501)
    cell = (x[1] - x[0]) ** 2
    base = [stats.laplace.pdf(x, 0, b), stats.laplace.pdf(x, 0, b)]
    moved = [stats.laplace.pdf(x, s, b) for s in shift]
    without = np.outer(*base)
    mixed = (1 - q) * without + q * np.outer(*moved)
    line = np.linspace(-30, 31, 1_000_001)
    single = stats.laplace.pdf(line, 0, b)
    single_mixed = (1 - q) * single + q * stats.laplace.pdf(line, 1, b)
    for epsilon in (0.0, 0.1, 0.3, 0.8, 1.2):
        for two, one in (((mixed, without), (single_mixed, single)), ((without, mixed), (single, single_mixed))):
            ours = np.maximum(two[0] - math.exp(epsilon) * two[1], 0).sum() * cell
            bound = np.maximum(one[0] - math.exp(epsilon) * one[1], 0).sum() * (line[1] - line[0])
            assert ours <= bound + 2e-4


@pytest.mark.parametrize("delta", [0.0, 1e-5])
@pytest.mark.parametrize(("target", "q", "steps"), [(6.0, 0.025, 300), (0.5, 1.0, 10), (3.0, 0.1, 1)])
def test_calibration_is_the_inverse(delta, target, q, steps):
    b = laplace_noise_multiplier(target_epsilon=target, sample_rate=q, num_steps=steps, delta=delta)
    spent = laplace_epsilon(noise_multiplier=b, sample_rate=q, num_steps=steps, delta=delta)
    assert target * 0.99 <= spent <= target * (1 + 1e-9)


def test_laplace_edges():
    run = dict(sample_rate=0.1, num_steps=5, delta=1e-5)
    assert laplace_epsilon(noise_multiplier=0.0, **run) == math.inf
    assert laplace_epsilon(noise_multiplier=1.0, **{**run, "num_steps": 0}) == 0.0
    tiny_noise = laplace_epsilon(noise_multiplier=1e-3, **{**run, "num_steps": 3, "delta": 1e-5})  # e^1000 is no float
    assert tiny_noise == pytest.approx(3 * (1000 + math.log(run["sample_rate"])), rel=1e-9)
    assert laplace_epsilon(noise_multiplier=1e-3, sample_rate=0.1, num_steps=1, delta=0.0) == pytest.approx(
        1000 + math.log(0.1))
    assert laplace_noise_multiplier(target_epsilon=1e4, sample_rate=0.1, num_steps=5, delta=0.0) == pytest.approx(
        1 / (2000 - math.log(0.1)))


# ------------------------------------------------------------------------------------------------------------ refused
def test_real_models_train_from_poisson_batches():
    model = tiny("bert")
    rows = padded_batch(model, batch=20)
    data = [{name: t[i] for name, t in rows.items()} for i in range(20)]
    plan = PrivacyPlan(dataset_size=20, expected_batch_size=2, num_steps=8, noise_multiplier=1.0, max_grad_norm=0.1,
                       delta=1e-3)
    optimizer = make_zeroth_order(model, plan, 0.01, num_directions=2)
    for batch in poisson_batches(data, plan, 2):
        optimizer.step(batch, plain_losses)
    assert optimizer.steps_taken == 8 and optimizer.examples_dropped == 0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": "a plan"}, "must be a PrivacyPlan"),
        ({"noise": "uniform"}, "one of gaussian, laplace"),
        ({"noise": "laplace", "plan": plan_for_tests(sampling="shuffled")}, "Poisson batches only"),
        ({"perturbation": 0.0}, "perturbation=0.0 is out of range"),
        ({"perturbation": math.nan}, "not a finite number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is out of range"),
        ({"learning_rate": "fast"}, "not a finite number"),
        ({"num_directions": 0}, "whole number >= 1"),
        ({"num_directions": 2.0}, "whole number >= 1"),
        ({"model": nn.Linear(2, 1).requires_grad_(False)}, "no parameter has requires_grad"),
        ({"model": nn.Linear(2, 1).half()}, "weight is torch.float16"),
        ({"model": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))}, "1 is a BatchNorm1d"),
        ({"noise_generator": 3}, "must be a torch.Generator or None"),
    ],
)
def test_bad_arguments_are_named(change, said):
    arguments = {"model": Quadratic(), "plan": plan_for_tests(), "learning_rate": 0.1, **change}
    make = getattr(make_zeroth_order, "__wrapped__", make_zeroth_order)
    with pytest.raises(ValueError, match=said):
        make(**arguments)


@pytest.mark.parametrize(
    "losses",
    [lambda m, b: quadratic_losses(m, b).mean(), lambda m, b: quadratic_losses(m, b)[:, None],
     lambda m, b: quadratic_losses(m, b)[:2], lambda m, b: quadratic_losses(m, b).tolist()],
    ids=["mean", "2-D", "too few", "list"],
)
def test_losses_that_are_not_one_an_example_are_refused(losses):
    optimizer = zeroth(Quadratic())
    start = optimizer.model.theta.detach().clone()
    with pytest.raises(ValueError, match="return one loss an example"):
        optimizer.step([inputs()], losses)
    assert torch.allclose(optimizer.model.theta, start) and optimizer.steps_taken == 0


def test_a_spent_plan_is_refused():
    optimizer = zeroth(Quadratic(), plan_for_tests(num_steps=1))
    optimizer.step([], quadratic_losses)
    with pytest.raises(ValueError, match="pays for 1 steps"):
        optimizer.step([], quadratic_losses)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0 is out of range"),
        ({"sample_rate": 0.0}, "sample_rate=0.0 is out of range"),
        ({"sample_rate": 1.5}, "sample_rate=1.5 is out of range"),
        ({"delta": 1.0}, "delta=1.0 is out of range"),
        ({"num_steps": 1.5}, "num_steps=1.5 must be a whole number"),
    ],
)
def test_bad_laplace_arguments_are_named(change, said):
    function = getattr(laplace_epsilon, "__wrapped__", laplace_epsilon)
    with pytest.raises(ValueError, match=said):
        function(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "num_steps": 5, "delta": 1e-5, **change})
    inverse = getattr(laplace_noise_multiplier, "__wrapped__", laplace_noise_multiplier)
    with pytest.raises(ValueError, match="target_epsilon=0 is out of range"):
        inverse(target_epsilon=0, sample_rate=0.1, num_steps=5, delta=1e-5)
    with pytest.raises(ValueError, match="spends nothing"):
        inverse(target_epsilon=1.0, sample_rate=0.1, num_steps=0, delta=1e-5)


def test_a_direction_drawn_in_pieces_is_normal_and_comes_back(monkeypatch):
    """θ + z − z is θ, every row of a table that takes many pieces has moved, and no two pieces hold the same numbers."""
    monkeypatch.setattr("memarc_utils.zeroth_order.DIRECTION_PIECE", 300)
    table = nn.Embedding(400, 30)  # ten rows a piece
    optimizer = make_zeroth_order(table, plan_for_tests(), learning_rate=0.1)
    start, seeds = table.weight.detach().clone(), torch.tensor([7])
    optimizer._move(seeds, 1.0)
    z = table.weight.detach() - start
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3 and len(z.round(decimals=3).unique(dim=0)) == 400
    optimizer._move(seeds, -1.0)
    torch.testing.assert_close(table.weight.detach(), start, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- examples that meet
def probe_losses(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def rows_with_an_outlier():
    x = torch.randn(8, 5, generator=seeded(3))
    x[0] *= -30
    return {"x": x, "y": torch.arange(8) % 2}


@pytest.mark.parametrize("losses", [
    lambda model, b: nn.functional.cross_entropy(model(b["x"]), b["y"]).expand(len(b["y"])),
    lambda model, b: probe_losses(model, b) / len(b["y"]),
    lambda model, b: probe_losses(lambda x: nn.functional.batch_norm(model(x), None, None, training=True), b),
], ids=["a mean, expanded", "divided by the batch at hand", "batch norm"])
def test_losses_that_mix_examples_are_refused(losses):
    model = nn.Linear(5, 2)
    start = model.weight.detach().clone()
    optimizer = zeroth(model, num_directions=2)
    with pytest.raises(ValueError, match="the losses mix examples"):
        optimizer.step([rows_with_an_outlier()], losses)
    assert torch.allclose(model.weight, start, atol=1e-6) and optimizer.steps_taken == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_padding_that_moves_the_last_token_is_refused(family):
    """A decoder's head reads the last token that is not the pad token: of short rows beside a long one it would read the padding."""
    model = tiny(family)
    model.config.pad_token_id = 2
    batch = padded_batch(model)
    zeroth(model).step([batch], plain_losses)
    wrong = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)}
    optimizer = zeroth(model)
    with pytest.raises(ValueError, match="Pad with pad_token_id=2"):
        optimizer.step([wrong], plain_losses)
    assert optimizer.steps_taken == 0 and not model._forward_pre_hooks


@pytest.mark.parametrize("batch", [(torch.ones(3, 4, 5),), [torch.ones(3, 4, 5), {"y": torch.ones(3)}]], ids=["tuple", "list"])
def test_a_loss_for_each_token_is_refused_in_any_nesting(batch):
    with pytest.raises(ValueError, match=r"gave \(12,\) for 3 examples"):
        zeroth(nn.Linear(5, 2)).step([batch], lambda model, b: model(b[0]).square().sum(-1).flatten())
    with pytest.raises(ValueError, match="shows no tensor, so it cannot be known how many examples"):
        zeroth(nn.Linear(5, 2)).step([["a text", "another"]], lambda model, b: torch.zeros(2))


class Keeping(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layer, self.table, self.what = nn.Linear(5, 2), nn.Parameter(torch.zeros(5), requires_grad=False), what
        self.register_buffer("average", torch.zeros(5))

    def forward(self, x):
        if self.what == "layer.weight":
            self.layer.weight[0] += x.mean(0)
        elif self.what == "average":
            self.average += x.mean(0)
        else:
            self.table.data += x.mean(0)
        return self.layer(x)


@pytest.mark.parametrize(("what", "kind"), [("average", "buffer"), ("table", "frozen parameter"), ("layer.weight", "parameter")])
def test_what_a_forward_pass_writes_is_refused(what, kind):
    optimizer = zeroth(Keeping(what))
    with pytest.raises(ValueError, match=f"the {kind} {what} was written in a forward pass"):
        optimizer.step([rows_with_an_outlier()], probe_losses)
    assert optimizer.steps_taken == 0


def test_weights_may_be_loaded_between_two_steps():
    model = Keeping(None)
    model.forward = model.layer.forward
    optimizer = zeroth(model)
    for _ in range(3):
        optimizer.step([rows_with_an_outlier()], probe_losses)
        with torch.no_grad():
            model.table.add_(1), model.average.add_(1), model.layer.weight.mul_(0.5)

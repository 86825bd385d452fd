"""Private training without a backward pass: each step publishes K noisy numbers along K random directions.

DPZero (Zhang et al. 2023, arXiv 2310.09639, Algorithm 2) with K directions clipped as one vector (DP-AggZO, Bao et al.,
USENIX Security 2025) and, as a choice, Laplace noise (DP-ZO, Tang et al. 2024, arXiv 2401.04343). For example i and
direction z_k ~ N(0, I), with λ the perturbation::

    Δ_ik = (ℓ_i(θ + λ z_k) − ℓ_i(θ − λ z_k)) / 2λ                    ≈ ⟨z_k, ∇ℓ_i(θ)⟩
    s    = Σ_i Δ_i · min(1, C/‖Δ_i‖) + noise                         Δ_i the vector of K numbers
    θ   ← θ − η / (B K) · Σ_k z_k s_k                                B the plan's expected batch size

Without clipping and noise the update is η times an unbiased estimate of the summed gradient over B, whatever K is; but
‖Δ_i‖ grows as √K, so C must grow as √K to cut equally.

* Gaussian: ‖·‖ is the Euclidean norm and the noise σC · N(0, I_K), so a step is a Gaussian mechanism of sensitivity C
  and the plan's ε is exact, for any K.
* Laplace: ‖·‖ is the sum of absolute values and each number gets Laplace noise of scale b = noise_multiplier · C. A
  step is then purely ε₀-DP with ε₀ = C/b.

The directions never see data and are public. The noise is the only secret, so it comes straight from the operating system: a
generator's output tells its state (see `randomness`).
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from dp_accounting import LaplaceDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from jaxtyping import Float, Int
from torch import Tensor, nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_guard import BatchGuard
from memarc_utils.data_parallel import rank_and_size
from memarc_utils.model_checks import WatchedBuffers, WatchedPasses, check_no_batch_statistics, check_not_begun, check_sampler, check_state
from memarc_utils.padding import padding_checked
from memarc_utils.probe import LossProbe, num_examples, refuse_sixteen_bits
from memarc_utils.randomness import check_generator, seed_from_operating_system

DIRECTION_PIECE = 2**20  # numbers of a direction that stand in memory at once
NOISES = {"gaussian": 2, "laplace": 1}  # the norm that the K numbers of an example are clipped in


# --------------------------------------------------------------------------------------------------- Laplace's ε
def laplace_epsilon(*, noise_multiplier: float, sample_rate: float, num_steps: int, delta: float) -> float:
    """ε of Laplace steps on Poisson samples, for adding or removing one example.

    One step is ε₀-DP with ε₀ = 1/noise_multiplier; sampled at rate q it is ε'-DP with ε' = log(1 + q (e^{ε₀} − 1))
    (Balle et al. 2018, arXiv 1807.01647, section 3). At δ = 0 the answer is T ε', and no smaller one holds: every step
    can lose ε' at once. At δ > 0 privacy loss distributions compose more tightly. They are those of one number moved by
    C. That K numbers moved by C in total are no easier to tell apart follows from Dong et al. 2019 (arXiv 1905.02383,
    section 2.5): the scalar Laplace pair is the worst that steps of vanishing ε can add up to.

    Args:
        noise_multiplier: b/C, the scale of the noise in units of C; 0 is allowed for checks (ε = ∞).
        sample_rate: q in (0, 1].
        num_steps: T; 0 spends 0.0.
        delta: δ in [0, 1); 0 asks for pure differential privacy.

    >>> round(laplace_epsilon(noise_multiplier=1.0, sample_rate=0.025, num_steps=1000, delta=0.0), 2)
    42.06
    >>> round(laplace_epsilon(noise_multiplier=1.0, sample_rate=0.025, num_steps=1000, delta=1e-5), 2)
    3.12
    """
    _check_laplace(sample_rate, num_steps, delta)
    _check_range("noise_multiplier", noise_multiplier, 0, math.inf, "0 (a check) or more")
    if num_steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    scale = 1 / noise_multiplier
    one_step = scale + math.log(sample_rate + (1 - sample_rate) * math.exp(-scale))  # log(1 + q(e^ε₀ − 1)), no overflow
    pure = num_steps * one_step
    if delta == 0 or scale > 500:  # beyond that e^ε₀ is no float; the bound holds at any δ
        return pure
    event = LaplaceDpEvent(noise_multiplier)
    # 2,000 grid points over one step's largest loss: ε to about 1e-4 of its size
    accountant = PLDAccountant(value_discretization_interval=one_step / 2000)
    accountant.compose(PoissonSampledDpEvent(sample_rate, event) if sample_rate < 1 else event, num_steps)
    return min(pure, max(0.0, float(accountant.get_epsilon(delta))))


def laplace_noise_multiplier(*, target_epsilon: float, sample_rate: float, num_steps: int, delta: float) -> float:
    """The b/C whose `laplace_epsilon` is ``target_epsilon``: closed form at δ = 0, else bisection (b to 0.1 %, above).

    >>> b = laplace_noise_multiplier(target_epsilon=6.0, sample_rate=0.025, num_steps=1000, delta=0.0)
    >>> round(laplace_epsilon(noise_multiplier=b, sample_rate=0.025, num_steps=1000, delta=0.0), 6)
    6.0
    """
    _check_laplace(sample_rate, num_steps, delta)
    _check_range("target_epsilon", target_epsilon, 1e-4, math.inf, "at least 1e-4")
    if num_steps == 0:
        raise ValueError("num_steps=0 spends nothing with any noise; write the number of steps.")
    each = target_epsilon / num_steps
    high = 1 / (math.log1p(math.expm1(each) / sample_rate) if each < 500 else each - math.log(sample_rate))
    if delta == 0:
        return high
    low, run = high, {"sample_rate": sample_rate, "num_steps": num_steps, "delta": delta}
    while laplace_epsilon(noise_multiplier=low, **run) <= target_epsilon:
        high, low = low, low / 2
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        spent = laplace_epsilon(noise_multiplier=middle, **run)
        low, high = (low, middle) if spent <= target_epsilon else (middle, high)
    return high


# ----------------------------------------------------------------------------------------------------- the steps
def make_zeroth_order(model: nn.Module, plan: PrivacyPlan, learning_rate: float, perturbation: float = 1e-3,
                      num_directions: int = 1, noise: str = "gaussian", noise_generator: torch.Generator | None = None,
                      direction_seed_generator: torch.Generator | None = None) -> "ZerothOrderOptimizer":
    """Prepares private training of whatever has ``requires_grad``, by forward passes alone.

    Args:
        model: on its device, with everything that shall train already added, that in float32 or float64.
        plan: owns C, the noise multiplier (σ, or b/C for Laplace), the divisor B and the number of steps. For Laplace
            its ``epsilon()`` and ``describe()`` do **not** hold, they speak of Gaussian noise: ask the optimizer.
        learning_rate: η; the attribute is that of the next step.
        perturbation: λ, the length of the finite difference, at least 1e-4 (1e-8 in float64).
        num_directions: K. A step costs 2 K forward passes of the batch.
        noise: "gaussian" or "laplace".
        noise_generator: for reproducible checks only: who knows its seed can subtract the noise. None draws every
            number from the operating system.
        direction_seed_generator: on the CPU; draws the directions' seeds, which are no secret. None: a fresh one.

    Raises:
        ValueError: names what is wrong and the mend; the model is unchanged then.
    """
    return ZerothOrderOptimizer(model, plan, learning_rate, perturbation, num_directions, noise, noise_generator, direction_seed_generator)


class ZerothOrderOptimizer:
    """Returned by `make_zeroth_order`: one `step` for each logical batch, empty ones too.

    Attributes:
        steps_taken: steps so far; an empty batch counts.
        examples_dropped: examples with a loss that was not finite; they contributed zero.
    """

    def __init__(self, model, plan, learning_rate, perturbation, num_directions, noise, noise_generator, direction_seed_generator) -> None:
        if not isinstance(plan, PrivacyPlan):
            raise ValueError(f"plan must be a PrivacyPlan, got {type(plan).__name__}")
        if not isinstance(noise, str) or noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        if noise == "laplace" and plan.sampling != "poisson":
            raise ValueError('Laplace noise is accounted for Poisson batches only: plan with sampling="poisson"')
        if isinstance(num_directions, bool) or not isinstance(num_directions, int) or num_directions < 1:
            raise ValueError(f"num_directions must be a whole number >= 1, got {num_directions!r}")
        _check_model(model)
        exact = all(p.dtype == torch.float64 for p in _trainable(model).values())  # what others change by rounding is divided by 2λ
        _check_range("perturbation", perturbation, 1e-8 if exact else 1e-4, 1.0, "1e-3, far above the rounding of the losses")
        if direction_seed_generator is None:
            direction_seed_generator = seed_from_operating_system(torch.Generator())
        _check_generators(noise_generator, direction_seed_generator)
        self.model, self._plan, self.noise = model, plan, noise
        self.learning_rate, self.perturbation, self.num_directions = learning_rate, perturbation, num_directions
        self.noise_generator, self.direction_seed_generator = noise_generator, direction_seed_generator
        self.steps_taken, self.examples_dropped, self.batch_guard = 0, 0, BatchGuard(plan)
        self._probe = LossProbe()
        self._check_learning_rate()

    @property
    def plan(self) -> PrivacyPlan:
        """Cannot be exchanged: noise and ε are those of this one."""
        return self._plan

    def step(self, batch: Iterable[Any], loss_per_example: Callable[[nn.Module, Any], Tensor]) -> None:
        """Losses at θ ± λ z_k for each direction, clip, sum, noise, update, account. An empty batch is all noise.

        Dropout is off (evaluation mode): with other masks on the two sides their difference would be divided by 2λ. Now and then, after
        the last pass, the losses of half of the rows are computed once more, alone (see `LossProbe`).

        Args:
            batch: micro-batches, as `poisson_batches` gives them: tensors with the batch axis first in dicts (moved to the
                model's device), tuples or lists. They are gone through 2 K times, so all of the step's *inputs* stand in memory.
            loss_per_example: ``(model, micro_batch) -> losses (B,)``, nothing in one example's loss from another.

        Raises:
            ValueError: the plan's steps are spent, the losses are not one for each example, mix them or are computed in 16 bits, or a
                forward pass wrote into the model. The parameters are back where they were, but for rounding.
        """
        if self.steps_taken >= self.plan.num_steps:
            raise ValueError(f"the plan pays for {self.plan.num_steps} steps and all are taken: plan more from the start, at more noise")
        _check_model(self.model)
        self._check_learning_rate()
        micro_batches = list(batch)
        seeds, watched = list(self._draw_seeds()), WatchedBuffers(self.model, since="in a forward pass")
        with torch.no_grad(), _evaluation_mode(self.model), padding_checked(self.model):
            differences = [self._differences(micro_batches, loss_per_example, row, row is seeds[0], row is seeds[-1]) for row in seeds]
        watched.check()
        self.batch_guard.check(len(differences[0]), self.steps_taken)
        self._probe.schedule.next_step()
        total = self._clipped_sum(torch.stack(differences, dim=1)) + self._draw_noise()
        self.steps_taken += 1  # before the weights move: an interrupted step is paid for
        self.batch_guard.note_step()
        scale = -self.learning_rate / (self.plan.expected_batch_size * self.num_directions)
        for row, number in zip(seeds, total.tolist()):
            self._move(row, scale * number)

    def epsilon(self, accountant: str = "pld") -> float:
        """ε spent by the steps taken so far; 0.0 before the first.

        Args:
            accountant: as in `PrivacyPlan.epsilon`, at the plan's δ. Laplace knows "pld" and "pure", which is at δ = 0.
        """
        if self.noise == "gaussian":
            return self.plan.epsilon(accountant, self.steps_taken)
        if accountant not in ("pld", "pure"):
            raise ValueError(f'accountant must be "pld" or "pure" for Laplace noise, got {accountant!r}')
        return laplace_epsilon(noise_multiplier=self.plan.noise_multiplier, sample_rate=self.plan.sample_rate,
                               num_steps=self.steps_taken, delta=0.0 if accountant == "pure" else self.plan.delta)

    def state_dict(self, sampler=None) -> dict:
        """Everything a resume needs; loads with ``torch.load(..., weights_only=True)``. Take it between two steps.

        Args:
            sampler: the batches being iterated, so that the resumed run draws on where this one stopped.
        """
        check_sampler(sampler, self.plan)
        if sampler is not None and sampler.steps_drawn != self.steps_taken:
            raise ValueError(f"{sampler.steps_drawn} batches were drawn but {self.steps_taken} steps taken: every batch needs its step")
        return {"run": self._run(), "steps_taken": self.steps_taken, "examples_dropped": self.examples_dropped,
                "learning_rate": self.learning_rate,
                "parameters": {name: p.detach().clone() for name, p in _trainable(self.model).items()},
                "directions": self.direction_seed_generator.get_state(),
                "noise_generator": None if self.noise_generator is None else self.noise_generator.get_state(),
                "sampler": None if sampler is None else sampler.state_dict()}

    def load_state_dict(self, state: dict, sampler=None) -> None:
        """Goes on where `state_dict` was taken: no noise is repeated or skipped, ε counts on.

        Noise from the operating system has no state and is fresh in any case.

        Raises:
            ValueError: the state belongs to another run, or was taken with another kind of noise source or sampler.
        """
        check_state(state, {"run", "sampler", "noise_generator", "parameters", "directions", "steps_taken", "learning_rate"})
        check_not_begun(self.steps_taken)
        check_sampler(sampler, self.plan)
        mine, theirs = self._run(), state["run"]
        if different := [name for name in mine if mine[name] != theirs.get(name)]:
            raise ValueError("the checkpoint belongs to another run: " + ", ".join(
                f"{n} is {theirs.get(n)!r} there and {mine[n]!r} here" for n in different) + "; resume with its own")
        if (sampler is None) != (state["sampler"] is None):
            raise ValueError("pass the sampler to both state_dict and load_state_dict, or to neither")
        if (self.noise_generator is None) != (state["noise_generator"] is None):
            raise ValueError("give a noise_generator to both runs (a check), or to neither")
        parameters = _trainable(self.model)
        shapes, saved = ({n: tuple(p.shape) for n, p in both.items()} for both in (parameters, state["parameters"]))
        if shapes != saved:
            odd = sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n))
            raise ValueError(f"the checkpoint's trainable parameters are others: {', '.join(odd[:5])}. Prepare the model the same way first")
        self.steps_taken, self.examples_dropped = state["steps_taken"], state.get("examples_dropped", 0)  # counted whatever fails below
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        self.direction_seed_generator.set_state(state["directions"])
        if self.noise_generator is not None:
            self.noise_generator.set_state(state["noise_generator"])
        self.learning_rate = state["learning_rate"]
        if sampler is not None:
            sampler.load_state_dict(state["sampler"])

    def _run(self) -> dict:
        return {**self.plan.to_dict(), "noise": self.noise, "num_directions": self.num_directions, "perturbation": float(self.perturbation)}

    def _check_learning_rate(self) -> None:
        _check_range("learning_rate", self.learning_rate, 0, math.inf, "0 or more")

    def _draw_seeds(self) -> Int[Tensor, "directions parameters"]:
        """One seed for each direction and parameter, so that z does not depend on which device a parameter is on."""
        return torch.randint(2**63 - 1, (self.num_directions, len(_trainable(self.model))), generator=self.direction_seed_generator)

    @torch.no_grad()
    def _move(self, seeds: Int[Tensor, " parameters"], scale: float) -> None:
        """θ ← θ + scale · z, in place, z drawn anew from its seeds: a few rows of one parameter's z stand in memory at a time."""
        for parameter, seed in zip(_trainable(self.model).values(), seeds.tolist()):
            generator = torch.Generator(parameter.device).manual_seed(seed)
            rows = torch.atleast_1d(parameter)
            for piece in rows.split(max(1, DIRECTION_PIECE * len(rows) // rows.numel())):
                like = {"dtype": piece.dtype, "device": piece.device}
                piece.add_(torch.empty(piece.shape, **like).normal_(generator=generator), alpha=scale)  # unnamed: gone before the next

    def _differences(self, micro_batches: list, loss_per_example: Callable, seeds: Int[Tensor, " parameters"], first: bool, last: bool
                     ) -> Float[Tensor, " examples"]:
        """Δ_i along one direction. Nothing is stored of θ: it goes to +λ, to −λ, and back, to rounding."""
        at = 0
        try:
            self._move(seeds, self.perturbation)
            at = 1
            above = self._losses(micro_batches, loss_per_example, watch=first)
            self._move(seeds, -2 * self.perturbation)
            at = -1
            below = self._losses(micro_batches, loss_per_example, look=last and self._probe.schedule.due)
        finally:
            self._move(seeds, -at * self.perturbation)
        return (above - below) / (2 * self.perturbation)

    def _losses(self, micro_batches: list, loss_per_example: Callable, watch=False, look=False) -> Float[Tensor, " examples"]:
        """Of all examples, at θ as it stands; ``watch`` for writes into what trains, ``look`` for examples that meet in them too."""
        device = next(iter(_trainable(self.model).values())).device
        def compute(micro_batch: Any) -> Float[Tensor, " batch"]:
            if isinstance(micro_batch, dict):
                micro_batch = {k: t.to(device) if isinstance(t, Tensor) else t for k, t in micro_batch.items()}
            size, losses = num_examples(micro_batch), loss_per_example(self.model, micro_batch)
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            if shape != (size,):
                raise ValueError(f"loss_per_example gave {shape} for {size} examples: return one loss an example, shape (batch,), "
                                 'for example with reduction="none"')
            return losses.double().cpu()

        watched = WatchedPasses(self.model, {p: name for name, p in _trainable(self.model).items()}, since="in a forward pass")
        if watch or look:
            watched.note()
        with refuse_sixteen_bits() if look else nullcontext():
            found = [compute(micro_batch) for micro_batch in micro_batches]
        watched.check()
        for micro_batch, losses in zip(micro_batches, found) if look else ():
            self._probe.run(micro_batch, losses, compute, device)
        return torch.cat([torch.zeros(0, dtype=torch.float64), *found])

    def _clipped_sum(self, differences: Float[Tensor, "examples directions"]) -> Float[Tensor, " directions"]:
        """Σ_i Δ_i min(1, C/‖Δ_i‖), in float64; an example with a number that is not finite contributes zero."""
        finite = differences.isfinite().all(dim=1)
        self.examples_dropped += int((~finite).sum())
        differences = differences[finite]
        norms, bound = differences.norm(NOISES[self.noise], dim=1, keepdim=True), self.plan.max_grad_norm
        return (differences * (bound / norms.clamp_min(bound))).sum(dim=0)

    def _draw_noise(self) -> Float[Tensor, " directions"]:
        """σC · N(0, I_K), or K independent Laplace(b): the difference of two exponentials of mean b."""
        shape, scale = (self.num_directions,), self.plan.noise_multiplier * self.plan.max_grad_norm
        generator, system = self.noise_generator, random.SystemRandom()
        if self.noise == "gaussian":
            if generator is None:
                unit = torch.tensor([system.normalvariate(0.0, 1.0) for _ in range(*shape)], dtype=torch.float64)
            else:
                unit = torch.empty(shape, dtype=torch.float64, device=generator.device).normal_(generator=generator)
        elif generator is None:
            unit = torch.tensor([system.expovariate(1.0) - system.expovariate(1.0) for _ in range(*shape)], dtype=torch.float64)
        else:
            pairs = torch.empty((2, *shape), dtype=torch.float64, device=generator.device)
            plus, minus = pairs.exponential_(generator=generator)
            unit = plus - minus
        return scale * unit.cpu()


# ---------------------------------------------------------------------------------------------------- what is refused
def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}  # a tied parameter is named once


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_model(model: nn.Module) -> None:
    if rank_and_size()[1] > 1:
        raise ValueError("zeroth order is for one process: several would each add noise to a sum of their own. Run it on one rank")
    if not (parameters := _trainable(model)):
        raise ValueError("no parameter has requires_grad: choose what shall train, as by select_linear_probe(model)")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}, in which θ + λz would be rounded away and never come back: hold what trains in "
                             "float32, model.float() or parameter.data = parameter.data.float()")
    check_no_batch_statistics(model)


def _check_generators(noise: object, directions: object) -> None:
    check_generator("noise_generator", noise)
    check_generator("direction_seed_generator", directions, secret=False)
    if directions.device.type != "cpu":
        raise ValueError("direction_seed_generator must be on the CPU: it draws seeds only, directions are made where parameters are")
    if noise is not None and (noise.initial_seed() - directions.initial_seed()) % 2**32 == 0:  # one object too; the CPU keeps 32 bits
        raise ValueError("noise and directions come from one seed: the directions are public, so the noise could be computed and "
                         "subtracted. Pass noise_generator=None")


def _check_range(name: str, value: object, smallest: int | float, largest: int | float, mend: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a finite number; write {mend}.")
    if not smallest <= value <= largest:
        raise ValueError(f"{name}={value} is out of range; write {mend}.")


def _check_laplace(sample_rate: object, num_steps: object, delta: object) -> None:
    _check_range("sample_rate", sample_rate, 1e-12, 1, "q = B/N, above 0 and at most 1")
    _check_range("delta", delta, 0, 1 - 1e-12, "0 (pure) or a number below 1/N")
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"num_steps={num_steps!r} must be a whole number >= 0.")

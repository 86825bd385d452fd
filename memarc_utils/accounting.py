"""Privacy accounting: one plan that owns every privacy number of a run, and the ε that follows from it.

The mechanism is DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1): each of T steps draws a batch, clips every
example's gradient to norm C, sums, and adds Gaussian noise of standard deviation σ·C. In units of C, a step is a
Gaussian mechanism of sensitivity 1 and noise σ, seen with probability q. Four accountants turn (σ, q, T, δ) into ε:

====== =============================================================== ===============================================
name   method                                                          what the answer is
====== =============================================================== ===============================================
"pld"  privacy loss distributions, connect-the-dots (2207.04380)       an upper bound, within about 1e-4 of the truth
"prv"  privacy random variables by FFT (Gopi et al. 2021, 2106.02848)  an upper bound, about 0.01 above the truth
"rdp"  Rényi DP of the sampled Gaussian (Mironov et al. 2019)          an upper bound, often 10-30 % above the truth
"gdp"  central limit theorem (Bu et al. 2020, 1911.11607)              no bound: often below the truth; never report it
====== =============================================================== ===============================================
"""

import logging
import math
import warnings
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from numbers import Integral, Real

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, get_epsilon_gaussian
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from scipy import stats

ACCOUNTANTS = ("pld", "prv", "rdp", "gdp")
NEIGHBOURS = {"poisson": "add/remove one example", "shuffled": "one example emptied in place (zero-out)"}
SMALLEST_NUMERICAL_DELTA = 1e-12  # pld and prv cut tails of up to 1e-15: below this δ the cut would show in ε
NOISE_SEARCH_RANGE = (1e-2, 1e5)
SMALLEST_TARGET = 1e-4
LARGEST_PRV_GRID = 5_000_000  # points: about ten seconds and half a gigabyte


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything about a run that its privacy guarantee depends on, as public numbers fixed before training.

    With ``sampling="poisson"`` every example joins every batch independently with probability q = B/N, and the
    guarantee is for *adding or removing one example*. The noise added to the clipped sum has standard deviation
    ``noise_multiplier * max_grad_norm``.

    With ``sampling="shuffled"`` each epoch is a fresh shuffle cut into batches of B, the last partial batch kept, so
    that every example is in exactly one batch an epoch. Nothing is claimed for the secrecy of the shuffle: ε is that of
    E = ⌈T / ⌈N/B⌉⌉ plain Gaussian mechanisms, which equals one with noise σ/√E. This holds when *one example is
    emptied in place*: its gradient becomes zero and every other example keeps its batch. Removing it outright would
    move the others to other batches; replacing it by another example doubles the sensitivity (use half the
    ``noise_multiplier`` to read that ε).

    Args:
        dataset_size: N, number of private examples (or users), a public number.
        expected_batch_size: B, mean number of examples a step; it is also the divisor of the summed gradient.
        num_steps: T, number of noise additions; steps with an empty batch count.
        noise_multiplier: σ, noise standard deviation in units of C. 0 is allowed for checks; then ε = ∞.
        max_grad_norm: C, the norm every example's gradient is clipped to. ε does not depend on it.
        delta: δ, must be below 1/N.
        sampling: "poisson" or "shuffled".

    Raises:
        ValueError: an argument is of the wrong kind or outside its range; the message says the mend.

    >>> plan = PrivacyPlan(dataset_size=50_000, expected_batch_size=500, num_steps=1000, noise_multiplier=1.0,
    ...                    max_grad_norm=1.0, delta=1e-5)
    >>> plan.sample_rate, round(plan.epsilon(), 3), round(plan.epsilon("rdp"), 3)
    (0.01, 1.828, 2.101)
    """

    dataset_size: int
    expected_batch_size: int
    num_steps: int
    noise_multiplier: float
    max_grad_norm: float
    delta: float
    sampling: str = "poisson"

    def __post_init__(self) -> None:
        _check_whole_number("dataset_size", self.dataset_size, "the number of examples")
        _check_whole_number("expected_batch_size", self.expected_batch_size, "the mean number of examples a step")
        _check_whole_number("num_steps", self.num_steps, "at least one step")
        if self.expected_batch_size > self.dataset_size:
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} over dataset_size={self.dataset_size} gives a sample "
                f"rate q = {self.sample_rate:.4g} > 1; write expected_batch_size <= {self.dataset_size}."
            )
        _check_finite("noise_multiplier", self.noise_multiplier)
        if self.noise_multiplier < 0:
            raise ValueError(f"noise_multiplier={self.noise_multiplier} is negative; write 0 (a check) or more.")
        _check_finite("max_grad_norm", self.max_grad_norm)
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be > 0; write for example 1.0.")
        _check_delta(self.delta, self.dataset_size)
        if not isinstance(self.sampling, str) or self.sampling not in NEIGHBOURS:
            raise ValueError(f'sampling={self.sampling!r} is unknown; write "poisson" or "shuffled".')

    @classmethod
    def from_epsilon(
        cls,
        *,
        target_epsilon: float,
        delta: float,
        dataset_size: int,
        expected_batch_size: int,
        num_steps: int,
        max_grad_norm: float,
        accountant: str = "pld",
        sampling: str = "poisson",
    ) -> "PrivacyPlan":
        """Plan with the smallest noise whose ε is at most ``target_epsilon``.

        ε falls as σ rises, so σ is the root of ε(σ) = target. It is searched by secant steps in (log σ, log ε) inside a
        bracket, from the start that the central limit theorem gives. The plan returned has ε in
        [target − t, target] with t = 1e-3 · min(1, target).

        Raises:
            ValueError: a bad argument, or a target that no noise multiplier between 0.01 and 100,000 reaches.

        >>> plan = PrivacyPlan.from_epsilon(target_epsilon=3.0, delta=1e-5, dataset_size=50_000,
        ...                                 expected_batch_size=1024, num_steps=150, max_grad_norm=1.0)
        >>> 2.999 <= plan.epsilon() <= 3.0
        True
        """
        _check_accountant(accountant)
        _check_finite("target_epsilon", target_epsilon)
        if target_epsilon < SMALLEST_TARGET:
            raise ValueError(f"target_epsilon={target_epsilon} cannot be reached: the smallest that can be told from "
                             f"the accountants' rounding is {SMALLEST_TARGET:g}; write at least that.")  # fmt: skip
        start = cls(dataset_size=dataset_size, expected_batch_size=expected_batch_size, num_steps=num_steps,
                    noise_multiplier=1.0, max_grad_norm=max_grad_norm, delta=delta, sampling=sampling)  # fmt: skip
        q, steps = start._mechanism(num_steps)
        noise_multiplier = _noise_for_epsilon(accountant, float(target_epsilon), q, steps, float(delta))
        return replace(start, noise_multiplier=noise_multiplier)

    @property
    def sample_rate(self) -> float:
        """q = expected_batch_size / dataset_size, a public number; never computed from the data at hand."""
        return self.expected_batch_size / self.dataset_size

    @property
    def neighbouring(self) -> str:
        """What two data sets may differ in, for which ε is stated."""
        return NEIGHBOURS[self.sampling]

    def with_sampling(self, sampling: str) -> "PrivacyPlan":
        """The same run with batches drawn another way; ``epsilon()`` of the new plan answers for that way.

        >>> plan = PrivacyPlan(dataset_size=67_349, expected_batch_size=1024, num_steps=197, noise_multiplier=0.8,
        ...                    max_grad_norm=1.0, delta=1 / (2 * 67_349))
        >>> round(plan.epsilon(), 2), round(plan.with_sampling("shuffled").epsilon(), 2)
        (2.63, 11.17)
        """
        return replace(self, sampling=sampling)

    def epsilon(self, accountant: str = "pld", num_steps: int | None = None) -> float:
        """ε at the plan's δ, after ``num_steps`` steps (the whole run if None; 0 steps spend 0.0).

        Args:
            accountant: "pld" (default), "prv", "rdp", or "gdp". GDP is a limit for many steps and tiny q. It bounds
                nothing and underestimates ε, at times by half: for comparison only. PRV refuses plans whose ε is so
                large that its grid would not fit in memory; PLD widens its grid instead. Below σ = 0.01, where float64
                overflows, all four give the bound of the unsampled mechanism, μ²/2 + μ√(2 ln(1/δ)) with μ = √T/σ.
            num_steps: may exceed the plan's, to ask what a longer run would spend.

        Returns:
            ε >= 0; ∞ where ``noise_multiplier`` is 0.
        """
        return self.epsilon_for(self.delta, accountant, num_steps)

    def epsilon_for(self, delta: float, accountant: str = "pld", num_steps: int | None = None) -> float:
        """ε at another δ; otherwise as ``epsilon``."""
        _check_accountant(accountant)
        _check_delta(delta, self.dataset_size)
        q, steps = self._mechanism(num_steps)
        if steps == 0:
            return 0.0
        if self.noise_multiplier == 0:
            return math.inf
        return _epsilon(accountant, float(self.noise_multiplier), q, steps, float(delta))

    def delta_for(self, epsilon: float, num_steps: int | None = None) -> float:
        """The smallest δ (an upper bound on it, by PLD) for which the run is (``epsilon``, δ)-DP.

        >>> plan = PrivacyPlan(dataset_size=50_000, expected_batch_size=500, num_steps=1000, noise_multiplier=1.0,
        ...                    max_grad_norm=1.0, delta=1e-5)
        >>> round(plan.delta_for(plan.epsilon()) / plan.delta, 3)
        1.0
        """
        _check_finite("epsilon", epsilon)
        if epsilon < 0:
            raise ValueError(f"epsilon={epsilon} is negative; write a number >= 0.")
        q, steps = self._mechanism(num_steps)
        if steps == 0:
            return 0.0
        if self.noise_multiplier < NOISE_SEARCH_RANGE[0]:
            return 1.0  # no noise or next to none: see ``epsilon``; δ = 1 always holds
        if q == 1.0:
            return gaussian_delta(epsilon, self.noise_multiplier / math.sqrt(steps))
        return float(_composed_pld(float(self.noise_multiplier), q, steps).get_delta_for_epsilon(float(epsilon)))

    def describe(self, accountant: str = "pld") -> str:
        """The sentence a paper needs: ε (rounded up), δ, N, q, steps, σ, C, neighbours, sampling, accountant."""
        epsilon = self.epsilon(accountant)
        batches = {"poisson": "Poisson sampling at rate", "shuffled": "shuffled batches without amplification, each"}
        run = (
            f"{batches[self.sampling]} q = {self.sample_rate:.6g} of N = {self.dataset_size:,} examples (expected "
            f"batch {self.expected_batch_size:,}), T = {self.num_steps:,} step{'s' * (self.num_steps > 1)}, noise "
            f"multiplier σ = {self.noise_multiplier:.4g}, clipping norm C = {self.max_grad_norm:g}"
        )
        if math.isinf(epsilon):
            return f"not private (ε = ∞): {run}."
        printed = math.ceil(epsilon * 1000 - 1e-9) / 1000  # up, so that the claim is never smaller than the truth
        caveat = " (an estimate, no bound)" if accountant == "gdp" else ""
        return (
            f"(ε = {printed:.3f}, δ = {self.delta:.3g})-differentially private{caveat} for neighbouring data sets that "
            f"differ in: {self.neighbouring}; {run}; ε by the {accountant.upper()} accountant."
        )

    def to_dict(self) -> dict:
        """Plain Python values, as a checkpoint wants; ``from_dict`` brings back an equal plan."""
        kinds = {"dataset_size": int, "expected_batch_size": int, "num_steps": int, "sampling": str}
        return {name: kinds.get(name, float)(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "PrivacyPlan":
        """Inverse of ``to_dict``; every check runs again."""
        if not isinstance(values, dict) or set(values) != set(cls.__dataclass_fields__):
            raise ValueError(f"give what plan.to_dict() returned, with {', '.join(cls.__dataclass_fields__)}; got {values!r}")
        return cls(**values)

    def _mechanism(self, num_steps: int | None) -> tuple[float, int]:
        """(q, number of compositions) of the sampled Gaussian mechanism that the steps amount to."""
        steps = self.num_steps if num_steps is None else num_steps
        _check_whole_number("num_steps", steps, "0 for the moment before training", smallest=0)
        if self.sampling == "poisson":
            return self.sample_rate, int(steps)
        steps_per_epoch = -(-self.dataset_size // self.expected_batch_size)
        return 1.0, -(-int(steps) // steps_per_epoch)


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """δ(ε) of one Gaussian mechanism of sensitivity 1 (Balle & Wang 2018, 1805.06530, Theorem 8), in log space.

    δ(ε) = Φ(1/(2σ) − εσ) − e^ε Φ(−1/(2σ) − εσ)

    >>> round(gaussian_delta(1.0, 1.0), 6)
    0.126937
    """
    half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    log_first, log_second = stats.norm.logcdf(half - shift), epsilon + stats.norm.logcdf(-half - shift)
    if log_second >= log_first:  # both terms agree to the last digit: δ is below float64's resolution
        return 0.0
    return float(np.exp(log_first) * -np.expm1(log_second - log_first))


@lru_cache(maxsize=4096)
def _epsilon(accountant: str, noise_multiplier: float, q: float, steps: int, delta: float) -> float:
    """ε of ``steps`` compositions of the Poisson-sampled Gaussian mechanism; add/remove one."""
    if accountant in ("pld", "prv") and delta < SMALLEST_NUMERICAL_DELTA:
        raise ValueError(
            f'delta={delta:.3g} is below what the numerical accountant "{accountant}" resolves '
            f'({SMALLEST_NUMERICAL_DELTA:g}); write a larger delta or accountant="rdp".'
        )
    if noise_multiplier < NOISE_SEARCH_RANGE[0]:
        mu = math.sqrt(steps) / noise_multiplier  # concentrated DP: Bun & Steinke 2016, 1605.02065, Proposition 1.3
        return mu * (mu / 2) + mu * math.sqrt(2 * math.log(1 / delta))
    if q == 1.0 and accountant != "rdp":
        # T Gaussian mechanisms are one with noise σ/√T, exactly; the closed form needs no grid.
        noise_multiplier, steps = noise_multiplier / math.sqrt(steps), 1
    if accountant == "rdp":
        return _epsilon_rdp(noise_multiplier, q, steps, delta)
    if accountant == "prv":
        return _epsilon_prv(noise_multiplier, q, steps, delta)
    if q < 1.0 and accountant == "gdp":
        # One Gaussian mechanism with μ = q √(T (e^{1/σ²} − 1)), noise 1/μ: Bu et al. 2020, section 3.2.
        if noise_multiplier**-2 > 700:
            return math.inf
        noise_multiplier, q = 1 / (q * math.sqrt(steps * math.expm1(noise_multiplier**-2))), 1.0
    if q == 1.0:
        with np.errstate(divide="ignore"):  # its search meets δ = 0, whose logarithm it wants as −∞
            return float(get_epsilon_gaussian(noise_multiplier, delta))
    return max(0.0, float(_composed_pld(noise_multiplier, q, steps).get_epsilon_for_delta(delta)))


@lru_cache(maxsize=2)  # one holds up to a few hundred thousand floats
def _composed_pld(noise_multiplier: float, q: float, steps: int) -> PrivacyLossDistribution:
    """Privacy loss distribution of the run, on a grid wide enough for time and fine enough for ε.

    Rounding on a grid of width h costs about T h²/2 in ε, so h = √(1e-4 ε/T) costs about 5e-5 ε; nor may h exceed
    ε/1000. It is kept between a 20,000th and a 100,000th of one step's range of losses, and above ε/200,000, which
    bounds time and memory for any σ. The scale of ε comes from a first pass on a coarse grid.
    """
    largest_noise = stats.norm.isf(math.exp(-50))  # dp_accounting cuts the noise there
    exponent = 1 / (2 * noise_multiplier**2) + largest_noise / noise_multiplier
    loss_range = np.logaddexp(math.log1p(-q), math.log(q) + exponent)
    loss_range -= np.logaddexp(math.log1p(-q), math.log(q) - exponent)

    def composed(interval: float) -> PrivacyLossDistribution:
        one_step = from_gaussian_mechanism(noise_multiplier, sampling_prob=q, value_discretization_interval=interval)
        return one_step.self_compose(steps) if steps > 1 else one_step

    scale = max(0.0, composed(loss_range / 2000).get_epsilon_for_delta(1e-6))
    wanted = min(math.sqrt(1e-4 * scale / steps), scale / 1000)
    interval = max(float(np.clip(wanted, loss_range / 100_000, loss_range / 20_000)), scale / 200_000)
    return composed(interval)


def _epsilon_rdp(noise_multiplier: float, q: float, steps: int, delta: float) -> float:
    accountant = RdpAccountant()
    step = GaussianDpEvent(noise_multiplier)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names each fractional order whose series it leaves out; the bound holds without
    try:
        accountant.compose(step if q == 1.0 else PoissonSampledDpEvent(q, step), steps)
        return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(level)


def _epsilon_prv(noise_multiplier: float, q: float, steps: int, delta: float) -> float:
    from opacus.accountants import PRVAccountant  # loads all of opacus, seconds that the other accountants need not pay

    epsilon_error, delta_error = 0.01, delta / 1000
    # opacus's grid: twice an RDP bound on the loss over its mesh (Gopi et al. 2021, Theorem 5.5 and Remark 5.6)
    mesh = epsilon_error / math.sqrt(steps / 2 * math.log(12 / delta_error))
    points = 2 * (_epsilon_rdp(noise_multiplier, q, steps, delta_error / 4) + 3) / mesh
    if points > LARGEST_PRV_GRID:
        raise ValueError(
            f"the PRV accountant needs a grid of {points:.2g} points at noise_multiplier={noise_multiplier:.3g}, "
            f'q={q:.3g}, {steps} steps; write accountant="pld", which widens its grid.'
        )
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, q, steps)]
    with warnings.catch_warnings(), np.errstate(divide="ignore"):  # log(1 - q) at q = 1 is −∞ on purpose
        warnings.simplefilter("ignore")
        return max(0.0, float(accountant.get_epsilon(delta, eps_error=epsilon_error, delta_error=delta_error)))


@lru_cache(maxsize=256)
def _noise_for_epsilon(accountant: str, target: float, q: float, steps: int, delta: float) -> float:
    """Smallest σ with ε(σ) in [target − t, target]; see ``PrivacyPlan.from_epsilon``."""
    tolerance = 1e-3 * min(1.0, target)
    log_goal = math.log(target - tolerance / 2)
    ends = [math.log(noise) for noise in NOISE_SEARCH_RANGE]
    low, high = ends[0] - 1e-9, ends[1] + 1e-9  # the root lies strictly between; the ends themselves may be tried
    x, slope, before = math.log(_first_guess(q, steps, target, delta)), -1.0, None
    while high - low > 2e-9:
        excess = math.log(max(_epsilon(accountant, math.exp(x), q, steps, delta), 1e-300)) - log_goal
        if target - tolerance <= math.exp(excess + log_goal) <= target:
            return math.exp(x)
        low, high = (x, high) if excess > 0 else (low, x)
        if before is not None:
            slope = (excess - before[1]) / (x - before[0])
        before = (x, excess)
        wanted = x - excess / min(slope, -0.2)  # ε falls about as 1/σ where it is small, faster where it is large
        wanted = min(max(wanted, x - 2.0, ends[0]), x + 2.0, ends[1])
        x = wanted if low < wanted < high else (low + high) / 2
    end = NOISE_SEARCH_RANGE[x > 0]
    raise ValueError(
        f'target_epsilon={target:g} cannot be reached by the accountant "{accountant}" at q={q:.4g}, {steps} '
        f"compositions, delta={delta:.3g}: noise_multiplier={end:g}, the end of the search, gives "
        f"ε = {_epsilon(accountant, end, q, steps, delta):.4g}. "
        + ("Write a larger target, fewer steps or a smaller batch." if end > 1 else "Write a smaller target.")
    )


def _first_guess(q: float, steps: int, target: float, delta: float) -> float:
    """σ from the central limit theorem: cheap, of the right size, and only a place to start from."""
    grid = [float(noise) for noise in np.geomspace(0.1, 1000, 60)]
    return next((noise for noise in grid if _epsilon("gdp", noise, q, steps, delta) <= target), grid[-1])


def _check_accountant(accountant: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant={accountant!r} is unknown; write one of {', '.join(ACCOUNTANTS)}.")


def _check_whole_number(name: str, value: object, meaning: str, smallest: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} is not a whole number; write an int ({meaning}).")
    if value < smallest:
        raise ValueError(f"{name}={value} is below {smallest}; write {meaning}.")


def _check_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a finite number; write a plain float.")


def _check_delta(delta: float, dataset_size: int) -> None:
    _check_finite("delta", delta)
    if not 0 < delta < 1 / dataset_size:
        raise ValueError(
            f"delta={delta:g} must lie strictly between 0 and 1/N = {1 / dataset_size:.4g}: a mechanism that publishes "
            f"one example at random has δ = 1/N; write for example delta={1 / (2 * dataset_size):.3g}, that is 1/(2N)."
        )

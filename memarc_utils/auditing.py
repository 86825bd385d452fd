"""Audits: lower bounds on ε from what a training run lets out. They can refute a claim of privacy; they never prove one.

*One run* (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846): many canaries are each in or out of one training run by a fair
coin; whoever sees the run guesses the coins and may abstain. Under (ε, δ)-DP a guess is right with probability at most
e^ε / (1 + e^ε), but for δ, so too many right guesses contradict ε. White-box canaries are examples whose gradients we
choose: single coordinates of a layer, at right angles to one another, read off the noisy updates one by one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor, nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_selection import poisson_batches, shuffled_batches
from memarc_utils.canaries import GradientCanaries, InsertedCanaries, exposure, insert_canaries
from memarc_utils.clipping import group_bound
from memarc_utils.dp_sgd import make_private
from memarc_utils.membership import (
    AttackReport, Judgement, Threshold, calibrated_scores, choose_threshold, confidence_margins, error_zone_ratio, error_zone_scores,
    evaluate_attack, judge_threshold, lira_scores, loss_scores, score_examples, split_halves, token_evidence)
from memarc_utils.randomness import seed_from_operating_system, spawn
from memarc_utils.sensitivity import SensitivityReport, check_micro_batch, verify_sensitivity

__all__ = [
    "GradientCanaries", "InsertedCanaries", "OneRunAudit", "QuickAudit", "audit_engine", "audit_quickly", "best_of_shares",
    "chosen_on_half", "clopper_pearson_epsilon", "exposure", "guess", "insert_canaries", "one_run_epsilon", "one_run_p_value",
    # membership inference, from memarc_utils.membership
    "AttackReport", "Judgement", "Threshold", "calibrated_scores", "choose_threshold", "confidence_margins", "error_zone_ratio",
    "error_zone_scores", "evaluate_attack", "judge_threshold", "lira_scores", "loss_scores", "score_examples", "split_halves",
    "token_evidence",
]

GRADIENT_SCALE = 100.0  # norm of a gradient canary in units of max(C, 1): clipping has something to do, a bias is dwarfed
MOST_AUDIT_STEPS = 200
MOST_NOISE_DRAWS = 3e8  # of all steps of a quick audit together: a few seconds on a CPU
QUICK_EXAMPLES = 4


# ------------------------------------------------------------------------------------------------------- lower bounds
def one_run_p_value(epsilon: float, num_canaries: int, num_guesses: int, num_correct: int, delta: float) -> float:
    """Bound on the probability of so many right guesses if the run were (ε, δ)-DP (2305.08846, Theorem 5.2 and appendix D).

    With p = e^ε/(1 + e^ε) and X ~ Bin(k, p): β = P[X ≥ v], α = max_i (P[X ≥ v − i] − β)/i, and the bound is β + 2 m δ α.
    """
    p, v = 1 / (1 + math.exp(-epsilon)), num_correct
    beta = float(stats.binom.sf(v - 1, num_guesses, p))
    i = np.arange(1, v + 1)
    alpha = float(((stats.binom.sf(v - i - 1, num_guesses, p) - beta) / i).max(initial=0))
    return min(1.0, beta + 2 * num_canaries * delta * alpha)


def one_run_epsilon(num_canaries: int, num_guesses: int, num_correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε that the guesses refute: a lower bound on the run's ε at ``delta``, with this confidence.

    Args:
        num_canaries: m, each in or out by a fair coin of its own.
        num_guesses: k, how many were guessed; fixed before the coins were looked at.
        num_correct: v, how many of these were right.

    Returns:
        The bound by bisection; 0.0 where nothing is refuted.

    >>> round(one_run_epsilon(1000, 100, 100, 1e-5), 2), one_run_epsilon(1000, 100, 55, 1e-5)
    (3.47, 0.0)
    """
    if not 0 <= num_correct <= num_guesses <= num_canaries or num_canaries < 1:
        raise ValueError(f"need 0 <= num_correct <= num_guesses <= num_canaries and a canary at least, got {num_correct}, {num_guesses}, "
                         f"{num_canaries}")
    _check_probabilities(delta, confidence)

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(epsilon, num_canaries, num_guesses, num_correct, delta) <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def clopper_pearson_epsilon(true_positives: int, num_in: int, false_positives: int, num_out: int, delta: float,
                            confidence: float = 0.95) -> float:
    """Lower bound from one threshold: ε ≥ log((TPR − δ)/FPR), and the same for guessing "out", log((TNR − δ)/FNR).

    Exact binomial intervals for both rates (Clopper and Pearson 1934), each at half the error, so that all four ends hold
    together. It assumes *independent trials*, one canary a run, and a threshold fixed beforehand. For many canaries in one
    run it is a comparison, not a bound: their outcomes are tied together by that run.

    Returns:
        The larger of the two, at least 0.0.

    >>> round(clopper_pearson_epsilon(90, 100, 10, 100, delta=1e-5), 2)
    1.46
    """
    if not (0 <= true_positives <= num_in and 0 <= false_positives <= num_out and num_in and num_out):
        raise ValueError(f"counts do not fit: {true_positives} of {num_in} in, {false_positives} of {num_out} out")
    _check_probabilities(delta, confidence)
    inside, outside = (stats.binomtest(hits, trials).proportion_ci(1 - (1 - confidence) / 2, method="exact")
                       for hits, trials in ((true_positives, num_in), (false_positives, num_out)))
    sides = ((inside.low - delta, outside.high), (1 - outside.high - delta, 1 - inside.low))
    return max(0.0, *(math.log(right / wrong) for right, wrong in sides if right > 0 and wrong > 0))


def _check_probabilities(delta: float, confidence: float) -> None:
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise ValueError(f"delta={delta} must lie in [0, 1) and confidence={confidence} in (0, 1), for example 1e-5 and 0.95")


# ----------------------------------------------------------------------------------------------------------- guessing
def guess(scores: Float[Tensor, " canaries"], included: Bool[Tensor, " canaries"], guess_in: int | float,
          guess_out: int | float) -> tuple[int, int]:
    """Guesses "in" for the highest scores, "out" for the lowest, abstains between.

    Args:
        scores: higher means rather in. Ties are broken by position, which knows nothing of the coins.
        included: the coins.
        guess_in, guess_out: how many, or which share of the canaries (a float below 1). Fix them before looking: a number
            chosen on the scores it is judged on makes the bound wrong. See `best_of_shares` and `chosen_on_half`.

    Returns:
        How many were guessed, and how many of them rightly.

    >>> guess(torch.tensor([3.0, 0.1, -2.0, 1.0]), torch.tensor([True, True, False, False]), 2, 0.25)
    (3, 2)
    """
    size = len(scores)
    counts = [int(k * size) if isinstance(k, float) and k < 1 else k for k in (guess_in, guess_out)]
    if not all(isinstance(k, int) and k >= 0 for k in counts) or not 0 < sum(counts) <= size:
        raise ValueError(f"guess_in={guess_in} and guess_out={guess_out} must be whole numbers or shares below 1, together between 1 and "
                         f"the {size} canaries")
    if not isinstance(included, Tensor) or included.dtype != torch.bool or included.shape != scores.shape:
        raise ValueError("included must hold one truth value a canary: give included.bool() (of whole numbers ~ would turn other bits)")
    if bool(torch.isnan(scores).any()):
        raise ValueError("some scores are nan: give canaries that cannot be judged the lowest or the middle score, by a fixed rule")
    order = torch.argsort(scores, descending=True, stable=True)
    ordered = included[order]
    right = int(ordered[:counts[0]].sum()) + int((~ordered[size - counts[1]:]).sum())
    return sum(counts), right


def best_of_shares(scores: Float[Tensor, " canaries"], included: Bool[Tensor, " canaries"], shares: Sequence[tuple[float, float]],
                   delta: float, confidence: float = 0.95) -> float:
    """Best bound over several (guess_in, guess_out), each at the confidence 1 − (1 − confidence)/number (Bonferroni)."""
    corrected = 1 - (1 - confidence) / len(shares)
    return max(one_run_epsilon(len(scores), *guess(scores, included, *share), delta, corrected) for share in shares)


def chosen_on_half(scores: Float[Tensor, " canaries"], included: Bool[Tensor, " canaries"], shares: Sequence[tuple[float, float]],
                   delta: float, generator: torch.Generator, confidence: float = 0.95) -> float:
    """Chooses the share on a random half of the canaries, judges it on the other, which alone counts as m.

    Valid because the coins of the first half tell nothing about those of the second: they are as public as any other data.
    """
    order = torch.randperm(len(scores), generator=generator)
    first, second = order[:len(order) // 2], order[len(order) // 2:]

    def bound(half: Tensor, share: tuple[float, float]) -> float:
        return one_run_epsilon(len(half), *guess(scores[half], included[half], *share), delta, confidence)

    return bound(second, max(shares, key=lambda share: bound(first, share)))


@dataclass(frozen=True)
class OneRunAudit:
    """Outcome of an audit in one run.

    Attributes:
        epsilon_lower: what the guesses refute, at ``delta`` and ``confidence``.
        claimed_epsilon: by the accountant, for exactly the audited steps.
        largest_possible: the bound had every guess been right: a claim above it cannot be contradicted by this audit.
        noise_ratio: deviation of an empty step's noise over σC, over all trainable parameters; nan where it was not measured.
        noise_surprise: how many standard deviations the noise is off, of the worst parameter or of all together; ∞ where one got none.
        scores, included: what the guesses were made from, for figures. Private in earnest.
    """

    num_canaries: int
    num_guesses: int
    num_correct: int
    num_steps: int
    delta: float
    confidence: float
    epsilon_lower: float
    claimed_epsilon: float
    largest_possible: float
    noise_ratio: float = math.nan
    noise_surprise: float = 0.0
    scores: Tensor | None = field(default=None, repr=False, compare=False)
    included: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def contradicts(self) -> bool:
        return self.epsilon_lower > self.claimed_epsilon

    @property
    def noise_fits(self) -> bool:
        """The noise, of every parameter and of all together, is within six standard deviations of what normal values have."""
        return self.noise_surprise <= 6

    def __str__(self) -> str:
        verdict = "CONTRADICTION: the run is less private than claimed" if self.contradicts else "no contradiction"
        power = "" if self.contradicts or self.claimed_epsilon <= self.largest_possible else (
            f". So few canaries could not have shown more than {self.largest_possible:.2f}")
        return (f"claimed ε {self.claimed_epsilon:.2f} for {self.num_steps} steps; the audit found at least {self.epsilon_lower:.2f} "
                f"({self.num_correct} of {self.num_guesses} guesses right, {self.confidence:.0%} confidence): {verdict}{power}")


# ------------------------------------------------------------------------------------------------ audits of the engine
def audit_engine(model: nn.Module, plan: PrivacyPlan, *, num_canaries: int = 2000, num_steps: int | None = None, clipping: str = "flat",
                 mode: str = "book_keeping", share: float = 0.1, confidence: float = 0.95, first_step: Callable | None = None,
                 generator: torch.Generator | None = None) -> OneRunAudit:
    """One private run of the engine with gradient canaries, audited by someone who sees every noisy update.

    The sampler, the clipping, the noise and the step are the real ones. The weights do not move (learning rate 0): such a
    canary's gradient does not depend on them. The score of a canary adds up the log-likelihood ratio of its coordinate u
    (in units of C) over the steps, log(1 − q + q exp((u − 1/2)/σ²)), the best test of "in" against "out" for that coordinate.

    Args:
        model: with its trainable parameters chosen; not private. It comes back as it was.
        plan: its σ, C, q, δ are audited.
        num_canaries: at most N, and at most what `GradientCanaries` finds room for.
        num_steps: the plan's by default; fewer make a shorter run, whose own ε is then the claim.
        share: of the canaries guessed "in", and as many "out" where every canary that is in was almost surely drawn at some time
            ((1 − q)^T ≤ 0.001); both are fixed by public numbers.
        first_step: called with the `PrivateOptimizer` in the first step, for real examples beside the canaries.
        generator: of coins, batches and noise, for checks; seeded by the operating system if None.

    Raises:
        ValueError: no noise (ε is infinite: nothing to contradict), fewer than 10 canaries, or as `make_private`.
    """
    if not isinstance(model, nn.Module) or not isinstance(plan, PrivacyPlan):
        raise ValueError(f"an audit takes a model and a PrivacyPlan, got {type(model).__name__} and {type(plan).__name__}")
    if plan.noise_multiplier == 0:
        raise ValueError("the plan has no noise, its ε is infinite: there is nothing to contradict. Audit a plan with noise_multiplier > 0")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator lies on {generator.device}: give one of the CPU, the coins and batches are drawn there")
    if num_steps is not None and not 1 <= num_steps <= plan.num_steps:
        raise ValueError(f"num_steps={num_steps} must lie between 1 and the plan's {plan.num_steps}")
    if not 0 < share < 0.5:
        raise ValueError(f"share={share} of the canaries is guessed on each side: write a number above 0 and below 0.5, such as 0.1")
    if isinstance(num_canaries, bool) or not isinstance(num_canaries, int) or num_canaries < 10:
        raise ValueError(f"num_canaries={num_canaries!r}: an audit needs hundreds, and 10 at least")
    plan = replace(plan, num_steps=num_steps or plan.num_steps)
    if any(p.grad is not None for p in model.parameters()):
        raise ValueError("the model still holds gradients: call optimizer.zero_grad() before the audit")
    canaries = GradientCanaries(model, min(num_canaries, plan.dataset_size), GRADIENT_SCALE * max(plan.max_grad_norm, 1.0))
    if len(canaries) < 10:
        raise ValueError(f"room for {len(canaries)} canaries only: an audit needs hundreds (num_canaries={num_canaries}, "
                         f"N={plan.dataset_size})")
    coins, draws, noise = spawn(generator or seed_from_operating_system(torch.Generator()), 3)
    included = torch.rand(len(canaries), generator=coins) < 0.5
    if plan.sampling == "poisson":
        batches = poisson_batches(range(plan.dataset_size), plan, generator=draws)
    else:
        batches = shuffled_batches(range(plan.dataset_size), plan, generator=draws)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    reads: list[Tensor] = []
    noises: list[tuple[float, int]] = []

    def look(*_) -> None:  # what the optimizer is given is what an adversary with every checkpoint can work out
        unit = plan.expected_batch_size / plan.max_grad_norm
        reads.append(canaries.read() * unit)
        if len(reads) > plan.num_steps:  # the empty step at the end
            unit /= plan.noise_multiplier
            noises.extend((float(p.grad.double().square().sum()) * unit**2, p.numel()) for p in optimizer.param_groups[0]["params"])

    optimizer.register_step_pre_hook(look)
    private = make_private(model, optimizer, replace(plan, num_steps=plan.num_steps + 1), clipping, mode,
                           None if generator is None else noise)
    # Drawn beforehand: the batch's rows are stand-ins, and the canaries that answer for them are no losses of a batch at work.
    private.batch_guard.on = False
    drawn = [[i for i in batch.indices if i < len(canaries) and included[i]] for batch in batches]
    try:
        for indices in drawn:
            if first_step and not reads:
                first_step(private)
            canaries.backward(private, indices)
            private.step()
        private.step()  # an empty batch, whoever is in: its noise is measured, and tells nothing of the coins
        groups = private.sampler.num_groups
    finally:
        private.detach()
    ratio, surprise = _noise_ratio(noises)
    scores = _log_likelihood_ratio(torch.stack(reads[:-1]), plan, group_bound(1.0, clipping, groups)).sum(0)
    in_share, out_share = share, share if (1 - plan.sample_rate) ** plan.num_steps <= 1e-3 or plan.sampling == "shuffled" else 0.0
    guesses, right = guess(scores, included, max(1, int(in_share * len(scores))), int(out_share * len(scores)))
    return OneRunAudit(
        len(scores), guesses, right, plan.num_steps, plan.delta, confidence,
        epsilon_lower=one_run_epsilon(len(scores), guesses, right, plan.delta, confidence), claimed_epsilon=plan.epsilon(),
        largest_possible=one_run_epsilon(len(scores), guesses, guesses, plan.delta, confidence),
        noise_ratio=ratio, noise_surprise=surprise, scores=scores, included=included)


def _noise_ratio(noises: list[tuple[float, int]]) -> tuple[float, float]:
    """Pooled deviation in units of the one claimed, and the worst distance in standard deviations, of one parameter or of all together.

    Wilson and Hilferty: the cube root of a mean of n squares of standard normals is about N(1 − 2/(9n), 2/(9n)). One in a
    thousand of rounding is allowed for.
    """
    def surprise(squares: float, n: int) -> float:
        if squares == 0:
            return math.inf
        return max(0.0, abs((squares / n) ** (1 / 3) - 1 + 2 / (9 * n)) - 1e-3) / math.sqrt(2 / (9 * n))

    total, values = (sum(each) for each in zip(*noises))
    return math.sqrt(total / values), max(surprise(*each) for each in [*noises, (total, values)])


def _log_likelihood_ratio(reads: Float[Tensor, "steps canaries"], plan: PrivacyPlan, signal: float) -> Float[Tensor, "steps canaries"]:
    """Of N(0, σ²) mixed with N(signal, σ²) at rate q, against N(0, σ²) alone."""
    inside = (signal * reads - signal**2 / 2) / plan.noise_multiplier**2 + math.log(plan.sample_rate)
    return inside if plan.sample_rate == 1 else torch.logaddexp(inside, torch.full_like(inside, math.log1p(-plan.sample_rate)))


@dataclass(frozen=True)
class QuickAudit:
    """What `audit_quickly` found. ``holds`` is false on any contradiction; true proves nothing."""

    sensitivity: SensitivityReport
    audit: OneRunAudit

    @property
    def holds(self) -> bool:
        return self.sensitivity.holds and self.audit.noise_fits and not self.audit.contradicts

    def __str__(self) -> str:
        noise = f"noise of an empty step: {self.audit.noise_ratio:.4f} of σC, {'as claimed' if self.audit.noise_fits else 'NOT AS CLAIMED'}"
        return "\n".join([f"sensitivity: {self.sensitivity}", noise, f"canaries: {self.audit}",
                          "verdict: " + ("no contradiction found" if self.holds else "CONTRADICTION, do not release this run")])


def audit_quickly(model: nn.Module, loss_per_example: Callable, micro_batch: dict[str, Tensor], plan: PrivacyPlan, *,
                  clipping: str = "flat", mode: str = "book_keeping", num_canaries: int = 2000, num_steps: int | None = None,
                  generator: torch.Generator | None = None) -> QuickAudit:
    """Half a minute before a long private training: does the engine keep its promises on *this* model, loss and plan?

    1. `verify_sensitivity` on the first examples of the micro-batch: one example moves the sum by at most C, and the engine's
       gradients are those of a plain loop.
    2. The noise of an empty step is σC, over all trainable parameters.
    3. `audit_engine`: canaries in the model's own trainable layers, with the plan's sampler, clipping, noise and step, and the
       examples of the micro-batch beside them in the first step.

    What it can tell: clipping that does not clip, noise that is missing or too small, batches that are larger or more frequent
    than accounted, a loss that mixes examples, a parameter that the engine does not see. What it cannot: that a run is private.
    A bound below the claim is what most broken runs give too, if they are broken a little, elsewhere, or for other examples
    than these. It looks at no seed that leaks, no choice of settings on private data, no metric released beside the model.

    Args:
        model: prepared as for training (side network, LoRA, ...), not private. It comes back as it was.
        loss_per_example: ``(model, micro_batch) -> losses (B,)``.
        micro_batch: real examples on the model's device; labels included.
        plan: of the training to come. By default all its steps, but at most 200, and fewer for very large models: the claim
            is then the ε of so many steps.
        clipping, mode: as for `make_private`.
        generator: for checks; seeded by the operating system if None.

    Returns:
        The report, which it also prints; ``report.holds`` is false on any contradiction.

    Raises:
        ValueError: as `make_private` and `audit_engine`.
    """
    check_micro_batch(micro_batch)
    if plan.noise_multiplier == 0:
        raise ValueError("the plan has no noise, its ε is infinite: there is nothing to contradict. Audit a plan with noise_multiplier > 0")
    some = {name: t[:QUICK_EXAMPLES] if isinstance(t, Tensor) else t for name, t in micro_batch.items()}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if num_steps is None:
        num_steps = min(plan.num_steps, MOST_AUDIT_STEPS, max(1, int(MOST_NOISE_DRAWS / max(1, parameters))))
    with torch.random.fork_rng():  # dropout of the first step
        sensitivity = verify_sensitivity(model, loss_per_example, some, plan.max_grad_norm, mode, clipping)
        audit = audit_engine(model, plan, num_canaries=num_canaries, num_steps=num_steps, clipping=clipping, mode=mode, generator=generator,
                             first_step=lambda private: private.backward(loss_per_example(model, some)))
    report = QuickAudit(sensitivity, audit)
    print(report)
    return report

"""Membership inference: scores that guess whether a model was trained on an example, and how well they guess.

Every score is one number an example, and higher means "more likely a member". The attacker has the model and an example; calibrated
scores also need a model that has not seen the example (the pre-trained one, or models trained on other data). A score is judged by its
ROC curve, above all at low false-positive rates (Carlini et al. 2022, arXiv 2112.03570): an attack that names a few
members for certain is a leak, though it is near chance on average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor, nn

from memarc_utils.batch_selection import pad_rows


# --------------------------------------------------------------------------------------------- what the models say
@torch.no_grad()
def score_examples(model: nn.Module, dataset, function: Callable[[nn.Module, dict[str, Tensor]], Tensor], batch_size: int = 32
                   ) -> Float[np.ndarray, " examples"]:
    """One number an example, in evaluation mode and in the order of the data set.

    Args:
        dataset: anything with ``len`` and ``[i]`` that gives a row of token ids.
        function: model and batch to a tensor (B,), such as `training.classification_losses` or `confidence_margins`.

    Raises:
        ValueError: no examples, or a function that does not give one number an example.
    """
    if not len(dataset) or batch_size < 1:
        raise ValueError(f"scores need at least 1 example and batch_size >= 1, got {len(dataset)} and {batch_size}")
    pieces = []
    for batch in _evaluation_batches(model, dataset, batch_size):
        values = function(model, batch)
        if values.shape != (len(batch["input_ids"]),):
            raise ValueError(f"the function gave shape {tuple(values.shape)} for {len(batch['input_ids'])} examples; it must give one "
                             "number an example, not a mean over the batch")
        pieces.append(values.double().cpu().numpy())
    return np.concatenate(pieces)


def _evaluation_batches(model: nn.Module, dataset, batch_size: int):
    device, training = next(model.parameters()).device, model.training
    pad_token = getattr(model.config, "pad_token_id", None) or 0
    model.eval()
    try:
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            yield {name: t.to(device) for name, t in pad_rows(rows, pad_token).items()}
    finally:
        model.train(training)


def confidence_margins(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " batch"]:
    """Logit-scaled confidence of a classifier, φ = log(p_y / (1 − p_y)) (Carlini et al., arXiv 2112.03570).

    From the logits, φ = z_y − log Σ_{j≠y} exp z_j, so that nothing is lost where p_y rounds to 1. Unlike the loss, φ is close to
    normal over retrained models, which is what LiRA's fit assumes.

    Args:
        batch: the model's inputs and ``labels`` (B,).
    """
    logits = model(**{name: t for name, t in batch.items() if name != "labels"}).logits.double()
    labels = batch["labels"][:, None]
    others = logits.scatter(1, labels, -torch.inf)
    return logits.gather(1, labels)[:, 0] - others.logsumexp(1)


def token_evidence(model: nn.Module, batch: dict[str, Tensor]) -> tuple[
        Float[Tensor, "batch targets"], Bool[Tensor, "batch targets"]]:
    """What a causal language model says of each target token, given the ones before it.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels`` (B, T); -100 marks what is no target.

    Returns:
        Log-probabilities (B, T − 1), zero where there is no target; and whether another token was thought more likely (never true where
        there is no target).
    """
    labels = batch["labels"][:, 1:]
    logits = model(**{name: t for name, t in batch.items() if name != "labels"}).logits[:, :-1].float()
    target = labels != -100
    tokens = labels.clamp_min(0)
    log_p = (logits.gather(2, tokens[..., None])[..., 0] - logits.logsumexp(2)).double()
    return log_p.masked_fill(~target, 0.0), (logits.argmax(2) != tokens) & target


# ----------------------------------------------------------------------------------------------------------- scores
def loss_scores(losses: Float[np.ndarray, " examples"]) -> Float[np.ndarray, " examples"]:
    """−ℓ(x): members have lower losses (Yeom et al., arXiv 1709.01604). Easy non-members have low losses too.

    >>> loss_scores(np.array([0.5, 2.0]))
    array([-0.5, -2. ])
    """
    return -_finite("losses", losses)


def calibrated_scores(losses: Float[np.ndarray, " examples"], reference_losses: Float[np.ndarray, " examples"]
                      ) -> Float[np.ndarray, " examples"]:
    """ℓ_ref(x) − ℓ(x): what training on the private data gained on this example (Watson et al., arXiv 2111.08440).

    Args:
        losses: of the model under attack.
        reference_losses: of a model that has not seen the examples, in the same order.

    >>> calibrated_scores(np.array([0.5, 2.0]), np.array([2.5, 2.0]))
    array([2., 0.])
    """
    losses, reference_losses = _finite("losses", losses), _finite("reference_losses", reference_losses)
    if losses.shape != reference_losses.shape:
        raise ValueError(f"{losses.size} losses and {reference_losses.size} reference losses; give both for the same examples")
    return reference_losses - losses


def lira_scores(values: Float[np.ndarray, " examples"], out_values: Float[np.ndarray, "models examples"], *, shared_variance: bool = False
                ) -> Float[np.ndarray, " examples"]:
    """Offline LiRA: how far a model's value lies above those of models that were not trained on the example.

    A normal distribution is fitted to each example's values under the out-models; the score is −log P[Z > φ], Z ~ N(μ_out, σ_out²)
    (Carlini et al., arXiv 2112.03570; the logarithm keeps apart what the probability itself would round to 1).

    Args:
        values: φ under the model under attack: `confidence_margins` of a classifier, −loss of a language model.
        out_values: the same under each out-model; NaN where that model did train on the example.
        shared_variance: one σ for all examples, the mean of their variances: steadier with few out-models.

    Raises:
        ValueError: shapes that do not fit, an example with too few out-models (2, or 1 with a shared variance), no variance at all.

    >>> out = np.array([[0.0, 5.0], [2.0, 7.0]])                    # means 1 and 6
    >>> lira_scores(np.array([1.0, 6.0]), out).round(4)             # both in the middle: P = ½
    array([0.6931, 0.6931])
    """
    values, out = _finite("values", values), np.asarray(out_values, dtype=np.float64)
    if out.ndim != 2 or out.shape[1:] != values.shape:
        raise ValueError(f"out_values has shape {out.shape}; it must be (models, {values.size}), one row an out-model")
    if np.isinf(out).any():
        raise ValueError("out_values holds an infinity; leave a model out of an example with NaN")
    counts = np.isfinite(out).sum(0)
    least = 1 if shared_variance else 2
    if counts.min() < least or counts.max() < 2:
        raise ValueError(f"an example has {counts.min()} out-models; each needs {least} or more (and one of them 2): train more models, "
                         "each on a random half, or set shared_variance=True")
    means = np.nansum(out, 0) / counts
    squares = np.nansum((out - means) ** 2, 0)
    variances = np.full(values.shape, squares.sum() / (counts - 1).sum()) if shared_variance else squares / (counts - 1)
    if not (variances > 0).all():
        raise ValueError("out-models agree exactly on an example, so there is no spread to fit; train them with different seeds and data")
    return -stats.norm.logsf((values - means) / np.sqrt(variances))


def error_zone_ratio(differences: Float[np.ndarray, "examples targets"], mispredicted: Bool[np.ndarray, "examples targets"]
                     ) -> Float[np.ndarray, " examples"]:
    """Sum of the positive Δ over sum of the |negative Δ|, over the tokens that the model under attack mispredicts (arXiv 2601.12104).

    Args:
        differences: Δ = log p_target − log p_reference of each token.
        mispredicted: by the model under attack; tokens beyond the text are false.

    Returns:
        A ratio an example; infinite, above all others, where no mispredicted token lost probability or none was mispredicted: the text is
        known by heart. (A convention of ours: 0/0 has no value.)

    >>> error_zone_ratio(np.array([[3.0, -1.0, 9.0]]), np.array([[True, True, False]]))
    array([3.])
    """
    differences = _finite("differences", differences, 2)
    mispredicted = np.asarray(mispredicted)
    if mispredicted.shape != differences.shape or mispredicted.dtype != bool:
        raise ValueError(f"mispredicted must be truth values of shape {differences.shape}, one a token; got {mispredicted.dtype} of "
                         f"shape {mispredicted.shape}")
    zone = np.where(mispredicted, differences, 0.0)
    gained, lost = zone.clip(min=0).sum(1), (-zone).clip(min=0).sum(1)
    return np.divide(gained, lost, out=np.full(len(zone), np.inf), where=lost > 0)


@torch.no_grad()
def error_zone_scores(model: nn.Module, reference: nn.Module, dataset, batch_size: int = 8) -> Float[np.ndarray, " examples"]:
    """EZ-MIA of a causal language model: `error_zone_ratio` from one forward pass of each model (arXiv 2601.12104).

    Args:
        model: under attack.
        reference: the same model before fine-tuning.
        dataset: rows of ``input_ids``, ``attention_mask``, ``labels``, as `data.tokenize_dataset` makes them.
    """
    if model is reference:
        raise ValueError("model and reference are one object, so every Δ is 0; load the pre-trained model once more as the reference")
    pieces = []
    pairs = zip(_evaluation_batches(model, dataset, batch_size), _evaluation_batches(reference, dataset, batch_size))
    for batch, same_batch in pairs:
        log_p, mispredicted = token_evidence(model, batch)
        log_p_reference, _ = token_evidence(reference, same_batch)
        pieces.append(error_zone_ratio((log_p - log_p_reference.to(log_p.device)).cpu().numpy(), mispredicted.cpu().numpy()))
    return np.concatenate(pieces)


# ------------------------------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True)
class AttackReport:
    """How well a score tells members from non-members.

    Attributes:
        auc: chance that a member's score is above a non-member's, ties counted half.
        auc_interval: from resampled members and non-members (percentile bootstrap). It knows nothing of other trained models: that
            takes several seeds. At perfect separation it has no width.
        tpr_at: {false-positive rate: share of members found with at most that share of false alarms}. A rate below 1 over the number of
            non-members allows no false alarm at all.
        tpr_intervals: likewise resampled; rough where few non-members fix the threshold.
        false_positive_rates, true_positive_rates: the ROC curve, from (0, 0) to (1, 1).
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr_at: dict[float, float]
    tpr_intervals: dict[float, tuple[float, float]]
    false_positive_rates: Float[np.ndarray, " points"] = field(repr=False)
    true_positive_rates: Float[np.ndarray, " points"] = field(repr=False)
    num_members: int
    num_nonmembers: int
    confidence: float

    def __str__(self) -> str:
        found = ", ".join(f"TPR {self.tpr_at[rate]:.3f} [{low:.3f}, {high:.3f}] at FPR {rate:g}"
                          for rate, (low, high) in self.tpr_intervals.items())
        return (f"AUC {self.auc:.3f} [{self.auc_interval[0]:.3f}, {self.auc_interval[1]:.3f}], {found} "
                f"({self.num_members} members, {self.num_nonmembers} non-members, {self.confidence:.0%} intervals)")


def evaluate_attack(scores: Float[np.ndarray, " examples"], members: Bool[np.ndarray, " examples"], *,
                    rates: Sequence[float] = (0.01, 0.001), confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
                    ) -> AttackReport:
    """ROC curve, AUC and true-positive rates at low false-positive rates, with bootstrap intervals.

    Members and non-members are resampled apart, each to its own number.

    Args:
        scores: higher means "member"; infinities are allowed.
        members: which examples the model was trained on.
        rates: false-positive rates, each in [0, 1).
        seed: of the resampling.

    >>> print(evaluate_attack(np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, True, False, False]), num_resamples=10).auc)
    0.75
    """
    scores, members = _checked(scores, members)
    if not rates or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"rates must be false-positive rates in [0, 1), such as (0.01, 0.001); got {tuple(rates)}")
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(f"confidence must lie in (0, 1) and num_resamples be 1 or more; got {confidence} and {num_resamples}")
    levels, level = np.unique(-scores, return_inverse=True)  # the highest score first
    level_in, level_out = level[members], level[~members]

    def measures(chosen_in: Int[np.ndarray, " members"], chosen_out: Int[np.ndarray, " nonmembers"]) -> tuple[np.ndarray, ...]:
        tpr = np.concatenate([[0], np.bincount(chosen_in, minlength=levels.size).cumsum()]) / chosen_in.size
        fpr = np.concatenate([[0], np.bincount(chosen_out, minlength=levels.size).cumsum()]) / chosen_out.size
        at = [tpr[np.searchsorted(fpr, rate * (1 + 1e-12), side="right") - 1] for rate in rates]
        return fpr, tpr, np.array([np.trapezoid(tpr, fpr), *at])

    fpr, tpr, found = measures(level_in, level_out)
    generator = np.random.default_rng(seed)
    resampled = np.array([measures(generator.choice(level_in, level_in.size), generator.choice(level_out, level_out.size))[2]
                          for _ in range(num_resamples)])
    tail = (1 - confidence) / 2
    intervals = [(float(low), float(high)) for low, high in np.quantile(resampled, [tail, 1 - tail], axis=0).T]
    return AttackReport(float(found[0]), intervals[0], dict(zip(rates, map(float, found[1:]))), dict(zip(rates, intervals[1:])),
                        fpr, tpr, level_in.size, level_out.size, confidence)


def split_halves(members: Bool[np.ndarray, " examples"], seed: int = 0) -> tuple[Int[np.ndarray, " half"], Int[np.ndarray, " other"]]:
    """Indices of two halves without common examples, each with half of the members and half of the non-members.

    >>> one, other = split_halves(np.array([True] * 4 + [False] * 6))
    >>> sorted([*one, *other]) == list(range(10)), int((one < 4).sum())
    (True, 2)
    """
    members = np.asarray(members)
    generator = np.random.default_rng(seed)
    kinds = [generator.permutation(np.flatnonzero(members == kind)) for kind in (True, False)]
    if min(kind.size for kind in kinds) < 2:
        raise ValueError(f"{kinds[0].size} members and {kinds[1].size} non-members; two halves need 2 or more of each")
    return (np.concatenate([kind[:kind.size // 2] for kind in kinds]), np.concatenate([kind[kind.size // 2:] for kind in kinds]))


@dataclass(frozen=True)
class Threshold:
    """Guess "member" where the score is above ``value``. Remembers what it was chosen on, so that it is not judged there."""

    value: float
    false_positive_rate: float  # aimed at
    chosen_on: Float[np.ndarray, " examples"] = field(repr=False)


@dataclass(frozen=True)
class Judgement:
    """What a threshold does on examples that had no part in choosing it; exact binomial (Clopper-Pearson) intervals of 95 %."""

    true_positive_rate: float
    true_positive_interval: tuple[float, float]
    false_positive_rate: float
    false_positive_interval: tuple[float, float]


def choose_threshold(scores: Float[np.ndarray, " examples"], members: Bool[np.ndarray, " examples"], false_positive_rate: float
                     ) -> Threshold:
    """The lowest threshold that keeps the false alarms on these examples at or below the rate.

    Judge it with `judge_threshold` on the other half (`split_halves`): on its own examples it looks better than it is.

    Args:
        false_positive_rate: in [0, 1); below 1 over the number of non-members it allows none.
    """
    scores, members = _checked(scores, members)
    if not 0 <= false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must lie in [0, 1), such as 0.01; got {false_positive_rate}")
    allowed = int(false_positive_rate * (~members).sum() * (1 + 1e-12))
    value = np.sort(scores[~members])[::-1][allowed]  # at most `allowed` non-members lie strictly above
    return Threshold(float(value), false_positive_rate, scores)


def judge_threshold(threshold: Threshold, scores: Float[np.ndarray, " examples"], members: Bool[np.ndarray, " examples"]) -> Judgement:
    """True- and false-positive rate of a threshold on other examples than it was chosen on.

    Raises:
        ValueError: the scores are those the threshold was chosen on, or share examples with them: more than one in ten of the values that
            occur once here occur once there. Scores with many ties (most values occur twice or more) agree by chance; those are refused
            only when all are the same.
    """
    scores, members = _checked(scores, members)
    once, there = (values[counts == 1] for values, counts in (np.unique(s, return_counts=True) for s in (scores, threshold.chosen_on)))
    common = np.isin(once, there).sum()
    if common > 0.1 * once.size and once.size > scores.size / 2 or np.array_equal(np.sort(scores), np.sort(threshold.chosen_on)):
        raise ValueError(f"these examples had a part in choosing the threshold ({common} scores are the same): split the examples with "
                         "split_halves, choose on one half and judge on the other")
    guessed = scores > threshold.value
    rates = []
    for kind in (members, ~members):
        test = stats.binomtest(int(guessed[kind].sum()), int(kind.sum()))
        interval = test.proportion_ci(0.95, method="exact")
        rates += [float(test.statistic), (float(interval.low), float(interval.high))]
    return Judgement(*rates)


def _finite(name: str, values: np.ndarray, dimensions: int = 1) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != dimensions or not values.size:
        raise ValueError(f"{name} must have {dimensions} axis or axes and at least one entry; got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds {(~np.isfinite(values)).sum()} values that are not finite; leave those examples out and "
                         "say how many")
    return values


def _checked(scores: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, members = np.asarray(scores, dtype=np.float64), np.asarray(members)
    if members.dtype != bool:
        raise ValueError(f"members must be truth values, one an example; got {members.dtype}. Write labels == 1")
    if scores.ndim != 1 or scores.shape != members.shape:
        raise ValueError(f"scores have shape {scores.shape} and members {members.shape}; give one of each an example")
    if members.all() or not members.any():
        raise ValueError(f"{members.sum()} members and {(~members).sum()} non-members; an attack needs both to be judged")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} scores are NaN; a model or a reference gave no loss there: leave those examples out")
    return scores, members

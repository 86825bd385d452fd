"""Membership inference: each score against a loop or scipy, ROC and intervals against other routes, thresholds on other examples only."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from memarc_utils import membership
from memarc_utils.backbones import tiny_backbone
from memarc_utils.training import causal_lm_losses, classification_losses, train_without_privacy

IN, OUT = np.array([True] * 30 + [False] * 40), np.random.default_rng(5)


def normal_scores(distance, members=IN, seed=0):
    return np.random.default_rng(seed).normal(size=members.size) + distance * members


def language_rows(count=7, seed=0, vocabulary=101):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, vocabulary, (4 + i % 4,), generator=generator).tolist()
        labels = [-100 if i % 3 == 0 and t < 2 else token for t, token in enumerate(ids)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def class_rows(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": (ids := torch.randint(3, 101, (5 + i % 3,), generator=generator).tolist()),
             "attention_mask": [1] * len(ids), "labels": int(torch.randint(0, 3, (), generator=generator))} for i in range(count)]


def one(row):
    return {name: torch.tensor([value]) for name, value in row.items()}


# ------------------------------------------------------------------------------------------------------ evaluation
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, -math.inf]), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_auc_is_mann_whitney_with_ties_and_infinities(pairs):
    scores, members = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    if members.all() or not members.any():
        return
    report = membership.evaluate_attack(scores, members, num_resamples=1)
    finite = np.nan_to_num(scores, posinf=9, neginf=-9)
    u = stats.mannwhitneyu(finite[members], finite[~members]).statistic
    assert report.auc == pytest.approx(u / (members.sum() * (~members).sum()), abs=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.025, 0.05, 0.3, 0.999])
@pytest.mark.parametrize("decimals", [1, 8])
def test_true_positives_at_a_rate_by_trying_every_threshold(rate, decimals):
    scores = normal_scores(1.5).round(decimals)
    tried = [(np.mean(scores[~IN] >= t), np.mean(scores[IN] >= t)) for t in [*scores, math.inf]]
    best = max(tpr for fpr, tpr in tried if fpr <= rate)
    assert membership.evaluate_attack(scores, IN, rates=[rate], num_resamples=1).tpr_at[rate] == pytest.approx(best)


def test_the_curve_runs_from_corner_to_corner_and_its_points_are_thresholds():
    scores = normal_scores(0.8).round(1)
    report = membership.evaluate_attack(scores, IN, num_resamples=1)
    fpr, tpr = report.false_positive_rates, report.true_positive_rates
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    levels = np.unique(scores)[::-1]
    assert np.allclose(fpr[1:], [np.mean(scores[~IN] >= t) for t in levels])
    assert np.allclose(tpr[1:], [np.mean(scores[IN] >= t) for t in levels])


def test_rates_that_rounding_would_miss():
    members = np.array([True] * 5 + [False] * 100)
    scores = np.concatenate([[0.5] * 5, np.arange(100.0) - 98])  # one non-member above the members, of 100
    report = membership.evaluate_attack(scores, members, rates=(0.01, 0.009), num_resamples=1)
    assert report.tpr_at == {0.01: 1.0, 0.009: 0.0}
    for allowed in range(1, 100):  # k/100 in floating point must count as k of 100
        scores = np.concatenate([[0.5] * 5, np.arange(100.0) - (99 - allowed)])
        assert membership.evaluate_attack(scores, members, rates=[allowed / 100], num_resamples=1).tpr_at[allowed / 100] == 1
        assert membership.choose_threshold(scores, members, allowed / 100).value == 0


def test_the_interval_is_that_of_scipys_bootstrap():
    scores = normal_scores(0.7)

    def auc(a, b):
        return stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))

    theirs = stats.bootstrap((scores[IN], scores[~IN]), auc, n_resamples=600, method="percentile", vectorized=False,
                             rng=np.random.default_rng(1)).confidence_interval
    ours = membership.evaluate_attack(scores, IN, num_resamples=2000).auc_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.025)


def test_the_interval_covers_the_true_auc_as_often_as_it_says():
    members = np.array([True] * 60 + [False] * 60)
    truth = stats.norm.cdf(0.8 / math.sqrt(2))  # of two normals 0.8 apart
    inside = 0
    for seed in range(150):
        low, high = membership.evaluate_attack(normal_scores(0.8, members, seed), members, num_resamples=150, seed=seed).auc_interval
        inside += low <= truth <= high
    # 0.95 of 150 is 142 with a standard deviation of 2.7; an interval of half the width would cover about 100.
    assert 134 <= inside <= 149


def test_the_interval_of_true_positives_is_that_of_a_plain_resampling():
    scores = normal_scores(2.0)
    report = membership.evaluate_attack(scores, IN, rates=[0.05], num_resamples=1500)
    generator, found = np.random.default_rng(7), []
    for _ in range(1500):
        a, b = generator.choice(scores[IN], 30), generator.choice(scores[~IN], 40)
        found.append(np.mean(a > np.sort(b)[-3]))  # at most 2 of 40 above
    assert report.tpr_intervals[0.05] == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])), abs=0.05)
    assert "AUC 0.890 [" in str(report) and "30 members, 40 non-members" in str(report)


@pytest.mark.parametrize(
    ("scores", "members", "said"),
    [
        (np.zeros(3), np.array([True, False]), "one of each an example"),
        (np.zeros(2), np.array([1, 0]), "labels == 1"),
        (np.zeros(2), np.array([True, True]), "needs both"),
        (np.array([0.0, np.nan]), np.array([True, False]), "NaN"),
    ],
)
def test_bad_scores_are_refused(scores, members, said):
    evaluate, choose = membership.evaluate_attack.__wrapped__, membership.choose_threshold.__wrapped__  # without the run-time types
    with pytest.raises(ValueError, match=said):
        evaluate(scores, members)
    with pytest.raises(ValueError, match=said):
        choose(scores, members, 0.1)


@pytest.mark.parametrize("wrong", [{"rates": ()}, {"rates": (1.0,)}, {"rates": (-0.1,)}, {"confidence": 1.0}, {"num_resamples": 0}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        membership.evaluate_attack(normal_scores(1), IN, **wrong)


# ------------------------------------------------------------------------------------------------------- thresholds
def test_halves_share_nothing_and_hold_half_of_each_kind():
    first, second = membership.split_halves(IN)
    assert sorted(np.concatenate([first, second])) == list(range(IN.size))
    assert IN[first].sum() == 15 and (~IN[first]).sum() == 20
    assert not np.array_equal(first, membership.split_halves(IN, seed=1)[0])
    with pytest.raises(ValueError, match="2 or more of each"):
        membership.split_halves(np.array([True, False, False]))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.24, 0.9])
@pytest.mark.parametrize("decimals", [0, 8])
def test_a_threshold_is_the_lowest_that_keeps_the_rate(rate, decimals):
    scores = normal_scores(1).round(decimals)
    value = membership.choose_threshold(scores, IN, rate).value
    assert np.mean(scores[~IN] > value) <= rate
    lower = scores[scores < value]
    assert not lower.size or np.mean(scores[~IN] > lower.max()) > rate


def test_a_threshold_is_judged_by_counting_on_the_other_half():
    scores = normal_scores(1.5)
    first, second = membership.split_halves(IN)
    threshold = membership.choose_threshold(scores[first], IN[first], 0.1)
    judged = membership.judge_threshold(threshold, scores[second], IN[second])
    above = int((scores[second][IN[second]] > threshold.value).sum())
    assert judged.true_positive_rate == above / 15
    low, high = judged.true_positive_interval  # Clopper and Pearson by the beta distribution
    assert (low, high) == pytest.approx((stats.beta.ppf(0.025, above, 16 - above), stats.beta.ppf(0.975, above + 1, 15 - above)))
    assert judged.false_positive_rate == np.mean(scores[second][~IN[second]] > threshold.value)


def test_a_threshold_is_refused_on_what_it_was_chosen_on():
    scores = normal_scores(1)
    first, second = membership.split_halves(IN)
    threshold = membership.choose_threshold(scores[first], IN[first], 0.1)
    order = np.random.default_rng(0).permutation(first)
    mixed = np.concatenate([second, first[::4]])
    for misuse in (first, order, first[::2], np.arange(IN.size), mixed):
        with pytest.raises(ValueError, match="had a part in choosing"):
            membership.judge_threshold(threshold, scores[misuse], IN[misuse])
    membership.judge_threshold(threshold, scores[second], IN[second])  # the honest use passes


def test_scores_with_ties_are_refused_when_they_are_all_the_same_and_pass_otherwise():
    scores, members = np.array([0.0, 0, 1, 1, 1, 0, math.inf, math.inf]), np.array([False, True] * 4)
    threshold = membership.choose_threshold(scores, members, 0.5)
    with pytest.raises(ValueError, match="had a part in choosing"):
        membership.judge_threshold(threshold, scores[::-1].copy(), members)
    membership.judge_threshold(threshold, np.array([0.0, 1, 1, 0, 0, 0]), members[:6])
    rounded, halves = normal_scores(1).round(1), membership.split_halves(IN)  # agree by chance now and then
    threshold = membership.choose_threshold(rounded[halves[0]], IN[halves[0]], 0.1)
    membership.judge_threshold(threshold, rounded[halves[1]], IN[halves[1]])


def test_why_a_threshold_is_judged_elsewhere():
    """On noise alone a threshold that allows no false alarm finds as many members elsewhere as non-members; where it was chosen, more."""
    members = np.array([True] * 400 + [False] * 20)
    here, elsewhere = [], []
    for seed in range(200):
        scores = normal_scores(0.0, members, seed)
        first, second = membership.split_halves(members, seed)
        threshold = membership.choose_threshold(scores[first], members[first], 0.0)
        here.append(np.mean(scores[first][~members[first]] > threshold.value))
        elsewhere.append(membership.judge_threshold(threshold, scores[second], members[second]).false_positive_rate)
    assert max(here) == 0
    assert np.mean(elsewhere) == pytest.approx(1 / 11, abs=0.03)  # a new score is above all of 10 others with chance 1/11


# ------------------------------------------------------------------------------------------------------------ scores
def test_plain_and_calibrated_scores():
    losses, reference = np.array([0.5, 2.0]), np.array([1.5, 1.0])
    assert membership.loss_scores(losses).tolist() == [-0.5, -2.0]
    assert membership.calibrated_scores(losses, reference).tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="same examples"):
        membership.calibrated_scores.__wrapped__(losses, reference[:1])
    with pytest.raises(ValueError, match="not finite"):
        membership.loss_scores(np.array([0.5, np.inf]))


def test_lira_is_a_normal_fit_example_by_example():
    values, out = OUT.normal(size=6), OUT.normal(size=(9, 6)) * np.arange(1, 7)
    out[2, :3] = np.nan  # this model trained on the first three
    scores = membership.lira_scores(values, out)
    for i in range(6):
        seen = out[:, i][~np.isnan(out[:, i])]
        mean, deviation = seen.mean(), seen.std(ddof=1)
        inside = 1 - 0.5 * math.erfc((values[i] - mean) / deviation / math.sqrt(2))  # P[Z <= φ] by the error function
        assert math.exp(-scores[i]) == pytest.approx(1 - inside, rel=1e-9)


def test_lira_with_one_variance_for_all():
    values, out = OUT.normal(size=5), OUT.normal(size=(4, 5))
    pooled = np.mean([np.var(out[:, i], ddof=1) for i in range(5)])
    wanted = -stats.norm.logsf(values, loc=out.mean(0), scale=math.sqrt(pooled))
    assert np.allclose(membership.lira_scores(values, out, shared_variance=True), wanted)


def test_lira_keeps_apart_what_a_probability_rounds_to_one():
    out = np.array([[-1.0, -1.0], [1.0, 1.0]])
    low, high = membership.lira_scores(np.array([20.0, 30.0]), out)
    assert stats.norm.cdf(20 / math.sqrt(2)) == stats.norm.cdf(30 / math.sqrt(2)) == 1
    assert 0 < low < high < math.inf


@pytest.mark.parametrize(
    ("out", "shared", "said"),
    [
        (np.zeros((3, 4)), False, "one row an out-model"),
        (np.zeros((1, 2)), False, "train more models"),
        (np.array([[0.0, 1], [np.nan, 2]]), False, "train more models"),
        (np.array([[np.nan, 1], [np.nan, 2]]), True, "train more models"),
        (np.zeros((3, 2)), False, "agree exactly"),
        (np.array([[0.0, 1], [np.inf, 2]]), False, "infinity"),
    ],
)
def test_lira_refuses_what_it_cannot_fit(out, shared, said):
    with pytest.raises(ValueError, match=said):
        membership.lira_scores.__wrapped__(np.zeros(2), out, shared_variance=shared)


def test_lira_finds_members_that_the_loss_cannot_see():
    """Examples differ in difficulty more than membership matters: the loss is near chance, LiRA is not."""
    generator = np.random.default_rng(0)
    difficulty, members = 5 * generator.normal(size=400), np.arange(400) < 200
    out = difficulty + generator.normal(size=(16, 400))
    values = difficulty + generator.normal(size=400) + 2 * members
    by_value = membership.evaluate_attack(values, members, num_resamples=1).auc
    by_lira = membership.evaluate_attack(membership.lira_scores(values, out), members, num_resamples=1).auc
    assert by_value < 0.7 and by_lira > 0.85


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_margins_are_log_odds_and_stay_finite(family):
    torch.manual_seed(0)
    model = tiny_backbone(family, num_labels=3)
    rows = class_rows()
    margins = membership.score_examples(model, rows, membership.confidence_margins, batch_size=4)
    losses = membership.score_examples(model, rows, classification_losses, batch_size=9)
    p = np.exp(-losses)
    assert np.allclose(margins, np.log(p / (1 - p)), atol=1e-5)
    with torch.no_grad():
        for parameter in model.classifier.parameters() if family == "bert" else model.score.parameters():
            parameter.mul_(1e5)  # p rounds to 0 or 1
    margins = membership.score_examples(model, rows, membership.confidence_margins)
    assert np.isfinite(margins).all() and np.abs(margins).max() > 100


def test_examples_are_scored_in_order_in_evaluation_mode_and_the_mode_comes_back():
    torch.manual_seed(0)
    model, rows = tiny_backbone("bert", num_labels=3, dropout=0.5), class_rows()
    model.train()
    scores = membership.score_examples(model, rows, classification_losses, batch_size=4)
    assert model.training and np.array_equal(scores, membership.score_examples(model, rows, classification_losses, batch_size=4))
    model.eval()
    alone = [classification_losses(model, one(row)).item() for row in rows]
    assert np.allclose(scores, alone, atol=1e-6)
    with pytest.raises(ValueError, match="one number an example"):
        membership.score_examples(model, rows, lambda model, batch: classification_losses(model, batch).mean())
    with pytest.raises(ValueError, match="at least 1 example"):
        membership.score_examples(model, [], classification_losses)


# ------------------------------------------------------------------------------------------------------------ EZ-MIA
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_token_evidence_adds_up_to_the_loss(family):
    torch.manual_seed(1)
    model, rows = tiny_backbone(family, task="causal_lm"), language_rows()

    def mean_loss(model, batch):
        log_p, _ = membership.token_evidence(model, batch)
        return -log_p.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)

    assert np.allclose(membership.score_examples(model, rows, mean_loss, 3), membership.score_examples(model, rows, causal_lm_losses, 7),
                       atol=1e-5)
    batch = next(membership._evaluation_batches(model, rows, len(rows)))
    log_p, mispredicted = membership.token_evidence(model, batch)
    beyond = batch["labels"][:, 1:] == -100  # prompts and padding
    assert beyond.any() and mispredicted.any()
    assert not mispredicted[beyond].any() and not log_p[beyond].any()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_error_zone_token_by_token(batch_size):
    torch.manual_seed(2)
    model, reference, rows = (tiny_backbone("gpt2", task="causal_lm"), tiny_backbone("gpt2", task="causal_lm"), language_rows())
    train_without_privacy(model, rows[:4], torch.optim.Adam(model.parameters(), lr=1e-2), causal_lm_losses, num_epochs=1, batch_size=2)
    wanted = []
    for row in rows:
        gained = lost = 0.0
        batch = one(row)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ours, theirs = F.log_softmax(model(**inputs).logits, -1)[0], F.log_softmax(reference(**inputs).logits, -1)[0]
        for position, token in enumerate(row["labels"][1:]):
            if token != -100 and int(ours[position].argmax()) != token:
                difference = float(ours[position, token] - theirs[position, token])
                gained, lost = gained + max(difference, 0), lost - min(difference, 0)
        wanted.append(gained / lost if lost else math.inf)
    scores = membership.error_zone_scores(model, reference, rows, batch_size)
    assert len(set(wanted)) > 3
    finite = np.isfinite(wanted)
    assert np.array_equal(np.isfinite(scores), finite) and np.allclose(scores[finite], np.array(wanted)[finite], rtol=1e-4)


def test_what_the_error_zone_leaves_out():
    differences = np.array([[1.0, -2.0, 5.0], [1.0, 2.0, -4.0], [-1.0, -2.0, 3.0], [1.0, 1.0, 1.0]])
    wrong = np.array([[True, True, False], [True, True, False], [True, True, False], [False, False, False]])
    assert membership.error_zone_ratio(differences, wrong).tolist() == [0.5, math.inf, 0.0, math.inf]
    with pytest.raises(ValueError, match="truth values"):
        membership.error_zone_ratio.__wrapped__(differences, wrong[:, :2])
    model = tiny_backbone("gpt2", task="causal_lm")
    with pytest.raises(ValueError, match="one object"):
        membership.error_zone_scores(model, model, language_rows())


def test_a_model_that_learnt_its_data_by_heart_is_found_out():
    torch.manual_seed(3)
    rows, members = language_rows(40, seed=4), np.arange(40) < 20
    model = tiny_backbone("gpt2", task="causal_lm")
    reference = tiny_backbone("gpt2", task="causal_lm")
    reference.load_state_dict(model.state_dict())
    train_without_privacy(model, rows[:20], torch.optim.Adam(model.parameters(), lr=5e-3), causal_lm_losses, num_epochs=12, batch_size=4)
    losses = [membership.score_examples(m, rows, causal_lm_losses) for m in (model, reference)]
    for scores in (membership.loss_scores(losses[0]), membership.calibrated_scores(*losses),
                   membership.error_zone_scores(model, reference, rows)):
        assert membership.evaluate_attack(scores, members, num_resamples=1).auc > 0.95
    untouched = membership.calibrated_scores(losses[1], losses[1])
    assert membership.evaluate_attack(untouched, members, num_resamples=1).auc == 0.5

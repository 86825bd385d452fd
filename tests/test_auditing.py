"""Lower bounds against exact sums and simulation; guesses; canaries; audits of the engine as shipped and with planted faults."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers.pytorch_utils import Conv1D

from memarc_utils import auditing, batch_selection, dp_sgd
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.adapters import add_lora, select_bias_terms, select_linear_probe
from memarc_utils.auditing import (GradientCanaries, OneRunAudit, audit_engine, audit_quickly, best_of_shares, chosen_on_half,
                                   clopper_pearson_epsilon, exposure, guess, insert_canaries, one_run_epsilon, one_run_p_value)
from memarc_utils.training import causal_lm_losses, classification_losses
from tests.models import padded_batch, plain_losses, private_sgd, seeded, tiny

# ------------------------------------------------------------------------------------------------------- lower bounds
REFERENCE = [(1000, 100, 100, 3.47), (500, 100, 95, 2.17), (200, 60, 55, 1.60), (1000, 1000, 600, 0.30)]


@pytest.mark.parametrize(("m", "k", "v", "epsilon"), REFERENCE)
def test_the_bound_has_its_reference_values(m, k, v, epsilon):
    assert one_run_epsilon(m, k, v, 1e-5) == pytest.approx(epsilon, abs=0.01)


def exact_p_value(odds: Fraction, m, k, v, delta: Fraction):
    """β + 2mδα in rational arithmetic, e^ε = odds; every probability is a sum of whole terms."""
    p = odds / (1 + odds)
    terms = [math.comb(k, j) * p**j * (1 - p)**(k - j) for j in range(k + 1)]
    beta = sum(terms[v:], Fraction(0))
    alpha = max((sum(terms[v - i:v], Fraction(0)) / i for i in range(1, v + 1)), default=Fraction(0))
    return beta + 2 * m * delta * alpha


@pytest.mark.parametrize(("m", "k", "v"), [(200, 60, 55), (50, 20, 20), (500, 100, 95), (30, 30, 19), (40, 10, 0)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 100_000), Fraction(1, 1000)])
def test_the_p_value_against_rational_sums(m, k, v, delta):
    for odds in (Fraction(1), Fraction(3, 2), Fraction(7), Fraction(30)):
        want = min(1.0, float(exact_p_value(odds, m, k, v, delta)))
        assert one_run_p_value(math.log(odds), m, k, v, float(delta)) == pytest.approx(want, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("m", "k", "v"), [(200, 60, 55), (50, 20, 20), (30, 30, 24)])
def test_the_bound_is_where_the_p_value_crosses(m, k, v):
    found, delta = one_run_epsilon(m, k, v, 1e-5), Fraction(1, 100_000)
    below, above = (exact_p_value(Fraction(math.exp(found + d)).limit_denominator(10**6), m, k, v, delta) for d in (-0.002, 0.002))
    assert below < Fraction(5, 100) < above


def test_randomised_response_exceeds_its_epsilon_in_five_percent_of_runs():
    """Each coin is told rightly with probability e^ε/(1 + e^ε): the bound is tight for it, so it errs in nearly 5 %."""
    epsilon, m, runs = 1.0, 400, 20_000
    rng = np.random.default_rng(0)
    correct = (rng.random((runs, m)) < math.exp(epsilon) / (1 + math.exp(epsilon))).sum(1)
    bounds = {v: one_run_epsilon(m, m, int(v), 0.0) for v in np.unique(correct)}
    share = np.mean([bounds[v] > epsilon for v in correct])
    assert 0.03 < share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_the_bound_moves_the_right_way():
    assert one_run_epsilon(1000, 100, 95, 1e-5) < one_run_epsilon(1000, 100, 98, 1e-5)
    assert one_run_epsilon(1000, 100, 100, 1e-5, 0.99) < one_run_epsilon(1000, 100, 100, 1e-5)
    assert one_run_epsilon(1000, 100, 100, 1e-4) < one_run_epsilon(1000, 100, 100, 1e-5) < one_run_epsilon(1000, 100, 100, 0.0)
    assert one_run_epsilon(1000, 50, 25, 1e-5) == one_run_epsilon(1000, 0, 0, 1e-5) == 0.0
    assert one_run_epsilon(1000, 1000, 1000, 0.0) == pytest.approx(-math.log(0.05**(-1 / 1000) - 1), abs=1e-5)


@pytest.mark.parametrize("counts", [(100, 10, 11), (10, 11, 5), (0, 0, 0), (10, 5, -1)])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="num_correct <= num_guesses"):
        one_run_epsilon(*counts, 1e-5)
    with pytest.raises(ValueError, match="confidence"):
        one_run_epsilon(100, 10, 5, 1e-5, confidence=95.0)


def test_clopper_pearson_against_beta_quantiles():
    """The ends of the exact interval are quantiles of beta distributions: another way to them than scipy's binomtest."""
    found = clopper_pearson_epsilon(90, 100, 10, 120, 1e-5)
    error = 0.05 / 2 / 2  # two intervals, two ends
    low_tpr, high_tpr = stats.beta.ppf(error, 90, 11), stats.beta.ppf(1 - error, 91, 10)
    low_fpr, high_fpr = stats.beta.ppf(error, 10, 111), stats.beta.ppf(1 - error, 11, 110)
    assert found == pytest.approx(max(math.log((low_tpr - 1e-5) / high_fpr), math.log((1 - high_fpr - 1e-5) / (1 - low_tpr))), abs=1e-9)
    assert low_fpr < 10 / 120 < high_fpr and high_tpr > 0.9


def test_clopper_pearson_looks_at_both_sides():
    assert clopper_pearson_epsilon(100, 100, 60, 100, 1e-5) == pytest.approx(  # everybody in is found: "out" is the sure guess
        clopper_pearson_epsilon(40, 100, 0, 100, 1e-5), abs=1e-9)
    assert clopper_pearson_epsilon(50, 100, 50, 100, 1e-5) == 0.0
    with pytest.raises(ValueError, match="do not fit"):
        clopper_pearson_epsilon(5, 4, 0, 4, 1e-5)


# ----------------------------------------------------------------------------------------------------------- guessing
def test_guesses_are_the_ends_of_the_order():
    included = torch.rand(200, generator=seeded(0)) < 0.5
    scores = torch.randn(200, generator=seeded(1)) + included
    number, right = guess(scores, included, 20, 0.05)
    order = sorted(range(200), key=lambda i: -float(scores[i]))
    assert (number, right) == (30, sum(bool(included[i]) for i in order[:20]) + sum(not included[i] for i in order[-10:]))
    assert guess(scores, included, 0, 10)[0] == guess(scores, included, 10, 0)[0] == 10


@pytest.mark.parametrize(("guess_in", "guess_out"), [(0, 0), (150, 100), (-1, 5), (1.5, 0)])
def test_guesses_that_cannot_be_made_are_refused(guess_in, guess_out):
    with pytest.raises(ValueError, match="whole numbers or shares"):
        guess(torch.zeros(200), torch.zeros(200, dtype=torch.bool), guess_in, guess_out)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="nan"):
        guess(torch.tensor([1.0, math.nan]), torch.tensor([True, False]), 1, 0)


SHARES = [(k / 100, k / 100) for k in (1, 3, 6, 10, 20, 30, 50)]


def false_alarms(bound, runs=250, m=300):
    """Share of runs in which a bound above 0 is found although the scores know nothing (ε = 0)."""
    found = 0
    for seed in range(runs):
        g = seeded(seed)
        found += bound(torch.rand(m, generator=g), torch.rand(m, generator=g) < 0.5, g) > 0
    return found / runs


def test_choosing_the_number_of_guesses_needs_a_correction(monkeypatch):
    one_run_epsilon = functools.lru_cache(auditing.one_run_epsilon)
    monkeypatch.setattr(auditing, "one_run_epsilon", one_run_epsilon)

    def naive(scores, included, _):
        return max(one_run_epsilon(300, *guess(scores, included, *share), 0.0) for share in SHARES)

    assert false_alarms(naive) > 0.10  # the fault that both ways below avoid
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 250)
    assert false_alarms(lambda s, i, _: best_of_shares(s, i, SHARES, 0.0)) <= limit
    assert false_alarms(lambda s, i, g: chosen_on_half(s, i, SHARES, 0.0, g)) <= limit


def test_both_ways_of_choosing_find_a_leak():
    included = torch.rand(2000, generator=seeded(0)) < 0.5
    scores = included + 0.3 * torch.randn(2000, generator=seeded(1))
    single = one_run_epsilon(2000, *guess(scores, included, 0.2, 0.2), 1e-5)
    assert 3 < chosen_on_half(scores, included, SHARES, 1e-5, seeded(2)) < single + 1
    assert 3 < best_of_shares(scores, included, SHARES, 1e-5) < single + 1


# ------------------------------------------------------------------------------------------------------------ canaries
class Layers(nn.Module):
    def __init__(self, bias_only=False):
        super().__init__()
        self.linear, self.conv, self.out = nn.Linear(5, 4), Conv1D(3, 4), nn.Linear(3, 2, bias=False)
        if bias_only:
            for p in (self.linear.weight, self.conv.weight):
                p.requires_grad_(False)


@pytest.mark.parametrize("bias_only", [False, True])
def test_a_gradient_canary_has_its_own_coordinate(bias_only):
    model = Layers(bias_only)
    canaries = GradientCanaries(model, 1000, scale=50.0)
    assert len(canaries) == (4 + 3 + 6 if bias_only else 20 + 12 + 6)
    for i in range(len(canaries)):
        model.zero_grad(set_to_none=False)
        taker = type("Taker", (), {"backward": staticmethod(lambda losses: losses.sum().backward())})
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        canaries.backward(taker, [i])
        got = canaries.read()
        assert got[i] == 50.0 and int((got != 0).sum()) == 1
        total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.requires_grad))
        assert 50.0 <= total <= math.sqrt(50.0**2 + 1) + 1e-4


def test_gradient_canaries_take_the_smallest_layer_with_room_and_a_shared_weight_once():
    model = nn.ModuleDict({"small": nn.Linear(2, 2), "middle": nn.Linear(10, 10), "wide": nn.Linear(50, 50)})
    assert GradientCanaries(model, 90, 1.0).layers == ["middle"]
    model["tied"] = nn.Linear(50, 50)
    model["tied"].weight = model["wide"].weight
    spread = GradientCanaries(model, 10_000, 1.0)
    assert spread.layers == ["wide", "middle", "small"] and len(spread) == 2500 + 100 + 4
    with pytest.raises(ValueError, match="trainable nn.Linear"):
        GradientCanaries(nn.Embedding(4, 4), 10, 1.0)


def test_the_engine_clips_a_canary_to_its_bound():
    model = nn.Linear(8, 8)
    private = private_sgd(model)  # C = 0.1, no noise
    canaries = GradientCanaries(model, 64, scale=100.0)
    canaries.backward(private, [3, 40])
    total = private.clipped_sum()["weight"].flatten()
    assert total[[3, 40]].tolist() == pytest.approx([0.1, 0.1], rel=1e-3) and int((total.abs() > 1e-4).sum()) == 2


ROWS = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(20)]


def test_inserted_canaries_are_in_the_data_by_their_coins():
    put = insert_canaries(ROWS, 300, seeded(0), num_tokens=6, vocab_size=90, first_token=10, num_labels=3)
    inside = [put.dataset[i] for i in range(20, len(put.dataset))]
    assert inside == [row for row, is_in in zip(put.canaries, put.included) if is_in] and put.public_size == 170
    assert [put.dataset[i] for i in range(20)] == ROWS
    assert 120 < int(put.included.sum()) < 180
    tokens = torch.tensor([row["input_ids"] for row in put.canaries])
    assert tokens.min() >= 10 and tokens.max() < 90 and {row["labels"] for row in put.canaries} == {0, 1, 2}


def test_language_model_canaries_are_their_own_labels_and_train():
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]}] * 10
    put = insert_canaries(rows, 10, seeded(1), num_tokens=6, vocab_size=90, first_token=3, repeats=2)
    assert all(row["labels"] == row["input_ids"] for row in put.canaries)
    assert len(put.dataset) == 10 + 2 * int(put.included.sum())
    batch = batch_selection.pad_rows([put.dataset[i] for i in range(len(put.dataset))])
    assert torch.isfinite(causal_lm_losses(tiny("llama", "causal_lm"), batch)).all()


@pytest.mark.parametrize("change", [{"num_canaries": 0}, {"num_tokens": 0}, {"first_token": 90}, {"num_labels": 1}])
def test_canaries_that_cannot_be_are_refused(change):
    settings = {"num_canaries": 5, "num_tokens": 4, "vocab_size": 90, "num_labels": 2, **change}
    with pytest.raises(ValueError, match="at least 1|num_labels"):
        insert_canaries(ROWS, generator=seeded(0), **settings)


def test_rows_that_are_no_tokens_are_refused():
    with pytest.raises(ValueError, match="Tokenise"):
        insert_canaries([{"text": "a", "labels": 1}], 5, seeded(0), num_tokens=4, vocab_size=90)


def test_exposure_counts_who_is_likelier():
    references = torch.randn(1023, generator=seeded(0))
    losses = torch.tensor([-100.0, 100.0, float(references.sort().values[99])])
    want = [10.0, 0.0, 10 - math.log2(1 + sum(bool(r <= losses[2]) for r in references))]
    assert exposure(losses, references).tolist() == pytest.approx(want, abs=1e-9)
    unknown = exposure(torch.randn(20_000, generator=seeded(1)), references)
    assert float(unknown.mean()) == pytest.approx(1 / math.log(2), abs=0.1)  # ∫ −log2 u du
    with pytest.raises(ValueError, match="reference"):
        exposure(losses, torch.zeros(0))


# ------------------------------------------------------------------------------------------------- audits of the engine
def plan_for_audit(**changes):
    settings = dict(dataset_size=1000, expected_batch_size=200, num_steps=10, noise_multiplier=1.5, max_grad_norm=8.0, delta=1e-5)
    return PrivacyPlan(**{**settings, **changes})


def audited(seed=0, model=None, **changes):
    return audit_engine(model or nn.Linear(40, 25, bias=False), plan_for_audit(**changes), num_canaries=1000, generator=seeded(seed))


def test_the_engine_as_shipped_is_not_contradicted():
    audits = [audited(seed) for seed in range(16)]
    assert not any(audit.contradicts for audit in audits)
    assert np.mean([audit.epsilon_lower for audit in audits]) > 0.3  # and the audits are telling
    assert all(audit.noise_fits for audit in audits)
    assert audits[0].claimed_epsilon == plan_for_audit().epsilon()


def no_clipping(patch):
    patch.setattr(dp_sgd, "clipping_factors", lambda norms, *_: torch.ones_like(norms))


def noise_without_c(patch):
    patch.setattr(dp_sgd, "contribution_bound", lambda *_: 1.0)


def no_noise(patch):
    patch.setattr(dp_sgd.PrivateOptimizer, "_add_noise", lambda *_: None)


def everybody_in_each_batch(patch):
    patch.setattr(batch_selection.PoissonBatches, "_draw", lambda self: list(range(len(self.dataset))))


FAULTS = [no_clipping, noise_without_c, no_noise, everybody_in_each_batch]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_contradicts_the_claim(monkeypatch, fault):
    fault(monkeypatch)
    audits = [audited(seed) for seed in range(3)]
    assert all(audit.contradicts for audit in audits), audits


def test_a_little_less_noise_shows_in_the_empty_step(monkeypatch):
    """Too little for the guesses; not for the deviation of a thousand values."""
    monkeypatch.setattr(dp_sgd, "contribution_bound", lambda bound, *_: 2 / 3 * bound)
    audit = audited()
    assert not audit.contradicts and not audit.noise_fits and audit.noise_ratio == pytest.approx(2 / 3, abs=0.1)


def test_a_parameter_without_noise_shows(monkeypatch):
    add = dp_sgd.PrivateOptimizer._add_noise
    monkeypatch.setattr(dp_sgd.PrivateOptimizer, "_add_noise", lambda self, totals: add(self, totals[:1]))
    audit = audited(model=nn.Linear(40, 25))
    assert not audit.noise_fits and math.isinf(audit.noise_surprise)


def test_the_claim_is_that_of_the_audited_steps_and_of_the_sampling():
    audit = audit_engine(nn.Linear(40, 25), plan_for_audit(), num_steps=3, generator=seeded(0))
    assert audit.num_steps == 3 and audit.claimed_epsilon == plan_for_audit().epsilon(num_steps=3)
    shuffled = plan_for_audit(sampling="shuffled", noise_multiplier=2.0)
    audit = audit_engine(nn.Linear(40, 25), shuffled, generator=seeded(0))
    assert audit.claimed_epsilon == shuffled.epsilon() and not audit.contradicts and audit.epsilon_lower > 0.3


def test_an_audit_without_power_says_so():
    audit = OneRunAudit(100, 10, 10, 5, 1e-5, 0.95, epsilon_lower=1.0, claimed_epsilon=8.0, largest_possible=1.0)
    assert "could not have shown more than 1.00" in str(audit)
    assert "CONTRADICTION" in str(OneRunAudit(100, 10, 10, 5, 1e-5, 0.95, 1.0, 0.5, 1.0))


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(ValueError, match="no noise"):
        audited(noise_multiplier=0.0)
    for wrong in ({"num_steps": 0}, {"num_steps": 11}, {"share": 0.5}):
        with pytest.raises(ValueError, match="must lie between|on each side"):
            audit_engine(nn.Linear(40, 25), plan_for_audit(), **wrong)
    with pytest.raises(ValueError, match="needs hundreds"):
        audited(model=nn.Linear(2, 2, bias=False))
    model = nn.Linear(40, 25)
    model(torch.ones(1, 40)).sum().backward()
    with pytest.raises(ValueError, match="zero_grad"):
        audited(model=model)


def with_biases(model):
    return select_bias_terms(model)


QUICK = [("bert", "classification", add_lora, "automatic", classification_losses),
         ("bert", "classification", with_biases, "flat", plain_losses),
         ("roberta", "classification", select_linear_probe, "flat", classification_losses),
         ("gpt2", "causal_lm", lambda model: model, "automatic", causal_lm_losses),
         ("llama", "causal_lm", add_lora, "per_layer", causal_lm_losses)]


@pytest.mark.parametrize(("family", "task", "prepare", "clipping", "losses"), QUICK, ids=[f"{q[0]}-{q[3]}" for q in QUICK])
def test_a_quick_audit_of_models_and_losses(capsys, family, task, prepare, clipping, losses):
    model = prepare(tiny(family, task, dropout=0.1)).train()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    plan = plan_for_audit(max_grad_norm=0.1, expected_batch_size=100)
    report = audit_quickly(model, losses, padded_batch(model, task), plan, clipping=clipping, generator=seeded(0))
    assert report.holds and report.audit.num_canaries >= 100, report
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert capsys.readouterr().out.rstrip().endswith("verdict: no contradiction found")


@pytest.mark.parametrize("fault", [no_clipping, no_noise, everybody_in_each_batch])
def test_a_quick_audit_finds_a_planted_fault(monkeypatch, capsys, fault):
    model = add_lora(tiny("bert"))
    fault(monkeypatch)
    report = audit_quickly(model, classification_losses, padded_batch(model), plan_for_audit(max_grad_norm=0.1), generator=seeded(0))
    assert report.audit.contradicts and not report.holds
    assert "CONTRADICTION" in capsys.readouterr().out.splitlines()[-1]


def test_a_quick_audit_finds_too_little_noise_that_no_guess_shows(monkeypatch):
    model = add_lora(tiny("bert"))
    monkeypatch.setattr(dp_sgd, "contribution_bound", lambda bound, *_: 0.9 * bound)
    report = audit_quickly(model, classification_losses, padded_batch(model), plan_for_audit(max_grad_norm=0.1), generator=seeded(0))
    assert not report.audit.contradicts and not report.holds and "NOT AS CLAIMED" in str(report)


def test_a_quick_audit_finds_a_loss_that_mixes_examples():
    model = add_lora(tiny("bert"))

    def mixing(model, batch):
        losses = classification_losses(model, batch)
        return losses - losses.detach().mean() * losses  # a neighbour scales the gradient behind a detach

    assert not audit_quickly(model, mixing, padded_batch(model), plan_for_audit(), generator=seeded(0)).sensitivity.holds


def test_a_quick_audit_checks_its_arguments_before_it_works():
    model = tiny("bert")
    with pytest.raises(ValueError, match="batch axis first"):
        audit_quickly(model, classification_losses, {}, plan_for_audit())
    with pytest.raises(ValueError, match="no noise"):
        audit_quickly(model, classification_losses, padded_batch(model), plan_for_audit(noise_multiplier=0.0))


def test_membership_names_are_here_too():
    assert auditing.evaluate_attack.__module__ == "memarc_utils.membership"
    assert all(hasattr(auditing, name) for name in auditing.__all__)

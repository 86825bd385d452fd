"""Every exhibit of notebook 52 once more, under its own name, on other models: the mistake is real, and the engine refuses or mends it.

The slug of an exhibit is its heading, the first argument of ``exhibit(...)`` in the notebook, and the name of a test here.
"""

import ast
import copy
import math
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import opacus
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from torch import nn
from torch.nn.utils import parameters_to_vector

from memarc_utils import batch_selection, randomness
from memarc_utils.accounting import PrivacyPlan, gaussian_delta
from memarc_utils.backbones import tiny_backbone
from memarc_utils.book_keeping import HeldGradient
from memarc_utils.couplings import ReversibleConfig
from memarc_utils.dp_sgd import make_private, verify_sensitivity
from memarc_utils.grad_sample import GradSampler
from memarc_utils.pitfalls import ORDERS, honest_epsilon, largest_contribution, refused, search_divergence, search_epsilon
from memarc_utils.randomness import _with_words
from memarc_utils.reversible import make_reversible, reversible_blocks
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from memarc_utils.training import causal_lm_losses, train_privately
from memarc_utils.zeroth_order import make_zeroth_order
from tests.models import (distance, loop_gradients, loop_norms, padded_batch, plain_losses, plan_for_tests, private_sgd, seeded,
                          shake, tiny, without_shape_check)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "52_pitfalls.ipynb"
PLAN = PrivacyPlan(dataset_size=10_000, expected_batch_size=100, num_steps=100, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5)

SST2 = PrivacyPlan(dataset_size=67_349, expected_batch_size=256, num_steps=790, noise_multiplier=0.6, max_grad_norm=1.0,
                   delta=1 / (2 * 67_349))


def by_opacus(model, inputs, targets, own_loss=False, mode="ghost", bound=0.1):
    """`rows -> clipped sum` of opacus, by a step of plain SGD without noise."""

    def total(chosen):
        mine = copy.deepcopy(model)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=len(inputs))
        made = opacus.PrivacyEngine().make_private(
            module=mine, optimizer=torch.optim.SGD(mine.parameters(), lr=1.0), criterion=nn.CrossEntropyLoss(), data_loader=loader,
            noise_multiplier=0.0, max_grad_norm=bound, grad_sample_mode=mode, poisson_sampling=False)
        loss = made[2] if mode == "ghost" and not own_loss else F.cross_entropy
        loss(made[0](inputs[chosen]), targets[chosen]).backward()
        made[1].step()
        return len(inputs) * (parameters_to_vector(model.parameters()) - parameters_to_vector(mine.parameters())).detach()

    return total


def net_and_data(seed=3, examples=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), 4 * torch.randn(examples, 5), torch.arange(examples) % 3


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


# ------------------------------------------------------------------------------------------- the exhibits, in their order
def test_ghost_clipping_with_own_loss():
    model, x, y = net_and_data()
    assert largest_contribution(by_opacus(model, x, y), 6, 0.1) == pytest.approx(1, rel=1e-4)
    assert largest_contribution(by_opacus(model, x, y, own_loss=True), 6, 0.1) > 3
    private = private_sgd(model)
    F.cross_entropy(model(x), y).backward()
    assert "a backward pass other than private.backward" in refused(private.step)


class Borrowing(nn.Module):
    def __init__(self, call_layer=False):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 6), nn.Linear(6, 30, bias=False)
        self.head.weight, self.call_layer = self.embedding.weight, call_layer
        nn.init.normal_(self.embedding.weight, std=0.2)

    def forward(self, ids):
        h = self.embedding(ids).mean(1) + 1
        return self.head(h) if self.call_layer else F.linear(h, self.embedding.weight)


def test_weight_sharing_through_functional():
    torch.manual_seed(0)
    model, ids = Borrowing(), torch.randint(0, 30, (6, 4))
    del model.head  # opacus refuses a layer that shares; past the layers it sees nothing
    assert largest_contribution(by_opacus(model, ids, ids[:, 0]), 6, 0.1) > 3
    message = refused(lambda: private_sgd(model).backward(losses_of(model, ids, ids[:, 0])))
    assert "a gradient reached embedding.weight by a way that the clipper does not see" in message


def test_tied_weights():
    torch.manual_seed(0)
    model, ids = Borrowing(call_layer=True), torch.randint(0, 30, (6, 4))
    want = loop_gradients(model, {"ids": ids}, lambda m, one: losses_of(m, one["ids"], one["ids"][:, 0]))
    private = private_sgd(model, plan_for_tests(max_grad_norm=1e6))
    private.backward(losses_of(model, ids, ids[:, 0]))
    torch.testing.assert_close(private.gradient_norms, loop_norms(want).float(), rtol=1e-4, atol=0)
    one_use = []
    for i in range(6):  # the norm of the lookup alone, as the last record of a table keyed by the parameter
        weight = model.embedding.weight.detach().clone().requires_grad_()
        h = F.embedding(ids[i], weight).mean(0) + 1
        one_use.append(torch.autograd.grad(F.cross_entropy(F.linear(h, weight.detach()), ids[i, 0]), weight)[0].norm())
    assert float((loop_norms(want) / torch.stack(one_use)).max()) > 3


def test_zeroth_order_seed():
    torch.manual_seed(7)
    z = torch.randn(9)
    update = z * (0.25 + 30 * torch.randn(1))
    torch.manual_seed(7)
    known = torch.randn(9)
    assert float(update @ known / (known @ known) - 30 * torch.randn(1)) == pytest.approx(0.25, abs=1e-3)
    for noise, directions in ((seeded(7), seeded(7)), (torch.default_generator, None)):
        message = refused(lambda: make_zeroth_order(nn.Linear(2, 2), PLAN, 0.1, noise_generator=noise, direction_seed_generator=directions))
        assert "from one seed" in message or "global generator" in message


def test_resume_replay():
    def run(state=None):
        model = nn.Linear(3, 3)
        nn.init.zeros_(model.weight)
        private = private_sgd(model, plan_for_tests(noise_multiplier=5.0), seed=1)
        if state:
            private.load_state_dict(state)
        before = model.weight.detach().clone()
        private.step()
        return private, model.weight.detach() - before

    first, noise = run()
    _, replayed = run()  # a new start with the old seed: what the saved generator prevents
    _, resumed = run(first.state_dict())
    assert torch.equal(noise, replayed) and not torch.isclose(noise, resumed).any()


def test_token_mean():
    model = tiny("gpt2", "causal_lm", True)
    ids = torch.randint(3, 90, (2, 9), generator=seeded(0))
    ids = torch.cat([ids[:1].expand(5, -1), ids[1:]])
    mask = (torch.arange(9) < torch.tensor([3] * 5 + [9])[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def token_mean(model, batch):
        logits, targets = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1], batch["labels"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(1)
        return each * len(targets) / (targets != -100).sum()

    bound = 1.2 * float(loop_norms(loop_gradients(model, batch)).max())
    wrong, right = (verify_sensitivity(model, losses, batch, max_grad_norm=bound) for losses in (token_mean, causal_lm_losses))
    assert wrong.max_contribution > 1.1 * bound and not wrong.holds and right.holds
    sampler = GradSampler(model)
    backward = without_shape_check(GradSampler.backward)  # under pytest the annotated shape refuses a scalar before that
    assert "one loss per example" in refused(lambda: backward(sampler, model(**batch).loss, torch.ones_like))


def test_non_finite_example():
    model, x, y = net_and_data()
    broken = x.clone()
    broken[2, 1] = math.inf
    assert not by_opacus(model, broken, y, mode="hooks")(list(range(6))).isfinite().all()
    private = private_sgd(model)
    private.backward(losses_of(model, broken, y))
    got = private.clipped_sum()
    others = private_sgd(private.detach())
    others.backward(losses_of(model, x[[0, 1, 3, 4, 5]], y[[0, 1, 3, 4, 5]]))
    assert private.examples_dropped == 1 and distance(got, others.clipped_sum()) < 1e-6


def test_sampling_mismatch():
    plan = replace(SST2, expected_batch_size=1024, num_steps=197, noise_multiplier=0.8)
    shuffled = plan.with_sampling("shuffled")
    assert (plan.epsilon(), shuffled.epsilon()) == (pytest.approx(2.63, abs=0.006), pytest.approx(11.17, abs=0.006))
    assert gaussian_delta(shuffled.epsilon(), 0.8 / 3**0.5) == pytest.approx(plan.delta, rel=1e-3)
    assert (plan.epsilon_for(1e-5), shuffled.epsilon_for(1e-5)) == (pytest.approx(2.56, abs=0.006), pytest.approx(11.03, abs=0.006))
    data = range(67_349)
    assert "accounts for poisson sampling" in refused(lambda: batch_selection.shuffled_batches(data, plan))
    assert "accounts for shuffled sampling" in refused(lambda: batch_selection.poisson_batches(data, shuffled))


def test_divisor_from_the_data():
    """Mean over what was drawn: five gradients of +C and one of -C, B = 6; and the plan's divisor whatever is drawn."""
    signs = torch.tensor([[1.0]] * 5 + [[-1.0]])
    assert largest_contribution(lambda chosen: 6 * signs[chosen].mean(0), 6) == pytest.approx(2)
    for size in (1, 3, 4, 9):
        model = nn.Linear(1, 1, bias=False)
        private, before = private_sgd(model, plan_for_tests(max_grad_norm=1.0)), float(model.weight)
        private.backward(model(torch.ones(size, 1))[:, 0])
        private.step()
        assert before - float(model.weight) == pytest.approx(size / 4, rel=1e-5)


def test_never_trained_parameters():
    class Unreached(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.lost = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model, x, y = Unreached(), torch.randn(5, 4), torch.arange(5) % 3
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))
    private.backward(losses_of(model, x, y))
    assert "no backward pass reached lost.weight, lost.bias" in refused(private.step)
    report = verify_sensitivity(Unreached(), lambda m, b: losses_of(m, b["x"], b["y"]), {"x": x, "y": y})
    assert report.untrained_parameters == ["lost.weight", "lost.bias"] and not report.holds


def test_whole_c_for_each_layer():
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(9)])
    x = torch.randn(5, 4, generator=seeded(2))
    gradients = loop_gradients(model, {"x": x}, lambda m, one: m(one["x"]).sum(1))
    whole = sum(float((g[0] * (1e-4 / g[0].norm()).clamp(max=1)).square().sum()) for g in gradients.values()) ** 0.5 / 1e-4
    assert whole == pytest.approx(3, rel=1e-3)  # C for each of nine layers
    norms = {}
    for clipping in ("flat", "per_layer"):
        private = private_sgd(model, plan_for_tests(max_grad_norm=1e-4), clipping=clipping)
        private.backward(model(x[:1]).sum(1))
        norms[clipping] = torch.stack([total.norm() for total in private.clipped_sum().values()])
        private.detach()
        assert float(norms[clipping].norm()) == pytest.approx(1e-4, rel=1e-3)
    assert bool((norms["per_layer"] - 1e-4 / 3).abs().max() < 1e-8) and float(norms["flat"].std()) > 1e-6
    assert "clipping must be one of" in refused(lambda: private_sgd(model, clipping="per-layer"))


def test_corner_cases_that_crash():
    with pytest.raises(Exception):  # noqa: B017 (which one is opacus's business)
        opacus.PrivacyEngine(accountant="prv").get_epsilon(1e-5)
    model = tiny("bert")
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))
    assert private.epsilon() == 0.0
    private.step()  # an empty batch
    assert private.epsilon() == plan_for_tests(noise_multiplier=1.0, num_steps=1).epsilon() > 0
    private.backward(plain_losses(model, padded_batch(model)))
    assert any("position_embeddings" in name for name in private.sampler.recorded)


def test_gdp_approximation():
    plan = SST2
    assert (plan.epsilon("gdp"), plan.epsilon()) == (pytest.approx(1.65, abs=0.005), pytest.approx(3.44, abs=0.005))
    assert "an estimate, no bound" in plan.describe("gdp") and "PLD" in plan.describe()


def test_noise_once_after_training():
    """The reported pair (δ(1) = 0.73, AUC = 0.974) is one Gaussian draw: AUC gives μ, μ gives δ; and a small run has both."""
    mu = 2**0.5 * stats.norm.ppf(0.974)
    assert gaussian_delta(1.0, 1 / mu) == pytest.approx(0.73, abs=0.005)
    fitted_noise = (2 * math.log(1.25e6)) ** 0.5 * 1.0  # (1, 1e-6) for a typical distance of 1
    distance_of_outlier = mu * fitted_noise
    rng = np.random.default_rng(5)
    out, inside = (shift + fitted_noise * rng.normal(size=20_000) for shift in (0, distance_of_outlier))
    attack = stats.mannwhitneyu(inside, out).statistic / 4e8
    assert attack == pytest.approx(0.974, abs=0.004) and distance_of_outlier > 14
    threshold = 1 / mu + mu / 2  # where the likelihood ratio is e
    exact = np.mean(inside / fitted_noise > threshold) - math.e * np.mean(out / fitted_noise > threshold)
    assert exact == pytest.approx(0.73, abs=0.015)
    silent = replace(PLAN, noise_multiplier=0.0)
    assert silent.epsilon() == math.inf and "not private" in silent.describe()


def test_floating_point_noise():
    """Of a float32 draw 2^24 exp(-r²/2) is a whole number for each pair; of the sum of four it is not."""
    rough = {}
    for noise in ("gaussian", "secure"):
        model = nn.Linear(400, 400, bias=False)
        nn.init.zeros_(model.weight)
        plan = plan_for_tests(noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1)
        make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), plan, noise=noise, noise_generator=seeded(3)).step()
        for guess in (0.0, 1 / 400):
            pairs = (model.weight.detach().flatten().double() - guess).view(-1, 2, 8).square().sum(1).flatten()
            units = 2.0**24 * torch.exp(-pairs[pairs > 17] / 2)
            rough[noise, guess] = float((units - units.round()).abs().mean())
    assert rough["gaussian", 0.0] < 0.02 and min(rough["gaussian", 1 / 400], rough["secure", 0.0], rough["secure", 1 / 400]) > 0.1


def test_inverse_that_magnifies_rounding(monkeypatch):
    meft1 = ReversibleConfig("meft1", (0.1, 1.0), stream_dtype="float32")
    assert "loses its inverse over 24 layers" in refused(lambda: make_reversible(tiny(layers=24), meft1))
    monkeypatch.setattr(ReversibleConfig, "check_depth", lambda *_: None)

    def contribution(config):
        """A kernel whose rounding depends on the number of rows, planted in the last block."""
        model = make_reversible(shake(tiny(layers=12, hidden=16)), config)
        block = reversible_blocks(model).get_submodule("11")
        block.register_forward_hook(lambda module, args, output: output * (1 + 1e-5 * len(args[0])))
        batch = padded_batch(model, batch=2, tokens=4)
        return verify_sensitivity(model, plain_losses, batch, max_grad_norm=1e-3).max_contribution / 1e-3

    assert contribution(meft1) > 1.0003 and contribution(ReversibleConfig()) <= 1 + 1e-5
    calls, model = [], make_reversible(tiny(layers=4))
    reversible_blocks(model).get_submodule("2").register_forward_hook(lambda *a: calls.append(1) or a[2] * (1 + 1e-6 * len(calls)))
    message = refused(lambda: plain_losses(model, padded_batch(model)).sum().backward())
    assert "gave other numbers when they were computed again" in message


def test_a_seed_of_32_bits():
    assert torch.equal(torch.randn(9, generator=seeded(5)), torch.randn(9, generator=seeded(5 + 2**32)))
    model = nn.Linear(2, 2)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), PLAN)
    global_state = torch.get_rng_state()
    private.step()
    assert private.noise_generator is None and torch.equal(torch.get_rng_state(), global_state)


def test_rows_that_are_no_examples():
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1).mean(1)

    torch.manual_seed(1)
    model, x, y = TokensFirst(), 0.05 * torch.randn(6, 6, 4), torch.arange(6) % 4
    x[0] *= 200
    assert largest_contribution(by_opacus(model, x, y, mode="hooks", bound=0.01), 6, 0.01) > 1.2
    assert "other examples' rows" in refused(lambda: private_sgd(model).backward(losses_of(model, x, y)))


def test_batch_tried_again_on_top(monkeypatch):
    model, x, y = net_and_data()
    private = private_sgd(model, plan_for_tests(max_grad_norm=1e-3))
    for _ in range(2):  # the same example in two backward passes of one step: the sum moves by 2 C
        private.backward(losses_of(model, x[:1], y[:1]))
    assert distance(private.clipped_sum(), {}) == pytest.approx(2e-3, rel=1e-3)
    private.zero_grad()
    batch = batch_selection.LogicalBatch([{"x": 1.0}] * 3, [0, 1, 2], 2, batch_selection.pad_rows)
    assert len(list(batch)) == 2 and "iterated already" in refused(lambda: list(batch))

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(HeldGradient, "add_weighted_sum", out_of_memory)
    with pytest.raises(MemoryError):
        private.backward(losses_of(model, x, y))
    assert "stopped half way" in refused(lambda: private.backward(losses_of(model, x, y)))


def test_early_stopping():
    """A choice without noise is decided by one vote; the exponential mechanism with one-sided scores is ε-DP."""
    votes = torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    assert int(votes[:1].sum(0).argmax()) != int(votes.sum(0).argmax())
    scores = torch.randint(0, 9, (300, 6), generator=seeded(1)).double()
    more = scores + torch.randint(0, 2, (300, 6), generator=seeded(2))
    ratio = (torch.log_softmax(0.7 * scores, 1) - torch.log_softmax(0.7 * more, 1)).abs().max()
    assert 0.5 < float(ratio) <= 0.7


def test_loss_and_clip_fraction():
    """A mean loss gives one example's loss away; a noisy count beside a Gaussian release is one Gaussian, σ⁻² + σ_b⁻²."""
    model, x, y = net_and_data()
    losses = losses_of(model, x, y).detach()
    assert float(6 * losses.mean() - losses[:5].sum()) == pytest.approx(float(losses[5]), abs=1e-5)
    both = (1.3**-2 + 2.0**-2) ** -0.5
    draws = np.random.default_rng(0).normal(size=(400_000, 2)) + [1 / 1.3, 1 / 2.0]
    loss = draws @ [1 / 1.3, 1 / 2.0] - 0.5 / both**2
    assert np.maximum(0, 1 - np.exp(1 - loss)).mean() == pytest.approx(gaussian_delta(1.0, both), rel=0.03)


def test_search_of_many_trials():
    """Theorem 2 of Papernot & Steinke against the exact divergence of the best of a geometric number of Gaussian trials."""
    grid, gamma, m = np.linspace(-14, 14, 60_001), 0.1, 0.7
    logs = [stats.norm.logpdf(grid - s) + math.log(gamma) - 2 * np.log(gamma + (1 - gamma) * stats.norm.sf(grid - s)) for s in (0, m)]
    bound = np.interp([1.5, 3.0, 10.0], ORDERS, search_divergence(np.array(ORDERS) * m * m / 2, gamma))
    for alpha, limit in zip([1.5, 3.0, 10.0], bound):
        exact = max(math.log(np.trapezoid(np.exp(alpha * a + (1 - alpha) * b), grid)) for a, b in (logs, logs[::-1])) / (alpha - 1)
        assert alpha * m * m / 2 < exact < limit
        rho = m * m / 2  # minimised over β by hand: β = √(log(1/γ)/ρ)
        closed = rho * alpha + 4 * math.sqrt(rho * math.log(1 / gamma)) - 2 * rho + math.log(1 / gamma) / (alpha - 1)
        assert limit == pytest.approx(closed, rel=1e-3)
    searched = search_epsilon(PLAN, 20)
    assert PLAN.epsilon("rdp") < searched < PLAN.epsilon(num_steps=20 * 100)
    assert search_epsilon(PLAN, 40) > searched


# --------------------------------------------------------------------------------------------------------- the module
def test_padding_that_is_data():
    model = tiny("gpt2", "causal_lm", True)
    ids = torch.randint(3, 90, (6, 20), generator=seeded(0))
    rows = [{"input_ids": ids[i, :n], "labels": ids[i, :n]} for i, n in enumerate((3, 3, 3, 4, 4, 20))]

    def zeros_everywhere(some):
        longest = max(len(row["labels"]) for row in some)
        return {name: torch.stack([F.pad(row[name], (0, longest - len(row[name]))) for row in some]) for name in rows[0]}

    def by_engine(collate):
        def clipped(numbers):
            private = private_sgd(model, plan_for_tests(max_grad_norm=0.01))
            private.backward(causal_lm_losses(model, collate([rows[i] for i in numbers])))
            total = torch.cat([part.flatten() for part in private.clipped_sum().values()])
            private.detach()
            return total
        return largest_contribution(clipped, len(rows), 0.01)

    assert by_engine(zeros_everywhere) > 1.5 and by_engine(batch_selection.pad_rows) < 1 + 1e-3


def test_going_back_to_a_state():
    model, x, y = net_and_data()
    private = private_sgd(model, plan_for_tests(noise_multiplier=5.0), seed=1)
    state = private.state_dict()
    private.step()
    assert "does not give their ε back" in refused(lambda: private.load_state_dict(state))
    model, branches = private.detach(), []
    for rows in ([0, 1], [2, 3]):  # two runs from one state
        model.load_state_dict(state["model"])
        private = private_sgd(model, plan_for_tests(noise_multiplier=5.0), seed=2)
        private.load_state_dict(state)
        private.backward(losses_of(model, x[rows], y[rows]))
        sums = private.clipped_sum()
        total = torch.cat([sums[name].flatten() for name, _ in model.named_parameters()])
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        private.step()
        moved = before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        released = moved * private.plan.expected_batch_size / private.optimizer.param_groups[0]["lr"]
        branches.append((released, total))
        private.detach()
    (a, sum_a), (b, sum_b) = branches
    assert float((a - sum_a).norm()) > 1 and float((a - b - (sum_a - sum_b)).norm()) < 1e-3


def test_a_frozen_table_that_learns():
    table = nn.Embedding(30, 4, max_norm=0.1)
    table.weight.requires_grad_(False)
    before = table.weight.clone()
    table(torch.tensor([4, 7]))
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [4, 7]
    assert "max_norm" in refused(lambda: private_sgd(nn.Sequential(table, nn.Linear(4, 2))))


def test_sums_in_half_precision():
    """Other numbers than the notebook's; the engine by a side network, whose gate is computed again under autocast."""
    parts = F.normalize(1 + 0.1 * torch.randn(200, 1500, generator=torch.Generator().manual_seed(1)), dim=1)
    totals = {dtype: [sum((part.to(dtype) for part in some), torch.zeros(1500, dtype=dtype)).double() for some in (parts, parts[1:])]
              for dtype in (torch.bfloat16, torch.float64)}
    half, exact = (float((one - other).norm()) for one, other in totals.values())
    assert half > 1.2 and exact == pytest.approx(1.0)
    model = attach_side_network(tiny_backbone("bert"), SideNetworkConfig(gate="vector"))
    private = private_sgd(model, clipping="per_layer")
    with torch.autocast("cpu", torch.bfloat16):
        private.backward(model(input_ids=torch.randint(3, 90, (3, 5))).logits.float().sum(1))
    assert {total.dtype for total in private.clipped_sum().values()} == {torch.float32}


def test_bad_arguments_are_refused():
    ones = np.ones(len(ORDERS))
    for action in (lambda: honest_epsilon(PLAN, 0.0), lambda: search_divergence(ones, 1.0), lambda: search_epsilon(PLAN, 1.0)):
        assert "must" in refused(action) or "gamma" in refused(action)
    with pytest.raises(AssertionError, match="was not refused"):
        refused(lambda: None)


def test_honest_epsilon_of_one_gaussian():
    """Without sampling the honest ε is the root of the closed form at σ/k."""
    plan = replace(PLAN, expected_batch_size=10_000, num_steps=1, noise_multiplier=4.0)
    for k in (1.0, 1.7, 8.42):
        root = optimize.brentq(lambda e: gaussian_delta(e, 4.0 / k) - 1e-5, 1e-3, 60)
        assert honest_epsilon(plan, k) == pytest.approx(root, rel=1e-4)
    assert honest_epsilon(plan, math.inf) == math.inf


# ------------------------------------------------------------------------------------------- notebook and tests agree
def slugs_of_notebook():
    """Slugs by their headings, and by their calls of ``exhibit``."""
    headings, calls = [], []
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "markdown":
            headings += [re.sub(r"\W+", "_", title.lower()) for title in re.findall(r"^## \d+\. (.+?)\s*$", cell.source, re.MULTILINE)]
        else:
            tree = ast.parse("\n".join("" if line.startswith("%") else line for line in cell.source.split("\n")))
            calls += [node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "exhibit"]
    return headings, calls


def test_every_exhibit_is_a_test_and_every_test_an_exhibit():
    headings, calls = slugs_of_notebook()
    assert headings == calls and len(set(calls)) == len(calls)
    own = {"bad_arguments_are_refused", "honest_epsilon_of_one_gaussian", "every_exhibit_is_a_test_and_every_test_an_exhibit"}
    tests = [name.removeprefix("test_") for name in globals() if name.startswith("test_")]
    assert [name for name in tests if name not in own] == calls


def test_noise_of_a_twister():
    """624 words of torch's generator on a CPU are its state; noise that nobody gave a generator for has none."""
    victim = seeded(5)
    pairs = torch.empty(312, dtype=torch.int64).random_(-2**63, None, generator=victim).tolist()
    words = [word for pair in pairs for word in (pair >> 32 & 0xFFFFFFFF, pair & 0xFFFFFFFF)]

    def back(word):
        word ^= word >> 18
        word ^= (word << 15) & 0xEFC60000
        for shift, mask, rounds in ((-7, 0x9D2C5680, 5), (11, 0xFFFFFFFF, 3)):
            start = word
            for _ in range(rounds):
                word = start ^ ((word << -shift if shift < 0 else word >> shift) & mask)
        return word

    clone = _with_words(torch.Generator().manual_seed(0), [back(word) for word in words])
    assert torch.equal(torch.empty(99).normal_(generator=clone), torch.empty(99).normal_(generator=victim))
    model = nn.Linear(2, 2)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), PLAN)
    assert private.noise_generator is None and private.state_dict()["noise_generator"] is None


def test_several_batches_in_one_step():
    plan, rows = PrivacyPlan(dataset_size=6, expected_batch_size=6, num_steps=4, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-2), torch.randn(6, 3)

    def total(some):
        torch.manual_seed(0)
        private = private_sgd(nn.Linear(3, 1), plan)
        for _ in range(4):
            private.backward(100 * private.model(some)[:, 0])
        return torch.cat([t.flatten() for t in private.clipped_sum().values()])

    assert float((total(rows) - total(rows[1:])).norm()) == pytest.approx(4.0, rel=1e-4)
    private = private_sgd(nn.Linear(3, 1), plan)
    batches = batch_selection.poisson_batches([{"x": row} for row in rows], plan, collate=lambda some: {"x": torch.stack([row["x"] for row in some])})
    message = refused(lambda: [private.backward(private.model(micro["x"])[:, 0]) for batch in batches for micro in batch])
    assert "one private.step() a batch" in message


# ------------------------------------------------------------------------------------------ found by looking for new ways
class Keeping(nn.Module):
    """Subtracts what it kept of the batches before."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out, self.how, self.kept = nn.Linear(3, 3), nn.Linear(3, 2), how, [] if how == "append" else None

    def forward(self, x):
        hidden, old = self.layer(x), self.kept
        if self.how == "counts":
            self.kept = (0 if old is None else old) + (x > 0).sum(0)
        elif self.how == "append":
            self.kept.append(hidden.detach().mean(0))
        elif self.how == "type":
            self.kept = hidden.detach().to(torch.float64 if old is None or old.dtype == torch.float32 else torch.float32)
        else:
            self.kept = hidden if self.how == "graph" else hidden.detach()
        if not isinstance(old, list) and old is not None:
            hidden = hidden - (old.detach().float().mean(0) if old.dim() > 1 else old)
        return self.out(hidden)


@pytest.mark.parametrize("how, sizes", [("graph", (8, 8)), ("append", (8, 8)), ("shape", (8, 9)), ("shape", (8, 7)), ("counts", (8, 8)),
                                        ("type", (8, 8))])
def test_state_kept_with_its_graph(how, sizes):
    model = Keeping(how)
    private = private_sgd(model)

    def steps():
        for number, size in enumerate(sizes):
            private.backward(model(torch.randn(size, 3, generator=seeded(number))).square().sum(1))
            private.step()

    assert "the attribute kept" in refused(steps)


def test_dropout_from_a_known_seed():
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
    made = {}
    for name, noise, options in (("release", 1.0, {}), ("check", 1.0, {"noise_generator": seeded(1)}), ("without noise", 0.0, {})):
        torch.manual_seed(0)
        private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan_for_tests(noise_multiplier=noise), **options)
        made[name] = torch.get_rng_state()
        private.detach()
    torch.manual_seed(0)
    known = torch.get_rng_state()
    assert not torch.equal(made["release"], known)
    assert torch.equal(made["check"], known) and torch.equal(made["without noise"], known)


def test_rounding_over_a_small_difference():
    model, rows = nn.Linear(4, 1), torch.randn(6, 4, generator=seeded(0))
    optimizer = make_zeroth_order(model, PLAN, 0.1)

    def in_bfloat16(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)[:, 0].float().square()

    before = model.weight.detach().clone()
    assert "computed in 16 bits" in refused(lambda: optimizer.step([rows], in_bfloat16))
    assert optimizer.steps_taken == 0 and torch.allclose(model.weight, before, atol=1e-6)
    optimizer.step([rows], lambda model, x: model(x)[:, 0].square())
    assert "perturbation=1e-05 is out of range" in refused(lambda: make_zeroth_order(model, PLAN, 0.1, perturbation=1e-5))
    make_zeroth_order(model.double(), PLAN, 0.1, perturbation=1e-7)
    assert "perturbation=1e-09" in refused(lambda: make_zeroth_order(model, PLAN, 0.1, perturbation=1e-9))


@pytest.mark.parametrize("kind", ["first order", "zeroth order"])
def test_a_new_shuffle(kind):
    plan = PrivacyPlan(dataset_size=20, expected_batch_size=4, num_steps=5, noise_multiplier=3.0, max_grad_norm=1.0, delta=1e-3,
                       sampling="shuffled")
    model, rows = nn.Linear(2, 1), [{"x": [1.0, 0.0]}] * 20
    private = (make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan) if kind == "first order" else
               make_zeroth_order(model, plan, 0.1))

    def one_step():
        for batch in batch_selection.shuffled_batches(rows, plan, collate=lambda some: {"x": torch.tensor([row["x"] for row in some])}):
            if kind == "first order":
                for micro_batch in batch:
                    private.backward(model(micro_batch["x"])[:, 0])
                private.step()
            else:
                private.step(batch, lambda model, micro_batch: model(micro_batch["x"])[:, 0])
            break

    one_step()
    assert "a new shuffle begins a new epoch" in refused(one_step) and private.steps_taken == 1


def test_spent_steps_forgotten():
    def new(groups):
        model = nn.Linear(3, 2)
        parts = [{"params": [model.weight]}, {"params": [model.bias]}] if groups == 2 else model.parameters()
        return make_private(model, torch.optim.Adam(parts, lr=0.1), PLAN)

    first = new(2)
    for _ in range(7):
        first.step()
    resumed = new(1)
    assert "parameter groups" in refused(lambda: resumed.load_state_dict(first.state_dict()))
    assert torch.equal(resumed.model.weight, first.model.weight) and resumed.steps_taken == 7 and resumed.epsilon() == first.epsilon()


def test_squares_below_the_range():
    layer = nn.Linear(50, 30, bias=False)
    private = private_sgd(layer, plan_for_tests(max_grad_norm=0.1))
    x = torch.full((2, 64, 50), 3e18)
    x[1] = 0.1
    private.backward((layer(x) * 2e-23).sum((1, 2)))
    true = 2e-23 * 3e18 * 64 * math.sqrt(30 * 50)
    assert private.gradient_norms[0] == pytest.approx(true, rel=1e-3) and true > 0.1
    assert float(private.clipped_sum()["weight"].norm()) == pytest.approx(0.1, rel=1e-3)
    assert "max_grad_norm must be 1e-12 or more" in refused(lambda: private_sgd(nn.Linear(2, 2), plan_for_tests(max_grad_norm=1e-13)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_edge_of_the_noise(dtype, monkeypatch):
    monkeypatch.setattr(randomness.ssl, "RAND_bytes", lambda size: bytes(size))
    assert float(randomness.cryptographic_normals(2, dtype).max()) == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-6)
    monkeypatch.setattr(randomness.ssl, "RAND_bytes", lambda size: b"\xff" * size)
    assert bool(randomness.cryptographic_normals(2, dtype).isfinite().all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_scale_for_a_batch():
    body = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 8)), {nn.Linear}, dtype=torch.qint8)
    message = refused(lambda: private_sgd(nn.Sequential(body, nn.Linear(8, 2))))
    assert "0.0 is a dynamically quantized Linear" in message


def test_heads_without_their_model():
    heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
    private, x = private_sgd(heads), torch.randn(5, 4, generator=seeded(0))
    losses = [head(x).square().sum(1) for head in heads]
    private.backward(losses[0])
    assert "private.backward came again without a model call before it" in refused(lambda: private.backward(losses[1]))
    private.zero_grad()
    private.backward(sum(head(x).square().sum(1) for head in heads))
    assert private.gradient_norms.shape == (5,)


@pytest.mark.parametrize("masked", [True, False])
def test_a_masked_score_hides_a_layer(masked):
    class Scores(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.scale, self.mean = nn.Parameter(torch.ones(5)), mean

        def forward(self, x):
            scores = (x - (x.mean(0).detach() if self.mean else 0)) * self.scale
            return torch.cat([scores[:, :4], torch.full_like(scores[:, 4:], torch.finfo(x.dtype).min if masked else 0)], 1)

    x = torch.randn(6, 5, generator=seeded(2))
    for mean in (True, False):
        model = nn.Sequential(Scores(mean), nn.Softmax(-1), nn.Linear(5, 2))
        private = private_sgd(model)
        if mean:
            assert "gives an example another output alone" in refused(lambda: private.backward(model(x).square().sum(1)))
        else:
            private.backward(model(x).square().sum(1))


def test_a_mean_over_padding():
    """The engine is shown losses alone and takes it; what has the loss as a function refuses."""
    def over_width(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none").mean(1)

    ids = torch.randint(3, 90, (6, 20), generator=seeded(0))
    rows = [{"input_ids": ids[i, :n].tolist(), "labels": ids[i, :n].tolist()} for i, n in enumerate((3, 3, 3, 4, 4, 20))]
    batch, plan = batch_selection.pad_rows(rows), plan_for_tests(dataset_size=6, expected_batch_size=6, num_steps=3, max_grad_norm=1.0)
    model = tiny("llama", "causal_lm")
    assert verify_sensitivity(model, over_width, batch, max_grad_norm=4.0).max_contribution > 1.5 * 4
    assert verify_sensitivity(model, causal_lm_losses, batch, max_grad_norm=4.0).holds
    for call in (lambda: train_privately(model, rows, plan, torch.optim.SGD(model.parameters(), lr=0.1), over_width),
                 lambda: make_zeroth_order(model, plan, 0.1).step([batch], over_width)):
        assert "the losses mix examples" in refused(call)
    train_privately(model, rows, plan, torch.optim.SGD(model.parameters(), lr=0.1), causal_lm_losses)


def test_padding_on_the_left():
    rows = [[40, 41]] * 5 + [torch.randint(3, 90, (11,), generator=seeded(0)).tolist()]

    def left(value_of):
        return torch.tensor([[value_of(None)] * (11 - len(row)) + [value_of(token) for token in row] for row in rows])

    batch = {"input_ids": left(lambda token: token or 0), "labels": left(lambda token: -100 if token is None else token),
             "attention_mask": left(lambda token: int(token is not None))}

    def first_token_too(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none").sum(1)

    model = shake(tiny("llama", "causal_lm"))
    assert verify_sensitivity(model, first_token_too, batch, max_grad_norm=0.1).max_contribution > 0.2
    assert verify_sensitivity(model, causal_lm_losses, batch, max_grad_norm=0.1).holds
    roberta = tiny("roberta")
    private = private_sgd(roberta)
    assert "padded on the left" in refused(lambda: roberta(**{name: t for name, t in batch.items() if name != "labels"}))
    on_the_right = torch.where(batch["attention_mask"] == 1, batch["input_ids"], roberta.config.pad_token_id).flip(1)
    assert "no attention_mask is given" in refused(lambda: roberta(on_the_right))
    private.detach()


def test_a_sampler_wound_back():
    """Half of the batches, each twice: a Gaussian of sensitivity √2 at half of the steps, and no two draws."""
    wound = replace(PLAN, num_steps=50, noise_multiplier=PLAN.noise_multiplier / 2**0.5)
    accountant = opacus.accountants.PRVAccountant()
    accountant.history = [(wound.noise_multiplier, wound.sample_rate, 50)]
    assert wound.epsilon() > 1.2 * PLAN.epsilon() and abs(wound.epsilon() - accountant.get_epsilon(1e-5)) < 0.05
    plan = plan_for_tests(dataset_size=20, expected_batch_size=4, num_steps=6)
    sampler = batch_selection.poisson_batches([{"input_ids": [3, 4], "labels": 0}] * 20, plan, generator=seeded(1))
    start = sampler.state_dict()
    next(iter(sampler))
    assert "would draw the same ones again" in refused(lambda: sampler.load_state_dict(start))


def test_two_optimizers_on_one_draw():
    accountant = opacus.accountants.PRVAccountant()
    accountant.history = [(PLAN.noise_multiplier / 2**0.5, PLAN.sample_rate, PLAN.num_steps)]
    together = honest_epsilon(PLAN, 2**0.5)
    assert abs(together - accountant.get_epsilon(1e-5)) < 0.05 and together > replace(PLAN, num_steps=2 * PLAN.num_steps).epsilon()
    plan = plan_for_tests(dataset_size=20, expected_batch_size=20, num_steps=2)
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    first, second = (private_sgd(model, plan) for model in models)

    def share():
        for batch in batch_selection.poisson_batches([{"x": [1.0, 0.0, 2.0]}] * 20, plan, collate=lambda some: {
                "x": torch.tensor([row["x"] for row in some])}):
            micro_batches = list(batch)
            for model, private in zip(models, (first, second)):
                for micro_batch in micro_batches:
                    private.backward(model(micro_batch["x"]).square().sum(1))
                private.step()

    assert "another optimizer has stepped on this batch" in refused(share) and (first.steps_taken, second.steps_taken) == (1, 0)


@pytest.mark.parametrize("mix", [lambda x: x - x.mean(0), lambda x: 0.6 * x + 0.4 * x.roll(1, 0)], ids=["centred", "mixup"])
def test_a_collate_that_mixes(mix):
    torch.manual_seed(0)
    rows, model = [{"x": [1.0, float(i), 0.0]} for i in range(6)] + [{"x": [-60.0, 0.0, 40.0]}], nn.Linear(3, 1, bias=False)
    plan = plan_for_tests(dataset_size=7, expected_batch_size=7, num_steps=1)

    def collate(some):
        return {"x": mix(torch.tensor([row["x"] for row in some]))}

    def total(chosen):
        private = private_sgd(model, replace(plan, max_grad_norm=0.1))
        private.backward(model(collate([rows[i] for i in chosen])["x"])[:, 0])
        found = private.clipped_sum()["weight"].flatten()
        private.detach()
        return found

    assert largest_contribution(total, 7, 0.1) > 1.2
    batches = batch_selection.poisson_batches(rows, plan, collate=collate)
    assert "alone than among its neighbours" in refused(lambda: list(next(iter(batches))))

"""The batch that a sampler has handed out, and what an optimizer makes of it: one loss an example, one step a batch, one plan."""

import copy
import dataclasses
import weakref

import pytest
import torch
from torch import nn

from memarc_utils import batch_guard
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.auditing import audit_quickly
from memarc_utils.batch_selection import poisson_batches, shuffled_batches
from memarc_utils.dp_sgd import make_private
from memarc_utils.zeroth_order import make_zeroth_order

# Sampling rate 1: every batch is all eight rows, in two micro-batches.
WHOLE = PrivacyPlan(dataset_size=8, expected_batch_size=8, num_steps=8, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-2)


def run(go, plan=WHOLE):
    """What ``go(private, model, batches)`` returns, of an optimizer with this plan and batches of the plan above."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    rows = [{"x": [float(i == 0), 1.0]} for i in range(8)]
    return go(private, model, poisson_batches(rows, WHOLE, 4, collate=lambda some: {"x": torch.tensor([row["x"] for row in some])}))


def all_of(private, model, batch, copies=1):
    for micro_batch in batch:
        private.backward(100 * model(micro_batch["x"].repeat_interleave(copies, 0))[:, 0])


def without_steps(private, model, batches, copies=1):
    for batch in batches:
        all_of(private, model, batch, copies)


def test_several_batches_in_one_step_are_refused():
    """Gradient accumulation over batches of the plan: one example would move the sum by as many C."""
    with pytest.raises(ValueError, match="this step has 12 losses, the batch at work 8 examples.*one private.step"):
        run(without_steps)


def test_several_losses_of_one_example_are_refused_where_the_batch_is_known():
    with pytest.raises(ValueError, match="this step has 16 losses, the batch at work 8 examples"):
        run(lambda *those: without_steps(*those, copies=4))


def test_batches_of_another_plan_are_refused_also_without_a_checkpoint():
    with pytest.raises(ValueError, match="drawn for another plan"):
        run(without_steps, dataclasses.replace(WHOLE, noise_multiplier=2.0))


@pytest.mark.parametrize("forget", [False, True])
def test_an_interrupted_batch_does_not_enter_the_next_one(forget):
    def go(private, model, batches):
        all_of(private, model, next(iter(batches)))
        if forget:
            private.zero_grad()
        for batch in batches:
            all_of(private, model, batch)
            private.step()
        return private.steps_taken

    if forget:
        assert run(go) == 7  # one batch was drawn and given up
        return
    with pytest.raises(ValueError, match="private.zero_grad"):
        run(go)


def test_a_batch_has_one_step():
    def again(private, model, batches):
        for batch in batches:
            for _ in range(2):
                private.backward(100 * model(torch.ones(2, 2))[:, 0])
                private.step()

    def skipped(private, model, batches):
        for number, batch in enumerate(batches):
            all_of(private, model, batch)
            private.zero_grad() if number == 1 else private.step()

    with pytest.raises(ValueError, match="has had its step"):
        run(again)
    with pytest.raises(ValueError, match="left without private.step"):
        run(skipped)


def test_a_step_that_was_refused_may_be_repeated():
    """It released nothing: the same batch is begun anew."""
    def go(private, model, batches):
        for batch in batches:
            micro_batches = list(batch)
            model.weight.grad = torch.ones_like(model.weight)  # past the clipper: refused
            with pytest.raises(ValueError, match="gradient"):
                private.step()
            private.zero_grad()
            all_of(private, model, micro_batches)
            private.step()
        return private.steps_taken

    assert run(go) == 8


def twin_of(plan=WHOLE):
    twin = nn.Linear(2, 1, bias=False)
    return twin, make_private(twin, torch.optim.SGD(twin.parameters(), lr=0.1), plan)


def test_two_optimizers_cannot_share_a_batch():
    """One draw and two noises: a Gaussian of sensitivity √2 C at one rate q, more than two runs that draw for themselves."""
    together = dataclasses.replace(WHOLE, sampling="poisson", expected_batch_size=1, num_steps=1, noise_multiplier=0.5)
    assert dataclasses.replace(together, noise_multiplier=0.5 / 2**0.5).epsilon() > 2 * together.epsilon()

    def both(private, model, batches):
        twin, second = twin_of()
        for batch in batches:
            micro_batches = list(batch)
            all_of(private, model, micro_batches)
            private.step()
            all_of(second, twin, micro_batches)

    with pytest.raises(ValueError, match="another optimizer has stepped on this batch"):
        run(both)


@pytest.mark.parametrize("order", ["one after the other", "both backward first"])
def test_two_loops_zipped_over_two_samplers_of_one_plan(order):
    """Each optimizer is held to its own batch: the newest sampler's was taken for both."""
    def zipped(private, model, batches):
        twin, second = twin_of()
        other = poisson_batches(batches.dataset, WHOLE, 4, collate=batches.collate)
        for mine, hers in zip(batches, other):
            all_of(private, model, mine)
            if order == "one after the other":
                private.step()
            all_of(second, twin, hers)
            if order != "one after the other":
                private.step()
            second.step()
        return private.steps_taken, second.steps_taken

    assert run(zipped) == (8, 8)


def test_of_two_zipped_loops_each_optimizer_is_held_to_its_own_batch():
    def zipped(private, model, batches):
        twin, second = twin_of()
        for mine, hers in zip(batches, poisson_batches(batches.dataset, WHOLE, 4, collate=batches.collate)):
            all_of(private, model, mine)
            all_of(second, twin, hers)
            private.step()
            second.step()
            all_of(private, model, [{"x": torch.ones(2, 2)}])

    with pytest.raises(ValueError, match="has had its step"):
        run(zipped)


@pytest.mark.parametrize("change, message", [
    ({"dataset": 3}, "a int does not"), ({"dataset": (row for row in ())}, "a generator does not"),
    ({"dataset": {"x": [[1.0, 2.0]] * 8}}, "Dataset.from_pandas")])
def test_what_batches_cannot_be_made_of_is_said(change, message):
    arguments = {"dataset": [{"input_ids": [3], "labels": 0}] * 8, "plan": WHOLE, **change}
    with pytest.raises(ValueError, match=message):
        poisson_batches(arguments.pop("dataset"), arguments.pop("plan"), **arguments)


def test_a_state_that_is_none_of_a_sampler_is_refused():
    with pytest.raises(ValueError, match="no state of such a sampler"):
        poisson_batches([{"input_ids": [3], "labels": 0}] * 8, WHOLE).load_state_dict({})


@pytest.mark.parametrize("fault, message", [("", ""), ("two batches", "16 losses"), ("twice", "has had its step"), ("plan", "another plan")])
def test_zeroth_order_takes_one_step_a_batch(fault, message):
    def go(private, model, batches):
        private.detach()
        zeroth, before = make_zeroth_order(model, dataclasses.replace(WHOLE, noise_multiplier=2.0 if fault == "plan" else 1.0), 0.1), []
        for batch in batches:
            before += list(batch)
            for _ in range(1 + (fault == "twice")):
                zeroth.step(before, lambda model, micro_batch: model(micro_batch["x"])[:, 0])
            before = before if fault == "two batches" else []
        return zeroth.steps_taken

    if not fault:
        assert run(go) == 8
        return
    with pytest.raises(ValueError, match=message):
        run(go)


@pytest.mark.parametrize("name, value", [("plan", dataclasses.replace(WHOLE, max_grad_norm=5.0)), ("clipping", "flat"), ("noise", "secure")])
def test_what_the_noise_was_made_for_cannot_be_exchanged(name, value):
    model = nn.Linear(3, 2)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), WHOLE, clipping="per_layer")
    with pytest.raises(AttributeError):
        setattr(private, name, value)
    if name == "plan":
        with pytest.raises(AttributeError):
            make_zeroth_order(private.detach(), WHOLE, 0.1).plan = value


def test_a_sampler_does_not_draw_the_same_batches_again():
    """Rewound after every ten batches, three noises fell on each draw: ε 0.71 accounted, 3.9 spent."""
    sampler = poisson_batches(range(8), WHOLE)
    start = sampler.state_dict()
    next(iter(sampler))
    with pytest.raises(ValueError, match="would draw the same ones again"):
        sampler.load_state_dict(start)
    poisson_batches(range(8), WHOLE).load_state_dict(sampler.state_dict())


SPARSE = dataclasses.replace(WHOLE, sampling="poisson", expected_batch_size=1, num_steps=12)


@pytest.mark.parametrize("way", ["empty ones not iterated", "listed first", "both backward first"])
@pytest.mark.parametrize("seed", range(4))
def test_zipped_loops_with_empty_batches(way, seed):
    def zipped(private, model, batches):
        private.detach()
        private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), SPARSE)
        twin, second = twin_of(SPARSE)
        mine, hers = (poisson_batches(batches.dataset, SPARSE, 4, collate=batches.collate, generator=torch.Generator().manual_seed(10 * seed + k))
                      for k in (1, 2))
        for a, b in zip(mine, hers):
            if way == "listed first":
                a, b = list(a), list(b)
            for optimizer, line, batch in ((private, model, a), (second, twin, b)):
                if way != "empty ones not iterated" or len(batch):
                    all_of(optimizer, line, batch)
                if way != "both backward first":
                    optimizer.step()
            if way == "both backward first":
                private.step()
                second.step()
        return private.steps_taken, second.steps_taken

    assert run(zipped) == (12, 12)


def test_an_optimizer_that_is_gone_has_still_stepped():
    """A grid of rates on each batch: the first optimizer's step stays, also where nothing holds it any more."""
    def grid(private, model, batches):
        private.detach()
        for batch in batches:
            micro_batches = list(batch)
            for rate in (0.1, 0.2):
                zeroth = make_zeroth_order(model, WHOLE, rate)
                zeroth.step(micro_batches, lambda model, micro_batch: model(micro_batch["x"])[:, 0])
                del zeroth

    with pytest.raises(ValueError, match="another optimizer has stepped on this batch"):
        run(grid)


@pytest.mark.parametrize("way", ["seeded again", "state loaded twice", "copied"])
def test_the_same_draws_again_are_refused(way):
    def again(private, model, batches):
        def new():
            if way == "seeded again":
                return poisson_batches(batches.dataset, WHOLE, 4, collate=batches.collate, generator=torch.Generator().manual_seed(0))
            if way == "copied":
                return copy.deepcopy(start)
            sampler = poisson_batches(batches.dataset, WHOLE, 4, collate=batches.collate)
            sampler.load_state_dict(state)
            return sampler

        start = poisson_batches(batches.dataset, WHOLE, 4, collate=batches.collate)
        state = start.state_dict()
        for _ in range(2):
            for _, batch in zip(range(2), new()):
                all_of(private, model, batch)
                private.step()

    with pytest.raises(ValueError, match="this batch was drawn before"):
        run(again)


def test_steps_on_an_old_batch_outside_the_loop_are_warned_of(monkeypatch):
    monkeypatch.setattr(batch_guard, "samplers", weakref.WeakSet())  # without those that other tests have left

    def overfit(private, model, batches):
        micro_batches = list(next(iter(batches)))
        for _ in range(3):
            all_of(private, model, micro_batches)
            private.step()

    with pytest.warns(UserWarning, match="a batch that is used again was drawn once"):
        run(overfit)


def test_a_new_shuffle_that_is_wound_forward_is_refused():
    plan = dataclasses.replace(WHOLE, sampling="shuffled", expected_batch_size=2, num_steps=4)
    model, rows = nn.Linear(2, 1), [{"x": [1.0, 0.0]}] * 8
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)

    def batches():
        return shuffled_batches(rows, plan, collate=lambda some: {"x": torch.tensor([row["x"] for row in some])})

    def step(batch):
        all_of(private, model, batch)
        private.step()

    for _, batch in zip(range(2), batches()):
        step(batch)
    with pytest.raises(ValueError, match="with another one: a new shuffle begins a new epoch"):
        for n, batch in enumerate(batches()):
            if n >= 2:
                step(batch)


@pytest.mark.parametrize("way", ["centred", "mixup", "each by itself", "sorted and padded", "random"])
def test_a_collate_that_mixes_rows_is_refused(way):
    rows = [{"x": [float(i), 1.0, 2.0][:1 + i % 3]} for i in range(8)]

    def collate(some):
        some = sorted(some, key=lambda row: len(row["x"])) if way == "sorted and padded" else some
        longest = max(len(row["x"]) for row in some)
        x = torch.tensor([row["x"] + [0.0] * (longest - len(row["x"])) for row in some])
        if way == "centred":
            x = x - x.mean(0)
        if way == "mixup":
            x = 0.7 * x + 0.3 * x.roll(1, 0)
        return {"x": x + torch.randn_like(x) if way == "random" else x, "labels": torch.zeros(len(some))}

    batches = poisson_batches(rows, WHOLE, 8, collate=collate)
    if way in ("centred", "mixup"):
        with pytest.raises(ValueError, match="another row of x alone than among its neighbours"):
            list(next(iter(batches)))
    else:
        assert sum(len(micro_batch["x"]) for micro_batch in next(iter(batches))) == 8


def test_an_audit_within_a_loop():
    def audited(private, model, batches):
        for batch in batches:
            micro_batches = list(batch)
            other = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 1))
            plan = dataclasses.replace(SPARSE, num_steps=2, dataset_size=100, delta=1e-3)
            report = audit_quickly(other, lambda model, batch: model(batch["x"])[:, 0], micro_batches[0], plan, num_canaries=20)
            all_of(private, model, micro_batches)
            private.step()
        return report

    assert run(audited).holds

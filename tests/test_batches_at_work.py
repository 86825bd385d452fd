"""The batch that a sampler has handed out, and what an optimizer makes of it: one loss an example, one step a batch, one plan."""

import dataclasses

import pytest
import torch
from torch import nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_selection import poisson_batches
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

    with pytest.raises(ValueError, match="another optimizer has stepped"):
        run(zipped)


@pytest.mark.parametrize("change, message", [
    ({"dataset": 3}, "a int does not"), ({"dataset": (row for row in ())}, "a generator does not"),
    ({"dataset": {"x": [[1.0, 2.0]] * 8}}, "Dataset.from_pandas")])
def test_what_batches_cannot_be_made_of_is_said(change, message):
    arguments = {"dataset": [{"input_ids": [3], "labels": 0}] * 8, "plan": WHOLE, **change}
    with pytest.raises(ValueError, match=message):
        poisson_batches(arguments.pop("dataset"), arguments.pop("plan"), **arguments)


def test_a_state_that_is_none_of_a_sampler_is_refused():
    with pytest.raises(ValueError, match="no state of a sampler"):
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

"""The batch that a sampler has handed out, and what an optimizer makes of it: one loss an example, one step a batch, one plan."""

import dataclasses

import pytest
import torch
from torch import nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_selection import poisson_batches
from memarc_utils.dp_sgd import make_private


def linear_run(num_rows, plan, go):
    """The clipped sum of the first step of ``go(private, model, batches)`` on ``num_rows`` of eight rows, all of which are drawn."""
    rows = [{"x": [float(i == 0), 1.0]} for i in range(8)][8 - num_rows:]
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    batches = poisson_batches(rows, plan, 4, collate=lambda some: {"x": torch.tensor([row["x"] for row in some])})
    return go(private, model, batches)


WHOLE = PrivacyPlan(dataset_size=8, expected_batch_size=8, num_steps=8, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-2)


def all_of(private, model, batch, copies=1):
    for micro_batch in batch:
        private.backward(100 * model(micro_batch["x"].repeat_interleave(copies, 0))[:, 0])


def test_several_batches_in_one_step_are_refused():
    """Gradient accumulation over batches of the plan: one example would move the sum by as many C."""
    def accumulate(private, model, batches):
        for batch in batches:
            all_of(private, model, batch)

    with pytest.raises(ValueError, match="this step has 12 losses, the batch at work 8 examples.*one private.step"):
        linear_run(8, WHOLE, accumulate)


def test_an_interrupted_batch_does_not_enter_the_next_sampler():
    def twice(private, model, batches):
        all_of(private, model, next(iter(batches)))
        all_of(private, model, next(iter(batches)))

    def forgotten(private, model, batches):
        all_of(private, model, next(iter(batches)))
        private.zero_grad()
        for batch in batches:
            all_of(private, model, batch)
            private.step()
        return private.steps_taken

    def within(private, model, batches):
        all_of(private, model, next(iter(batches)))
        for batch in batches:
            all_of(private, model, batch)

    with pytest.raises(ValueError, match="private.zero_grad"):
        linear_run(8, WHOLE, within)
    assert linear_run(8, WHOLE, forgotten) == 7  # one batch was drawn and given up


def test_several_losses_of_one_example_are_refused_where_the_batch_is_known():
    with pytest.raises(ValueError, match="this step has 16 losses, the batch at work 8 examples"):
        linear_run(8, WHOLE, lambda private, model, batches: [all_of(private, model, batch, copies=4) for batch in batches])


def test_batches_of_another_plan_are_refused_also_without_a_checkpoint():
    other = dataclasses.replace(WHOLE, noise_multiplier=2.0)

    def go(private, model, batches):
        model = nn.Linear(2, 1, bias=False)
        private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), other)
        for batch in batches:
            all_of(private, model, batch)

    with pytest.raises(ValueError, match="drawn for another plan"):
        linear_run(8, WHOLE, go)


def test_a_batch_has_one_step():
    def again(private, model, batches):
        for batch in batches:
            for _ in range(2):
                private.backward(100 * model(torch.ones(2, 2))[:, 0])
                private.step()

    def skipped(private, model, batches):
        for number, batch in enumerate(batches):
            all_of(private, model, batch)
            if number != 1:
                private.step()
            else:
                private.zero_grad()

    with pytest.raises(ValueError, match="has had its step"):
        linear_run(8, WHOLE, again)
    with pytest.raises(ValueError, match="left without private.step"):
        linear_run(8, WHOLE, skipped)


def test_two_optimizers_may_share_the_batches():
    def both(private, model, batches):
        twin = nn.Linear(2, 1, bias=False)
        second = make_private(twin, torch.optim.SGD(twin.parameters(), lr=0.1), WHOLE)
        for batch in batches:
            for micro_batch in batch:
                private.backward(model(micro_batch["x"])[:, 0])
                second.backward(twin(micro_batch["x"])[:, 0])
            private.step()
            second.step()
        return private.steps_taken, second.steps_taken

    assert linear_run(8, WHOLE, both) == (8, 8)


@pytest.mark.parametrize("name, value", [("plan", dataclasses.replace(WHOLE, max_grad_norm=5.0)), ("clipping", "flat"), ("noise", "secure")])
def test_what_the_noise_was_made_for_cannot_be_exchanged(name, value):
    model = nn.Linear(3, 2)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), WHOLE, clipping="per_layer")
    with pytest.raises(AttributeError):
        setattr(private, name, value)

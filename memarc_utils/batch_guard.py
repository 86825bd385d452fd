"""Holds an optimizer's steps to the batches that its plan pays for.

ε counts T draws, each made for one step of one optimizer, and one loss an example in each. What is outside a loop over a sampler is
the caller's own word; within one, several batches in a step, a batch that has had its step, one that another optimizer has stepped
on, and one that was drawn before are refused.
"""

import itertools
import warnings
import weakref

from memarc_utils.accounting import PrivacyPlan

at_work: list = []  # samplers that have handed out a batch and wait for its step, the newest last
samplers = weakref.WeakSet()  # all that there are
_turns = itertools.count()
_numbers = itertools.count()


def next_turn() -> int:
    """Rises with every batch that is drawn or iterated: in this order they are used."""
    return next(_turns)


class BatchGuard:
    """Of one optimizer.

    Attributes:
        on: False for an optimizer whose batches are made by hand though a sampler is at work (an audit within a loop).
    """

    def __init__(self, plan: PrivacyPlan) -> None:
        self.on, self._plan = True, plan
        self._number = next(_numbers)  # never given again, as the address of an optimizer that is gone may be
        self._begun = self._earlier = None  # the sampler of the step at hand, and of the one before
        self._draws: set[bytes] = set()
        self._losses, self._warned = 0, False

    def check(self, num_losses: int, steps_taken: int) -> None:
        """Is what the optimizer has summed in this step within the batch that the plan pays for?

        Args:
            num_losses: that the step has seen so far.
            steps_taken: before it.

        Raises:
            ValueError: the batch is of another plan, of a second shuffle, has fewer examples, was drawn before, or has had its step, of
                this optimizer or another: several batches in one step, or several losses of one example, would move the sum by
                several C, and a batch that is used twice was drawn once.
        """
        if not self.on:
            return
        if not at_work:
            self._warn_of_old_batches(num_losses, steps_taken)
            return
        self._losses = num_losses
        sampler = self._sampler()
        if sampler is None:
            raise ValueError("the batch at work was drawn for another plan than this optimizer's, and ε would be that of other batches: make "
                             "both with one plan, poisson_batches(dataset, private.plan), or leave that loop first (an iterator that is "
                             "kept, it = iter(batches), is a loop too: del it)")
        if self._plan.sampling == "shuffled" and (sampler.steps_drawn <= steps_taken or self._earlier not in (None, sampler)):
            raise ValueError(f"this sampler has drawn {sampler.steps_drawn} batches and the optimizer taken {steps_taken} steps"
                             f"{'' if self._earlier in (None, sampler) else ' with another one'}: a new shuffle begins a new epoch, and some "
                             "examples come twice where the plan pays for once. Keep one shuffled_batches object for the whole run (a "
                             "resume loads its state)")
        if num_losses:
            self._begun = sampler
            sampler.begun.add(self._number)
        if num_losses > len(sampler.batch):
            raise ValueError(f"this step has {num_losses} losses, the batch at work {len(sampler.batch)} examples: give one loss an example and "
                             "take one private.step() a batch, the empty ones too. A larger batch is a plan with a larger "
                             "expected_batch_size; what an interrupted batch left is forgotten with private.zero_grad()")
        if num_losses and self._number in sampler.stepped:
            raise ValueError("the batch at work has had its step: a second one needs a batch of its own, which the sampler draws")
        if num_losses and sampler.stepped:
            raise ValueError("another optimizer has stepped on this batch. Who is in it was drawn once for both: together they spend what one "
                             "run with noise_multiplier divided by the root of 2 spends, more than their ε added up. Give each its own "
                             "sampler and go through its batch right before its step, or train both models as one, with one optimizer")
        if num_losses and sampler.draw in self._draws:
            raise ValueError("this batch was drawn before: the sampler's generator stands where it stood for an earlier step (it was seeded "
                             "again, or a state was loaded twice), so the same examples come again, which the plan pays for as new "
                             "draws. Make one sampler for the whole run, with generator=None")

    def note_step(self) -> None:
        """The optimizer has taken the step of the batch at work."""
        if self.on and (sampler := self._sampler()) is not None:
            sampler.stepped.add(self._number)
            self._draws.add(sampler.draw)
            self._earlier = sampler
        self._begun = None

    def forget(self) -> None:
        """What the step has summed so far was forgotten."""
        if self._begun is not None:
            self._begun.begun.discard(self._number)
        self._begun = None

    def _sampler(self):
        """Whose batch the step at hand is made of: that of its first losses; for these, of the samplers at work for the plan, the one of
        the step before, or the first one whose batch nobody else has begun (an empty one for a step without losses). So loops over
        several, zipped or one within the other, are kept apart."""
        mine = [sampler for sampler in at_work if sampler.plan == self._plan]
        if any(self._begun is sampler for sampler in mine):
            return self._begun
        free = [sampler for sampler in mine if not (sampler.begun | sampler.stepped) - {self._number}]
        waiting = [sampler for sampler in free if self._number not in sampler.stepped] or free or mine
        if any(self._earlier is sampler for sampler in waiting):
            return self._earlier
        return min(waiting, key=lambda sampler: ((len(sampler.batch) == 0) != (self._losses == 0), not sampler.batch.used, sampler.batch.turn),
                   default=None)

    def _warn_of_old_batches(self, num_losses: int, steps_taken: int) -> None:
        drawn = [sampler.steps_drawn for sampler in samplers if sampler.steps_drawn and sampler.plan == self._plan]
        if num_losses and drawn and max(drawn) <= steps_taken and not self._warned:
            self._warned = True
            warnings.warn(f"this optimizer has taken {steps_taken} steps, the sampler of its plan has drawn {max(drawn)} batches and none is at "
                          "work: a batch that is used again was drawn once, and ε counts a new draw a step. Step within a loop, for batch "
                          "in batches", stacklevel=5)

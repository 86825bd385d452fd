"""Batches as the privacy plan accounts for them, cut into physical micro-batches that never change the result.

Poisson sampling: in every step each example is in the batch with probability q = expected_batch_size / dataset_size,
independently of everything else (Abadi et al. 2016). So the batch size is random, and a batch may be empty: it still
takes its noise step. Padding is to the right with a mask, each row's own tokens are what they would be alone, so no
neighbour in a micro-batch changes an example's loss. Under ``torch.distributed`` rank r of R draws for the examples i with
i mod R = r alone: the ranks' draws together are one batch of the whole data set (see `data_parallel`).
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral

import torch
from torch import Tensor

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.data_parallel import rank_and_size
from memarc_utils.padding import num_tokens, pad_rows
from memarc_utils.randomness import check_generator, seed_from_operating_system


def _rows(dataset, indices: list[int]) -> list:
    if indices and hasattr(dataset, "column_names"):  # a datasets.Dataset reads many rows at once faster than one by one
        columns = dataset[indices]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]
    return [dataset[i] for i in indices]


_turns = itertools.count()  # of batches that are drawn and iterated: the last one is what a step is made of


class LogicalBatch:
    """One step's examples. Iterating yields its micro-batches, once; an empty batch yields none."""

    def __init__(self, dataset, indices: list[int], physical_batch_size: int, collate: Callable) -> None:
        self.indices = indices
        self._dataset, self._physical, self._collate = dataset, physical_batch_size, collate
        self._used = self._whole = False
        self.turn = next(_turns)

    def __len__(self) -> int:
        """Number of examples (private: the plan's expected batch size is the public number)."""
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._used:
            raise ValueError("this batch was iterated already: an example that enters the sum twice moves it by 2 C. Keep the "
                             "micro-batches with list(batch) if you need to look at them again")
        self._used, self.turn = True, next(_turns)
        rows = _rows(self._dataset, self.indices)
        if rows and isinstance(rows[0], dict) and num_tokens(rows[0]) is not None:
            rows.sort(key=num_tokens)  # rows of like length together: less padding to compute
        for start in range(0, len(rows), self._physical):
            some = rows[start:start + self._physical]
            micro_batch = self._collate(some)
            if not isinstance(micro_batch, Mapping):  # transformers' collators return a BatchEncoding
                raise ValueError(f"collate must return a dict of tensors, got {type(micro_batch).__name__}")
            micro_batch = dict(micro_batch)
            shapes = [tuple(t.shape) for t in micro_batch.values() if isinstance(t, Tensor)]
            if any(shape[:1] != (len(some),) for shape in shapes):
                raise ValueError(f"collate made tensors of shapes {shapes} of {len(some)} examples: give one row an example, or each "
                                 "of an example's rows would be clipped by itself and it would count several times")
            yield micro_batch
        self._whole = True

    def give_up(self) -> None:
        """Says that a batch left half way was forgotten (``private.zero_grad()``) and shall not be finished."""
        self._whole = True

    @property
    def half_done(self) -> bool:
        """Some of its micro-batches were handed out and some were not."""
        return self._used and not self._whole


_at_work: list["_Batches"] = []  # samplers that have handed out a batch and wait for its step, the newest last


def check_batch_at_work(optimizer, num_losses: int) -> None:
    """Is what an optimizer has summed in this step within the batch that the plan pays for? Where no sampler is at work there is nothing
    to compare with: then a step's batch is the caller's own word.

    Args:
        optimizer: private or of zeroth order, with its ``plan``; what its step's first losses come from stays its ``batches_of_step``.
        num_losses: that its step has seen so far.

    Raises:
        ValueError: the batch is of another plan, of a second shuffle, has fewer examples, or has had its step, of this optimizer or
            another: several batches in one step, or several losses of one example, would move the sum by several C, and a batch
            that is used twice was drawn once.
    """
    if not _at_work:
        return
    sampler = _sampler_of(optimizer)
    if sampler is None:
        raise ValueError("the batch at work was drawn for another plan than this optimizer's, and ε would be that of other batches: make "
                         "both with one plan, poisson_batches(dataset, private.plan), or leave that loop first")
    if optimizer.plan.sampling == "shuffled" and sampler.steps_drawn <= optimizer.steps_taken:
        raise ValueError(f"this sampler has drawn {sampler.steps_drawn} batches and the optimizer taken {optimizer.steps_taken} steps: a new "
                         "shuffle begins a new epoch, and some examples come twice where the plan pays for once. Keep one shuffled_batches "
                         "object for the whole run (a resume loads its state)")
    if num_losses:
        optimizer.batches_of_step = sampler
    if num_losses > len(sampler.batch):
        raise ValueError(f"this step has {num_losses} losses, the batch at work {len(sampler.batch)} examples: give one loss an example and "
                         "take one private.step() a batch, the empty ones too. A larger batch is a plan with a larger expected_batch_size; "
                         "what an interrupted batch left is forgotten with private.zero_grad()")
    if num_losses and optimizer in sampler.stepped:
        raise ValueError("the batch at work has had its step: a second one needs a batch of its own, which the sampler draws")
    if num_losses and sampler.stepped:
        raise ValueError("another optimizer has stepped on this batch. Who is in it was drawn once for both: together they spend what one run "
                         "with noise_multiplier divided by the root of 2 spends, more than their ε added up. Give each its own sampler "
                         "and go through its batch right before its step, or train both models as one, with one optimizer")


def note_step(optimizer) -> None:
    """The optimizer has taken the step of the batch at work."""
    if (sampler := _sampler_of(optimizer)) is not None:
        sampler.stepped.add(optimizer)
    optimizer.batches_of_step = None


def _sampler_of(optimizer) -> "_Batches | None":
    """What the step's first losses came from; for these, of those at work for the optimizer's plan, the one whose batch was drawn or
    iterated last: loops over several, zipped or one within the other, each go through their own batch before its losses."""
    if (begun := optimizer.batches_of_step) in _at_work:
        return begun
    return max((sampler for sampler in _at_work if sampler.plan == optimizer.plan), key=lambda sampler: sampler.batch.turn, default=None)


class _Batches:
    """What both samplers share: position, generator, and their state for a resume."""

    def __init__(self, dataset, plan: PrivacyPlan, physical_batch_size: int, collate, pad_token_id, generator) -> None:
        self.dataset, self.plan, self.physical_batch_size = dataset, plan, physical_batch_size
        self.collate = collate or (lambda rows: pad_rows(rows, pad_token_id))
        if generator is None:
            generator = seed_from_operating_system(torch.Generator())  # who is in which batch must be unknown
        self.generator = generator
        self.steps_drawn = 0
        self.batch: LogicalBatch | None = None
        self.stepped = weakref.WeakSet()  # optimizers that have taken its step

    def __len__(self) -> int:
        return self.plan.num_steps

    def state_dict(self) -> dict:
        return {"steps_drawn": self.steps_drawn, "generator": self.generator.get_state(), **self._more_state()}

    def load_state_dict(self, state: dict) -> None:
        """Raises:
            ValueError: batches were drawn already: an earlier state would draw them again, and ε counts new draws.
        """
        if self.steps_drawn:
            raise ValueError(f"this sampler has drawn {self.steps_drawn} batches: an earlier state would draw the same ones again, which the "
                             "plan does not pay for. Load it into a new sampler of a new run, before the first batch")
        if not isinstance(state, dict) or not {"steps_drawn", "generator"} <= state.keys():
            raise ValueError("this is no state of a sampler: give what its state_dict() returned")
        self.steps_drawn = state["steps_drawn"]
        self.generator.set_state(state["generator"])
        self._load_more(state)

    def _more_state(self) -> dict:
        return {}

    def _load_more(self, state: dict) -> None:
        pass

    def __iter__(self) -> Iterator[LogicalBatch]:
        steps_were_taken = False
        while self.steps_drawn < self.plan.num_steps:
            rank, size = rank_and_size()
            indices = [i for i in self._draw() if i % size == rank]
            self.steps_drawn += 1
            self.batch, self.stepped = LogicalBatch(self.dataset, indices, self.physical_batch_size, self.collate), weakref.WeakSet()
            _at_work.append(self)
            try:
                yield self.batch
            finally:
                _at_work.remove(self)
            if self.batch.half_done:
                raise ValueError("the last batch was left half way: what is in the sum of it would be released with the next one's. Go "
                                 "through all of its micro-batches, or forget them with private.zero_grad() and say so with "
                                 "batch.give_up()")
            stepped = bool(self.stepped)
            if steps_were_taken and not stepped:
                raise ValueError("the last batch was left without private.step(): every batch is a step that the plan pays for, an empty "
                                 "one too, which then is noise alone")
            steps_were_taken = stepped


class PoissonBatches(_Batches):
    """See `poisson_batches`."""

    def _draw(self) -> list[int]:
        # float64: with float32 the smallest rates would be rounded to multiples of 2^-24
        chosen = torch.rand(len(self.dataset), generator=self.generator, dtype=torch.float64) < self.plan.sample_rate
        return chosen.nonzero().flatten().tolist()


class ShuffledBatches(_Batches):
    """See `shuffled_batches`."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._order: list[int] = []

    def _draw(self) -> list[int]:
        size = self.plan.expected_batch_size
        drawn, self._order = self._order[:size], self._order[size:]
        if not drawn:
            self._order = torch.randperm(len(self.dataset), generator=self.generator).tolist()
            return self._draw()
        return drawn

    def _more_state(self) -> dict:
        return {"order": list(self._order)}

    def _load_more(self, state: dict) -> None:
        self._order = list(state["order"])


def _check(dataset, plan: PrivacyPlan, physical_batch_size: int, sampling: str, collate: Callable | None, pad_token_id: int,
           generator: torch.Generator | None) -> None:
    if not isinstance(plan, PrivacyPlan):
        raise ValueError(f"plan must be a PrivacyPlan, got a {type(plan).__name__}: make it with PrivacyPlan.from_epsilon")
    if plan.sampling != sampling:
        mend = "poisson_batches(dataset, plan)" if plan.sampling == "poisson" else 'a plan with sampling="poisson"'
        raise ValueError(f"the plan accounts for {plan.sampling} sampling, these batches are {sampling}: its ε would be wrong. "
                         f"Use {mend}, or plan.with_sampling({sampling!r}) whose ε is that of {sampling} batches")
    if isinstance(physical_batch_size, bool) or not isinstance(physical_batch_size, Integral) or physical_batch_size < 1:
        raise ValueError(f"physical_batch_size must be a whole number >= 1, got {physical_batch_size!r}")
    if (not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or hasattr(dataset, "iloc")
            or isinstance(dataset, (Mapping, str))):
        raise ValueError(f"a data set has a length and gives row i as dataset[i]; a {type(dataset).__name__} does not: give a list of rows, a "
                         "torch data set, or datasets.Dataset.from_pandas(frame), from_dict(columns)")
    if collate is not None and not callable(collate):
        raise ValueError(f"collate must be a function of a list of rows, got a {type(collate).__name__}")
    if collate is None and (isinstance(pad_token_id, bool) or not isinstance(pad_token_id, Integral)):
        raise ValueError(f"pad_token_id must be a whole number, got {pad_token_id!r}: the model's, or any token where it has none and an "
                         "attention_mask says what is padding")
    check_generator("generator", generator)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator is on {generator.device}: who is in which batch is drawn on the CPU, torch.Generator()")
    # Poisson sampling knows q alone. A shuffled plan counts how often an example comes, and a smaller data set comes round sooner.
    slack = max(1, plan.dataset_size // 100)
    if not -slack * (sampling == "poisson") <= len(dataset) - plan.dataset_size <= slack:
        raise ValueError(f"the plan is for {plan.dataset_size} examples, the data set has {len(dataset)}: make the plan with "
                         "the (public) size of this data set")
    if collate is None and len(dataset) and isinstance(row := dataset[0], (tuple, list, str, Tensor)):
        raise ValueError(f"a row of the data set is a {type(row).__name__}: give rows that are dicts, such as {{'input_ids': [...], "
                         "'labels': 0}, or a collate that makes a dict of tensors of a list of rows")


def poisson_batches(dataset, plan: PrivacyPlan, physical_batch_size: int = 32, *, collate: Callable | None = None,
                    pad_token_id: int = 0, generator: torch.Generator | None = None) -> PoissonBatches:
    """Batches by true Poisson sampling at the plan's rate, one for each of the plan's steps.

    Args:
        dataset: anything with ``len`` and ``[i]`` that gives a dict of ints, floats, lists or tensors, or what ``collate`` takes.
        plan: owns the sampling rate and the number of steps.
        physical_batch_size: at most so many examples go through the model at once; changes memory, never the result.
        collate: rows to micro-batch; `pad_rows` by default. One row in, one row out: several rows made of one example
            (windows, augmentations) would be clipped as so many examples.
        pad_token_id: for the default collate: the model's (``model.config.pad_token_id``), where its head looks for the last real token.
        generator: seeded by the operating system if None. Give one for checks only.

    Returns:
        An iterable of `LogicalBatch` with ``state_dict`` and ``load_state_dict``.

    Raises:
        ValueError: the plan is for another sampling or another data set's size.
    """
    _check(dataset, plan, physical_batch_size, "poisson", collate, pad_token_id, generator)
    return PoissonBatches(dataset, plan, physical_batch_size, collate, pad_token_id, generator)


def shuffled_batches(dataset, plan: PrivacyPlan, physical_batch_size: int = 32, *, collate: Callable | None = None,
                     pad_token_id: int = 0, generator: torch.Generator | None = None) -> ShuffledBatches:
    """Fixed-size batches from a shuffled order, for comparison: every example once an epoch, so no amplification.

    Arguments as in `poisson_batches`; the plan must be made for it (``plan.with_sampling("shuffled")``), and its ε is
    the larger one.
    """
    _check(dataset, plan, physical_batch_size, "shuffled", collate, pad_token_id, generator)
    return ShuffledBatches(dataset, plan, physical_batch_size, collate, pad_token_id, generator)

"""Batches as the privacy plan accounts for them, cut into physical micro-batches that never change the result.

Poisson sampling: in every step each example is in the batch with probability q = expected_batch_size / dataset_size,
independently of everything else (Abadi et al. 2016). So the batch size is random, and a batch may be empty: it still
takes its noise step. Padding is to the right with a mask, each row's own tokens are what they would be alone, so no
neighbour in a micro-batch changes an example's loss. Under ``torch.distributed`` rank r of R draws for the examples i with
i mod R = r alone: the ranks' draws together are one batch of the whole data set (see `data_parallel`).
"""

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral

import torch
from torch import Tensor

from memarc_utils import batch_guard
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.data_parallel import rank_and_size
from memarc_utils.padding import num_tokens, pad_rows
from memarc_utils.randomness import check_generator, seed_from_operating_system


def _rows(dataset, indices: list[int]) -> list:
    if indices and hasattr(dataset, "column_names"):  # a datasets.Dataset reads many rows at once faster than one by one
        columns = dataset[indices]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]
    return [dataset[i] for i in indices]


_LOOK_EVERY = 64  # batches: how often a collate of the caller's own is looked at again


class LogicalBatch:
    """One step's examples. Iterating yields its micro-batches, once; an empty batch yields none."""

    def __init__(self, dataset, indices: list[int], physical_batch_size: int, collate: Callable, look: bool = False) -> None:
        self.indices, self._look = indices, look
        self._dataset, self._physical, self._collate = dataset, physical_batch_size, collate
        self.used = self._whole = False
        self.turn = batch_guard.next_turn()

    def __len__(self) -> int:
        """Number of examples (private: the plan's expected batch size is the public number)."""
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.used:
            raise ValueError("this batch was iterated already: an example that enters the sum twice moves it by 2 C. Keep the "
                             "micro-batches with list(batch) if you need to look at them again")
        self.used, self.turn = True, batch_guard.next_turn()
        rows = _rows(self._dataset, self.indices)
        if rows and isinstance(rows[0], dict) and num_tokens(rows[0]) is not None:
            rows.sort(key=num_tokens)  # rows of like length together: less padding to compute
        for start in range(0, len(rows), self._physical):
            some = rows[start:start + self._physical]
            kept = [copy.copy(row) for row in some] if self._look and len(some) > 1 else []  # a collate may take entries out of its rows
            micro_batch = self._collate(some)
            if not isinstance(micro_batch, Mapping):  # transformers' collators return a BatchEncoding
                raise ValueError(f"collate must return a dict of tensors, got {type(micro_batch).__name__}")
            micro_batch = dict(micro_batch)
            shapes = [tuple(t.shape) for t in micro_batch.values() if isinstance(t, Tensor)]
            if any(shape[:1] != (len(some),) for shape in shapes):
                raise ValueError(f"collate made tensors of shapes {shapes} of {len(some)} examples: give one row an example, or each "
                                 "of an example's rows would be clipped by itself and it would count several times")
            if kept:
                _check_collate(self._collate, kept, micro_batch)
                self._look = False
            yield micro_batch
        self._whole = True

    def give_up(self) -> None:
        """Says that a batch left half way was forgotten (``private.zero_grad()``) and shall not be finished."""
        self._whole = True

    @property
    def half_done(self) -> bool:
        """Some of its micro-batches were handed out and some were not."""
        return self.used and not self._whole


def _check_collate(collate: Callable, rows: list, micro_batch: Mapping) -> None:
    """Half of the rows, chosen at random and collated alone, must come out as they do among all, but for padding and their order. A column
    that is another one when it is made again is random and cannot be compared.

    Raises:
        ValueError: a row depends on its neighbours.
    """
    some, state = random.SystemRandom().sample(rows, len(rows) // 2), random.getstate()
    with torch.random.fork_rng(devices=[]):
        alone, again = (dict(collate([copy.copy(row) for row in some])) for _ in range(2))
    random.setstate(state)
    for name, t in alone.items():
        whole = micro_batch.get(name)
        if not isinstance(t, Tensor) or not isinstance(whole, Tensor) or whole.dim() != t.dim() or whole.shape[2:] != t.shape[2:]:
            continue
        if again[name].shape != t.shape or not torch.allclose(again[name].double(), t.double(), equal_nan=True):
            continue
        sides = [whole] if t.dim() < 2 else [whole[:, :t.shape[1]], whole[:, whole.shape[1] - t.shape[1]:]]
        places = [side.double() for side in sides if side.shape[1:] == t.shape[1:]]
        for row in t.double():
            if not any(torch.isclose(place, row, rtol=1e-4, equal_nan=True).reshape(len(place), -1).all(1).any() for place in places):
                raise ValueError(f"collate gives an example another row of {name} alone than among its neighbours: one example would "
                                 "change the others' gradients. What mixes rows (a mean of the batch, mixup) has no place there; "
                                 "scale by public numbers")


class _Batches:
    """What both samplers share: position, generator, and their state for a resume."""

    def __init__(self, dataset, plan: PrivacyPlan, physical_batch_size: int, collate, pad_token_id, generator) -> None:
        self.dataset, self.plan, self.physical_batch_size = dataset, plan, physical_batch_size
        self.collate, self._own = collate or (lambda rows: pad_rows(rows, pad_token_id)), collate is None
        if generator is None:
            generator = seed_from_operating_system(torch.Generator())  # who is in which batch must be unknown
        self.generator = generator
        self.steps_drawn = 0
        self.batch: LogicalBatch | None = None
        self.draw = b""  # tells one draw from another: a digest of the generator's state before it
        self._looks = True  # until a collate of the caller's own was seen at work
        self.begun: set[int] = set()  # the numbers of those optimizers that have losses of the batch in their sums
        self.stepped: set[int] = set()  # and of those that have taken its step
        batch_guard.samplers.add(self)

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
        if not isinstance(state, dict) or not {"steps_drawn", "generator", *self._more_state()} <= state.keys():
            raise ValueError("this is no state of such a sampler: give what its state_dict() returned")
        self.steps_drawn = state["steps_drawn"]
        self.generator.set_state(state["generator"])
        self._load_more(state)

    def _state_digest(self) -> bytes:
        place = str(len(self._more_state().get("order", ()))).encode()
        return hashlib.blake2b(self.generator.get_state().numpy().tobytes() + place, digest_size=16).digest()

    def _more_state(self) -> dict:
        return {}

    def _load_more(self, state: dict) -> None:
        pass

    def __iter__(self) -> Iterator[LogicalBatch]:
        steps_were_taken, at_work = False, batch_guard.at_work  # by a name of its own: the interpreter's end clears the module's
        while self.steps_drawn < self.plan.num_steps:
            rank, size = rank_and_size()
            self.draw = self._state_digest()
            indices = [i for i in self._draw() if i % size == rank]
            self.steps_drawn += 1
            look = not self._own and (self._looks or not random.SystemRandom().randrange(_LOOK_EVERY))
            self.batch = LogicalBatch(self.dataset, indices, self.physical_batch_size, self.collate, look)
            self.begun, self.stepped, self._looks = set(), set(), self._looks and len(indices) < 2
            at_work.append(self)
            try:
                yield self.batch
            finally:
                at_work.remove(self)
            if self.batch.half_done:
                raise ValueError("the last batch was left half way: what is in the sum of it would be released with the next one's. Go "
                                 "through all of its micro-batches, or forget them with private.zero_grad(), say so with "
                                 "batch.give_up() and take the step, which then is noise alone")
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
            or isinstance(dataset, (Mapping, str)) or collate is None and hasattr(dataset, "ndim")):
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
            (windows, augmentations) would be clipped as so many examples. At the first batch, and now and then, half of the rows are
            collated alone: a row that depends on its neighbours is refused.
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

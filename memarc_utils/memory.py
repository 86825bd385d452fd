"""What a training step takes: peak memory above what was there before, seconds, and what autograd keeps in between."""

import contextlib
import gc
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from memarc_utils.book_keeping import HeldGradient
from memarc_utils.planning import MemoryPlan, largest_batch, plan_memory

__all__ = ["MemoryPlan", "SavedBytes", "StepCost", "held_bytes", "largest_batch", "measure_step", "plan_memory", "saved_bytes"]


@dataclass(frozen=True)
class StepCost:
    """Attributes:
        peak_bytes: highest number of bytes that the step held at once above what stood before it.
        seconds: median wall time of the timed repeats.
        saved_bytes: the most that autograd kept at once for the backward pass, parameters apart (see `saved_bytes`).
        engine_bytes: the most that the clipping engine held of examples at once. A layer's input may be in both: it stands once.
    """

    peak_bytes: int
    seconds: float
    saved_bytes: int = 0
    engine_bytes: int = 0

    @property
    def peak_megabytes(self) -> float:
        return self.peak_bytes / 1e6


def measure_step(step: Callable[[], object], repeats: int = 3) -> StepCost:
    """Measures a step: once to warm up (optimizer state is made then, and what is saved and held is counted), once for the peak, then
    for time.

    Of a step that computes on CUDA the peak is the caching allocator's. On the CPU it follows every allocation and release of torch's
    allocator (the profiler's memory events), so it is exact and repeatable; what libraries hold outside that allocator
    is not in it. The resident peak of a fresh process has that too: `benchmark.measure_cases` takes it.

    Args:
        step: a callable that does one whole training step.
        repeats: timed runs; the median counts. Time on an idle machine only.

    >>> cost = measure_step(lambda: torch.ones(1_000_000) + torch.ones(1_000_000))
    >>> cost.peak_bytes
    12000000
    """
    if not callable(step):
        raise ValueError(f"step must be a function that does one whole training step, got a {type(step).__name__}")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be a whole number >= 1, got {repeats!r}")
    saved, held = _MostSaved(), _MostHeld()
    with saved, held:
        step()
    gc.collect()
    on_cuda = _peak_on_cuda(step) if torch.cuda.is_available() else 0
    peak = on_cuda or _held_and_peak_on_cpu(step)[1]
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return StepCost(peak, statistics.median(times), saved.most, held.most)


@dataclass(frozen=True)
class SavedBytes:
    """Attributes:
        total: bytes that autograd keeps for the backward pass.
        storages: bytes of each kept storage, in the order in which they were saved.
    """

    total: int
    storages: tuple[int, ...]

    @property
    def megabytes(self) -> float:
        return self.total / 1e6


class _Kept:
    """What the graph holds in place of a saved tensor; it dies with the node that saved it."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output as it is would hold the node that holds it, and neither would ever go


def saved_bytes(forward: Callable[[], object], model: nn.Module | None = None) -> SavedBytes:
    """Bytes that the graph of ``forward``'s result keeps for the backward pass, parameters apart.

    Sees what torch's operations save and what autograd functions give to ``save_for_backward`` (attributes set on
    ``ctx`` escape). Under non-reentrant checkpointing that is the inputs of each checkpointed part. A storage counts
    once and in full, however many views of it were saved; what was released before ``forward`` returned does not count.

    Args:
        forward: runs the forward pass and returns the loss, or whatever the backward pass would start from.
        model: its buffers stand in memory anyway, as its parameters do, and are left out with them. Parameters are
            recognised without it, unless they were saved detached.

    Raises:
        ValueError: ``forward`` returned None, so that its graph is gone.

    GELU keeps its input; a linear layer keeps its input if its weight trains, and nothing but its weight if not.

    >>> x, layer = torch.ones(10, 4, requires_grad=True), nn.Linear(4, 3)
    >>> saved_bytes(lambda: nn.functional.gelu(layer(x)))
    SavedBytes(total=280, storages=(160, 120))
    >>> layer.weight.requires_grad = False
    >>> saved_bytes(lambda: nn.functional.gelu(layer(x))).total
    120
    """
    standing = () if model is None else (*model.parameters(), *model.buffers())
    skipped = {_identity(tensor) for tensor in standing}
    kept: list[weakref.ref] = []

    def pack(tensor: Tensor) -> _Kept:
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            skipped.add(_identity(tensor))
        holder = _Kept(tensor)
        kept.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = forward()
    if result is None:
        raise ValueError("forward returned None: return the loss, else its graph is gone before it can be counted")
    alive = [holder.tensor for ref in kept if (holder := ref()) is not None]
    sizes = {_identity(t): t.untyped_storage().nbytes() for t in alive if _identity(t) not in skipped}
    return SavedBytes(sum(sizes.values()), tuple(sizes.values()))


def _identity(tensor: Tensor) -> int:
    """The storage object itself: all views of it share it, and tensors without memory (on ``meta``) have one too."""
    return tensor.untyped_storage()._cdata


class _MostSaved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that live graphs keep, at the moment when they are most."""

    def __init__(self) -> None:
        super().__init__(self._pack, lambda kept: kept.tensor)
        self.now = self.most = 0
        self._uses: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            key, size = _identity(tensor), tensor.untyped_storage().nbytes()
            self._uses[key] = self._uses.get(key, 0) + 1
            self.now += size * (self._uses[key] == 1)
            self.most = max(self.most, self.now)
            weakref.finalize(kept, self._gone, key, size).atexit = False
        return kept

    def _gone(self, key: int, size: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self.now -= size


class _MostHeld(contextlib.ExitStack):
    """Bytes of the storages that the clipping engine holds of examples, at the moment when they are most."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._held = 0, weakref.WeakSet()
        for name in ("add_dense", "add_pair", "add_lookup"):
            self.enter_context(mock.patch.object(HeldGradient, name, self._counted(getattr(HeldGradient, name))))

    def _counted(self, add: Callable) -> Callable:
        def added(held: HeldGradient, *args) -> None:
            add(held, *args)
            self._held.add(held)
            sizes = {_identity(t): t.untyped_storage().nbytes() for each in self._held for t in each.tensors()}
            self.most = max(self.most, sum(sizes.values()))
        return added


def held_bytes(forward: Callable[[], object]) -> int:
    """Bytes that the allocator has given out in ``forward`` and not got back while its result is alive.

    Another route to what `saved_bytes` counts, which knows nothing of autograd. It has the result itself in it, and not
    what autograd saved of tensors that stood before. Runs ``forward`` twice, the first time to warm up.

    >>> held_bytes(lambda: torch.ones(1000) + torch.ones(1000))
    4000
    """
    forward()
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        result = forward()  # noqa: F841 (it must live until the count)
        if held := torch.cuda.memory_allocated() - before:
            return held
    return _held_and_peak_on_cpu(forward)[0]  # also where a GPU stands by and nothing was put on it


def _peak_on_cuda(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _held_and_peak_on_cpu(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes allocated and not released when ``step`` has returned, its result alive; and the most at any moment."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), _without_collector(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        result = step()  # noqa: F841 (it must live until the profile ends)
    standing: dict[int, int] = {}  # sizes by address
    held = peak = 0
    for _, address, size in sorted(_allocations(profile)):
        if size < 0 and standing.pop(address, None) is None:
            continue  # not of this run: the profiler keeps addresses of earlier ones and takes older blocks that lie there for theirs
        standing.update({address: size} if size > 0 else {})
        held += size
        peak = max(peak, held)
    return held, peak


def _allocations(profile: torch.profiler.profile) -> Iterator[tuple[int, int, int]]:
    """Time in nanoseconds, address, and bytes given out, or, negative, taken back."""
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag == torch._C._profiler._EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size


@contextlib.contextmanager
def _without_collector():
    """Python's collector runs at moments of its own choosing, and would then free what earlier steps left behind."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _quiet_stderr():
    """The profiler's C++ part reports its start and stop on file descriptor 2, which no Python setting turns off."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)

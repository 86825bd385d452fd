"""What a training step takes: peak memory above what was there before, and seconds."""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepCost:
    """Attributes:
        peak_bytes: highest number of bytes that the step held at once above what stood before it.
        seconds: median wall time of the timed repeats.
    """

    peak_bytes: int
    seconds: float

    @property
    def peak_megabytes(self) -> float:
        return self.peak_bytes / 1e6


def measure_step(step: Callable[[], object], repeats: int = 3) -> StepCost:
    """Measures a step: once to warm up (optimizer state is made then), once for memory, then for time.

    On CUDA the peak is the caching allocator's. On the CPU it follows every allocation and release of torch's allocator
    (the profiler's memory events), so it is exact and repeatable; what libraries hold outside that allocator is not in it.

    Args:
        step: a callable that does one whole training step.
        repeats: timed runs; the median counts. Time on an idle machine only.

    >>> cost = measure_step(lambda: torch.ones(1_000_000) + torch.ones(1_000_000))
    >>> cost.peak_bytes
    12000000
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    step()
    gc.collect()
    peak = _peak_on_cuda(step) if torch.cuda.is_available() else _peak_on_cpu(step)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return StepCost(peak, statistics.median(times))


def _peak_on_cuda(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(step: Callable[[], object]) -> int:
    with _quiet_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


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

"""One training step of a method under an engine, measured in a process of its own: seconds, and resident memory.

A comparison is a list of `StepCase`, measured one process after the other on an idle machine. Memory is the highest resident
size, mapped files apart, over all steps above the size with the model and the optimizer loaded: Linux's own record of it, and
what a sample every 2 ms sees. The allocator of the process gives freed memory back at once (`ALLOCATOR`), so that what is
resident is what is held.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_selection import pad_rows
from memarc_utils.dp_sgd import make_private
from memarc_utils.feature_cache import cache_features
from memarc_utils.methods import METHODS, SHAPES
from memarc_utils.training import classification_losses, progress
from memarc_utils.zeroth_order import make_zeroth_order

# Blocks of 16 KiB and more are mapped one by one: among smaller ones that stand, freed ones of 64 KiB would stay resident.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
ENGINES = ("non-private", "book-keeping", "opacus hooks", "opacus ghost")  # that train by gradients
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
_SAMPLING_INTERVAL = 0.002  # seconds
_WARM_UP_STEPS = 2  # the engine looks for examples that meet in the first step, or two where a layer starts at zero


@dataclass(frozen=True)
class StepCase:
    """One cell of a comparison.

    Attributes:
        method: what trains, a key of `METHODS`. ``side-cached`` reads its features from disk, at side width (reduction 8, a
            pooled downsample), ``side-cached learned`` at full width of every second block; the others run the backbone.
        engine: ``non-private`` (mean loss), ``book-keeping`` (ours), ``opacus hooks``, ``opacus ghost``, ``zeroth order`` (one
            direction).
        shape: a key of `SHAPES`, random weights, classification head, dropout as published.
        batch_size: B.
        num_tokens: T; no padding.
        checkpointing: activation checkpointing of every block (non-reentrant).
        clipping: of our engine.
        bookkeeping: of our engine.
        threads: of torch.
        repeats: timed steps, after two for warming up.
        optimizer: ``sgd`` or ``adamw``, whose state counts in the peak; zeroth-order training has its own.
    """

    method: str
    engine: str
    shape: str = "roberta-base"
    batch_size: int = 16
    num_tokens: int = 128
    checkpointing: bool = False
    clipping: str = "flat"
    bookkeeping: str = "memory"
    threads: int = 2
    repeats: int = 5
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("engine", (*ENGINES, "zeroth order")), ("shape", SHAPES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "num_tokens", "threads", "repeats"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        if self.method.startswith("side-cached") and (self.checkpointing or self.engine not in ("non-private", "book-keeping")):
            raise ValueError(f"{self.method} is measured without checkpointing, as non-private or book-keeping")
        if self.method.startswith("rev") and (self.checkpointing or self.engine.startswith("opacus")):
            raise ValueError(f"{self.method} recomputes its activations itself: measure it without checkpointing and without opacus, whose "
                             "hooks do not see what is recomputed")
        if self.engine.startswith("opacus") and self.checkpointing:
            raise ValueError("opacus's module hooks cannot run under activation checkpointing: take checkpointing=False")


def measure_cases(cases: Iterable[StepCase]) -> pd.DataFrame:
    """Measures each case in a fresh process, one after the other.

    Returns:
        One row a case: its settings, ``seconds`` (median of the repeats), ``seconds_min``, ``seconds_max``, ``peak_mb`` (10⁶
        bytes above the loaded model) and ``model_mb``.

    Raises:
        RuntimeError: a process failed; the message holds the end of its error output.
    """
    cases = list(cases)
    rows = []
    for case in progress(cases, "measuring", len(cases)):
        rows.append({**dataclasses.asdict(case), **_in_fresh_process(case)})
    return pd.DataFrame(rows)


def _in_fresh_process(case: StepCase) -> dict[str, float]:
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(case.threads), "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-W", "ignore", "-m", "memarc_utils.benchmark", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _resident_bytes() -> int:
    """Without the pages of mapped files (a feature cache, libraries), which the system takes back whenever it likes."""
    import psutil

    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


class _PeakResident:
    """Samples the resident size of this process in a thread of its own, and asks Linux, which misses nothing, for its highest one."""

    def __enter__(self) -> "_PeakResident":
        self._restart_record()
        self.peak, self._stop = _resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLING_INTERVAL):
            self.peak = max(self.peak, _resident_bytes())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._record())

    def _restart_record(self) -> None:
        self._recorded = False
        with contextlib.suppress(OSError):  # no Linux, or one that does not let us
            Path("/proc/self/clear_refs").write_text("5")
            self._recorded = True

    def _record(self) -> int:
        """The highest size since the restart, without mapped files: all that are resident now, which is at least what was then."""
        if not self._recorded:
            return 0
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        highest, files, shared = (1024 * int(status[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem"))
        return highest - files - shared


def measure_here(case: StepCase) -> dict[str, float]:
    """Measures a case in this process; `measure_cases` calls it in a fresh one."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    _warm_up()
    before = _resident_bytes()
    step = _prepared_step(case)
    loaded = _resident_bytes()
    peaks = []
    for _ in range(_WARM_UP_STEPS):
        with _PeakResident() as memory:
            step()
        peaks.append(memory.peak)
    seconds = []
    for _ in range(case.repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds),
            "peak_mb": (max(peaks) - loaded) / 1e6, "model_mb": (loaded - before) / 1e6}


def _warm_up() -> None:
    """Matrix products of a real size: the libraries' packing buffers, some 5 MB a thread, are set up once and are no step's memory."""
    x, w = torch.randn(4, 512, 1024), torch.randn(1024, 1024)
    for product in (lambda: x @ w, lambda: x @ w.t(), lambda: x.transpose(1, 2) @ x, lambda: x.flatten(0, 1).t() @ x.flatten(0, 1)):
        product()


def _prepared_step(case: StepCase) -> Callable[[], None]:
    model = AutoModelForSequenceClassification.from_config(SHAPES[case.shape]())
    if case.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model = METHODS[case.method](model).train()
    if case.engine.startswith("opacus") and case.shape == "gpt2":
        model.transformer.wpe.requires_grad_(False)  # positions that broadcast over the batch crash opacus
    optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    draw_batch = _cached_batches(case, model) if case.method.startswith("side-cached") else _standing_batch(case, model)
    make = {"non-private": _non_private_step, "book-keeping": _book_keeping_step, "zeroth order": _zeroth_order_step}
    return make.get(case.engine, _opacus_step)(case, model, optimizer, draw_batch)


def _tokens(case: StepCase, model: nn.Module, rows: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size - 1, (rows, case.num_tokens))


def _standing_batch(case: StepCase, model: nn.Module) -> Callable[[], dict]:
    batch = {"input_ids": _tokens(case, model, case.batch_size),
             "attention_mask": torch.ones(case.batch_size, case.num_tokens, dtype=torch.long),
             "labels": torch.randint(0, 2, (case.batch_size,))}
    return lambda: batch


def _cached_batches(case: StepCase, model: nn.Module) -> Callable[[], dict]:
    """Rows at random from a cache of four batches on disk, as an epoch draws them."""
    size = 4 * case.batch_size
    rows = [{"input_ids": row.tolist(), "labels": i % 2} for i, row in enumerate(_tokens(case, model, size))]
    folder = tempfile.TemporaryDirectory()
    cached = cache_features(model, rows, batch_size=8, folder=folder.name)

    def draw_batch() -> dict:
        assert folder  # the files live as long as this function
        return pad_rows([cached[i] for i in torch.randperm(size)[:case.batch_size].tolist()])

    return draw_batch


def _non_private_step(case, model, optimizer, draw_batch) -> Callable[[], None]:
    def step() -> None:
        batch = draw_batch()  # it stands through the backward pass, as in a loop over batches
        classification_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _plan(case: StepCase) -> PrivacyPlan:
    return PrivacyPlan(dataset_size=50_000, expected_batch_size=case.batch_size, num_steps=1_000, noise_multiplier=1.0,
                       max_grad_norm=1.0, delta=1e-5)


def _zeroth_order_step(case, model, optimizer, draw_batch) -> Callable[[], None]:
    zeroth_order = make_zeroth_order(model, _plan(case), learning_rate=1e-4)
    return lambda: zeroth_order.step([draw_batch()], classification_losses)


def _book_keeping_step(case, model, optimizer, draw_batch) -> Callable[[], None]:
    private = make_private(model, optimizer, _plan(case), clipping=case.clipping, bookkeeping=case.bookkeeping)

    def step() -> None:
        batch = draw_batch()
        private.backward(classification_losses(model, batch))
        private.step()

    return step


def _opacus_step(case, model, optimizer, draw_batch) -> Callable[[], None]:
    """opacus 1.6.0 as its own `PrivacyEngine` puts it together, without the data loader."""
    from opacus import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    ghost = case.engine == "opacus ghost"
    options = dict(noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=case.batch_size)
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)
        private = DPOptimizerFastGradientClipping(optimizer, **options)
        loss_of = DPLossFastGradientClipping(wrapped, private, nn.CrossEntropyLoss())
    else:
        wrapped, private, loss_of = GradSampleModule(model), DPOptimizer(optimizer, **options), F.cross_entropy
    batch = draw_batch()
    inputs = {name: t for name, t in batch.items() if name != "labels"}

    def step() -> None:
        private.zero_grad()
        loss_of(wrapped(**inputs).logits, batch["labels"]).backward()
        private.step()
        private.zero_grad()

    return step


def relative_to(table: pd.DataFrame, engine: str = "non-private") -> pd.DataFrame:
    """Adds ``time_ratio`` and ``memory_ratio``: each row against the same step under another engine.

    Raises:
        ValueError: a row has no partner in the table, or several.
    """
    keys = ["method", "shape", "batch_size", "num_tokens", "checkpointing", "threads", "optimizer"]
    partners = table[table["engine"] == engine].set_index(keys)
    if not partners.index.is_unique or not set(table.set_index(keys).index) <= set(partners.index):
        raise ValueError(f"every case needs exactly one partner with engine={engine!r} that has the same {', '.join(keys)}")
    own = partners.loc[table.set_index(keys).index]
    return table.assign(time_ratio=table["seconds"].to_numpy() / own["seconds"].to_numpy(),
                        memory_ratio=table["peak_mb"].to_numpy() / own["peak_mb"].to_numpy())


if __name__ == "__main__":
    print(json.dumps(measure_here(StepCase(**json.loads(sys.argv[1])))))

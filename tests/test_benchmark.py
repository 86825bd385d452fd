"""`benchmark`: every engine and method takes its step in a process of its own; what cannot be compared is refused."""

import weakref
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from memarc_utils import benchmark
from memarc_utils.benchmark import ENGINES, METHODS, StepCase, measure_cases, relative_to

SMALL = dict(shape="tiny", batch_size=2, num_tokens=8, threads=1, repeats=1)


def test_a_fresh_process_measures_a_step():
    table = measure_cases([StepCase("full", "non-private", **SMALL), StepCase("full", "book-keeping", **SMALL)])
    assert (table["seconds"] > 0).all() and (table["peak_mb"] > 0).all()
    ratios = relative_to(table)
    assert ratios["time_ratio"][0] == ratios["memory_ratio"][0] == 1.0
    assert ratios["time_ratio"][1] == pytest.approx(table["seconds"][1] / table["seconds"][0])


@pytest.mark.parametrize("prepare", [benchmark._non_private_step, benchmark._book_keeping_step])
def test_a_batch_stands_through_the_backward_pass(prepare, monkeypatch):
    """In a loop over batches it does; a step that let go of it after the forward pass would hold less."""
    drawn, stood = [], []

    def draw_batch():
        drawn.append(weakref.ref(batch := torch.ones(3, 2)))
        return {"x": batch}

    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda grad: stood.append(drawn[-1]() is not None))
    monkeypatch.setattr(benchmark, "classification_losses", lambda model, batch: weight.sum() * batch["x"].detach().clone().sum(1))
    monkeypatch.setattr(benchmark, "make_private", lambda *args, **kwargs: SimpleNamespace(
        backward=lambda losses: losses.sum().backward(), step=lambda: None))
    prepare(StepCase("full", "book-keeping", **SMALL), None, torch.optim.SGD([weight], 0.1), draw_batch)()
    assert stood == [True]


def test_a_peak_between_two_samples_is_seen(monkeypatch):
    monkeypatch.setattr(benchmark, "_SAMPLING_INTERVAL", 60)
    with benchmark._PeakResident() as memory:
        before = benchmark._resident_bytes()
        bytearray(64_000_000)
        after = benchmark._resident_bytes()
    assert after - before < 1e6
    assert not memory._recorded or 60e6 < memory.peak - before < 70e6  # where the system keeps no record, samples are all there is


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("method, engine", [
    *((method, engine) for method in ("full", "lora", "bitfit") for engine in (*ENGINES, "zeroth order")), ("side-cached", "non-private"),
    *((method, "book-keeping") for method in METHODS if method not in ("full", "lora", "bitfit"))])
def test_every_engine_moves_what_trains_and_nothing_else(method, engine, monkeypatch):
    """The optimizer is watched from its making; with noise, and only with noise, everything it holds moves."""
    made = []

    class Watched(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setitem(benchmark.OPTIMIZERS, "sgd", Watched)
    torch.manual_seed(0)
    step = benchmark._prepared_step(StepCase(method, engine, **SMALL))
    trained = [p for group in made[0].param_groups for p in group["params"]]
    before = [p.detach().clone() for p in trained]
    for _ in range(3):
        step()
    moved = [not torch.equal(p.detach(), old) for p, old in zip(trained, before)]
    assert any(moved) if engine == "non-private" else all(moved)
    if not engine.startswith("opacus"):  # whose zero_grad keeps tensors of zeros, by its default
        assert all(p.grad is None for p in trained)


def test_a_failed_process_says_why(monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", {**benchmark.SHAPES, "unknown there": benchmark.SHAPES["tiny"]})
    with pytest.raises(RuntimeError, match="shape must be one of"):
        measure_cases([StepCase("full", "non-private", **{**SMALL, "shape": "unknown there"})])


def test_what_cannot_be_measured_is_refused():
    for change, message in ((dict(method="prefix"), f"method must be one of {', '.join(METHODS)}, got 'prefix'"),
                            (dict(engine="fastdp"), "engine must be one of non-private"), (dict(shape="huge"), "shape must be one of"),
                            (dict(batch_size=0), "batch_size must be a whole number >= 1, got 0")):
        with pytest.raises(ValueError, match=message):
            StepCase(**{"method": "full", "engine": "non-private", **change})
    with pytest.raises(ValueError, match="side-cached is measured without checkpointing"):
        StepCase("side-cached", "zeroth order")
    with pytest.raises(ValueError, match="rev-lora recomputes its activations itself"):
        StepCase("rev-lora", "book-keeping", checkpointing=True)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw"):
        StepCase("full", "book-keeping", optimizer="lion")
    with pytest.raises(ValueError, match="opacus's module hooks cannot run under activation checkpointing"):
        StepCase("lora", "opacus ghost", checkpointing=True)
    row = dict(method="full", engine="book-keeping", shape="tiny", batch_size=1, num_tokens=1, checkpointing=False, threads=1,
               optimizer="sgd", seconds=1.0, peak_mb=1.0)
    with pytest.raises(ValueError, match="every case needs exactly one partner"):
        relative_to(pd.DataFrame([row]))

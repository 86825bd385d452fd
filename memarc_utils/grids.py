"""The recorded experiments as lists of cells, and the command that runs them.

``python -m memarc_utils.grids film_reviews`` runs what is missing of a grid, ``make experiments`` all of them: classification, the
ablations of notebooks 40 and 43, and generation (``e2e``). ``SHARD=1/4`` takes every fourth cell, the second of them: several
machines can share a grid. ``python -m memarc_utils.grids steps`` measures what a step of each method takes, on a machine that does
nothing else; the same with ``planner`` what `planning` predicts beside the measured peak, with ``plans`` what it predicts for the
paper's two models. After the code has changed ``python -m memarc_utils.grids recheck film_reviews lora`` runs a recorded cell again: if
its numbers are the same, rows go on counting.
"""

import csv
import functools
import json
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict

from memarc_utils import generation
from memarc_utils.benchmark import StepCase, measure_cases
from memarc_utils.experiments import METHODS, Cell, recheck, rows_of, run_grid, table_of
from memarc_utils.methods import METHODS as PLANNED_METHODS
from memarc_utils.planning import plan_memory
from memarc_utils.recording import append_result
from memarc_utils.training import progress

# Features that were computed once allow many steps of large batches in the time that a few small ones through the backbone take.
_CACHED = {"num_steps": 60, "batch_size": 1024}
_LONG = {"num_steps": 240, "batch_size": 1024}  # about the time that 24 of the steps below take
_BY_SLOPES = {"num_steps": 240, "batch_size": 1024, "max_grad_norm": 4.0}  # C = √K: K = 16 slopes of an example
_THROUGH = {"num_steps": 24, "batch_size": 512, "epochs": 1, "autocast": True}
# Rates tried for each method, with seed 0 on film reviews, at epsilon = 8 and, of cached methods, without privacy; METHODS holds what
# validates best.
_RATES = {
    "lora": [(5e-4, 5e-3, 2e-2), (1e-3, 5e-3, 1e-1), (2e-3, 1e-2, 5e-2)],
    "rev-lora": [(5e-4, 5e-3, 2e-2), (1e-3, 5e-3, 1e-1), (2e-3, 1e-2, 5e-2)],
    "ffa-lora": [(1e-3, 5e-3, 1e-1), (2e-3, 1e-2, 5e-2)],
    "adapters": [(1e-3, 5e-3, 1e-1), (2e-3, 1e-2, 5e-2)],
    "bitfit": [(2e-3, 2e-3, 2e-2), (5e-3, 5e-3, 5e-2), (1e-2, 1e-2, 1e-1)],
    "full": [(2e-4, 2e-4, 1e-2), (5e-4, 5e-4, 2e-2), (1e-3, 1e-3, 5e-2)],
    "linear-probe": [(rate, rate, rate) for rate in (2e-2, 5e-2, 1e-1, 2e-1)],
    "zeroth-order": [(rate, rate, rate) for rate in (0.5, 1.0, 2.0, 4.0)],
    "side-cached": [(1e-3, 2e-2, 2e-2), (2e-3, 2e-2, 1e-1), (2e-3, 4e-2, 4e-2), (4e-3, 8e-2, 8e-2)],
}
_LONG_RATES = {"side-cached": [(1e-3, 1e-2, 1e-2), (1e-3, 2e-2, 2e-2)], "linear-probe": [(rate, rate, rate) for rate in (5e-2, 1e-1)]}
# Other sizes for the cached side network, for about the time of the long budget or less: steps, batch, rates.
_OTHER_SIZES = [(60, 2048, (2e-3, 4e-2, 4e-2)), (60, 4096, (2e-3, 4e-2, 4e-2)), (120, 2048, (1e-3, 2e-2, 2e-2)),
                (30, 4096, (4e-3, 8e-2, 8e-2))]

_OPEN_RATES = {"linear-probe": [(rate,) * 3 for rate in (2e-3, 1e-2, 5e-2)],
               "side-cached": [*((rate,) * 3 for rate in (5e-4, 1e-3, 2e-3)), (1e-3, 1e-2, 1e-2)]}


def _cells(dataset: str, methods: list[str], epsilons: tuple[float, ...] = (8.0, 3.0, 1.0, math.inf, 1.6), **settings) -> list[Cell]:
    return [Cell("31_classification", dataset, method, epsilon, seed, **settings)
            for epsilon in epsilons for seed in range(3) for method in methods]


def _classification(dataset: str) -> list[Cell]:
    """The comparison that a reader looks for first comes first: an interrupted grid has answered something."""
    variants = [name for name in METHODS if name.startswith("side-cached ")]
    return [*_cells(dataset, ["linear-probe", "side-cached"], **_CACHED),
            *(cell for method, tried in _LONG_RATES.items()
              for cell in _cells(dataset, [method], (8.0, 3.0, 1.0, 1.6), rates=tried[0], **_LONG)),  # the first validates best, or no worse
            *_cells(dataset, ["zeroth-order"], (8.0, 3.0, 1.0, 1.6), **_BY_SLOPES),
            *_cells(dataset, ["lora", "rev-lora", "full", "bitfit"], **_THROUGH),
            *_cells(dataset, variants, **_CACHED),
            *_cells(dataset, ["adapters", "ffa-lora"], **_THROUGH),
            *_cells(dataset, ["rev-lora quarter"] if dataset == "film_reviews" else [], (8.0,), **_THROUGH)]


def _rates() -> list[Cell]:
    long = [Cell("31_rates", "film_reviews", method, 8.0, 0, rates=rates, **_LONG)
            for method, tried in _LONG_RATES.items() for rates in tried]
    long += [Cell("31_rates", "film_reviews", "side-cached", 8.0, 0, num_steps=steps, batch_size=batch, rates=rates)
             for steps, batch, rates in _OTHER_SIZES]
    without = [Cell("31_rates", "film_reviews", method, math.inf, 0, rates=rates, **_CACHED)
               for method, tried in _OPEN_RATES.items() for rates in tried]
    budgets = {method: _CACHED if METHODS[method].cached else _THROUGH for method in _RATES} | {"zeroth-order": _BY_SLOPES}
    return long + without + [Cell("31_rates", "film_reviews", method, 8.0, 0, rates=rates, **budgets[method])
                             for method, tried in _RATES.items() for rates in tried]


# --------------------------------------------------------------------------------------------------------- ablations
_DEFAULT_SIDE = {"reduction": 8, "layers": 2}
_LEAN_SIDE = {**_DEFAULT_SIDE, "block": "mlp", "downsample": "orthogonal", "gate": "none"}
_VARIED = {"reduction": [64, 32, 16, 4, 2], "layers": ["all", 3, 6], "block": ["mlp", "adapter"],
           "downsample": ["low_rank", "pooled", "orthogonal"], "gate": ["none", "vector"]}


def side_settings(varied: dict[str, list] = _VARIED, width: int = 384) -> dict[str, dict]:
    """Settings of side networks by name: the default, *slim*, *lean*, and the default with one thing changed."""
    sides = {"default": _DEFAULT_SIDE, "slim": {**_DEFAULT_SIDE, "reduction": 16, "block": "mlp"}, "lean": _LEAN_SIDE}
    for factor, values in varied.items():
        for value in values:
            changed = {**_DEFAULT_SIDE, factor: value}
            sides[f"{factor} {value}"] = changed if (width // changed["reduction"]) % 4 == 0 else {**changed, "heads": 2}
    return sides


def _over_seeds(experiment: str, method: str, epsilon: float, **settings) -> list[Cell]:
    return [Cell(experiment, "film_reviews", method, epsilon, seed, **settings) for seed in range(3)]


def _side_width() -> list[Cell]:
    """What `notebooks/40_ablation_side_width` reads."""
    few = {"num_train": 4096, "max_tokens": 32}
    short, longer = {**few, "num_steps": 30, "batch_size": 512}, {**few, "num_steps": 60, "batch_size": 1024}
    sides = side_settings()
    ways = {name: {"method": "side-cached", "side": side} for name, side in sides.items()}
    ways["linear probe"] = {"method": "linear-probe"}
    cells = [cell for way in ways.values() for cell in _over_seeds("40_side_width", epsilon=8.0, **short, **way)]
    cells += [cell for name in ("linear probe", "slim") for cell in _over_seeds("40_side_width", epsilon=8.0, **longer, **ways[name])]
    cells += _over_seeds("40_side_width", "side-cached", 8.0, without_noise=True, rates=_LONG_RATES["side-cached"][0], **_LONG)
    cells += [*_over_seeds("40_side_width", "side-cached", 8.0, side=sides["slim"], rates=_LONG_RATES["side-cached"][0], **_LONG),
              *_over_seeds("40_side_width", "side-cached", math.inf, side=sides["slim"])]
    free = ((math.inf, {}), (8.0, {"without_noise": True}))
    return cells + [cell for name in ("linear probe", "default", "slim") for target, more in free
                    for cell in _over_seeds("40_side_width", epsilon=target, **short, **ways[name], **more)]


def _batch_size() -> list[Cell]:
    """What `notebooks/43_ablation_batch_size_and_noise` reads."""
    def probe(batch: int, steps: int, rate: float = 0.02) -> list[Cell]:
        return _over_seeds("43_batch_size", "linear-probe", 3.0, num_steps=steps, batch_size=batch, rates=(rate,) * 3)

    sizes = [64 * 2**power for power in range(7)]
    runs = dict.fromkeys((*((batch, 40) for batch in sizes), *((batch, 40_960 // batch) for batch in sizes)))
    cells = [cell for batch, steps in runs for cell in probe(batch, steps)]
    cells += [cell for batch in (64, 256, 1024)
              for cell in _over_seeds("43_batch_size", "side-cached", 3.0, num_steps=40, batch_size=batch, side=_LEAN_SIDE)]
    retried = ((64, 40, 0.005), (64, 40, 0.08), (64, 40, 0.32), (4096, 40, 0.08), (4096, 10, 0.08), (4096, 10, 0.32))
    return cells + [cell for each in retried for cell in probe(*each)]


DATASETS = ("film_reviews", "sst2", "trec", "qnli", "mrpc", "mnli")
GRIDS: dict[str, Callable[[], list[Cell]]] = {
    "rates": _rates, **{name: functools.partial(_classification, name) for name in DATASETS},
    "side_width": _side_width, "batch_size": _batch_size}


def _step_cases() -> list[StepCase]:
    """Every method of this collection beside DP-LoRA, in one run; depth by per-layer clipping; totals at RoBERTa-large's shape."""
    ours = [StepCase(method, "book-keeping") for method in ("lora", "side", "side-cached", "side-cached learned", "rev-lora", "bitfit",
                                                              "ffa-lora", "adapters", "probe", "full")]
    deep = [StepCase(method, "book-keeping", shape, clipping="per_layer", repeats=1) for method in ("rev-lora", "rev-lora quarter")
            for shape in ("roberta-base", "roberta-base-24", "roberta-base-48")]
    large = {"shape": "roberta-large", "batch_size": 8, "optimizer": "adamw", "repeats": 1}
    return [*ours, StepCase("lora", "book-keeping", checkpointing=True), StepCase("full", "zeroth order", repeats=3), *deep,
            *(StepCase(method, "book-keeping", **large) for method in ("side", "side every second block", "lora", "full"))]


def measure_steps(cases: list[StepCase]) -> None:
    """Measures one case after the other and appends seconds, peak and model size of each to ``data/results/step_costs.csv``. The machine
    must have nothing else to do."""
    nothing = dict.fromkeys(("num_train", "epsilon", "delta", "accountant", "sample_rate", "num_steps", "trainable_share"))
    metrics = {"seconds_per_step": ("seconds", "s"), "peak_memory": ("peak_mb", "MB"), "model_memory": ("model_mb", "MB")}
    for case in progress(cases, "steps", len(cases)):
        found = measure_cases([case]).iloc[0]
        settings = {name: value for name, value in asdict(case).items() if name != "method"}
        for metric, (column, unit) in metrics.items():
            append_result(table_of("step_costs"), experiment="step_costs", method=case.method, model=case.shape, seed=0,
                          dataset="random tokens", metric=metric, value=float(found[column]), unit=unit, settings=settings,
                          noise_multiplier=1.0, max_grad_norm=1.0, device="cpu", **nothing)


_ENGINES_PLANNED = {"opacus hooks": "per-example", "opacus ghost": "two-pass ghost"}  # by their names in `planning`; others have the same


def _planner_cases() -> list[StepCase]:
    """Every method at RoBERTa-base's shape, three batch sizes by three lengths; opacus's two ways at the largest of each."""
    variants = ("bitfit with added biases", "rev-lora quarter", "side every second block")  # of what is there; RoBERTa has all its biases
    methods = [name for name in PLANNED_METHODS if name not in variants]
    sizes = [{"batch_size": b, "num_tokens": t, "repeats": 1, "threads": 1} for b in (4, 8, 16) for t in (32, 64, 128)]
    ours = [StepCase(method, "book-keeping", **size) for size in sizes for method in methods]
    others = [case for size in sizes for case in (StepCase("lora", "book-keeping", checkpointing=True, **size),
                                                  StepCase("rev-lora", "book-keeping", clipping="per_layer", **size),
                                                  StepCase("full", "zeroth order", **size), StepCase("full", "non-private", **size))]
    opacus = [StepCase(method, engine, **sizes[-1]) for method in ("full", "lora") for engine in _ENGINES_PLANNED]
    cases = [*ours, *others, *opacus]
    random.Random(0).shuffle(cases)  # a run that is stopped has seen some of everything
    return cases


def compare_plans(cases: list[StepCase], experiment: str = "30_planner") -> None:
    """Appends the planned and the measured peak of each case above the loaded model to ``data/results/30_planner.csv``; a case whose rows
    are there is skipped."""
    table, done = table_of(experiment), _recorded_settings(experiment, "measured_peak")
    nothing = dict.fromkeys(("num_train", "epsilon", "delta", "accountant", "sample_rate", "num_steps"))
    for case in progress(cases, "cases", len(cases)):
        settings = {name: value for name, value in asdict(case).items() if name not in ("method", "threads", "repeats")}
        if (case.shape, case.method, json.dumps(settings, sort_keys=True)) in done:
            continue
        plan = plan_memory(case.shape, case.method, case.batch_size, case.num_tokens, clipping=case.clipping, task="classification",
                           engine=_ENGINES_PLANNED.get(case.engine, case.engine), checkpointing=case.checkpointing,
                           optimizer=case.optimizer)
        measured = measure_cases([case]).iloc[0]["peak_mb"]
        for metric, value in (("planned_peak", plan.peak_bytes / 1e6), ("measured_peak", float(measured))):
            append_result(table, experiment=experiment, method=case.method, model=case.shape, dataset="random tokens", seed=0,
                          metric=metric, value=value, unit="MB", noise_multiplier=1.0, max_grad_norm=1.0, device="cpu",
                          trainable_share=None, settings=settings, **nothing)


def _recorded_settings(experiment: str, metric: str) -> set[tuple[str, str, str]]:
    """Model, method and settings of the rows that a table has of a metric."""
    if not table_of(experiment).exists():
        return set()
    with open(table_of(experiment), encoding="utf-8", newline="") as file:
        return {(row["model"], row["method"], row["settings"]) for row in csv.DictReader(file) if row["metric"] == metric}


_WHOLE_STEPS = {"full, per-example gradients": ("full", {"engine": "per-example"}), "full": ("full", {}), "lora": ("lora", {}),
                "lora, checkpointed": ("lora", {"checkpointing": True}), "bitfit": ("bitfit", {}), "side": ("side", {}),
                "side every second block": ("side every second block", {}), "side-cached": ("side-cached", {}), "rev-lora": ("rev-lora", {}),
                "rev-lora, per layer": ("rev-lora", {"clipping": "per_layer"})}


def record_plans(shapes: tuple[str, ...] = ("roberta-large", "gpt2-large"), experiment: str = "30_memory") -> None:
    """Appends the planned memory of whole steps, model included, to ``data/results/30_memory.csv``: the paper's two models, weights in
    bfloat16, AdamW, B = 32, T = 128, with attention weights standing in memory and without. What is there is skipped."""
    done = _recorded_settings(experiment, "planned_whole_step")
    nothing = dict.fromkeys(("num_train", "epsilon", "delta", "accountant", "sample_rate", "num_steps"))
    cases = [(shape, case, fused) for shape in shapes for fused in (False, True) for case in _WHOLE_STEPS]
    for shape, case, fused in progress(cases, "plans", len(cases)):
        method, options = _WHOLE_STEPS[case]
        settings = {"case": case, "fused_attention": fused, "batch_size": 32, "num_tokens": 128, "dtype": "bfloat16", "optimizer": "adamw"}
        if (shape, method, json.dumps(settings, sort_keys=True)) in done:
            continue
        plan = plan_memory(shape, method, 32, 128, "bfloat16", fused_attention=fused, **options)
        append_result(table_of(experiment), experiment=experiment, method=method, model=shape, dataset="none", seed=0,
                      metric="planned_whole_step", value=plan.total_bytes / 1e9, unit="GB", noise_multiplier=1.0, max_grad_norm=1.0,
                      device="cpu", trainable_share=None, settings=settings, **nothing)


def _recheck(arguments: list[str]) -> None:
    """Of a method's recorded cells again, by today's code, one for each code that made them."""
    dataset, method = arguments if len(arguments) == 2 else ("", "")
    cells = [cell for cell in GRIDS.get(dataset, list)() if cell.method == method]
    cells = [cell for cell in cells if any(row["seed"] == str(cell.seed) for row, _ in rows_of(cell))]
    if not cells:
        raise SystemExit(f"nothing is recorded of method {method!r} on data {dataset!r}: write recheck film_reviews lora, for instance")
    again = [recheck(cell) for cell in cells]  # runs where the code that made the row is not known to be the same by then
    print("the same numbers by today's code" if any(again) else "the rows are of today's code already")


def main(arguments: list[str]) -> None:
    names = arguments or [*GRIDS, "e2e"]
    alone = {"steps": lambda: measure_steps(_step_cases()), "planner": lambda: compare_plans(_planner_cases()), "plans": record_plans}
    if len(names) == 1 and names[0] in alone:
        alone[names[0]]()
        return
    if names[0] == "recheck":
        _recheck(names[1:])
        return
    if unknown := [name for name in names if name not in (*GRIDS, "e2e")]:
        raise SystemExit(f"unknown grid {unknown[0]}: write some of {', '.join(GRIDS)}, e2e; or steps, planner or plans, by itself, to measure "
                         "time and memory")
    shard = os.environ.get("SHARD", "0/1")
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise SystemExit(f"SHARD must be i/n with 0 <= i < n, such as 1/4, got {shard!r}")
    part = int(index), int(count)
    for name in names:
        ran = generation.run_missing(part) if name == "e2e" else run_grid(GRIDS[name](), part)
        print(f"{name}: {ran} cells ran")


if __name__ == "__main__":
    main(sys.argv[1:])

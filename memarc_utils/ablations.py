"""Runs of an ablation as a table: what is recorded is read, the rest is run. One row a cell, so that seeds can be averaged."""

import csv
import json
from dataclasses import asdict

import pandas as pd

from memarc_utils.experiments import Cell, run_cell, table_of
from memarc_utils.training import progress

_METRICS = ("validation_accuracy", "test_accuracy")


def _recorded(cell: Cell) -> dict[str, float | bool] | None:
    """Both accuracies of a cell from its table, the last ones if it was recorded twice; None if one is missing."""
    path = table_of(cell.experiment)
    if not path.exists():
        return None
    wanted, found = cell.settings(), {}
    same = {"method": cell.method, "dataset": cell.dataset, "seed": str(cell.seed)}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if any(row[name] != value for name, value in same.items()):
                continue
            have = json.loads(row["settings"])
            private = wanted["target_epsilon"] is not None
            if {**have, "code": ""} != {**wanted, "code": ""} or private and float(row["max_grad_norm"]) != cell.max_grad_norm:
                continue
            found[row["metric"]] = float(row["value"])
            found["same_code"] = have["code"] == wanted["code"]
            found["sigma"] = float(row["noise_multiplier"] or 0)
            found["share"] = float(row["trainable_share"])
    return found if all(metric in found for metric in _METRICS) else None


def measured(cells: list[Cell], fresh: bool = False) -> pd.DataFrame:
    """Accuracy of each cell, from ``data/results`` where it is recorded, else from a run. Nothing is written.

    A recorded row counts when all settings of the cell agree with it, whatever code made it: ``same_code`` says whether today's code
    is the same (see `experiments.code_of`).

    Args:
        cells: as for `experiments.run_grid`, which is what records them.
        fresh: run them all.

    Returns:
        One row a cell, in order: the cell's fields, and ``test_accuracy``, ``validation_accuracy``, ``sigma`` (0 without privacy),
        ``share`` of the parameters that train, ``recorded``, ``same_code``.

    Raises:
        ValueError: no cell, or one cell twice.
    """
    if not cells:
        raise ValueError("there is no cell to measure: give a list of Cell")
    if len({repr(cell) for cell in cells}) < len(cells):
        raise ValueError("a cell stands in the list twice, and would count twice in its mean: leave one out")
    rows = [None if fresh else _recorded(cell) for cell in cells]
    missing = [i for i, row in enumerate(rows) if row is None]
    for i in progress(missing, "runs", len(missing)):
        found = run_cell(cells[i])
        rows[i] = {**{name: found[name] for name in (*_METRICS, "share")}, "sigma": found.get("sigma", 0.0), "same_code": True}
    return pd.DataFrame([{**asdict(cell), **row, "recorded": i not in missing} for i, (cell, row) in enumerate(zip(cells, rows))])


def over_seeds(runs: pd.DataFrame, by: list[str], value: str = "test_accuracy") -> pd.DataFrame:
    """Mean, sample standard deviation and count of a column over the runs of each setting, in the order of the table.

    >>> runs = pd.DataFrame({"setting": ["a", "a", "b"], "test_accuracy": [0.7, 0.8, 0.6]})
    >>> over_seeds(runs, ["setting"]).round(3).reset_index().values.tolist()
    [['a', 0.75, 0.071, 2], ['b', 0.6, nan, 1]]
    """
    return runs.groupby(by, sort=False, dropna=False)[value].agg(mean="mean", sd="std", n="count")

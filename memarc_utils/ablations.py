"""Runs of an ablation as a table: what is recorded is read, the rest is run. One row a cell, so that seeds can be averaged."""

from dataclasses import asdict

import pandas as pd

from memarc_utils.experiments import Cell, rows_of, run_cell
from memarc_utils.training import progress

_METRICS = ("validation_accuracy", "test_accuracy")


def _recorded(cell: Cell) -> dict[str, float | bool] | None:
    """Both accuracies of a cell from its table; None if one is missing."""
    found = {}
    for row, same_code in rows_of(cell):
        if row["seed"] == str(cell.seed):
            found |= {row["metric"]: float(row["value"]), "sigma": float(row["noise_multiplier"] or 0),
                      "share": float(row["trainable_share"]), "same_code": same_code}
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

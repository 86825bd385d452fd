"""What a notebook leaves behind: recorded metrics, checks that print, and rows of results.

`record` stores a metric inside the notebook file itself, as an output with its own MIME type, so that a test can read
it back without running anything. `check_close` and `check` are the asserts of a notebook: they print a line when they
hold and name the likely mistake when they do not. `append_result` adds one row to a table of `data/results/`.
"""

import csv
import datetime
import fcntl
import io
import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

RECORD_MIME = "application/vnd.memarc.record+json"

# The one schema of every row in data/results/*.csv, in the order of the columns.
RESULT_COLUMNS = (
    "experiment",
    "method",
    "model",
    "dataset",
    "num_train",
    "epsilon",
    "delta",
    "accountant",
    "noise_multiplier",
    "sample_rate",
    "num_steps",
    "max_grad_norm",
    "seed",
    "metric",
    "value",
    "unit",
    "trainable_share",
    "device",
    "torch",
    "commit",
    "date",
    "settings",
)
FILLED_COLUMNS = ("device", "torch", "commit", "date")  # append_result fills these in when they are not given
_TEXT_COLUMNS = ("experiment", "method", "model", "dataset", "metric")  # never empty
_INTEGER_COLUMNS = ("num_train", "num_steps", "seed")
_NUMBER_COLUMNS = ("epsilon", "delta", "noise_multiplier", "sample_rate", "max_grad_norm", "value", "trainable_share")


def _as_array(value: Any) -> np.ndarray:
    """Number, array, tensor or list of them as a float64 array (NumPy has no bfloat16, so tensors go by float64)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def record(name: str, value: Any, unit: str = "") -> None:
    """Print one metric and store it in the notebook, where `read_records` finds it.

    Args:
        name: a short snake_case name, unique in the notebook, such as `"accuracy_side"`.
        value: a finite number, a truth value or a short text (NumPy scalars and 0-d tensors are numbers too).
        unit: unit of the value, such as `"MB"` or `"%"`; empty for a pure number.

    Raises:
        ValueError: a name that is not snake_case, or a value that is not a single finite number, bool or text.

    >>> record("epsilon_pld", 1.8281234, "")
    epsilon_pld = 1.82812
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"record() needs a snake_case name, such as 'accuracy_side'; got {name!r}")
    if not isinstance(unit, str):
        raise ValueError(f"record({name!r}): unit must be text such as 'MB'; got {unit!r}")
    if hasattr(value, "item"):  # NumPy scalar or tensor
        if math.prod(value.shape) != 1:
            raise ValueError(f"record({name!r}) takes one number; reduce the array first, for example with .mean()")
        value = value.item()
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"record({name!r}) takes a number, a bool or a text; got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"record({name!r}) takes a finite number; got {value}. Record what stays finite instead")
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    line = f"{name} = {shown} {unit}".rstrip()

    from IPython.core.interactiveshell import InteractiveShell

    if InteractiveShell.initialized():
        from IPython.display import display

        display({RECORD_MIME: {"name": name, "value": value, "unit": unit}, "text/plain": line}, raw=True)
    else:
        print(line)


def read_records(notebook_path: str | Path) -> dict[str, dict[str, Any]]:
    """Read every metric that `record` stored in an executed notebook.

    Args:
        notebook_path: the `.ipynb` file.

    Returns:
        `{name: {"value": ..., "unit": ...}}` in the order of recording.

    Raises:
        ValueError: two records of one name.
    """
    notebook = json.loads(Path(notebook_path).read_text(encoding="utf-8"))
    records: dict[str, dict[str, Any]] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            stored = output.get("data", {}).get(RECORD_MIME)
            if stored is None:
                continue
            if stored["name"] in records:
                raise ValueError(
                    f"{Path(notebook_path).name} records {stored['name']!r} twice; give every metric a name of its own"
                )
            records[stored["name"]] = {"value": stored["value"], "unit": stored["unit"]}
    return records


def check_close(
    label: str, got: Any, want: Any, *, rtol: float | None = None, atol: float | None = None, likely_mistake: str = ""
) -> None:
    """Check that two numbers that came by two routes agree; print one line, or raise.

    Holds when |got − want| ≤ rtol·|want| (or ≤ atol) for every element. For arrays whose small entries carry no
    meaning of their own, check the norm of the difference instead.

    Args:
        label: what the number is, such as `"ε at T=1000"`.
        got: number, array or tensor.
        want: number, or array or tensor of the same shape.
        rtol: relative tolerance. Exactly one of `rtol` and `atol` is given.
        atol: absolute tolerance, in the unit of `got`.
        likely_mistake: what is probably wrong when the check fails.

    Raises:
        AssertionError: the numbers differ by more than the tolerance.
        ValueError: both or none of the tolerances, shapes that differ, nothing to compare.

    >>> check_close("ε at T=1000", 2.10341, 2.10341, rtol=1e-6)
    ✓ ε at T=1000: 2.1034 ≈ 2.1034 (rtol 1e-06)
    """
    if (rtol is None) == (atol is None):
        raise ValueError(f"check_close({label!r}) takes exactly one of rtol and atol, for example rtol=1e-6")
    kind, tolerance = ("rtol", rtol) if atol is None else ("atol", atol)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"check_close({label!r}): {kind} must be a finite number, 0 or above; got {tolerance}")
    got, want = _as_array(got), _as_array(want)
    if want.shape not in ((), got.shape):
        raise ValueError(f"check_close({label!r}): shapes {got.shape} and {want.shape} differ; bring them to one shape")
    if got.size == 0:
        raise ValueError(f"check_close({label!r}): there is nothing to compare, both sides are empty")
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - want)
        near = difference <= tolerance * (np.abs(want) if kind == "rtol" else 1.0)
        holds = (got == want) | (near & np.isfinite(difference))  # infinities agree when equal, NaN never
    if got.size == 1:
        a, b = got.item(), want.item()
        shown = f"{a:.5g} {'≈' if holds.all() else '≠'} {b:.5g} ({kind} {tolerance:g})"
        shown += "" if holds.all() else f", difference {difference.item():.3g}"
    else:
        worst = np.nanmax(difference) if np.isfinite(difference).any() else float("nan")
        shown = f"{got.size} values, largest difference {worst:.3g} ({kind} {tolerance:g})"
        shown += "" if holds.all() else f", {int((~holds).sum())} of them too far apart"
    if not holds.all():
        raise AssertionError(f"✗ {label}: {shown}" + (f". Likely mistake: {likely_mistake}" if likely_mistake else ""))
    print(f"✓ {label}: {shown}")


def check(label: str, condition: Any, likely_mistake: str = "") -> None:
    """Check that something holds; print one line, or raise.

    Args:
        label: the claim, such as `"ε rises with T"`.
        condition: a single truth value (reduce an array with `.all()` first).
        likely_mistake: what is probably wrong when the check fails.

    Raises:
        AssertionError: the condition is false.

    >>> check("noise lowers ε", 1.2 < 2.1)
    ✓ noise lowers ε
    """
    if not bool(condition):
        raise AssertionError(f"✗ {label}" + (f". Likely mistake: {likely_mistake}" if likely_mistake else ""))
    print(f"✓ {label}")


def _commit() -> str:
    """Short hash of the checkout, with `+changes` when files differ from it; empty outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the machine knows about itself, unless the caller said otherwise."""
    import torch

    known = {
        "device": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": lambda: torch.__version__,
        "commit": _commit,
        "date": lambda: datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    return {**{column: look() for column, look in known.items() if column not in row}, **row}


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row in the order of the schema, every value checked; None becomes an empty field."""
    unknown = sorted(set(row) - set(RESULT_COLUMNS))
    missing = [column for column in RESULT_COLUMNS if column not in row and column not in FILLED_COLUMNS]
    if unknown or missing:
        parts = [f"missing column{'s' * (len(missing) > 1)} {', '.join(missing)}"] if missing else []
        parts += [f"unknown column{'s' * (len(unknown) > 1)} {', '.join(unknown)}"] if unknown else []
        raise ValueError(
            f"append_result: {'; '.join(parts)}. Give every column of RESULT_COLUMNS but {', '.join(FILLED_COLUMNS)} "
            "(None where it does not apply), and put anything else into settings={...}"
        )
    row = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
    for column in _TEXT_COLUMNS:
        if not isinstance(row[column], str) or not row[column]:
            raise ValueError(f"append_result: {column} must be a text that is not empty; got {row[column]!r}")
    for column in _INTEGER_COLUMNS + _NUMBER_COLUMNS:
        value, wanted = row[column], int if column in _INTEGER_COLUMNS else (int, float)
        if value is None and column != "value":
            continue
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = "a whole number" if wanted is int else "a number"
            kind += "" if column == "value" else " or None"
            raise ValueError(f"append_result: {column} must be {kind}; got {value!r}")
        if isinstance(value, float) and not math.isfinite(value) and not (column == "epsilon" and value == math.inf):
            raise ValueError(f"append_result: {column} must be finite; got {value}")
    if not isinstance(row["settings"], dict):
        raise ValueError(f"append_result: settings must be a dict, {{}} for nothing; got {row['settings']!r}")
    try:
        return {**row, "settings": json.dumps(row["settings"], sort_keys=True, ensure_ascii=False)}
    except TypeError as no_json:
        raise ValueError(f"append_result: settings must hold plain numbers, texts, lists and dicts; {no_json}") from None


def append_result(path: str | Path, **row: Any) -> dict[str, Any]:
    """Append one measured number to a table of results, in the one schema of all tables.

    The header is written once. The row goes out in one write under a file lock, so two runs can append to one file.

    Args:
        path: the `.csv` file; it is made when it is not there.
        **row: every column of `RESULT_COLUMNS`, None where one does not apply. `device`, `torch`, `commit` and `date`
            are filled in when they are left out: pass `device="cpu"` for a CPU run on a machine with a GPU. `settings`
            is a dict of whatever else was chosen.

    Returns:
        The row as it was written.

    Raises:
        ValueError: a missing, unknown or wrong value, or a file with another header. Nothing is written then.
    """
    row = _filled(_checked(row))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ",".join(RESULT_COLUMNS)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
        file.seek(0)
        first_line = file.readline().decode("utf-8").rstrip("\n")
        if not first_line:
            writer.writerow(RESULT_COLUMNS)
        elif first_line != header:
            raise ValueError(f"{path.name} has another header than RESULT_COLUMNS; append to another file")
        else:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text.write("\n")  # a hand edit lost the last newline; do not glue two rows together
        writer.writerow(["" if row[column] is None else row[column] for column in RESULT_COLUMNS])
        file.write(text.getvalue().encode("utf-8"))
    return {column: row[column] for column in RESULT_COLUMNS}

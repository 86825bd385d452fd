"""Records, checks that print, and rows of results."""

import csv
import fcntl
import json
import math
import multiprocessing

import numpy as np
import pytest
import torch

from memarc_utils import recording
from memarc_utils.recording import RESULT_COLUMNS, append_result, check, check_close, read_records, record


@pytest.mark.parametrize(
    ("value", "line"),
    [(3, "m = 3 MB"), (0.123456789, "m = 0.123457 MB"), (True, "m = True MB"), ("pld", "m = pld MB")],
)
def test_record_prints_one_line(capsys, value, line):
    record("m", value, "MB")
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize("value", [np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([0.5]).bfloat16()])
def test_record_takes_scalars_of_numpy_and_torch(capsys, value):
    record("m", value)
    assert capsys.readouterr().out == "m = 0.5\n"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("Not Snake", 1, "snake_case"),
        ("m", math.inf, "finite"),
        ("m", float("nan"), "finite"),
        ("m", torch.ones(2), r"\.mean\(\)"),
        ("m", np.ones(2), r"\.mean\(\)"),
        ("m", None, "NoneType"),
        ("m", [1.0], "list"),
    ],
)
def test_record_refuses_what_cannot_be_compared(name, value, said):
    with pytest.raises(ValueError, match=said):
        record(name, value)


def notebook_with(tmp_path, *records):
    outputs = [{"output_type": "display_data", "data": {recording.RECORD_MIME: entry}} for entry in records]
    path = tmp_path / "99_x.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": outputs}]}))
    return path


def test_read_records_refuses_a_name_twice(tmp_path):
    one, two = {"name": "a", "value": 1, "unit": ""}, {"name": "b", "value": 2.5, "unit": "MB"}
    assert read_records(notebook_with(tmp_path, one, two)) == {
        "a": {"value": 1, "unit": ""},
        "b": {"value": 2.5, "unit": "MB"},
    }
    with pytest.raises(ValueError, match="'a' twice"):
        read_records(notebook_with(tmp_path, one, one))


def test_check_close_prints_the_line_of_the_style_guide(capsys):
    check_close("ε at T=1000", 2.10341, 2.103409, rtol=1e-6)
    check_close("norms", torch.tensor([1.0, 2.0], requires_grad=True), np.array([1.0, 2.5]), atol=0.5)
    assert capsys.readouterr().out == (
        "✓ ε at T=1000: 2.1034 ≈ 2.1034 (rtol 1e-06)\n✓ norms: 2 values, largest difference 0.5 (atol 0.5)\n"
    )


@pytest.mark.parametrize(
    ("got", "want", "tolerance"),
    [
        (1.011, 1.0, {"rtol": 0.01}),
        (0.989, 1.0, {"rtol": 0.01}),
        (-1.011, -1.0, {"rtol": 0.01}),
        (1e-12, 0.0, {"rtol": 0.5}),
        (100.2, 100.0, {"atol": 0.1}),
        (math.nan, 1.0, {"rtol": 0.1}),
        (1.0, math.nan, {"atol": 1.0}),
        (math.nan, math.nan, {"atol": 1.0}),
        (math.inf, 1.0, {"rtol": 0.1}),
        (1.0, math.inf, {"rtol": 0.1}),
        (-math.inf, math.inf, {"rtol": 0.1}),
        ([1.0, 2.0, 3.1], [1.0, 2.0, 3.0], {"rtol": 0.01}),
        ([1.0, math.nan], 1.0, {"atol": 1.0}),
    ],
)
def test_check_close_raises_and_names_the_likely_mistake(got, want, tolerance):
    with pytest.raises(AssertionError, match=r"✗ ε: .*\. Likely mistake: δ was left out"):
        check_close("ε", got, want, **tolerance, likely_mistake="δ was left out")


def test_check_close_holds_at_the_edge():
    check_close("at the edge", 1.5, 1.0, atol=0.5)
    check_close("both infinite", math.inf, math.inf, rtol=1e-6)
    check_close("against one number", torch.ones(3, dtype=torch.bfloat16), 1.0, rtol=0.0)


@pytest.mark.parametrize(
    ("got", "want", "tolerance", "said"),
    [
        (1.0, 1.0, {}, "exactly one"),
        (1.0, 1.0, {"rtol": 0.1, "atol": 0.1}, "exactly one"),
        (1.0, 1.0, {"rtol": -0.1}, "0 or above"),
        (1.0, 1.0, {"atol": math.inf}, "0 or above"),
        (np.ones(2), np.ones(3), {"rtol": 0.1}, "shapes"),
        (1.0, np.ones(3), {"rtol": 0.1}, "shapes"),
        (np.ones(0), np.ones(0), {"rtol": 0.1}, "nothing to compare"),
    ],
)
def test_check_close_refuses_a_comparison_without_meaning(got, want, tolerance, said):
    with pytest.raises(ValueError, match=said):
        check_close("x", got, want, **tolerance)


def test_check(capsys):
    check("ε rises with T", torch.tensor(True))
    assert capsys.readouterr().out == "✓ ε rises with T\n"
    with pytest.raises(AssertionError, match="✗ ε rises. Likely mistake: sign"):
        check("ε rises", np.bool_(False), "sign")


ROW = {
    "experiment": "test",
    "method": "side",
    "model": "tiny",
    "dataset": "none",
    "num_train": 10,
    "epsilon": 3.0,
    "delta": 1e-5,
    "accountant": "pld",
    "noise_multiplier": 1.0,
    "sample_rate": 0.1,
    "num_steps": 5,
    "max_grad_norm": 1.0,
    "seed": 0,
    "metric": "accuracy",
    "value": 0.5,
    "unit": "",
    "trainable_share": 0.01,
    "settings": {"b": 1, "a": "é"},
}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_append_result_writes_the_header_once_and_fills_in_what_it_knows(tmp_path):
    path = tmp_path / "results" / "x.csv"
    append_result(path, **ROW)
    append_result(path, **{**ROW, "value": np.float64(0.75), "epsilon": None, "device": "a GPU", "date": "2024-01-01"})
    first, second = rows_of(path)
    assert path.read_text().splitlines()[0] == ",".join(RESULT_COLUMNS)
    assert (first["value"], second["value"]) == ("0.5", "0.75")
    assert (first["epsilon"], second["epsilon"]) == ("3.0", "")
    assert first["torch"] == torch.__version__
    assert len(first["date"]) == 10
    assert (second["device"], second["date"]) == ("a GPU", "2024-01-01")
    assert json.loads(first["settings"]) == ROW["settings"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": None}, "value must be a number"),
        ({"value": math.nan}, "must be finite"),
        ({"value": "0.5"}, "value must be a number"),
        ({"value": True}, "value must be a number"),
        ({"seed": 1.5}, "seed must be a whole number or None"),
        ({"method": ""}, "method must be a text"),
        ({"settings": "none"}, "settings must be a dict"),
        ({"settings": {"C": np.float32(1)}}, "settings must hold plain numbers, texts, lists and dicts; .*float32"),
        ({"accuracy": 0.5}, "unknown column accuracy"),
    ],
)
def test_append_result_refuses_a_wrong_row_and_writes_nothing(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        append_result(tmp_path / "x.csv", **{**ROW, **change})
    assert not (tmp_path / "x.csv").exists()


def test_append_result_names_a_missing_column(tmp_path):
    row = {name: value for name, value in ROW.items() if name not in ("delta", "unit")}
    with pytest.raises(ValueError, match="missing columns delta, unit"):
        append_result(tmp_path / "x.csv", **row)


def test_infinite_epsilon_is_a_result_but_no_other_infinity(tmp_path):
    append_result(tmp_path / "x.csv", **{**ROW, "epsilon": math.inf})
    assert math.isinf(float(rows_of(tmp_path / "x.csv")[0]["epsilon"]))
    with pytest.raises(ValueError, match="delta must be finite"):
        append_result(tmp_path / "x.csv", **{**ROW, "delta": math.inf})


def test_append_result_keeps_a_file_of_another_form(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="another header"):
        append_result(path, **ROW)
    assert path.read_text() == "a,b\n1,2\n"


def test_append_result_mends_a_lost_newline(tmp_path):
    path = tmp_path / "x.csv"
    append_result(path, **ROW)
    path.write_text(path.read_text().rstrip("\n"))
    append_result(path, **ROW)
    assert len(rows_of(path)) == 2


def test_append_result_waits_for_another_run_that_is_writing(tmp_path):
    path = tmp_path / "x.csv"
    other = multiprocessing.get_context("fork").Process(target=append_result, args=(path,), kwargs=ROW, daemon=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other.start()
        other.join(timeout=1.0)
        assert other.is_alive() and path.read_text() == ""
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: the other process shares this open file
    other.join(timeout=30)
    assert other.exitcode == 0 and len(rows_of(path)) == 1

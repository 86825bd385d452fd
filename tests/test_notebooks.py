"""Every notebook runs with quick parameters and records what tests/expected/ says; and the comparison can fail."""

import json
import math
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from memarc_utils import notebooks
from memarc_utils.notebook_outputs import code_hash
from memarc_utils.recording import read_records

TESTS = Path(__file__).resolve().parent
EXECUTED = notebooks.ROOT / "build" / "test_notebooks"
NAMES = sorted(path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb"))
CASES = yaml.safe_load((TESTS / "notebooks.yaml").read_text(encoding="utf-8")) or {}
COMPARISONS = ("exact", "rtol", "atol", "min", "max")


def entry_problems(name, entry):
    """What is wrong with the form of one expected metric; nothing when it is right."""
    if set(entry) != {"value", "comparison", "tolerance", "why"}:
        return [f"{name}: an entry has value, comparison, tolerance and why; this one has {', '.join(entry)}"]
    if entry["comparison"] not in COMPARISONS:
        return [f"{name}: comparison must be one of {', '.join(COMPARISONS)}; got {entry['comparison']!r}"]
    if not str(entry["why"]).strip():
        return [f"{name}: 'why' is empty; say why this comparison tells a right run from a wrong one"]
    takes_tolerance = entry["comparison"] in ("rtol", "atol")
    tolerance = entry["tolerance"]
    if takes_tolerance and (type(tolerance) not in (int, float) or not 0 < tolerance < math.inf):
        return [f"{name}: {entry['comparison']} needs a tolerance above 0; got {tolerance!r}"]
    if not takes_tolerance and tolerance is not None:
        return [f"{name}: {entry['comparison']} takes no tolerance; write null"]
    if entry["comparison"] != "exact" and type(entry["value"]) not in (int, float):
        return [f"{name}: {entry['comparison']} compares numbers; got {entry['value']!r}"]
    return []


def holds(got, entry):
    """Whether a recorded value satisfies its entry. `min` and `max` are bounds, not measured values."""
    want, comparison, tolerance = entry["value"], entry["comparison"], entry["tolerance"]
    if comparison == "exact":
        return isinstance(got, bool) == isinstance(want, bool) and got == want
    if type(got) not in (int, float):
        return False
    return {
        "rtol": lambda: abs(got - want) <= tolerance * abs(want),
        "atol": lambda: abs(got - want) <= tolerance,
        "min": lambda: got >= want,
        "max": lambda: got <= want,
    }[comparison]()


def differences(records, expected):
    """Every way in which the records of a run differ from what is expected, one sentence each."""
    problems = [f"{name}: expected, but the notebook did not record it" for name in expected if name not in records]
    problems += [f"{name}: recorded, but tests/expected does not know it" for name in records if name not in expected]
    for name, entry in expected.items():
        wrong_form = entry_problems(name, entry)
        problems += wrong_form
        if name in records and not wrong_form and not holds(records[name]["value"], entry):
            how = entry["comparison"] + ("" if entry["tolerance"] is None else f" {entry['tolerance']:g}")
            got = records[name]["value"]
            problems.append(f"{name}: got {got!r}, expected {entry['value']!r} ({how}): {entry['why']}")
    return problems


def updated(records, expected):
    """The expected metrics with the values of a run: known comparisons, tolerances and bounds are kept.

    A new metric gets an empty `why`, with which the test fails until a person has chosen the comparison.
    """
    new = {}
    for name, record in records.items():
        value = record["value"]
        comparison, tolerance = ("rtol", 1e-6) if isinstance(value, float) else ("exact", None)
        entry = {"value": value, "comparison": comparison, "tolerance": tolerance, "why": ""}
        if name in expected:
            entry = dict(expected[name])
            entry["value"] = entry["value"] if entry.get("comparison") in ("min", "max") else value
        new[name] = entry
    return new


def case_problems(names, cases, expected_names):
    """Notebooks without an entry, entries without a notebook, entries of a wrong form."""
    problems = [f"{name} has no entry in tests/notebooks.yaml" for name in names if name not in cases]
    problems += [f"tests/notebooks.yaml names {name}, which does not exist" for name in cases if name not in names]
    problems += [f"tests/expected/{name}.json has no notebook" for name in expected_names if name not in names]
    for name, case in cases.items():
        if not isinstance(case, dict) or set(case) != {"timeout", "parameters"}:
            problems.append(f"{name} in tests/notebooks.yaml takes exactly timeout and parameters")
        elif not isinstance(case["timeout"], int) or not isinstance(case["parameters"], dict):
            problems.append(f"{name} in tests/notebooks.yaml: timeout is whole seconds, parameters a mapping or {{}}")
    return problems


def timeout_of(name):
    case = CASES.get(name)
    return case.get("timeout", 0) if isinstance(case, dict) else 0


@pytest.mark.parametrize(("name", "timeout"), [pytest.param(name, timeout_of(name), id=name) for name in NAMES])
def test_notebook(name, timeout, request, record_property):
    if name not in CASES:
        pytest.fail(f"{name} has no entry in tests/notebooks.yaml (timeout and parameters)", pytrace=False)
    output = EXECUTED / f"{name}.ipynb"
    started = time.monotonic()
    try:
        notebooks.execute(
            notebooks.NOTEBOOKS / f"{name}.ipynb", output, parameters=CASES[name]["parameters"], timeout=timeout
        )
    except notebooks.NotebookError as error:
        pytest.fail(f"{error}\nThe whole traceback is in build/test_notebooks/{name}.ipynb", pytrace=False)
    record_property(f"notebook:{name}", round(time.monotonic() - started, 1))
    records = read_records(output)
    assert records, f"{name} recorded nothing; its last code cell should call record()"
    path = TESTS / "expected" / f"{name}.json"
    expected = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if request.config.getoption("--update-expected"):
        expected = updated(records, expected)
        path.write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    problems = differences(records, expected)
    if problems:
        pytest.fail(f"{name}:\n  " + "\n  ".join(problems), pytrace=False)


def test_every_notebook_has_its_entry():
    expected_names = [path.stem for path in (TESTS / "expected").glob("*.json")]
    assert case_problems(NAMES, CASES, expected_names) == []


ENTRY = {"value": 2.0, "comparison": "rtol", "tolerance": 0.01, "why": "closed form"}


def recorded(**values):
    return {name: {"value": value, "unit": ""} for name, value in values.items()}


def test_right_metrics_pass():
    expected = {
        "a": ENTRY,
        "b": {**ENTRY, "comparison": "atol"},
        "c": {**ENTRY, "comparison": "min", "tolerance": None},
        "d": {**ENTRY, "comparison": "max", "tolerance": None},
        "e": {"value": "pld", "comparison": "exact", "tolerance": None, "why": "a name"},
    }
    assert differences(recorded(a=2.019, b=1.991, c=2.0, d=-7, e="pld"), expected) == []


@pytest.mark.parametrize(
    ("comparison", "tolerance", "wrong"),
    [("rtol", 0.01, 2.021), ("atol", 0.01, 1.98), ("min", None, 1.99), ("max", None, 2.01), ("exact", None, 2.0001)],
)
def test_a_wrong_metric_fails(comparison, tolerance, wrong):
    expected = {"a": {"value": 2.0, "comparison": comparison, "tolerance": tolerance, "why": "closed form"}}
    assert len(differences(recorded(a=wrong), expected)) == 1
    assert len(differences(recorded(a=math.nan), expected)) == 1
    assert len(differences(recorded(a="2.0"), expected)) == 1
    assert differences(recorded(a=2.0), expected) == []


def test_true_is_not_one():
    expected = {"a": {"value": 1, "comparison": "exact", "tolerance": None, "why": "a count"}}
    assert differences(recorded(a=True), expected)


def test_missing_and_extra_metrics_fail():
    assert differences(recorded(), {"a": ENTRY}) == ["a: expected, but the notebook did not record it"]
    assert differences(recorded(a=2.0, b=1), {"a": ENTRY}) == ["b: recorded, but tests/expected does not know it"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"why": " "}, "'why' is empty"),
        ({"comparison": "about"}, "comparison must be one of"),
        ({"tolerance": None}, "needs a tolerance"),
        ({"tolerance": 0}, "needs a tolerance"),
        ({"comparison": "min"}, "takes no tolerance"),
        ({"value": "2"}, "compares numbers"),
        ({"atol": 0.1}, "an entry has"),
    ],
)
def test_an_entry_of_a_wrong_form_fails(change, said):
    (problem,) = differences(recorded(a=2.0), {"a": {**ENTRY, **change}})
    assert said in problem


def test_update_rewrites_values_and_keeps_the_rest():
    bound = {"value": 0.7, "comparison": "min", "tolerance": None, "why": "better than guessing"}
    new = updated(recorded(a=3.0, b=0.9, c=1.5), {"a": ENTRY, "b": bound, "gone": ENTRY})
    assert list(new) == ["a", "b", "c"]
    assert new["a"] == {**ENTRY, "value": 3.0}
    assert new["b"] == bound
    assert "'why' is empty" in differences(recorded(a=3.0, b=0.9, c=1.5), new)[0]


def test_update_is_refused_under_ci(pytestconfig, monkeypatch):
    conftest = pytestconfig.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(pytestconfig.option, "update_expected", True)
    with pytest.raises(pytest.UsageError, match="refused under CI"):
        conftest.pytest_configure(pytestconfig)
    monkeypatch.delenv("CI")
    conftest.pytest_configure(pytestconfig)


def test_entries_and_notebooks_belong_together():
    case = {"timeout": 60, "parameters": {}}
    assert case_problems(["00_a"], {"00_a": case}, ["00_a"]) == []
    assert "no entry" in case_problems(["00_a"], {}, [])[0]
    assert "does not exist" in case_problems([], {"00_a": case}, [])[0]
    assert "no notebook" in case_problems([], {}, ["00_a"])[0]
    assert "exactly" in case_problems(["00_a"], {"00_a": {"timeout": 60}}, [])[0]
    assert "mapping" in case_problems(["00_a"], {"00_a": {"timeout": 60, "parameters": None}}, [])[0]


def written(folder, *cells):
    """A small notebook of code cells given as (source, tag, tag, ...)."""
    notebook = nbformat.v4.new_notebook()
    for source, *tags in cells:
        notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    path = folder / "98_small.ipynb"
    nbformat.write(notebook, path)
    return path


PARAMETERS = ("seed: int = 3  # the seed\nname: str = 'a'", "parameters")


def test_execute_injects_parameters_and_stores_records(tmp_path):
    path = written(
        tmp_path,
        PARAMETERS,
        ("import os, sys\nfrom memarc_utils.recording import record\nrecord('seed', seed)\nrecord('name', name)",),
        ("record('folder', os.path.basename(os.getcwd()))",),
        (f"record('in_this_environment', sys.prefix == {sys.prefix!r})",),
        ("raise ValueError('shown on purpose')", "raises-exception"),
        ("record('after', 1.5, 'MB')",),
    )
    notebooks.execute(path, tmp_path / "out" / path.name, {"seed": 7}, timeout=60)
    records = read_records(tmp_path / "out" / path.name)
    assert {name: entry["value"] for name, entry in records.items()} == {
        "seed": 7,
        "name": "a",
        "folder": tmp_path.name,
        "in_this_environment": True,
        "after": 1.5,
    }
    assert records["after"]["unit"] == "MB"


def test_execute_refuses_an_unknown_parameter_before_running(tmp_path):
    path = written(tmp_path, PARAMETERS, ("open('ran', 'w').close()",))
    with pytest.raises(ValueError, match=r"no parameter sede\. Its parameters: seed=3, name='a'"):
        notebooks.execute(path, parameters={"sede": 1})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (("x = 1\n1 / 0",), "98_small, cell 2 of 3:\n    x = 1\n    1 / 0\nline 2: ZeroDivisionError: division"),
        (("x = 1", "raises-exception"), "should raise"),
        (("import time\ntime.sleep(60)",), "longer than its timeout of 6 seconds"),
        (("import os\nos._exit(1)",), "lost its kernel"),
    ],
    ids=["error", "no-error", "timeout", "dead-kernel"],
)
def test_a_failing_cell_is_named_without_a_traceback(tmp_path, cell, said):
    path = written(tmp_path, PARAMETERS, cell, ("open('went_on', 'w').close()",))
    with pytest.raises(notebooks.NotebookError) as caught:
        notebooks.execute(path, timeout=6)
    assert said in str(caught.value)
    assert "cell 2 of 3" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert (tmp_path / "went_on").exists() == ("raises-exception" in cell)


def test_refresh_twice_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "EXECUTED", tmp_path / "out")
    path = written(
        tmp_path,
        PARAMETERS,
        ("import sys\nfrom tqdm.auto import tqdm\nimport matplotlib.pyplot as plt\nimport memarc_utils",),
        ("for i in tqdm(range(3)):\n    pass",),
        ("print(object(), memarc_utils.__file__)\nprint('a warning', file=sys.stderr)\nprint('b')",),
        ("fig, ax = plt.subplots(figsize=(2, 1))\nax.plot([1, 2]);",),
        ("from memarc_utils.recording import record\nrecord('a', 1.5)", "metrics"),
    )
    notebooks.refresh(path)
    first = path.read_bytes()
    assert "a warning" in capsys.readouterr().err
    notebooks.refresh(path)
    assert path.read_bytes() == first
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[3].outputs[0].text == "<object object at 0x0> memarc_utils/__init__.py\nb\n"
    text = json.dumps([(cell.metadata, cell.outputs) for cell in notebook.cells] + [notebook.metadata])
    for unwanted in ("papermill", "a warning", "widget", "0x7f", str(notebooks.ROOT), "start_time"):
        assert unwanted not in text
    assert notebook.metadata.memarc.code_sha256 == code_hash(notebook)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3, 4, 5, 6]
    assert "image/png" in notebook.cells[4].outputs[0].data
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_refresh_leaves_the_notebook_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "EXECUTED", tmp_path / "out")
    path = written(tmp_path, PARAMETERS, ("1 / 0",))
    before = path.read_bytes()
    with pytest.raises(notebooks.NotebookError):
        notebooks.refresh(path)
    assert path.read_bytes() == before


def test_the_hash_follows_the_code_alone(tmp_path):
    notebook = nbformat.read(written(tmp_path, PARAMETERS, ("x = 1",)), as_version=4)
    before = code_hash(notebook)
    notebook.cells.append(nbformat.v4.new_markdown_cell("prose"))
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="1")]
    assert code_hash(notebook) == before
    notebook.cells[1].source = "x = 2"
    assert code_hash(notebook) != before

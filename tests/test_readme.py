"""The README: short, its figure is the one of the committed notebook, its example runs as it stands."""

import base64
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def _figure_of_00() -> bytes:
    notebook = json.loads((ROOT / "notebooks" / "00_start_here.ipynb").read_text(encoding="utf-8"))
    images = [output["data"]["image/png"] for cell in notebook["cells"] for output in cell.get("outputs", [])
              if "image/png" in output.get("data", {})]
    return base64.b64decode("".join(images[-1]))


def parameters_of(notebook) -> set[str]:
    (cell,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    return set(re.findall(r"^(\w+):", "".join(cell["source"]), re.MULTILINE))


def test_short():
    assert len(TEXT.splitlines()) <= 150


def test_figure_is_the_notebooks(pytestconfig):
    path = ROOT / re.search(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)[1]
    if pytestconfig.getoption("--update-expected"):
        path.write_bytes(_figure_of_00())
    assert path.read_bytes() == _figure_of_00(), "write it anew: pytest tests/test_readme.py --update-expected"


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert len(code.splitlines()) <= 15
    exec(compile(code, "README.md", "exec"), {})
    assert "differentially private" in capsys.readouterr().out


def test_notebooks_that_show_an_error_are_named():
    named = re.findall(r"\d\d", re.search(r"the errors that ([^)]*?) show on purpose", TEXT)[1])
    assert named == [path.name[:2] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
                     if '"raises-exception"' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", ["README.md", "Makefile"])
def test_parameters_of_examples_exist(file):
    for number, given in re.findall(r'NOTEBOOK=(\d\d) PARAMETERS="([^"]+)"', (ROOT / file).read_text(encoding="utf-8")):
        (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        names = parameters_of(json.loads(path.read_text(encoding="utf-8")))
        assert {assignment.split("=")[0] for assignment in given.split()} <= names, (file, given)


@pytest.mark.parametrize("command", re.findall(r"^make (\w+)", TEXT, re.MULTILINE))
def test_commands_exist(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

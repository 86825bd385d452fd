"""The set-up: done once, one sentence for each way it can fail, and nothing half-installed left behind.

Most cases run with a stand-in for Python that makes empty environments and plays pip's part, so they take milliseconds;
one runs the real pip on a wheel made here. None needs the network.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from memarc_utils import environment

ROOT = Path(__file__).resolve().parents[1]

STAND_IN = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
*"-m venv "*)
    [ "$PLAY" = no-venv ] && { echo "ensurepip is not available"; exit 1; }
    for folder; do :; done
    if [ "$PLAY" = busy-venv ]; then  # a child of its own writes on, as ensurepip does
        (n=0; while [ $n -lt 5000 ]; do mkdir -p "$folder/bin/$n"; n=$((n + 1)); done) &
        wait
    fi
    mkdir -p "$folder/bin" "$folder/lib/python3.11/site-packages"
    cp "$0" "$folder/bin/python" ;;
*"-m pip install "*requirements.txt)
    echo half > "$(dirname "$0")/../half-installed"
    case "$PLAY" in
    slow) exec sleep 60 ;;
    no-network)
        echo "WARNING: Retrying after connection broken by 'NewConnectionError(Temporary failure in name resolution)'"
        echo "ERROR: No matching distribution found for torch==2.13.0"; exit 1 ;;
    no-version) echo "ERROR: No matching distribution found for torch==2.13.0"; exit 1 ;;
    full) echo "ERROR: Could not install packages: [Errno 28] No space left on device"; exit 1 ;;
    strange) echo "ERROR: something else"; exit 1 ;;
    esac ;;
*"-m pip install "*assets.txt)
    while [ "$1" != --target ]; do shift; done
    mkdir -p "$2"; echo text > "$2/file"
    [ "$PLAY" = slow-assets ] && exec sleep 60
    if [ "$PLAY" = wrong-hash ]; then
        echo "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. Someone may have tampered:"
        echo "    small-model==0.1.0 from https://index.invalid/small.whl:"
        echo "        Expected sha256 aa"; exit 1
    fi ;;
esac
exit 0
"""


@pytest.fixture
def checkout(tmp_path):
    """A bare checkout: the set-up script, the two lists, the stand-in for Python."""
    root = tmp_path / "checkout"
    for name in ("memarc_utils", "data"):
        (root / name).mkdir(parents=True)
    shutil.copy(ROOT / "memarc_utils" / "environment.py", root / "memarc_utils")
    shutil.copy(ROOT / "Makefile", root)
    (root / "requirements.txt").write_text("torch==2.13.0\n")
    (root / "data" / "assets.txt").write_text("small-model==0.1.0\n")
    (tmp_path / "python-stand-in").write_text(STAND_IN)
    (tmp_path / "python-stand-in").chmod(0o755)
    return root


def command(root):
    """Run the set-up script with `sys.executable` replaced by the stand-in."""
    code = "import runpy, sys; sys.executable = sys.argv[1]; runpy.run_path(sys.argv[2], run_name='__main__')"
    return [sys.executable, "-c", code, str(root.parent / "python-stand-in"), str(root / "memarc_utils/environment.py")]


def settings(root, play):
    return {**os.environ, "PLAY": play, "CALLS": str(root.parent / "calls")}


def set_up(root, play=""):
    return subprocess.run(command(root), env=settings(root, play), capture_output=True, text=True, timeout=60)


def calls(root):
    path = root.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def left_behind(root):
    """What stands in the checkout beside its own files and the log."""
    own = {"memarc_utils", "data", "Makefile", "requirements.txt", "build", "build/setup.log", "build/setup.lock"}
    found = [path for path in root.iterdir()] + list((root / "build").glob("*"))
    return sorted(str(path.relative_to(root)) for path in found if str(path.relative_to(root)) not in own)


def test_run_takes_parameters(checkout):
    shown = subprocess.run([shutil.which("make"), "-n", "run", "NOTEBOOK=41", "PARAMETERS=epsilon=3 method='side-cached pooled'"],
                           cwd=checkout, capture_output=True, text=True, timeout=60)
    assert '-m memarc_utils.notebooks run "41" --parameters epsilon=3 method=\'side-cached pooled\'\n' in shown.stdout, shown


def test_set_up_is_done_once(checkout):
    first = set_up(checkout)
    assert first.returncode == 0, first.stderr
    assert [line[:5] for line in first.stdout.splitlines()] == ["[1/3]", "[2/3]", "[3/3]", "Set-u"]
    assert left_behind(checkout) == [".venv", "build/assets"]
    assert (checkout / "build/assets/file").read_text() == "text\n"
    (path_file,) = checkout.glob(".venv/lib/python3*/site-packages/memarc.pth")
    assert path_file.read_text() == f"{checkout}\n"
    made = calls(checkout)
    assert len(made) == 3
    assert "--no-deps --require-hashes" in made[2] and "--target" in made[2]
    second = set_up(checkout)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert calls(checkout) == made


@pytest.mark.parametrize(
    ("play", "said", "left"),
    [
        ("no-venv", "could not make a virtual environment: install its venv module", []),
        ("no-network", "The package index cannot be reached", []),
        ("no-version", "The package index has no torch==2.13.0 for Python 3.", []),
        ("full", "The disk is full", []),
        ("strange", "pip could not install requirements.txt", []),
        ("wrong-hash", "for small-model does not have the sha256 written in data/assets.txt", [".venv"]),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing(checkout, play, said, left):
    failed = set_up(checkout, play)
    assert failed.returncode == 1
    assert said in failed.stderr and "build/setup.log" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and failed.stderr.count(". ") == 0
    assert left_behind(checkout) == left
    mended = set_up(checkout)
    assert mended.returncode == 0
    assert left_behind(checkout) == [".venv", "build/assets"]
    assert not (checkout / "build/assets/half-installed").exists()


@pytest.mark.parametrize("play", ["busy-venv", "slow", "slow-assets"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(checkout, play, number):
    process = subprocess.Popen(
        command(checkout), env=settings(checkout, play), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wanted = {"busy-venv": 1, "slow": 2, "slow-assets": 3}[play]
    deadline = time.monotonic() + 30
    while len(calls(checkout)) < wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # the stand-in is now at work in pip's place
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "Set-up was stopped; nothing half-installed stays behind.\n"
    time.sleep(0.2)  # time enough for a process that was forgotten to write again
    assert left_behind(checkout) == ([".venv"] if play == "slow-assets" else [])


def test_a_second_set_up_waits_for_the_first(checkout):
    (checkout / "build").mkdir()
    with open(checkout / "build" / "setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(command(checkout), env=settings(checkout, ""), stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "Another set-up of this checkout is running; waiting for it.\n"
        assert calls(checkout) == []
    assert "Set-up is done." in second.communicate(timeout=30)[0]


def test_leftovers_without_a_stamp_are_made_anew(checkout):
    """What a power cut leaves: folders that nobody marked as complete, and a link in place of the assets."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "old").write_text("old")
    (checkout / "build" / "assets.partial").mkdir(parents=True)
    (checkout / "build" / "assets.partial" / "old").write_text("old")
    elsewhere = checkout.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (checkout / "build" / "assets").symlink_to(elsewhere)
    assert set_up(checkout).returncode == 0
    assert left_behind(checkout) == [".venv", "build/assets"]
    assert not list(checkout.rglob("old"))
    assert (elsewhere / "kept").exists() and not (checkout / "build" / "assets").is_symlink()


def test_a_changed_list_or_a_moved_checkout_is_noticed(checkout):
    set_up(checkout)
    (checkout / "data" / "assets.txt").write_text("small-model==0.2.0\n")
    assert [line[:5] for line in set_up(checkout).stdout.splitlines()] == ["[3/3]", "Set-u"]
    (checkout / "requirements.txt").write_text("torch==2.14.0\n")
    assert [line[:5] for line in set_up(checkout).stdout.splitlines()] == ["[1/3]", "[2/3]", "Set-u"]
    moved = checkout.rename(checkout.parent / "moved")
    assert [line[:5] for line in set_up(moved).stdout.splitlines()] == ["[1/3]", "[2/3]", "Set-u"]


def test_assets_stay_when_their_successor_cannot_be_had(checkout):
    set_up(checkout)
    (checkout / "data" / "assets.txt").write_text("small-model==0.2.0\n")
    assert set_up(checkout, "wrong-hash").returncode == 1
    assert left_behind(checkout) == [".venv", "build/assets"]
    assert not environment.is_complete(checkout / "build/assets", environment.wanted_stamps(checkout)["build/assets"])


def small_wheel(folder):
    folder.mkdir()
    info = "small_model-0.1.0.dist-info"
    path = folder / "small_model-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("small_model/weights.txt", "1 2 3")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 0.1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files = ["small_model/weights.txt", *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD"))]
        wheel.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in files))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_real_pip_checks_the_hash(checkout):
    sha256 = small_wheel(checkout / "wheels")
    options = f"--no-index\n--find-links {checkout / 'wheels'}\n"
    (checkout / "requirements.txt").write_text(f"{options}small-model==0.1.0\n")
    assets = checkout / "data" / "assets.txt"
    assets.write_text(f"{options}small-model==0.1.0 --hash=sha256:{'0' * 64}\n")
    script = [sys.executable, str(checkout / "memarc_utils" / "environment.py")]
    failed = subprocess.run(script, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "for small-model does not have the sha256 written in data/assets.txt" in failed.stderr
    assert not (checkout / "build/assets").exists() and not (checkout / "build/assets.partial").exists()
    assets.write_text(f"{options}small-model==0.1.0 --hash=sha256:{sha256}\n")
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (checkout / "build/assets/small_model/weights.txt").read_text() == "1 2 3"
    python = checkout / ".venv" / "bin" / "python"
    script = [python, "-c", "import memarc_utils.environment as e; print(e.__file__)"]
    found = subprocess.run(script, cwd="/", capture_output=True, text=True)
    assert found.stdout.strip() == str(checkout / "memarc_utils" / "environment.py")


def make(checkout, folder, *arguments):
    """Call make with nothing but the given folder on PATH."""
    environment_of_make = {"PATH": str(folder), "HOME": str(checkout)}
    return subprocess.run(
        [shutil.which("make"), "--no-print-directory", "setup", *arguments],
        cwd=checkout, env=environment_of_make, capture_output=True, text=True,
    )


def pretended_python(path, good):
    path.write_text(f'#!/bin/sh\ncase "$1" in\n-c) exit {0 if good else 1} ;;\n*) echo "$0 $1" ;;\nesac\n')
    path.chmod(0o755)


def test_make_without_a_python_says_so(checkout, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    none = make(checkout, folder)
    pretended_python(folder / "python3", good=False)  # there, but older than 3.11
    for failed in (none, make(checkout, folder)):
        assert failed.returncode != 0
        assert failed.stderr.startswith("Python 3.11 or newer is needed and none was found")
        assert left_behind(checkout) == []


def test_make_takes_a_python_that_is_new_enough(checkout, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    pretended_python(folder / "python3", good=True)
    assert make(checkout, folder).stdout.split() == [str(folder / "python3"), "memarc_utils/environment.py"]
    pretended_python(folder / "python3.12", good=True)
    pretended_python(folder / "python3.11", good=True)
    assert make(checkout, folder).stdout.split()[0].endswith("/python3.11")  # what the versions were tested with
    pretended_python(folder / "python3.11", good=False)
    assert make(checkout, folder).stdout.split()[0].endswith("/python3.12")
    pretended_python(folder / "mine", good=True)
    assert make(checkout, folder, f"PYTHON={folder / 'mine'}").stdout.split()[0].endswith("/mine")


def test_this_checkout_needs_nothing_but_the_standard_library():
    script = "import sys; sys.path.insert(0, sys.argv[1]); import environment; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT / "memarc_utils")], capture_output=True, text=True
    ).stdout.split()
    outside = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"environment", "__main__"}
    assert "environment" in loaded and not {name for name in outside if not name.startswith("_")}

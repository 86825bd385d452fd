"""Run, refresh and check the notebooks: `python -m memarc_utils.notebooks run 00`.

    run 00 [--parameters name=value ...]   execute into build/notebooks/, write HTML, print the recorded numbers
    refresh 22                             execute with the default parameters and write the outputs back, normalised
    normalise 22                           the same without executing: for a change in prose alone
    check [22]                             the mechanical rules, without executing anything
    expect 22                              write the recorded numbers of a quick run into tests/expected/

Every notebook runs through papermill, in `notebooks/` as working directory, with the Python that runs this command.
Normalised means: nothing in the file depends on when, where or how often it was executed, so a refresh without a change
is an empty diff, except in cells tagged `measured` (seconds, bytes).
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from memarc_utils.notebook_outputs import KERNELSPEC, ROOT, add_alt_texts, normalise
from memarc_utils.recording import read_records

NOTEBOOKS = ROOT / "notebooks"
EXECUTED = ROOT / "build" / "notebooks"
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class NotebookError(Exception):
    """A notebook that could not be run to its end; the message is all that a person needs to see."""


def find_notebooks(which: str = "all", folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks that a number (`22`), a name (`22_side_networks`), a file name or `all` stands for.

    Raises:
        ValueError: nothing goes by that name; the message lists what exists.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    wanted = Path(which).name.removesuffix(".ipynb")
    found = paths if wanted == "all" else [p for p in paths if wanted in (p.stem, p.stem[:2])]
    if not found:
        names = ", ".join(p.stem for p in paths) or "none"
        raise ValueError(f"There is no notebook {which!r}. These exist: {names} (or all).")
    return found


def default_parameters(notebook: NotebookNode) -> dict[str, Any]:
    """Names and default values in the cell tagged `parameters`.

    Raises:
        ValueError: a line of that cell is not `name: type = literal`.
    """
    parameters: dict[str, Any] = {}
    for cell in notebook.cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        for statement in ast.parse(cell.source).body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
            try:
                parameters[target.id] = ast.literal_eval(statement.value)
            except (AttributeError, ValueError, TypeError):
                line = ast.unparse(statement)
                raise ValueError(f"the parameters cell takes lines 'name: type = literal' only; got {line!r}") from None
    return parameters


def checked_parameters(notebook: NotebookNode, parameters: Mapping[str, Any], name: str = "the notebook") -> None:
    """Refuse a parameter that the notebook does not define (papermill itself only warns and goes on).

    Raises:
        ValueError: an unknown name; the message lists the names there are.
    """
    known = default_parameters(notebook)
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in known.items()) or "none"
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}. Its parameters: {listed}.")


def _headless_environment() -> None:
    """Set what every kernel started from here inherits: no progress bars, figures inline, this environment's kernel."""
    import tqdm.auto  # noqa: F401  reads TQDM_DISABLE when first imported; our own bar must stay on

    os.environ.update(
        TQDM_DISABLE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        MEMARC_HEADLESS="1",  # what our own progress helper looks at
        JUPYTER_PREFER_ENV_PATH="1",  # the kernel `python3` of sys.prefix, not one in the home directory
        MPLBACKEND="module://matplotlib_inline.backend_inline",  # a backend set outside would lose the figures
    )
    os.environ.pop("JUPYTER_PATH", None)  # would go before sys.prefix


def execute(
    path: Path,
    output: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    progress: bool = False,
) -> NotebookNode:
    """Execute one notebook through papermill.

    papermill's own `execute_notebook` fails on every cell that shows an error, those tagged `raises-exception` too, so
    its parts are called here: inject the parameters, execute in its engine, and judge the errors by the tag.

    Args:
        path: the notebook.
        output: where the executed notebook goes, also when it fails; None keeps it in memory.
        parameters: values that replace those of the parameters cell.
        timeout: seconds for the whole notebook.
        progress: show one progress bar over the cells.

    Returns:
        The executed notebook.

    Raises:
        ValueError: an unknown parameter; nothing is executed then.
        NotebookError: a cell failed or the time ran out; names the cell, its first lines and the error.
    """
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.engines import papermill_engines
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    from papermill.utils import chdir
    from traitlets.config import Config

    notebook = load_notebook_node(str(path))
    checked_parameters(notebook, parameters or {}, path.stem)
    notebook.metadata["kernelspec"] = NotebookNode(KERNELSPEC)
    if parameters:
        notebook = parameterize_notebook(notebook, dict(parameters))
    _headless_environment()
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if timeout is None else time.monotonic() + timeout
    bar = {"desc": path.stem, "disable": False, "dynamic_ncols": True} if progress else False
    failure, started = "", [0]
    with chdir(str(path.parent)):
        try:
            papermill_engines.execute_notebook_with_engine(
                None,
                notebook,
                kernel_name="python3",
                output_path=None if output is None else str(output.resolve()),
                progress_bar=bar,
                # One budget for the whole notebook: each cell may use what is left of it.
                on_cell_execute=lambda cell, cell_index: started.append(cell_index),
                config=Config(KernelManager={"transport_encryption": "auto"}),  # without it the kernel warns on stderr
                timeout_func=None if deadline is None else lambda cell: max(1, int(deadline - time.monotonic())),
            )
        except CellTimeoutError:
            failure = f"took longer than its timeout of {timeout:g} seconds"
        except DeadKernelError:
            failure = "lost its kernel (most likely the machine ran out of memory)"
    if failure:
        raise NotebookError(_failure_text(path, notebook, started[-1], failure))
    for index, cell in enumerate(notebook.cells):
        errors = [o for o in cell.get("outputs", []) if o.output_type == "error"]
        allowed = "raises-exception" in cell.metadata.get("tags", [])
        if errors and not allowed:
            traceback = _ANSI.sub("", "\n".join(errors[0].traceback))
            line = re.search(rf"Cell In\[{cell.execution_count}\], line (\d+)", traceback)
            where = f"line {line[1]}: " if line else ""
            raise NotebookError(_failure_text(path, notebook, index, f"{where}{errors[0].ename}: {errors[0].evalue}"))
        if allowed and not errors:
            raise NotebookError(_failure_text(path, notebook, index, "should raise (raises-exception) and did not"))
    return notebook


def _failure_text(path: Path, notebook: NotebookNode, index: int, problem: str) -> str:
    """Which cell failed, its first lines, and why, without the traceback (it stands in the executed notebook)."""
    lines = notebook.cells[index].source.splitlines()
    shown = [f"    {line}" for line in lines[:6]] + ["    ..."] * (len(lines) > 6)
    place = f"{path.stem}, cell {index + 1} of {len(notebook.cells)}:"
    return "\n".join([place, *shown, _ANSI.sub("", problem).strip()])


def refresh(path: Path, progress: bool = False) -> None:
    """Execute a notebook with its default parameters and write the normalised outputs back into it.

    What cells wrote to stderr is left out of the file and shown here instead, so that no warning gets lost.
    The file is replaced in one step, and only when every cell ran.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # sums depend on the number of threads; not on this machine's cores
    executed = execute(path, EXECUTED / path.name, progress=progress)
    for index, cell in enumerate(executed.cells):
        warnings = "".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stderr")
        if warnings.strip():
            print(f"{path.stem}, cell {index + 1} wrote to stderr (left out):\n{warnings.rstrip()}", file=sys.stderr)
    _replace(path, normalise(executed, path.stem))


def rewrite_normalised(path: Path) -> None:
    """Normalise a notebook in place without executing it; the stored hash stays, so changed code is still noticed.

    Raises:
        ValueError: the notebook was never refreshed.
    """
    notebook = nbformat.read(path, as_version=4)
    stored = notebook.metadata.get("memarc", {}).get("code_sha256")
    if not stored:
        raise ValueError(f"{path.stem} was never executed by refresh; run: make refresh NOTEBOOK={path.stem[:2]}")
    _replace(path, normalise(notebook, path.stem, stored))


def _replace(path: Path, notebook: NotebookNode) -> None:
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def write_html(path: Path) -> Path:
    """Convert an executed notebook to one HTML file beside it, figures inside; needs no network."""
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    add_alt_texts(notebook)
    html, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    target = path.with_suffix(".html")
    target.write_text(html, encoding="utf-8")
    return target


def _runtime_line(path: Path) -> str:
    """The **Runtime** line of the notebook's header, so that a reader knows how long to wait."""
    for cell in nbformat.read(path, as_version=4).cells[:3]:
        found = re.search(r"\*\*Runtime:?\*\*:?\s*(.+)", cell.source)
        if found:
            return found.group(1).strip()
    return ""


def _shown_path(path: Path) -> str:
    return os.path.relpath(path, Path.cwd())


def run(path: Path, parameters: Mapping[str, Any]) -> None:
    """Execute one notebook into build/notebooks/, write its HTML, print what it recorded and where both files lie."""
    runtime = _runtime_line(path)
    print(f"Running {path.stem}" + (f" (runtime: {runtime})" if runtime else ""), flush=True)
    output = EXECUTED / path.name
    started = time.monotonic()
    try:
        execute(path, output, parameters, progress=True)
    except NotebookError as error:
        raise NotebookError(f"{error}\nThe whole traceback is in {_shown_path(output)}") from None
    html = write_html(output)
    print(f"\n{path.stem}: {time.monotonic() - started:.0f} seconds\n")
    records = read_records(output)
    if records:
        width = max(len(name) for name in records)
        print(f"{'metric':<{width}}  {'value':>12}  unit\n{'-' * width}  {'-' * 12}  ----")
        for name, entry in records.items():
            value = entry["value"]
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            print(f"{name:<{width}}  {shown:>12}  {entry['unit']}".rstrip())
    else:
        print("The notebook recorded no metric.")
    print(f"\nExecuted notebook: {_shown_path(output)}\nHTML:              {_shown_path(html)}")


def _parsed_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """`["seed=1", "model=tiny"]` as `{"seed": 1, "model": "tiny"}`: a Python literal where it is one, else text."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--parameters takes name=value, for example seed=1; got {pair!r}.")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[name] = value
    return parameters


def _pytest(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; every expected mistake ends in one message and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m memarc_utils.notebooks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "execute into build/notebooks/ and print the recorded numbers"),
        ("refresh", "execute with default parameters and write the outputs back"),
        ("normalise", "write the outputs back in their stable form, without executing"),
        ("check", "the mechanical rules, nothing is executed"),
        ("expect", "write the recorded numbers of a quick run into tests/expected/"),
    ):
        command = commands.add_parser(name, help=text)
        required = None if name != "check" else "?"
        command.add_argument("notebook", nargs=required, default="all", help="22, a name or all")
        if name == "run":
            command.add_argument("--parameters", nargs="+", default=[], metavar="name=value", action="extend")
    chosen = parser.parse_args(arguments)
    try:
        paths = find_notebooks(chosen.notebook)
        if chosen.command == "check":
            selected = [] if chosen.notebook == "all" else ["-k", paths[0].stem]
            return _pytest("tests/test_notebook_hygiene.py", *selected)
        if chosen.command == "expect":
            selected = [] if chosen.notebook == "all" else ["-k", paths[0].stem]
            return _pytest("tests/test_notebooks.py", "--update-expected", *selected)
        parameters = _parsed_parameters(chosen.parameters) if chosen.command == "run" else {}
        for path in paths:  # refuse a wrong name before the first notebook has run for minutes
            checked_parameters(nbformat.read(path, as_version=4), parameters, path.stem)
        for path in paths:
            if chosen.command == "run":
                run(path, parameters)
            elif chosen.command == "refresh":
                refresh(path, progress=True)
                print(f"Refreshed {_shown_path(path)}")
            else:
                rewrite_normalised(path)
    except (NotebookError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

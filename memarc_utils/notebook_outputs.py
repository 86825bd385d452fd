"""The form in which executed notebooks are kept: nothing in the file depends on when, where or how often it ran."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# Without the version of Python, which differs between machines.
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}


def code_hash(notebook: NotebookNode) -> str:
    """sha256 over the sources of all code cells, in order: it changes when, and only when, the code does."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources, ensure_ascii=False).encode("utf-8")).hexdigest()


def _sentence(text: str) -> str:
    """The first paragraph of some Markdown on one line, without emphasis; empty for a heading, a table or a list."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    if not paragraph or re.match(r"[#|>!<]|\$\$|[*-] |\d+\. ", paragraph):
        return ""
    return re.sub(r"[*`]{1,3}(\S.*?\S|\S)[*`]{1,3}", r"\1", paragraph)


def add_alt_texts(notebook: NotebookNode) -> None:
    """Give every figure the sentence below it as alt text: the next Markdown output, else the next Markdown cell."""
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        after = "" if below is None or below.cell_type != "markdown" else _sentence(below.source)
        for output in reversed(cell.get("outputs", [])):
            data = output.get("data", {})
            if "text/markdown" in data:
                after = _sentence(data["text/markdown"]) or after
            if "image/png" in data:
                output.metadata["image/png"] = NotebookNode(alt=after)


def _plain(text: str) -> str:
    """Text without what differs between machines and runs: folders, addresses in memory, temporary kernel files."""
    for folder, name in ((str(ROOT) + os.sep, ""), (str(ROOT), "."), (str(Path.home()), "~")):
        if len(folder) > 1 and folder != os.sep:  # a home of "/" would match everything
            text = text.replace(folder, name)
    text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "<cell>", text)
    return re.sub(r"\b0x[0-9a-f]{6,16}\b", "0x0", text)


def _normalised_outputs(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs without stderr, widgets and paths; neighbouring prints joined (how they are cut depends on timing)."""
    kept: list[NotebookNode] = []
    for output in map(copy.deepcopy, outputs):
        output.pop("transient", None)
        if output.output_type == "stream":
            output.text = _plain(output.text)
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif output.output_type == "error":
            output.evalue = _plain(output.evalue)
            output.traceback = [_plain(line) for line in output.traceback]
        else:
            if any(mime.startswith("application/vnd.jupyter.widget") for mime in output.data):
                continue  # its text/plain is an empty progress bar
            for mime in ("text/plain", "text/html", "text/markdown"):
                if mime in output.data:
                    output.data[mime] = _plain(output.data[mime])
        kept.append(output)
    return kept


def normalise(notebook: NotebookNode, name: str, code_sha256: str | None = None) -> NotebookNode:
    """A copy of an executed notebook in which nothing depends on when, where or how often it ran.

    Cells keep their tags and their outputs; ids follow from the notebook's number and the position; execution counts
    are numbered anew; figures have alt texts; injected parameters, papermill's times and widget state are gone; the
    code's hash is stored.

    Args:
        notebook: the notebook as it was executed; it is left as it is.
        name: the notebook's name, which begins with its number.
        code_sha256: hash of the code that made the outputs, when that was not just now; of this code when left out.
    """
    cells = []
    counter = 0
    for cell in notebook.cells:
        tags = list(cell.metadata.get("tags", []))
        if "injected-parameters" in tags:
            continue
        new = NotebookNode(cell_type=cell.cell_type)
        new.id = hashlib.sha256(f"{name[:2]}:{len(cells)}".encode()).hexdigest()[:8]
        new.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        new.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        if cell.cell_type == "code":
            new.outputs = _normalised_outputs(cell.outputs)
            counter += cell.execution_count is not None
            new.execution_count = counter if cell.execution_count is not None else None
            for output in new.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = counter
        cells.append(new)
    clean = nbformat.v4.new_notebook(cells=cells)
    clean.nbformat_minor = 5
    clean.metadata = NotebookNode(kernelspec=NotebookNode(KERNELSPEC), language_info=NotebookNode(LANGUAGE))
    clean.metadata["memarc"] = NotebookNode(code_sha256=code_sha256 or code_hash(clean))
    add_alt_texts(clean)
    nbformat.validate(clean)
    return clean

"""The mechanical rules of the notebooks, read from the files alone; all broken rules of one are shown at once."""

import ast
import re
import statistics
from itertools import takewhile

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from memarc_utils import notebooks
from memarc_utils.notebook_outputs import code_hash, normalise
from memarc_utils.recording import RECORD_MIME

PATHS = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
TAGS = {"parameters", "metrics", "measured", "raises-exception"}


def parsed(cell):
    """The syntax tree of a code cell, magics left out; None when it does not parse."""
    lines = ["" if re.match(r"\s*[!%]", line) else line for line in cell.source.split("\n")]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return None


def words(markdown):
    """Number of words a person reads: no tables, code or display equations; an inline formula counts as one word."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|^\s*\|.*$", " ", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$[^$\n]+\$", " formula ", re.sub(r"\]\([^)]*\)", "]", text))
    return len(re.findall(r"[^\W_][\w'’.,%-]*", text))


def section(cells, title):
    """The bullets below a heading; None when there is no such heading."""
    lines = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown").split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(rf"#+ .*{title}", line)]
    if not starts:
        return None
    below = takewhile(lambda line: not line.startswith("#"), lines[starts[0] + 1 :])
    return [line for line in below if re.match(r"([-*]|\d+\.) ", line)]


def tagged(cells, tag):
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


def frame_problems(cells, code):
    """Header, parameters cell, setup cell, closing sections, metrics cell."""
    first = cells[0].source if cells[0].cell_type == "markdown" else ""
    lines = [line for line in first.split("\n") if line.strip()]
    if not lines or not lines[0].startswith("# "):
        yield "the first cell must begin with the title: '# Title'"
    if len(lines) < 2 or "**Question" not in lines[1]:
        yield "the second line must be the question: '**Question** ...'"
    first_code = cells.index(code[0])
    header = "\n".join(cell.source for cell in cells[:first_code])
    for word in ("You will derive", "Needs", "Runtime"):
        if f"**{word}" not in header:
            yield f"the header lacks **{word}**"
    if tagged(code, "parameters") != code[:1]:
        yield "the first code cell, and only that one, must be tagged 'parameters'"
    tree = parsed(code[0])
    source = code[0].source.split("\n")
    for statement in tree.body if tree else []:
        try:
            ast.literal_eval(statement.value if isinstance(statement, ast.AnnAssign) else None)
        except ValueError:
            yield f"parameters cell: not a literal: {ast.unparse(statement)}"
        if not isinstance(statement, ast.AnnAssign):
            yield f"parameters cell: write 'name: type = literal  # comment' instead of {ast.unparse(statement)}"
        elif not any("#" in line for line in source[statement.lineno - 1 : statement.end_lineno]):
            yield f"parameters cell: {ast.unparse(statement.target)} has no comment"
    setup = code[1].source if len(code) > 1 else ""
    if len([line for line in setup.split("\n") if line.strip()]) > 12:
        yield "the setup cell has more than 12 lines"
    for part in (r"%autoreload 2", r"setup\((seed=)?seed\)"):
        if not re.search(part, setup):
            yield f"the setup cell lacks {part}"
    if tagged(code, "metrics") != code[-1:]:
        yield "the last code cell, and only that one, must be tagged 'metrics'"
    counts = [sum(RECORD_MIME in output.get("data", {}) for output in cell.outputs) for cell in code]
    if not 3 <= counts[-1] <= 12:
        yield f"the metrics cell must record 3 to 12 numbers; it recorded {counts[-1]}"
    if any(counts[:-1]):
        yield "record() belongs into the metrics cell alone"
    for title, least, most in (("What to remember", 3, 5), ("Try it", 2, 3), ("References", 1, 99)):
        bullets = section(cells, title)
        if bullets is None or not least <= len(bullets) <= most:
            yield f"a section '{title}' with {least} to {most} bullets is missing"


def code_problems(cell, is_setup):
    """One code cell: length, imports, what must not stand in it."""
    tree, lines = parsed(cell), cell.source.split("\n")
    if len(lines) > 40:
        yield f"{len(lines)} lines; 40 is the most"
    if re.search(r"^\s*(!|%pip|%conda|%%)", cell.source, re.MULTILINE):
        yield "no shell command and no %pip, %conda or cell magic"
    if re.search(r"\bif\s+(not\s+)?(quick|fast|ci|debug)\b", cell.source, re.IGNORECASE):
        yield "no branch for a quick run; small values live in tests/notebooks.yaml"
    if tree is None:
        yield "is not Python"
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            if not is_setup:
                yield f"import outside the setup cell: {ast.unparse(node)}"
            if any(name.name == "*" for name in node.names):
                yield f"import by name: {ast.unparse(node)}"
            if any(module.split(".")[0] in ("requests", "urllib", "httpx", "socket", "http") for module in modules):
                yield f"no network: {ast.unparse(node)}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            yield "no sys.path"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            *("load_dataset", "hf_hub_download", "snapshot_download", "urlopen", "urlretrieve"),
        ):
            yield f"no network: {ast.unparse(node.func)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.match(r"(~|/[\w.-]+)/|[A-Za-z]:\\", node.value):
                yield f"no absolute path: {node.value!r}"
            if re.match(r"https?://", node.value):
                yield f"no network address: {node.value!r}"
        elif isinstance(node, ast.FunctionDef) and node.name.endswith("_naive") and node.end_lineno - node.lineno >= 25:
            yield f"{node.name} is longer than 25 lines"


def output_problems(cell):
    """What one executed code cell left."""
    tags = cell.metadata.get("tags", [])
    if cell.execution_count is None:
        yield "was not executed; refresh the notebook"
        return
    kinds = [output.output_type for output in cell.outputs]
    if "error" in kinds and "raises-exception" not in tags:
        yield "shows an error, but is not tagged raises-exception"
    if "raises-exception" in tags and "error" not in kinds:
        yield "is tagged raises-exception, but shows no error"
    tree = parsed(cell)
    defines = tree is not None and all(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)
    if not cell.outputs and not defines and "parameters" not in tags:
        yield "shows nothing; end it in something visible or a check"
    for output in cell.outputs:
        data, metadata = output.get("data", {}), output.get("metadata", {})
        if output.get("name") == "stderr":
            yield "keeps output to stderr; refresh the notebook"
        if "image/svg+xml" in data or any("widget" in mime for mime in data):
            yield "no svg and no widgets"
        if "image/png" in data and not metadata.get("image/png", {}).get("alt"):
            yield "its figure needs a sentence below: a Markdown cell, or display(Markdown(...)) after it"
        header = re.search(r"<thead>(.*?)</tr>", "".join(data.get("text/html", "")), re.DOTALL)
        if header and header[1].count("<th") > 9:
            yield "a table has at most 8 columns (and the index)"


def prose_problems(cell, folder):
    """One Markdown cell: length, equations that GitHub shows, links that lead somewhere."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)
    if words(cell.source) > 150:
        yield f"{words(cell.source)} words; 150 is the most"
    for bad in (r"\label", r"\ref{", r"\eqref", r"\begin{equation", r"\begin{align}", r"\begin{align*}", r"\(", r"\["):
        if bad in re.sub(r"\\\\\[", "", text):
            yield f"GitHub does not show {bad}; put '$$' on its own lines and aligned inside"
    if any("$$" in line and line.strip() != "$$" for line in text.split("\n")):
        yield "'$$' stands on its own line"
    if text.count("$$") % 2:
        yield "a '$$' is not closed"
    rows = [line for line in text.split("\n") if line.lstrip().startswith("|")]
    if any("|" in formula.replace(r"\|", "|") for row in rows for formula in re.findall(r"\$[^$]+\$", row)):
        yield r"no '|' in a formula inside a table; write \vert or \Vert"
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        if not (folder / target).exists():
            yield f"link to {target}, which does not exist"


def link_problems(cells, name, names):
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    place = names.index(name)
    for neighbour in [*names[max(0, place - 1) : place], *names[place + 1 : place + 2]]:
        if f"]({neighbour}.ipynb)" not in text:
            yield f"a link to its neighbour is missing: ({neighbour}.ipynb)"


def violations(path, names):
    """Every rule that a notebook breaks, as sentences."""
    notebook = nbformat.read(path, as_version=4)
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    if len(code) < 3:
        return ["a notebook has at least a parameters cell, a setup cell and a metrics cell"]
    problems = [*frame_problems(cells, code), *link_problems(cells, path.stem, names)]
    if not re.fullmatch(r"\d\d_[a-z0-9]+(_[a-z0-9]+)*", path.stem):
        problems.append("the name must be NN_snake_case.ipynb")
    if path.stat().st_size >= 1_000_000:
        problems.append(f"the file has {path.stat().st_size / 1e6:.1f} MB; it must stay below 1 MB")
    median = statistics.median(len([line for line in cell.source.split("\n") if line.strip()]) for cell in code)
    if median > 10:
        problems.append(f"the median code cell has {median:g} lines; 10 is the most")
    for index, cell in enumerate(cells):
        found = [f"unknown tag {tag!r}" for tag in cell.metadata.get("tags", []) if tag not in TAGS]
        if cell.cell_type == "code":
            found += [*code_problems(cell, cell is code[1]), *output_problems(cell)]
        else:
            found += prose_problems(cell, path.parent)
        problems += [f"cell {index + 1}: {problem}" for problem in found]
    stored = notebook.metadata.get("memarc", {}).get("code_sha256")
    if stored != code_hash(notebook):
        problems.append(f"the code changed since the outputs were made; run: make refresh NOTEBOOK={path.stem[:2]}")
    elif nbformat.writes(normalise(notebook, path.stem, stored)).strip() != path.read_text(encoding="utf-8").strip():
        problems.append(f"is not normalised; run: python -m memarc_utils.notebooks normalise {path.stem[:2]}")
    return problems


def function_bodies(path):
    """`{body: name}` of the functions of a notebook that are long enough to be a copy rather than a coincidence."""
    bodies = {}
    for cell in nbformat.read(path, as_version=4).cells:
        tree = parsed(cell) if cell.cell_type == "code" else None
        for node in ast.walk(tree) if tree else []:
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                text = "\n".join(ast.unparse(statement) for statement in body)
                if len(text) > 60:
                    bodies[text] = node.name
    return bodies


def repeated_functions(paths):
    seen, repeated = {}, []
    for path in paths:
        for body, name in function_bodies(path).items():
            if body in seen:
                repeated.append(f"{name} in {path.stem} has the body of {seen[body][1]} in {seen[body][0]}")
            seen[body] = (path.stem, name)
    return repeated


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PATHS])
def test_notebook_keeps_the_rules(path):
    problems = violations(path, [other.stem for other in PATHS])
    if problems:
        pytest.fail(f"{path.stem} breaks {len(problems)} rules:\n  " + "\n  ".join(problems), pytrace=False)


def test_no_function_body_stands_in_two_notebooks():
    assert repeated_functions(PATHS) == []


def test_numbers_are_unique():
    numbers = [path.stem[:2] for path in PATHS]
    assert len(set(numbers)) == len(numbers)


# A small notebook that keeps every rule; each case below breaks one of them.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
ERROR = new_output("error", ename="ValueError", evalue="on purpose")
PRINTED = new_output("stream", text="seen\n")


def shown(data, **metadata):
    return new_output("display_data", data=data, metadata=metadata)


def good_cells():
    def code(source, outputs, *tags):
        return new_code_cell(source, outputs=outputs, execution_count=1, metadata={"tags": list(tags)} if tags else {})

    records = [shown({RECORD_MIME: {"name": f"m{i}", "value": i, "unit": ""}, "text/plain": f"m{i}"}) for i in range(3)]
    setup = "%load_ext autoreload\n%autoreload 2\nfrom memarc_utils.training import setup\ndevice = setup(seed=seed)"
    return {
        "header": new_markdown_cell(
            "# A title\n**Question** Why?\n\n**You will derive** a bound.\n\n**Needs** nothing.\n\n**Runtime** a minute"
        ),
        "parameters": code("seed: int = 0  # seed of everything", [], "parameters"),
        "setup": code(setup, [PRINTED]),
        "claim": new_markdown_cell("## A claim\n\n$$\n\\varepsilon = 1\n$$\n\nand $\\sigma$ in words."),
        "naive": code("def total_naive(values):\n    return sum(value for value in values)", []),
        "plot": code("plot_bars(table)", [shown({"image/png": PNG, "text/plain": "<Figure>"})]),
        "reading": new_markdown_cell("The bar is high."),
        "fails": code("raise ValueError('on purpose')", [ERROR], "raises-exception"),
        "metrics": code("record('m0', 0)", records, "metrics"),
        "end": new_markdown_cell(
            "## What to remember\n- a\n- b\n- c\n## Try it\n- d\n- e\n## References\n- f\n\n[next](02_next.ipynb)"
        ),
    }


def saved(folder, cells, name="01_good"):
    (folder / "02_next.ipynb").write_text("{}")
    notebook = normalise(new_notebook(cells=list(cells.values())), name)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


NAMES = ["01_good", "02_next"]


def test_a_good_notebook_breaks_no_rule(tmp_path):
    assert violations(saved(tmp_path, good_cells()), NAMES) == []


BROKEN_SOURCES = [
    ("header", "# A title", "A title", "the title"),
    ("header", "**Question** Why?", "Why?", "the question"),
    ("header", "**Runtime**", "Runtime", r"lacks \*\*Runtime"),
    ("header", "Why?", "why " * 150, "150 is the most"),
    ("parameters", "seed: int = 0", "seed: int = 1 + 1", "not a literal"),
    ("parameters", "seed: int = 0", "seed = 0", "write 'name: type = literal"),
    ("parameters", "  # seed of everything", "", "has no comment"),
    ("setup", "%autoreload 2", "", "autoreload 2"),
    ("setup", "setup(seed=seed)", "setup(seed=1)", "setup"),
    ("setup", "import setup", "import *", "import by name"),
    ("setup", "%load_ext autoreload", "from a import (\n" + "    b,\n" * 10 + ")", "more than 12 lines"),
    ("setup", "from memarc_utils.training", "from requests", "no network"),
    ("plot", "plot_bars", "import os\nplot_bars", "outside the setup cell"),
    ("plot", "plot_bars(table)", "!ls", "no shell command"),
    ("plot", "plot_bars(table)", "%pip install x", "no shell command"),
    ("plot", "table", "'/data/table.csv'", "no absolute path"),
    ("plot", "table", "sys.path", "no sys.path"),
    ("plot", "table", "datasets.load_dataset('sst2')", "no network"),
    ("plot", "table", "'https://example.org'", "no network address"),
    ("plot", "plot_bars", "if quick:\n    plot_bars", "no branch for a quick run"),
    ("plot", "plot_bars(table)", "plot_bars(", "is not Python"),
    ("plot", "plot_bars(table)", "x = 1\n" * 40 + "x", "40 is the most"),
    ("naive", "return", "value = 1\n" + "    value = 1\n" * 24 + "    return", "longer than 25 lines"),
    ("claim", "$$\n\\varepsilon", "$$\\varepsilon", "stands on its own line"),
    ("claim", "\\varepsilon", "\\label{a}", "GitHub does not show"),
    ("claim", "and", "| a | $|x|$ |\n", "in a formula inside a table"),
    ("claim", "and", "[there](nowhere.ipynb)", "does not exist"),
    ("reading", "The bar is high.", "## Next", "needs a sentence below"),
    ("end", "- c", "", "'What to remember'"),
    ("end", "## Try it", "", "'Try it'"),
    ("end", "## References", "", "'References'"),
    ("end", "02_next", "01_good", "link to its neighbour"),
]


@pytest.mark.parametrize(("where", "old", "new", "said"), BROKEN_SOURCES, ids=[case[3][:20] for case in BROKEN_SOURCES])
def test_a_broken_source_is_noticed(tmp_path, where, old, new, said):
    cells = good_cells()
    assert old in cells[where].source
    cells[where].source = cells[where].source.replace(old, new)
    assert re.search(said, "\n".join(violations(saved(tmp_path, cells), NAMES)))


TABLE = "<table class='dataframe'><thead><tr>" + "<th>a</th>" * 10 + "</tr></thead></table>"
BROKEN_OUTPUTS = [
    ("plot", {"execution_count": None}, "was not executed"),
    ("plot", {"outputs": []}, "shows nothing"),
    ("plot", {"outputs": [ERROR]}, "shows an error"),
    ("fails", {"outputs": [PRINTED]}, "shows no error"),
    ("plot", {"outputs": [shown({"image/svg+xml": "<svg/>"})]}, "no svg"),
    ("plot", {"outputs": [shown({"text/html": TABLE})]}, "at most 8 columns"),
    ("plot", {"outputs": [shown({"image/png": PNG * 20_000})]}, "below 1 MB"),
    ("plot", {"metadata": {"tags": ["mesured"]}}, "unknown tag"),
    ("metrics", {"metadata": {}}, "must be tagged 'metrics'"),
    ("setup", {"metadata": {"tags": ["parameters"]}}, "must be tagged 'parameters'"),
    ("metrics", {"outputs": [PRINTED]}, "it recorded 0"),
    ("plot", {"outputs": [shown({RECORD_MIME: {"name": "a", "value": 1, "unit": ""}})]}, "metrics cell alone"),
]


@pytest.mark.parametrize(("where", "change", "said"), BROKEN_OUTPUTS, ids=[case[2] for case in BROKEN_OUTPUTS])
def test_a_broken_output_is_noticed(tmp_path, where, change, said):
    cells = good_cells()
    cells[where].update(change)
    assert re.search(said, "\n".join(violations(saved(tmp_path, cells), NAMES)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return sum(", "return min(", "code changed since"),
        ('"alt": "The bar is high."', '"alt": "The bar"', "not normalised"),
        ('"name": "stdout"', '"name": "stderr"', "stderr"),
    ],
)
def test_an_edit_by_hand_is_noticed(tmp_path, old, new, said):
    path = saved(tmp_path, good_cells())
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert said in "\n".join(violations(path, NAMES))


def test_a_long_median_a_wrong_name_and_a_copied_function_are_noticed(tmp_path):
    cells = good_cells()
    for name in ("plot", "naive", "setup", "metrics"):
        cells[name].source += "\nx = 1" * 12
    assert "the median code cell" in "\n".join(violations(saved(tmp_path, cells), NAMES))
    assert "NN_snake_case" in "\n".join(violations(saved(tmp_path, good_cells(), "1-Bad"), ["1-Bad", *NAMES]))
    cells = good_cells()
    body = "    norms = [row.norm() for row in rows]\n    return [min(1, 1 / norm) for norm in norms]"
    cells["naive"].source = "def other(rows):\n" + body
    one, two = saved(tmp_path, cells), saved(tmp_path, cells, "03_other")
    assert repeated_functions([one, two]) == ["other in 03_other has the body of other in 01_good"]
    assert repeated_functions([one]) == []

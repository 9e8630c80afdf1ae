"""Reports: a notebook executed with a parameter set, its page, and the index of a study. Level 4, no torch.

`execute` puts `<notebook>.ipynb` and `.html` in place only if every cell ran, in order, without an error;
what happened otherwise is kept beside them as `<notebook>.failed.ipynb` and `.failed.html`. From a shell:

    python -m vitlib.report run notebooks/2_evaluate.ipynb --study demo
    python -m vitlib.report render | index | summary --study demo
"""

import argparse
import ast
import html
import json
import keyword
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlib import files, params, publish
from vitlib.frontpage import POLICY, TEMPLATES, index, is_study, reports, summary

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from traitlets.config import Config

# What a page shows of an output; widgets and scripts would be dead in it anyway.
SHOWN = ("text/html", "text/markdown", "text/latex", "text/plain", "image/png", "image/jpeg", "image/svg+xml")


class ReportError(RuntimeError):
    """A report that was not made; the message names the notebook, the cell and the error in one line."""


@dataclass(frozen=True)
class Problem:
    """Why a notebook does not count as done: the number of its code cell (from 1), error name and message."""

    cell: int
    name: str
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (f"cell {self.cell}", self.name, self.message)))


# ---------------------------------------------------------------------------------------------- execute


def execute(
    notebook: str | Path,
    *,
    parameters: Mapping[str, Any],
    folder: str | Path,
    cell_timeout_s: int | None = None,
    start_timeout_s: int = 120,
    progress: bool = True,
) -> Path:
    """The executed `notebook` in `folder` (its page beside it), made with `parameters` from `params.load`.

    Names that the notebook's parameters cell does not declare are left out: one set serves all notebooks.
    ReportError if any code cell did not run in order and without error; the last good report then stays.
    """
    notebook, folder = Path(notebook), Path(folder)
    chosen = _declared_only(notebook, parameters)
    _check_twin(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    target, running = folder / f"{notebook.stem}.ipynb", folder / f".{notebook.stem}.running.ipynb"
    running.unlink(missing_ok=True)
    try:
        ended = _papermill(notebook, running, chosen, cell_timeout_s, start_timeout_s, progress)
        executed, problem = _judged(running, ended)
        if problem is None:
            return _publish(executed, target)
        failed = target.with_suffix(".failed.ipynb")
        _write(_marked(executed, problem), failed)
        if ended is not None and not isinstance(ended, Exception):
            raise ended  # Ctrl-C
        page = publish.display(failed.with_suffix(".html"))
        raise ReportError(f"{notebook.stem} FAILED in {problem} (see {page})")
    finally:
        running.unlink(missing_ok=True)


def _papermill(
    notebook: Path,
    output: Path,
    parameters: dict[str, Any],
    cell_timeout_s: int | None,
    start_timeout_s: int,
    progress: bool,
) -> BaseException | None:
    """Executes `notebook` into `output`; returns what ended it early, if anything."""
    import papermill

    # It warns of parameters it cannot parse (an `=` in a comment is enough); `_declared_only` judged them.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            _unformatted(notebook),
            _unformatted(output),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(files.project_root()),
            progress_bar={"desc": notebook.stem} if progress else False,
            log_output=False,
            start_timeout=start_timeout_s,
            execution_timeout=cell_timeout_s,
            iopub_timeout=120,  # seconds for outputs to arrive; the default of 4 is short on a busy machine
            config=_kernel_config(),
        )
    except BaseException as error:  # Ctrl-C too: what was done until then is kept as a failed report
        return error
    return None


def _kernel_config() -> "Config":
    """Encrypted channels where ZeroMQ can: other users of this machine could listen, as the kernel warns."""
    import zmq
    from traitlets.config import Config

    return Config({"KernelManager": {"transport_encryption": "auto" if zmq.has("curve") else "disabled"}})


def _unformatted(path: Path) -> str:
    """The path as papermill wants it: it fills `{name}` in paths from the parameters."""
    return str(path.absolute()).replace("{", "{{").replace("}", "}}")


def _judged(running: Path, ended: BaseException | None) -> tuple["NotebookNode", Problem | None]:
    """The run, fit to publish, and why it does not count as done; ReportError if no cell was started."""
    from papermill.exceptions import PapermillExecutionError

    if not running.exists():
        raise ReportError(f"{running.name} was not written: {type(ended).__name__}: {_one_line(ended)}")
    executed = publish.tidy(_read(running))
    problem = None
    if ended is None or isinstance(ended, PapermillExecutionError):
        problem = first_problem(executed)
    if problem is None and ended is not None:
        problem = _crashed(executed, ended)
    return executed, problem


def _publish(executed: "NotebookNode", target: Path) -> Path:
    """`target`, replaced by the run; the marks of an earlier failure are removed."""
    _write(executed, target)
    for suffix in (".failed.ipynb", ".failed.html"):
        target.with_suffix(suffix).unlink(missing_ok=True)
    return target


def first_problem(executed: "NotebookNode") -> Problem | None:
    """What keeps an executed notebook from counting as done: an error, or a cell that did not run in turn.

    papermill's exit code and status are not asked: it passes `sys.exit(0)` in mid-notebook, and marks what a
    killed kernel left as completed.
    """
    for number, cell in enumerate(_code_cells(executed), start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                return Problem(number, output.ename, _one_line(output.evalue))
        if cell.metadata.get("papermill", {}).get("exception"):
            return Problem(number, "Error", "stopped without a traceback")
        if cell.execution_count != number:
            return Problem(number, "NotRun", "the kernel never ran this cell in its turn")
    return None


def _crashed(executed: "NotebookNode", error: BaseException) -> Problem:
    """The problem of a run that ended from outside (kernel dead, time over): in the last cell started."""
    started = [
        number
        for number, cell in enumerate(_code_cells(executed), start=1)
        if cell.metadata.get("papermill", {}).get("start_time")
    ]
    return Problem(max(started, default=1), type(error).__name__, _one_line(error))


def _code_cells(executed: "NotebookNode") -> list["NotebookNode"]:
    """The cells that must run; an empty one is passed over by Jupyter."""
    return [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]


def _marked(executed: "NotebookNode", problem: Problem) -> "NotebookNode":
    """`executed` with a banner on top and another before the cell that failed."""
    from nbformat.v4 import new_markdown_cell

    cell = _code_cells(executed)[problem.cell - 1 :][:1]
    place = executed.cells.index(cell[0]) if cell else len(executed.cells)
    stop = '<div class="alert alert-danger" id="failed-cell">It stopped in the next cell.</div>'
    banner = (
        f'<div class="alert alert-danger">FAILED in <a href="#failed-cell">cell {problem.cell}</a>: '
        f"{html.escape(problem.name)}: {html.escape(problem.message)}</div>"
    )
    executed.cells.insert(place, new_markdown_cell(stop))
    executed.cells.insert(0, new_markdown_cell(banner))
    return executed


def _one_line(error: object) -> str:
    """The first line of a message without colour codes, at most 300 characters."""
    lines = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", str(error)).strip().splitlines()
    return publish.scrubbed(lines[0])[:300] if lines else ""


# ------------------------------------------------------------------------------------------- parameters


def declared(notebook: str | Path) -> list[str]:
    """The names that `notebook`'s parameters cell assigns; ReportError if there is no such notebook.

    Read from the syntax tree: papermill's own reading loses a line whose comment holds an `=`.
    """
    for cell in _read(Path(notebook)).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", ()):
            return list(_assigned(cell.source))
    return []


def _assigned(source: str) -> Iterator[str]:
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _declared_only(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that `notebook` declares; ReportError on what papermill would paste as code."""
    for name, value in parameters.items():
        if not (type(name) is str and re.fullmatch(r"[^\W_]\w*", name)) or keyword.iskeyword(name):
            raise ReportError(f"{name!r} cannot be a parameter: it must be a plain name")
        if not _plain(value):
            raise ReportError(f"parameter {name!r} must be text, number, true/false, or a list or mapping of such")
    known = declared(notebook)
    chosen = {name: value for name, value in parameters.items() if name in known}
    _check_pasted(chosen)
    return chosen


def _check_twin(notebook: Path) -> None:
    """ReportError if the `.py` twin holds other cells: a report comes from the text that is reviewed."""
    twin = notebook.with_suffix(".py")
    if not twin.exists():
        return
    import jupytext

    pair = [
        [(cell.cell_type, cell.source.strip()) for cell in side.cells if cell.source.strip()]
        for side in (_read(notebook), jupytext.read(twin))
    ]
    if pair[0] != pair[1]:
        raise ReportError(f"{notebook.name} and {twin.name} differ: run `make sync` (the newer one wins)")


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether `value` is built of the exact built-in types alone (a subclass may print itself as code)."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is list:
        return depth < 8 and all(_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return depth < 8 and all(type(key) is str and _plain(item, depth + 1) for key, item in value.items())
    return value is None or type(value) in (str, int, bool)


def _check_pasted(parameters: dict[str, Any]) -> None:
    """ReportError unless the cell that papermill will write reads back as exactly these values."""
    from papermill.translators import PythonTranslator

    try:
        body = ast.parse(PythonTranslator.codify(parameters)).body
        back = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise ReportError(f"the parameters cannot be written as plain values: {error}") from None
    if back != parameters:
        raise ReportError("the parameters do not survive being written into the notebook")


# ----------------------------------------------------------------------------------------------- render


def render(ipynb: str | Path) -> Path:
    """The page of an executed notebook, beside it: `.html`, complete in itself, no script alive."""
    ipynb = Path(ipynb)
    page = ipynb.with_suffix(".html")
    text = page_of(_read(ipynb), page)
    with files.atomic_path(page) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    return page


def page_of(executed: "NotebookNode", page: Path) -> str:
    """The HTML text of `executed`, to lie at `page` beside the study's other reports."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        sanitize_html=True,
        embed_images=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"clean_html": publish.clean},
        mathjax_url="",
        require_js_url="",
        jupyter_widgets_base_url="",
        mermaid_js_url="",
    )
    # A copied study lies in a folder of any name; what the notebook was run with says whose it is.
    study, name = _study_of(executed) or page.absolute().parent.name, page.stem.removesuffix(".failed")
    # The pages of a study will be there; one that stands apart may be alone.
    siblings = [stem for stem, status in reports(page.parent) if status != "missing" or name in (*params.STUDY, stem)]
    if name in {*params.NOTEBOOKS} - {*params.STUDY} - {*siblings}:
        siblings.append(name)  # one that stands apart, rendered for the first time; it comes after the study's
    about = {"study": study, "name": name, "siblings": siblings, "policy": POLICY}
    exporter.log.setLevel(logging.ERROR)
    resources = {"metadata": {"name": f"{name} – {study}"}, "report": about}
    text, _ = exporter.from_notebook_node(_shown(executed), resources)
    return text.replace(' alt="No description has been provided for this image"', ' alt=""')


def _study_of(executed: "NotebookNode") -> str:
    """The value of `study` that an executed notebook was given; '' where it has none that can name a study."""
    found = ""
    for cell in executed.cells:
        if cell.cell_type == "code" and {"parameters", "injected-parameters"} & {*cell.metadata.get("tags", ())}:
            found = _literal(cell.source, "study") or found  # papermill's own cell stands second
    return found if is_study(found) else ""


def _literal(source: str, name: str) -> str:
    """The text that `source` assigns to `name`; '' where it does not, or is no Python."""
    try:
        nodes = ast.parse(source).body
    except SyntaxError:
        return ""
    for node in nodes:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets) and isinstance(node.value, ast.Constant):
            return node.value.value if isinstance(node.value.value, str) else ""
    return ""


def _shown(executed: "NotebookNode") -> "NotebookNode":
    """A copy with what a page may hold: known kinds of output, numbers as sizes of pictures."""
    import nbformat

    copy = nbformat.from_dict(json.loads(json.dumps(executed)))
    copy.metadata = nbformat.from_dict({"language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    for cell in copy.cells:
        for output in cell.get("outputs", ()):
            if "data" in output:
                output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN}
                output.metadata = {kind: _sizes(output.metadata.get(kind)) for kind in output.data}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    return copy


def _sizes(metadata: Any) -> dict[str, int]:
    # The template writes them without quotes, so anything but a number could be a second attribute.
    sizes = metadata if isinstance(metadata, dict) else {}
    return {key: sizes[key] for key in ("width", "height") if type(sizes.get(key)) is int}


def _read(path: Path) -> "NotebookNode":
    import nbformat

    if not path.is_file():
        raise ReportError(f"there is no notebook {publish.display(path)}")
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, UnicodeDecodeError) as error:
        raise ReportError(f"{publish.display(path)} is not a notebook: {_one_line(error)}") from None


def _write(executed: "NotebookNode", ipynb: Path) -> None:
    """Put notebook and page in place together: both are written in full before either is renamed."""
    import nbformat

    page = ipynb.with_suffix(".html")
    text = page_of(executed, page)
    with files.atomic_path(ipynb) as notebook_file, files.atomic_path(page) as page_file:
        Path(notebook_file).write_text(nbformat.writes(executed) + "\n", encoding="utf-8")
        Path(page_file).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ shell


def main(arguments: Sequence[str] | None = None) -> int:
    """The shell's way in; returns the exit status, 1 with one line on stderr if a report was not made."""
    parser = argparse.ArgumentParser(prog="python -m vitlib.report", description="Reports of a study.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (
        ("run", "execute a notebook into the study's folder"),
        ("render", "make the pages of executed notebooks anew, without executing"),
        ("index", "write index.html"),
        ("summary", "print the table of variants"),
    ):
        command = commands.add_parser(name, help=meaning)
        if name == "run":
            command.add_argument("notebook", type=Path)
            command.add_argument("--params", type=Path, help="parameter set (default: params/<study>.yaml)")
        command.add_argument("--study", required=True, help="results lie in outputs/<study>/")
    options = parser.parse_args(arguments)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else each kernel prints a warning
    try:
        folder = files.study_folder(options.study)
        _COMMANDS[options.command](options, folder)
    except (ReportError, params.ParameterError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, folder: Path) -> None:
    values = params.load(options.params or files.project_root() / "params" / f"{options.study}.yaml")
    try:
        execute(options.notebook, parameters={**values, "study": options.study}, folder=folder)
    finally:
        index(folder)  # of a failed run too: it must show there


def _render(options: argparse.Namespace, folder: Path) -> None:
    for ipynb in sorted(folder.glob("[0-9]*_*.ipynb")):
        print(publish.display(render(ipynb)))


def _index(options: argparse.Namespace, folder: Path) -> None:
    print(publish.display(index(folder)))


def _summary(options: argparse.Namespace, folder: Path) -> None:
    print(summary(folder))


_COMMANDS = {"run": _run, "render": _render, "index": _index, "summary": _summary}

if __name__ == "__main__":
    sys.exit(main())

"""Runs of notebooks: one executed with a parameter set, and put in place only if every cell ran. No torch.

`execute` puts `<notebook>.ipynb` and `.html` in place only if every cell ran, in order, without an error;
otherwise the run is kept beside them as `<notebook>.failed.ipynb` and `.failed.html`. From a shell:

    python -m vitlib.report run notebooks/2_evaluate.ipynb --study demo
    python -m vitlib.report index | summary | render --study demo
"""

from __future__ import annotations

import argparse
import html
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from vitlib.report import index, page
from vitlib.study import files, params, provenance
from vitlib.study.study import Study, StudyBusy

if TYPE_CHECKING:
    from nbformat import NotebookNode

_RESERVE = 2**23  # bytes; zeros would take no room on some file systems


class ReportError(RuntimeError):
    """A report that was not made; the message names the notebook, the cell and the error in one line."""


class Problem(NamedTuple):
    """Why a notebook does not count as done: the number of its code cell (from 1), error name and message."""

    cell: int
    name: str
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (f"cell {self.cell}", self.name, self.message)))


def execute(notebook: str | Path, *, parameters: Mapping[str, Any], folder: str | Path) -> Path:
    """Execute `notebook` into `folder`, its page beside it, with `parameters` from `params.load`; returns the path.

    Names that the notebook's parameters cell does not declare are left out: one set serves all notebooks.
    ParameterError for parameters that cannot work, before a kernel starts.
    ReportError if any code cell did not run in order and without error; the last good report then stays.
    """
    notebook, folder = Path(notebook), Path(folder)
    cells = page.read(notebook).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    declared = params.assigned("\n".join(tagged))
    for remark in params.remarks(params.check(parameters), declared, parameters):
        print(f"{notebook.stem}: {remark}", file=sys.stderr)
    chosen = {name: parameters[name] for name in declared if name in parameters}
    _check_twin(notebook, cells)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{notebook.stem}.ipynb"
    facts = provenance.facts(provenance.environment(parameters={}))  # of the commit that the kernel imports
    facts["made"] = time.strftime("%Y-%m-%d %H:%M")
    changes = ("records", target.name, target.with_suffix(".html").name)
    with Study.at(folder).locked(), files.unchanged_on_error(folder, changes):
        with files.atomic_path(reserve := folder / ".reserve") as file:  # of the disk, for the page of a failure
            file.write_bytes(os.urandom(_RESERVE))
        text, ended = _papermill(notebook, chosen)
        reserve.unlink()
        executed, problem = _judged(text, ended, facts)
        failed = target.with_suffix(".failed.ipynb")
        try:
            if problem is None:
                page.write(executed, target)
                for suffix in (".ipynb", ".html"):
                    failed.with_suffix(suffix).unlink(missing_ok=True)
                return target
        except OSError as error:
            problem = Problem(len(_code_cells(executed)), "OSError", f"every cell ran, but {files.first_line(error)}")
        said = f"{notebook.stem} FAILED in {problem}"
        try:
            page.write(_marked(executed, problem), failed)
            said += f" (see {page.display(failed.with_suffix('.html'))})"
        except OSError as error:
            said += f"; of this there is no page: {files.first_line(error)}"
        raise ended if isinstance(ended, KeyboardInterrupt) else ReportError(said)


def _check_twin(notebook: Path, cells: Sequence[NotebookNode]) -> None:
    """ReportError if the `.py` twin holds other cells: a report must come from the text that was reviewed."""
    import jupytext

    twin = notebook.with_suffix(".py")
    sides = (cells, jupytext.read(twin).cells) if twin.exists() else ()
    texts = [[(cell.cell_type, cell.source.strip()) for cell in side if cell.source.strip()] for side in sides]
    if texts and texts[0] != texts[1]:
        raise ReportError(f"{notebook.name} and {twin.name} differ: run `make sync` (the newer one wins)")


def _papermill(notebook: Path, parameters: dict[str, Any]) -> tuple[str, BaseException | None]:
    """Execute `notebook`; returns the run as far as it went, and what ended it early, if anything."""
    import papermill
    import zmq
    from papermill.iorw import papermill_io
    from traitlets.config import Config

    # It warns of parameters that it cannot parse (an `=` in a comment is enough); `params.assigned` can.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    run = {}  # its text by path; a full disk would cut a file off
    papermill_io.register(
        "memory:", SimpleNamespace(write=lambda text, path: run.update({path: text}), pretty_path=str)
    )
    source = str(notebook.absolute()).replace("{", "{{").replace("}", "}}")  # it fills `{name}` from the parameters
    # Encrypted channels if ZeroMQ can: otherwise other users of this machine could listen, as the kernel warns.
    encryption = "auto" if zmq.has("curve") else "disabled"
    try:
        papermill.execute_notebook(
            source,
            "memory:run.ipynb",
            parameters=parameters,
            kernel_name="python3",
            cwd=str(files.project_root()),
            progress_bar={"desc": notebook.stem},
            log_output=False,
            start_timeout=120,
            iopub_timeout=120,  # seconds for outputs to arrive; the default of 4 is short on a busy machine
            config=Config({"KernelManager": {"transport_encryption": encryption}}),
        )
    except (Exception, KeyboardInterrupt) as error:
        return "".join(run.values()), error
    return "".join(run.values()), None


def _judged(text: str, ended: BaseException | None, made: Mapping[str, str]) -> tuple[NotebookNode, Problem | None]:
    """The run `text`, fit to publish, and why it does not count as done; ReportError if it did not start."""
    import nbformat
    from papermill.exceptions import PapermillExecutionError

    if not text:
        raise ReportError(f"the notebook did not start: {type(ended).__name__}: {_one_line(ended)}") from ended
    executed = page.tidy(nbformat.reads(text, as_version=4))
    executed.metadata["vitlib"] = dict(made)  # for the page's footer
    problem = first_problem(executed)
    if ended is not None and not (problem and isinstance(ended, PapermillExecutionError)):  # Ctrl-C, a dead kernel
        started = sum(bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in _code_cells(executed))
        problem = Problem(max(started, 1), type(ended).__name__, _one_line(ended))
    return executed, problem


def first_problem(executed: NotebookNode) -> Problem | None:
    """Why an executed notebook does not count as done: an error, or a cell that did not run in turn.

    papermill's exit code and status do not decide: it passes `sys.exit(0)` in mid-notebook, and marks the notebook of a
    killed kernel as completed.
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


def _code_cells(executed: NotebookNode) -> list[NotebookNode]:
    """The cells that must run; Jupyter skips an empty one."""
    return [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]


def _marked(executed: NotebookNode, problem: Problem) -> NotebookNode:
    """`executed` with a banner on top and another before the cell that failed."""
    from nbformat.v4 import new_markdown_cell

    name, message = html.escape(problem.name), html.escape(problem.message)
    kept = "Records and reports are those of the last good run."
    link = f'<a href="#failed-cell">cell {problem.cell}</a>'
    stop = '<div class="alert alert-danger" id="failed-cell">It stopped in the next cell.</div>'
    at = executed.cells.index(_code_cells(executed)[problem.cell - 1])
    executed.cells.insert(at, new_markdown_cell(stop))
    executed.cells.insert(
        0, new_markdown_cell(f'<div class="alert alert-danger">FAILED in {link}: {name}: {message}<br>{kept}</div>')
    )
    return executed


def _one_line(error: object) -> str:
    """The first line of a message without colour codes, at most 300 characters."""
    lines = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", str(error)).strip().splitlines()
    return page.scrubbed(lines[0])[:300] if lines else ""


def sources(script: str | Path, package: str = "vitlib") -> list[str]:
    """The files of `package` that `script` imports, directly or through each other, relative to the package's parent.

    A change in one of them makes a report out of date; a change in another module does not. Nothing is imported.
    """
    import grimp

    graph = grimp.build_graph(package, cache_dir=None)
    lines = re.findall(
        rf"^from ({package}\b[\w.]*) import (.+)", Path(script).read_text(encoding="utf-8"), re.MULTILINE
    )
    named = {f"{parent}.{name.strip()}" for parent, names in lines for name in names.split(",")}
    modules = graph.modules & {*named, *(parent for parent, _ in lines)}
    modules = modules.union(*map(graph.find_upstream_modules, modules))
    modules |= {module.rsplit(".", up)[0] for module in modules for up in range(1, module.count(".") + 1)}
    ends = {module: "/__init__.py" if graph.find_children(module) else ".py" for module in modules}
    return sorted(module.replace(".", "/") + end for module, end in ends.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 with one line on stderr if a report was not made."""
    parser = argparse.ArgumentParser(prog="python -m vitlib.report", description="Reports of a study.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook into the study's folder")
    run.add_argument("notebook", type=Path)
    run.add_argument("--params", type=Path, help="parameter set (default: params/<study>.yaml; none with -p alone)")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set one parameter")
    commands.add_parser("index", help="write the study's index.html, and that of all studies")
    commands.add_parser("summary", help="print the table of variants")
    commands.add_parser("render", help="make the pages of executed notebooks again; nothing is run")
    for name, command in commands.choices.items():
        command.add_argument("--study", required=name == "run", help="results are in outputs/<study>/")
        if name != "run":
            command.add_argument("--folder", type=Path, help="a study in another folder, outputs/gallery/<name> say")
    options = parser.parse_args(arguments)
    if not options.study and not options.folder:
        parser.error("--study or --folder is needed")
    try:
        if options.command == "run":
            _run(options, files.study_folder(options.study))
        else:
            _show(options.command, options.folder or files.study_folder(options.study))
    except (ReportError, page.PageError, StudyBusy, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _show(command: str, folder: Path) -> None:
    """Print the study's table, or make its pages from what it has, and print their paths."""
    if command == "summary":
        print(index.summary(folder))
        return
    written = [*(page.render(folder) if command == "render" else []), index.write(folder), index.overview(folder)]
    print("\n".join(page.display(path) for path in written if path))


def _run(options: argparse.Namespace, folder: Path) -> None:
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # without it each kernel prints a warning
    own = files.project_root() / "params" / f"{options.study}.yaml"
    values = {} if options.p and not options.params and not own.is_file() else params.load(options.params or own)
    values |= params.given(options.p) | {"study": options.study}
    with Study(params.check(values), folder).locked():
        try:
            execute(options.notebook, parameters=values, folder=folder)
        except (ReportError, KeyboardInterrupt) as error:
            try:
                index.write(folder)  # it must show that the run failed
            except OSError as full:
                raise ReportError(f"{error}; the index does not show it: {files.first_line(full)}") from error
            raise
        index.write(folder)

"""Runs of notebooks: one executed with a parameter set, and put in place only if every cell ran. No torch.

`execute` puts `<notebook>.ipynb` and `.html` in place only if every cell ran, in order, without an error;
otherwise the run is kept beside them as `<notebook>.failed.ipynb` and `.failed.html`. From a shell:

    python -m vitlib.run run notebooks/2_evaluate.ipynb --study demo
    python -m vitlib.run render | index | summary --study demo
"""

from __future__ import annotations

import argparse
import ast
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitlib import files, index, page, params
from vitlib.study import Study, StudyBusy

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from traitlets.config import Config


class ReportError(RuntimeError):
    """A report that was not made; the message names the notebook, the cell and the error in one line."""


class Problem(NamedTuple):
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
    progress: bool = True,
) -> Path:
    """Execute `notebook` into `folder`, its page beside it, with `parameters` from `params.load`; returns the path.

    Names that the notebook's parameters cell does not declare are left out: one set serves all notebooks.
    ReportError if any code cell did not run in order and without error; the last good report then stays.
    """
    notebook, folder = Path(notebook), Path(folder)
    chosen = {name: parameters[name] for name in declared(notebook) if name in parameters}
    _check_twin(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    target, running = folder / f"{notebook.stem}.ipynb", folder / f".{notebook.stem}.running.ipynb"
    running.unlink(missing_ok=True)
    try:
        ended = _papermill(notebook, running, chosen, cell_timeout_s, progress)
        executed, problem = _judged(running, ended)
        if problem is None:
            page.write(executed, target)
            for suffix in (".failed.ipynb", ".failed.html"):
                target.with_suffix(suffix).unlink(missing_ok=True)
            return target
        failed = target.with_suffix(".failed.ipynb")
        page.write(_marked(executed, problem), failed)
        if ended is not None and not isinstance(ended, Exception):
            raise ended  # Ctrl-C
        raise ReportError(f"{notebook.stem} FAILED in {problem} (see {page.display(failed.with_suffix('.html'))})")
    finally:
        running.unlink(missing_ok=True)


def declared(notebook: str | Path) -> list[str]:
    """The names that `notebook`'s parameters cell assigns; PageError if there is no such notebook."""
    for cell in page.read(Path(notebook)).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", ()):
            return list(params.assigned(cell.source))
    return []


def _check_twin(notebook: Path) -> None:
    """ReportError if the `.py` twin holds other cells: a report must come from the text that was reviewed."""
    twin = notebook.with_suffix(".py")
    if not twin.exists():
        return
    import jupytext

    pair = [
        [(cell.cell_type, cell.source.strip()) for cell in side.cells if cell.source.strip()]
        for side in (page.read(notebook), jupytext.read(twin))
    ]
    if pair[0] != pair[1]:
        raise ReportError(f"{notebook.name} and {twin.name} differ: run `make sync` (the newer one wins)")


def _papermill(
    notebook: Path, output: Path, parameters: dict[str, Any], cell_timeout_s: int | None, progress: bool
) -> BaseException | None:
    """Execute `notebook` into `output`; returns what ended it early, if anything."""
    import papermill

    # It warns of parameters that it cannot parse (an `=` in a comment is enough); `declared` can.
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
            start_timeout=120,
            execution_timeout=cell_timeout_s,
            iopub_timeout=120,  # seconds for outputs to arrive; the default of 4 is short on a busy machine
            config=_kernel_config(),
        )
    except BaseException as error:  # Ctrl-C too: the run so far is kept as a failed report
        return error
    return None


def _kernel_config() -> Config:
    """Encrypted channels if ZeroMQ can: otherwise other users of this machine could listen, as the kernel warns."""
    import zmq
    from traitlets.config import Config

    return Config({"KernelManager": {"transport_encryption": "auto" if zmq.has("curve") else "disabled"}})


def _unformatted(path: Path) -> str:
    """The path for papermill, which fills `{name}` in paths from the parameters."""
    return str(path.absolute()).replace("{", "{{").replace("}", "}}")


def _judged(running: Path, ended: BaseException | None) -> tuple[NotebookNode, Problem | None]:
    """The run, fit to publish, and why it does not count as done; ReportError if it was not written whole."""
    from papermill.exceptions import PapermillExecutionError

    try:
        executed = page.tidy(page.read(running))
    except page.PageError as error:  # the kernel did not start, or the disk is full
        reason = f"{type(ended).__name__}: {_one_line(ended)}" if ended is not None else str(error)
        raise ReportError(f"{running.name} was not written: {reason}") from None
    problem = None
    if ended is None or isinstance(ended, PapermillExecutionError):
        problem = first_problem(executed)
    if problem is None and ended is not None:
        problem = _crashed(executed, ended)
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


def _crashed(executed: NotebookNode, error: BaseException) -> Problem:
    """The problem of a run that ended from outside (dead kernel, timeout): in the last cell that was started."""
    started = [
        number
        for number, cell in enumerate(_code_cells(executed), start=1)
        if cell.metadata.get("papermill", {}).get("start_time")
    ]
    return Problem(max(started, default=1), type(error).__name__, _one_line(error))


def _code_cells(executed: NotebookNode) -> list[NotebookNode]:
    """The cells that must run; Jupyter skips an empty one."""
    return [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]


def _marked(executed: NotebookNode, problem: Problem) -> NotebookNode:
    cell = _code_cells(executed)[problem.cell - 1 :][:1]
    at = executed.cells.index(cell[0]) if cell else len(executed.cells)
    return page.marked_failed(executed, at, problem.cell, f"{problem.name}: {problem.message}")


def _one_line(error: object) -> str:
    """The first line of a message without colour codes, at most 300 characters."""
    lines = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", str(error)).strip().splitlines()
    return page.scrubbed(lines[0])[:300] if lines else ""


# --------------------------------------------------------------------------------------------- dependencies


def sources(script: str | Path, package: str = "vitlib") -> list[str]:
    """The files of `package` that `script` imports, directly or through each other, relative to the package's parent.

    A change in one of them makes a report out of date; a change in another module does not. Nothing is imported.
    """
    import grimp

    graph = grimp.build_graph(package, cache_dir=None)
    named = set()
    for node in ast.walk(ast.parse(Path(script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    direct = named & graph.modules
    modules = direct.union(*(graph.find_upstream_modules(module) for module in direct))
    modules |= {module.rsplit(".", up)[0] for module in modules for up in range(1, module.count(".") + 1)}
    packages = {module for module in graph.modules if graph.find_children(module)}
    return sorted(f"{module.replace('.', '/')}{'/__init__' if module in packages else ''}.py" for module in modules)


# ------------------------------------------------------------------------------------------------ shell


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 with one line on stderr if a report was not made."""
    parser = argparse.ArgumentParser(prog="python -m vitlib.run", description="Reports of a study.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, meaning) in _COMMANDS.items():
        command = commands.add_parser(name, help=meaning)
        if name == "run":
            command.add_argument("notebook", type=Path)
            command.add_argument("--params", type=Path, help="parameter set (default: params/<study>.yaml)")
        command.add_argument("--study", required=True, help="results go to outputs/<study>/")
    options = parser.parse_args(arguments)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # without it each kernel prints a warning
    try:
        _COMMANDS[options.command][0](options, files.study_folder(options.study))
    except (ReportError, page.PageError, StudyBusy, params.ParameterError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, folder: Path) -> None:
    values = params.load(options.params or files.project_root() / "params" / f"{options.study}.yaml")
    values |= {"study": options.study}
    with Study(params.check(values), folder).locked():
        try:
            execute(options.notebook, parameters=values, folder=folder)
        finally:
            index.write(folder)  # of a failed run too: the index must show it


def _render(options: argparse.Namespace, folder: Path) -> None:
    for ipynb in sorted(folder.glob("[0-9]*_*.ipynb")):
        print(page.display(page.render(ipynb)))


def _index(options: argparse.Namespace, folder: Path) -> None:
    print(page.display(index.write(folder)))


def _summary(options: argparse.Namespace, folder: Path) -> None:
    print(index.summary(folder))


_COMMANDS = {
    "run": (_run, "execute a notebook into the study's folder"),
    "render": (_render, "make the pages of executed notebooks again, without executing them"),
    "index": (_index, "write index.html"),
    "summary": (_summary, "print the table of variants"),
}

if __name__ == "__main__":
    sys.exit(main())

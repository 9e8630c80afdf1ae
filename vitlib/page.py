"""Pages: what of an executed notebook may be published, and its HTML without scripts. No torch."""

from __future__ import annotations

import ast
import functools
import html
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlib import files, params

if TYPE_CHECKING:
    from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent / "templates"
# The last defence: a browser runs no script that got into a page, and fetches nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# Kinds of output that a page shows; widgets and scripts would not work in it.
SHOWN = ("text/html", "text/markdown", "text/latex", "text/plain", "image/png", "image/jpeg", "image/svg+xml")


def _words(text: str) -> set[str]:
    return set(text.split())


# Elements that are removed with their content, and those that stay; of all others only the content stays.
_REMOVED = _words(
    "applet base embed form frame frameset iframe link math meta noscript object script style svg template"
)
_TAGS = _words(
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i img"
    " ins kbd li mark ol p pre progress s samp small span strong sub summary sup table tbody td tfoot th"
    " thead tr u ul"
)
_ATTRIBUTES = {
    "*": {"class", "id", "title"},
    **{"a": {"href"}, "img": {"src", "alt", "width", "height"}, "progress": {"value", "max"}},
    **{"th": {"colspan", "rowspan", "scope"}, "td": {"colspan", "rowspan"}, "col": {"span"}},
    **{"ol": {"start"}, "details": {"open"}},
}
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[a-z0-9+/=]*", re.IGNORECASE)


class PageError(RuntimeError):
    """A notebook that cannot be read; the message names it."""


# -------------------------------------------------------------------------------------------- sanitising


def clean(source: str | bytes) -> str:
    """`source` with its text, tables and pictures; no script, style, frame or form, nothing from elsewhere."""
    import nh3

    return nh3.clean(
        source.decode() if isinstance(source, bytes) else str(source),
        tags=_TAGS,
        clean_content_tags=_REMOVED,
        attributes=_ATTRIBUTES,
        attribute_filter=_allowed,
        url_schemes={"http", "https", "mailto", "data"},
    )


def _allowed(tag: str, name: str, value: str) -> str | None:
    """`data:` addresses only as pictures, and pictures only from `data:` addresses."""
    if tag == "img" and name == "src":
        return value if _PICTURE.fullmatch(value) else None
    scheme = re.sub(r"[\0-\x20]", "", value)  # browsers ignore control characters and spaces there
    return None if name == "href" and scheme.lower().startswith("data:") else value


# ---------------------------------------------------------------------------------------------- tidying


def tidy(executed: NotebookNode) -> NotebookNode:
    """`executed` fit to publish: progress bars in their last state, no widgets, no path of this machine."""
    executed.cells = [cell for cell in executed.cells if "papermill-error-cell-tag" not in _tags(cell)]
    executed.metadata.pop("widgets", None)
    origin = executed.metadata.pop("papermill", {})
    kept = {key: origin[key] for key in ("parameters", "start_time", "duration", "version") if key in origin}
    executed.metadata["papermill"] = scrubbed(kept)
    for cell in executed.cells:
        if "injected-parameters" in _tags(cell):
            cell.source = scrubbed(cell.source)
        if cell.cell_type == "code":
            outputs = [output for output in cell.outputs if not _is_widget(output)]
            tidied = [_tidy_output(output) for output in _joined(outputs)]
            cell.outputs = [output for output in tidied if output.get("text", "-").strip()]  # no empty streams
    return executed


def _tags(cell: NotebookNode) -> Sequence[str]:
    return cell.metadata.get("tags", ())


def _is_widget(output: NotebookNode) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """`outputs` with consecutive pieces of one stream joined, so that a progress bar is seen whole."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if output.output_type == "stream" and last and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _tidy_output(output: NotebookNode) -> NotebookNode:
    if output.output_type == "stream":
        output.text = scrubbed(last_state(output.text))
    elif output.output_type == "error":
        output.evalue, output.traceback = scrubbed(output.evalue), scrubbed(output.traceback)
    else:
        for kind in output.data.keys() - {"image/png", "image/jpeg"}:
            output.data[kind] = scrubbed(output.data[kind])
    return output


def last_state(text: str) -> str:
    """`text` as a terminal would show it: a carriage return overwrites the line."""
    text = re.sub(r"\x1b\[\d*[A-DJK]", "", text.replace("\r\n", "\n"))
    lines = (line.rstrip("\r").rsplit("\r", maxsplit=1)[-1] for line in text.split("\n"))
    return "\n".join(lines)


def scrubbed(value: Any) -> Any:
    """`value` (text, or lists and mappings of it) with the project's root as `.` and the home folder as `~`.

    Files of installed libraries start at the library's name.
    """
    if isinstance(value, str):
        for pattern, short in _machine_paths(str(files.project_root()), str(Path.home())):
            value = pattern.sub(short, value)
        return value
    if isinstance(value, Mapping):
        return type(value)({key: scrubbed(item) for key, item in value.items()})
    return [scrubbed(item) for item in value] if isinstance(value, list) else value


@functools.cache
def _machine_paths(root: str, home: str) -> list[tuple[re.Pattern[str], str]]:
    """Patterns of this machine's folders; the root first, as it is often inside the home folder."""
    # A colour code may precede a path, and its last letter must not count as part of a name.
    before, after = r"(^|[^\w.~-]|\x1b\[[\d;]*m)", r"(?![\w-]|\.\w)"
    kernel = rf"{re.escape(tempfile.gettempdir())}/ipykernel_\d+/\d+\.py"
    library = r"/[\w./+-]*/(?:site|dist)-packages/"  # a warning names its file
    pairs = [(folder, short) for folder, short in ((root, "."), (os.path.realpath(root), "."), (home, "~"))]
    patterns = [
        (re.compile(before + re.escape(folder) + after), rf"\g<1>{short}")
        for folder, short in pairs
        if len(Path(folder).parts) > 1  # a home of `/` would match every path
    ]
    return [(re.compile(kernel), "<cell>"), (re.compile(library), ""), *patterns]


def display(path: Path) -> str:
    """The path as a user would type it: relative to the project if it is inside."""
    root = files.project_root()
    return str(path.absolute().relative_to(root)) if path.absolute().is_relative_to(root) else str(path)


# ---------------------------------------------------------------------------------------------- rendering


def reports(folder: str | Path) -> list[tuple[str, str]]:
    """The study's reports in order, each with its status: done, failed (if the newest run was) or missing."""
    folder = Path(folder)
    found = [*folder.glob("[0-9]*_*.html"), *(files.project_root() / "notebooks").glob("[0-9]*_*.ipynb")]

    def status(stem: str) -> str:
        if (folder / f"{stem}.failed.html").exists():
            return "failed"
        return "done" if (folder / f"{stem}.html").exists() else "missing"

    stems = {path.stem.removesuffix(".failed") for path in found}
    return [(stem, status(stem)) for stem in sorted(stems, key=lambda s: (int(re.match(r"\d+", s)[0]), s))]


def render(ipynb: str | Path) -> Path:
    """Write the page of an executed notebook beside it, `.html`: complete in itself, without scripts."""
    ipynb = Path(ipynb)
    page = ipynb.with_suffix(".html")
    text = page_of(read(ipynb), page)
    with files.atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def write(executed: NotebookNode, ipynb: Path) -> None:
    """Write notebook and page together: both are complete before either is renamed."""
    import nbformat

    page = ipynb.with_suffix(".html")
    text = page_of(executed, page)
    with files.atomic_path(ipynb) as notebook_file, files.atomic_path(page) as page_file:
        notebook_file.write_text(nbformat.writes(executed) + "\n", encoding="utf-8")
        page_file.write_text(text, encoding="utf-8")


def read(path: Path) -> NotebookNode:
    """The notebook at `path`; PageError if there is none."""
    import nbformat

    if not path.is_file():
        raise PageError(f"there is no notebook {display(path)}")
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, UnicodeDecodeError) as error:
        raise PageError(f"{display(path)} is not a notebook: {files.first_line(error)[:300]}") from None


def page_of(executed: NotebookNode, page: Path) -> str:
    """The HTML text of `executed`, for the file `page` beside the study's other reports."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        sanitize_html=True,
        embed_images=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"clean_html": clean},
        mathjax_url="",
        require_js_url="",
        jupyter_widgets_base_url="",
        mermaid_js_url="",
    )
    # A copied study may be in a folder of any name; the notebook's parameters say which study it is.
    study, name = _study_of(executed) or page.absolute().parent.name, page.stem.removesuffix(".failed")
    siblings = [stem for stem, _ in reports(page.parent)]
    about = {
        **{"study": study, "name": name, "policy": POLICY},
        "siblings": siblings if name in siblings else [*siblings, name],
    }
    exporter.log.setLevel(logging.ERROR)
    resources = {"metadata": {"name": f"{name} – {study}"}, "report": about}
    text, _ = exporter.from_notebook_node(_shown(executed), resources)
    return text.replace(' alt="No description has been provided for this image"', ' alt=""')


def _study_of(executed: NotebookNode) -> str:
    """The value of `study` that an executed notebook was given; '' without one that can name a study."""
    found = ""
    for cell in executed.cells:
        if cell.cell_type == "code" and {"parameters", "injected-parameters"} & {*_tags(cell)}:
            value = params.assigned(cell.source).get("study")  # papermill's own cell comes second
            found = value.value if isinstance(value, ast.Constant) else found
    return found if is_study(found) else ""


def is_study(name: object) -> bool:
    """Whether `name` can be a study's (see `files.study_folder`)."""
    try:
        return bool(files.study_folder(name))
    except ValueError:
        return False


def _shown(executed: NotebookNode) -> NotebookNode:
    """A copy with what a page may hold: known kinds of output, integers as sizes of pictures."""
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
    # The template writes them without quotes, so anything but an integer could become a second attribute.
    sizes = metadata if isinstance(metadata, dict) else {}
    return {key: sizes[key] for key in ("width", "height") if type(sizes.get(key)) is int}


def marked_failed(executed: NotebookNode, at: int, cell: int, text: str) -> NotebookNode:
    """`executed` with a banner on top and another before the cell that failed: position `at`, the `cell`-th of code."""
    from nbformat.v4 import new_markdown_cell

    stop = '<div class="alert alert-danger" id="failed-cell">It stopped in the next cell.</div>'
    banner = (
        f'<div class="alert alert-danger">FAILED in <a href="#failed-cell">cell {cell}</a>: {html.escape(text)}</div>'
    )
    executed.cells.insert(at, new_markdown_cell(stop))
    executed.cells.insert(0, new_markdown_cell(banner))
    return executed

"""Pages: what of an executed notebook may be published, and its HTML, in which nothing of it can run. No torch."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlib.report import layout
from vitlib.study import files
from vitlib.study.study import Study

if TYPE_CHECKING:
    from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent / "templates"
# Kinds of output that a page shows; widgets and scripts would not work in it.
SHOWN = ("text/html", "text/markdown", "text/latex", "text/plain", "image/png", "image/jpeg", "image/svg+xml")
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[a-z0-9+/=]*", re.IGNORECASE)
# The last defence: a browser runs no script but the one of `with_script`, and fetches nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SORTED_ROWS = 8  # a page whose longest table has fewer rows needs no script to sort and filter them
_ACTIVATE = """
const last = (sign) => (a, b) => a === b ? 0 : a === -Infinity ? 1 : b === -Infinity ? -1 : sign * (a - b);
Object.assign(jQuery.fn.dataTable.ext.type.order, {"num-asc": last(1), "num-desc": last(-1)});
for (const table of document.querySelectorAll("table")) {
  if (table.rows.length <= ROWS || !table.tHead) continue;
  const filtered = table.rows.length > 2 * ROWS;
  jQuery(table).DataTable({paging: false, info: false, order: [], searching: filtered, autoWidth: false});
}
"""


class PageError(RuntimeError):
    """A notebook that cannot be read; the message names it."""


def clean(source: str | bytes) -> str:
    """`source` with its text, tables and pictures; no script, style, frame or form, nothing from elsewhere."""
    import nh3

    return nh3.clean(
        source.decode() if isinstance(source, bytes) else str(source),
        tags=nh3.ALLOWED_TAGS | {"progress"},
        clean_content_tags={"iframe", "math", "noscript", "object", "script", "style", "svg", "template"},
        attributes=nh3.ALLOWED_ATTRIBUTES
        | {"*": {"class", "id", "title"}, "progress": {"value", "max"}, "td": {"data-order", "style"}},
        attribute_filter=_allowed,
        url_schemes={"http", "https", "mailto", "data"},
    )


def _allowed(tag: str, name: str, value: str) -> str | None:
    """`data:` addresses only as pictures, and pictures only from `data:` addresses."""
    if tag == "img" and name == "src":
        return value if _PICTURE.fullmatch(value) else None
    if name == "style":
        return value if re.fullmatch(r"--bar: ?\d{1,3}%", value) else None
    scheme = re.sub(r"[\0-\x20]", "", value)  # browsers ignore control characters and spaces there
    return None if name == "href" and scheme.lower().startswith("data:") else value


def tidy(executed: NotebookNode) -> NotebookNode:
    """`executed` fit to publish: progress bars in their last state, no widgets, no path of this machine."""
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    tagged = ((cell, cell.metadata.get("tags", ())) for cell in executed.cells)
    executed.cells = [cell for cell, tags in tagged if "papermill-error-cell-tag" not in tags]
    executed.metadata.pop("widgets", None)
    run = executed.metadata.pop("papermill", {})
    kept = ("parameters", "start_time", "duration", "version")
    executed.metadata["papermill"] = {key: run[key] for key in kept if key in run}
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    widget = "application/vnd.jupyter.widget-view+json"
    for cell in code:
        cell.outputs = [output for output in cell.outputs if widget not in output.get("data", ())]
    executed, _ = CoalesceStreamsPreprocessor().preprocess(executed, {})  # the last state of a progress bar
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = re.sub(r"\x1b\[\d*[A-DJK]", "", output.text)  # colours stay, cursor movements do not
        cell.outputs = [output for output in cell.outputs if output.get("text", "-").strip()]  # no empty streams
    return scrubbed(executed)


def scrubbed(value: Any) -> Any:
    """`value` (text, or lists and mappings of it) with the project's root as `.` and the home folder as `~`.

    Files of installed libraries start at the library's name.
    """
    if isinstance(value, str):
        for pattern, short in _machine_paths(str(files.project_root()), str(Path.home())):
            value = pattern.sub(short, value)
        return value
    if isinstance(value, Mapping):
        texts = {key: scrubbed(item) for key, item in value.items() if key not in ("image/png", "image/jpeg")}
        return type(value)({**value, **texts})
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


def reports(folder: str | Path) -> list[tuple[str, str]]:
    """The study's reports in order, each with its status: done, failed (if the newest run was) or missing."""
    folder = Path(folder)
    found = [*folder.glob("[0-9]*_*.html"), *(files.project_root() / "notebooks").glob("[0-9]*_*.ipynb")]
    stems = {path.stem.removesuffix(".failed") for path in found}

    def status(stem: str) -> str:
        if (folder / f"{stem}.failed.html").exists():
            return "failed"
        return "done" if (folder / f"{stem}.html").exists() else "missing"

    return [(stem, status(stem)) for stem in sorted(stems, key=lambda stem: (int(stem.partition("_")[0]), stem))]


def write(executed: NotebookNode, ipynb: Path) -> None:
    """Write notebook and page together: both are complete before either is renamed."""
    import nbformat

    page = ipynb.with_suffix(".html")
    text = page_of(executed, page)
    with files.atomic_path(ipynb) as notebook_file, files.atomic_path(page) as page_file:
        notebook_file.write_text(nbformat.writes(executed) + "\n", encoding="utf-8")
        page_file.write_text(text, encoding="utf-8")


def render(folder: Path) -> list[Path]:
    """Make the pages of the executed notebooks in `folder` again, with today's templates; returns their paths.

    Nothing is run: footers keep the facts of the run. PageError where there is no executed notebook.
    """
    notebooks = sorted(folder.glob("[0-9]*_*.ipynb"))
    if not notebooks:
        raise PageError(f"there is no executed notebook in {display(folder)}")
    pages = [notebook.with_suffix(".html") for notebook in notebooks]
    with Study.at(folder).locked():  # a run would put other notebooks beside these pages
        for notebook, page in zip(notebooks, pages, strict=True):
            with files.atomic_path(page) as file:
                file.write_text(page_of(read(notebook), page), encoding="utf-8")
    return pages


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
        **dict.fromkeys(("mathjax_url", "require_js_url", "jupyter_widgets_base_url", "mermaid_js_url"), ""),
    )
    exporter.log.setLevel(logging.ERROR)
    # A copied study may be in a folder of any name; the notebook's parameters say which study it is.
    study = executed.metadata.get("papermill", {}).get("parameters", {}).get("study") or page.absolute().parent.name
    name, run = page.stem.removesuffix(".failed"), executed.metadata.get("vitlib", {})
    about = {"study": study, "navigation": _navigation(page), "description": layout.finding_of(executed)}
    facts = (run.get(key) for key in ("hardware", "software", "commit", "made"))
    about |= {"made": " · ".join(filter(None, facts)), "date": run.get("made", "")}
    about |= {"notebook": f"{page.stem}.ipynb", "failed": page.stem.endswith(".failed")}
    resources = {"metadata": {"name": f"{layout.title_of(executed) or name} – {study}"}, "report": about}
    text, _ = exporter.from_notebook_node(layout.arrange(_shown(executed)), resources)
    return with_script(layout.with_contents(linked(text)))


def _navigation(page: Path) -> str:
    """Links from `page` to the study's reports; those that have not run yet are words."""
    own, items = page.stem.removesuffix(".failed"), []
    for stem in dict.fromkeys([*(stem for stem, _ in reports(page.parent)), own]):
        name, words = html.escape(stem), html.escape(stem.replace("_", " "))
        ends = (end for end in (".html", ".failed.html") if (page.parent / f"{stem}{end}").exists())
        there = name + end if (end := next(ends, "")) else ""
        if stem == own:
            items.append(f'<a href="{html.escape(page.name)}" aria-current="page">{words}</a>')
        else:
            items.append(f'<a href="{there}">{words}</a>' if there else f"<span>{words}</span>")
    return f'<nav aria-label="Reports">{" ".join(items)}</nav>'


def relink(folder: Path) -> None:
    """Bring the links between the pages in `folder` up to date: a page was written before those that came later."""
    for page in folder.glob("[0-9]*_*.html"):
        text = page.read_text(encoding="utf-8")
        before, found, rest = text.partition('<nav aria-label="Reports">')
        renewed = before + _navigation(page) + rest.partition("</nav>")[2]
        if found and renewed != text:
            with files.atomic_path(page) as temporary:
                temporary.write_text(renewed, encoding="utf-8")


def linked(text: str) -> str:
    """Captions that name a record of the study become links to it."""
    return re.sub(r"<caption>(records/[\w.-]+)</caption>", r'<caption><a href="\1">\1</a></caption>', text)


def _shown(executed: NotebookNode) -> NotebookNode:
    """A copy with what a page may hold: known kinds of output, without their metadata and progress bars."""
    copy = deepcopy(executed)
    copy.metadata = type(copy)(language_info={"name": "python", "pygments_lexer": "ipython3"})
    for cell in copy.cells:
        for output in cell.get("outputs", ()):
            if "data" in output:
                output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN}
                output.metadata = {}  # the template would write sizes from it without quotes
            elif output.get("name") == "stderr":
                output.text = re.sub(r".*\d%\|.*\n?", "", output.text)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("data", output.get("text", "-").strip())]
    return copy


def with_script(text: str) -> str:
    """`text` with its policy and, if a table has at least `SORTED_ROWS` rows, with the script that sorts and filters.

    Whatever the direction, what was not measured is sorted last.
    """
    rows = max((table.count("<tr") for table in re.findall(r"<table.*?</table>", text, re.DOTALL)), default=0) - 1
    policy = POLICY
    if rows >= SORTED_ROWS:
        script = _script()
        policy += f"; script-src '{checksum_of(script)}'"
        before, _, after = text.rpartition("</body>")
        text = f'{before}<script type="module">{script}</script>\n</body>{after}'
    return text.replace("<!--policy-->", f'<meta http-equiv="Content-Security-Policy" content="{policy}" />')


def checksum_of(script: str) -> str:
    """The source expression with which a content security policy allows the script with this text, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@functools.cache
def _script() -> str:
    """DataTables as itables ships it and the lines that apply it, as the text of a module script."""
    (folder,) = importlib.util.find_spec("itables").submodule_search_locations  # importing it would take a second
    source = Path(folder, "html", "dt_bundle.js").read_text(encoding="utf-8")
    # Neither may stand in a <script>: after both, HTML would look for a second end of it. All are in strings.
    source = re.sub(r"<(?=!--|/?script)", r"\\x3c", source)
    jquery = re.search(r"(\w+) as jQuery", source)
    source = re.sub(r"\bexport\s*\{[^}]*\};?", "", source)
    return f"{source}\nconst jQuery = {jquery[1]};{_ACTIVATE.replace('ROWS', str(SORTED_ROWS))}"

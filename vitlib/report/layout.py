"""The order of a page: title, answer, contents, then the notebook's cells, with folded sections. No torch.

A notebook tells its story in the order in which it runs, so its findings come last. A page shows them first: the
outputs of cells with the tag `summary` move below the title. A Markdown cell with the tag `details` starts with a
heading; what follows it, up to the next heading of the same or a higher level, is folded under that heading.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

SUMMARY, DETAILS = "summary", "details"
_HEADING = re.compile(r"(#{1,6}) +(.+)")
_SECTION = re.compile(
    r'<h2 id="(?P<id>[^"]+)">(?P<title>.*?)<a class="anchor-link"'
    r'|<details class="fold level2" id="(?P<fold>[^"]+)"><summary>(?P<folded>.*?)</summary>'
)
# The end of a sentence; a full stop in a name is an entity there, see `tables.text`.
_SENTENCE = re.compile(r"(?<=[.!?])(?:\*\*)? +(?=[A-Z0-9*])")
FEWEST_SECTIONS = 3  # a page with fewer needs no list of contents


def arrange(notebook: NotebookNode) -> NotebookNode:
    """`notebook` with its cells in the order of a page; `cell.metadata.around` holds the HTML before and after each."""
    cells = [cell for cell in notebook.cells if cell.source.strip() or cell.get("outputs")]
    for cell in cells:
        tags = list(cell.metadata.get("tags", ()))
        cell.metadata = type(cell.metadata)(tags=tags, around=["", ""])  # nothing that a notebook's file may hold
    answer = [cell for cell in cells if SUMMARY in cell.metadata.tags and cell.get("outputs")]
    faults = [output for cell in answer for output in cell.outputs if output.output_type == "error"]
    if answer and not faults:  # a notebook that failed is shown as it is
        rest = _folded([cell for cell in cells if SUMMARY not in cell.metadata.tags])
        answer[0].metadata.around[0] = '<section class="answer">'
        answer[-1].metadata.around[1] = "</section>\n<!--contents-->"
        at = next((number for number, cell in enumerate(rest) if cell.source.startswith("# ")), None)
        if at is not None:
            rest[at : at + 1] = [part for part in _title_apart(rest[at]) if part.source.strip()]
        before = 0 if at is None else at + 1
        cells = [*rest[:before], *answer, *rest[before:]]
    notebook.cells = cells
    return notebook


def _title_apart(cell: NotebookNode) -> tuple[NotebookNode, NotebookNode]:
    """A cell that starts with the title, as two: the title, and what introduces the notebook."""
    title, _, introduction = cell.source.partition("\n")
    metadata = {"tags": [], "around": ["", ""]}
    second = {"source": introduction.strip(), "metadata": type(cell.metadata)(metadata), "id": f"{cell.get('id')}-2"}
    return type(cell)(cell | {"source": title}), type(cell)(cell | second)


def _folded(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells, those of sections with the tag `details` between `<details>` and `</details>`."""
    level, ids = 0, set()
    for number, cell in enumerate(cells):
        heading = _HEADING.match(cell.source) if cell.cell_type == "markdown" else None
        if heading and level and len(heading[1]) <= level:
            cells[number - 1].metadata.around[1] += "</details>"
            level = 0
        if heading and DETAILS in cell.metadata.tags and not level:
            level, title = len(heading[1]), plain(heading[2])
            name = re.sub(r"\W+", "-", title.lower()).strip("-")
            name, ids = (f"{name}-{number}" if name in ids else name), ids | {name}
            opened = f'<details class="fold level{level}" id="{name}"><summary>{html.escape(title)}</summary>'
            cell.metadata.around[0] += opened
            cell.source = cell.source.partition("\n")[2].strip()
    if level:
        cells[-1].metadata.around[1] += "</details>"
    return cells


def title_of(notebook: NotebookNode) -> str:
    """The text of the first heading; '' without one."""
    headings = (_HEADING.match(cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    return next((plain(found[2]) for found in headings if found and len(found[1]) == 1), "")


def answer_of(notebook: NotebookNode) -> list[NotebookNode]:
    """The outputs of the cells with the tag `summary`."""
    answer = (cell for cell in notebook.cells if SUMMARY in cell.metadata.get("tags", ()))
    return [output for cell in answer for output in cell.get("outputs", ())]


def finding_of(notebook: NotebookNode) -> str:
    """The first sentence of the answer as plain text; '' where the notebook has none."""
    texts = (output.get("data", {}).get("text/markdown", "") for output in answer_of(notebook))
    lines = (line.strip() for text in texts for line in text.splitlines())
    return next((plain(_SENTENCE.split(line)[0]) for line in lines if line and not line.startswith("#")), "")


def plain(markdown: str) -> str:
    """One line of Markdown as plain text: no marks of lists, emphasis, code or links."""
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", markdown)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub("</?span>", "", text)  # of `tables.text`
    text = re.sub(r"\\([^\w\s]|_)|[*`]", lambda found: found[1] or "", text)
    return html.unescape(text).strip()


def with_contents(page: str) -> str:
    """`page` with a list of its sections below the answer."""
    found = ((m["id"] or m["fold"], m["title"] or m["folded"]) for m in _SECTION.finditer(page))
    items = [f'<li><a href="#{name}">{title}</a></li>' for name, title in found]
    listed = f'<nav class="contents" aria-label="Contents"><ol>{"".join(items)}</ol></nav>'
    return page.replace("<!--contents-->", listed if len(items) >= FEWEST_SECTIONS else "", 1)

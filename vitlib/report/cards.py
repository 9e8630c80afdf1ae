"""What an index shows of a report: its title, finding, date and a small picture, taken from its notebook. No torch."""

from __future__ import annotations

import base64
import html
import io
import re
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from vitlib.report import layout, page

if TYPE_CHECKING:
    from nbformat import NotebookNode

_PHOTOGRAPH = re.compile(r'alt="([^"]*)" src="data:image/(?:png|jpeg|webp);base64,([^"]*)"')  # of `plots.Pictures`
_UNQUOTED = " ='/:;,()-.{}*!?+@$"  # characters that may stay in an address inside double quotes
PHOTOGRAPHS, SIDE = 4, 160  # photographs in a card, and the side in pixels that they are scaled down to


class Thumbnail(NamedTuple):
    """A picture of a card: its `data:` address, its alternative text, and whether it is a figure (SVG)."""

    src: str
    alt: str
    drawn: bool


def card(folder: Path, stem: str, status: str) -> dict[str, Any]:
    """What an index shows of one report: title, finding, pictures, status, date and links."""
    good, failed = folder / f"{stem}.html", folder / f"{stem}.failed.html"
    shown, (number, _, name) = failed if status == "failed" else good, stem.partition("_")
    made: dict[str, Any] = {"stem": stem, "status": status, "title": f"{number} · {name.replace('_', ' ')}"}
    made |= {"finding": "", "date": "", "thumbnails": []} | ({"href": shown.name} if shown.is_file() else {})
    if executed := _executed(shown):
        made |= {"notebook": f"{shown.stem}.ipynb", "date": _date(executed), "finding": layout.finding_of(executed)}
        made |= {"thumbnails": _thumbnails(executed)}
        made |= {"title": f"{number} · {title}"} if (title := layout.title_of(executed)) else {}
    if shown == failed and good.is_file():
        made |= {"last_good": good.name, "last_good_date": _date(_executed(good) or {})}
    return made


def _executed(report: Path) -> NotebookNode | None:
    """The notebook that a page was made of; None where there is none (another process may have removed it)."""
    with suppress(page.PageError):
        return page.read(report.with_suffix(".ipynb"))


def _date(executed: Mapping[str, Any]) -> str:
    """When the notebook ran, to the minute."""
    return executed.get("metadata", {}).get("vitlib", {}).get("made", "")


def _thumbnails(executed: NotebookNode) -> list[Thumbnail]:
    """The first figure of the answer as it is, or its first photographs, scaled down."""
    made: list[Thumbnail] = []
    for output in layout.answer_of(executed):
        data = output.get("data", {})
        if svg := data.get("image/svg+xml"):
            return made or [Thumbnail(_figure(svg), data.get("text/plain", ""), True)]
        for alt, source in _PHOTOGRAPH.findall(data.get("text/html", ""))[: PHOTOGRAPHS - len(made)]:
            made.append(Thumbnail(_small(base64.b64decode(source)), html.unescape(alt), False))
    return made


def _small(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as opened:
        opened.thumbnail((SIDE, SIDE))
        opened.convert("RGB").save(file := io.BytesIO(), "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def drawing(path: Path) -> str:
    """The `data:` address of an SVG file; '' where there is none."""
    return _figure(path.read_text(encoding="utf-8")) if path.is_file() else ""


def _figure(svg: str) -> str:
    """The `data:` address of a figure, coordinates to 0.01 pt; none of its characters ends an attribute in quotes."""
    svg = re.sub(r"scale\([^)]*\)|(?<=\d\.\d\d)\d+", lambda found: found[0] if "s" in found[0] else "", svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg[max(svg.find("<svg"), 0) :]))
    svg = svg if "'" in svg else svg.replace('"', "'")
    return f"data:image/svg+xml,{urllib.parse.quote(svg, safe=_UNQUOTED)}"

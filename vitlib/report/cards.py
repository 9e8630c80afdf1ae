"""What an index shows of a page: its title, finding, date and a small picture, taken from its HTML. No torch."""

from __future__ import annotations

import base64
import html
import io
import re
import time
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

_DATA = re.compile(r"data:image/(svg\+xml|png|jpeg|webp);base64,(.*)", re.DOTALL)
_UNQUOTED = " ='/:;,()-.{}*!?+@$"  # characters that may stay in an address inside double quotes
PHOTOGRAPHS, SIDE = 4, 160  # photographs in a card, and the side in pixels that they are scaled down to


class Thumbnail(NamedTuple):
    """A picture of a card: its `data:` address, its alternative text, and whether it is a figure (SVG)."""

    src: str
    alt: str
    drawn: bool


class _Head(HTMLParser):
    """The title of a page, the contents of its `<meta>` by name, and the attributes of the images in its answer."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.meta, self.images = dict[str, str](), list[dict[str, str]]()
        head, _, body = text.partition("</head>")
        title = re.search(r"<title>(.*?)</title>", head, re.DOTALL)
        self.title = html.unescape(title[1]).rpartition(" – ")[0] if title else ""  # without the study's name
        answer = re.search(r'<section class="answer">.*?</section>', body, re.DOTALL)
        self.feed(head + (answer[0] if answer else ""))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag == "meta":
            self.meta[values.get("name", "")] = values.get("content", "")
        elif tag == "img":
            self.images.append(values)


def card(folder: Path, stem: str, status: str) -> dict[str, Any]:
    """What an index shows of one report: title, finding, pictures, status, date and links."""
    good, failed = folder / f"{stem}.html", folder / f"{stem}.failed.html"
    shown = failed if status == "failed" else good
    number, _, name = stem.partition("_")
    made: dict[str, Any] = {"stem": stem, "status": status, "finding": "", "date": "", "thumbnails": []}
    made["title"] = f"{number} · {name.replace('_', ' ')}"
    if (text := read(shown)) is not None:
        head = _Head(text)
        made |= {"href": shown.name, "date": _date(shown, head), "thumbnails": _thumbnails(head.images)}
        made |= {"title": f"{number} · {head.title}"} if head.title not in ("", stem, shown.stem) else {}
        made |= {"finding": head.meta.get("description", "")}
        made |= {"notebook": f"{shown.stem}.ipynb"} if shown.with_suffix(".ipynb").is_file() else {}
    if shown == failed and (text := read(good)) is not None:
        made |= {"last_good": good.name, "last_good_date": _date(good, _Head(text))}
    return made


def read(page: Path) -> str | None:
    """The text of a page; None where there is none (another process may have removed it)."""
    try:
        return page.read_text(encoding="utf-8")
    except OSError:
        return None


def _date(page: Path, head: _Head) -> str:
    """When the notebook ran, to the minute; for a page of an earlier version, when its file was written."""
    return head.meta.get("date") or time.strftime("%Y-%m-%d %H:%M", time.localtime(page.stat().st_mtime))


def _thumbnails(images: list[dict[str, str]]) -> list[Thumbnail]:
    """The first figure of an answer as it is, or its first photographs, scaled down."""
    made: list[Thumbnail] = []
    for image in images:
        data, alt = _DATA.fullmatch(image.get("src", "")), image.get("alt", "")
        if data and data[1] == "svg+xml":
            return made or [Thumbnail(_figure(base64.b64decode(data[2]).decode()), alt, True)]
        if data and len(made) < PHOTOGRAPHS:
            made.append(Thumbnail(_small(base64.b64decode(data[2])), alt, False))
    return made


def _small(picture: bytes) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        opened.thumbnail((SIDE, SIDE))
        opened.convert("RGB").save(file := io.BytesIO(), "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def drawing(path: Path) -> str:
    """The `data:` address of an SVG file; '' where there is none."""
    return _figure(text) if (text := read(path)) else ""


def _figure(svg: str) -> str:
    """The `data:` address of a figure, coordinates to 0.01 pt; none of its characters ends an attribute in quotes."""
    svg = re.sub(r"scale\([^)]*\)|(?<=\d\.\d\d)\d+", lambda found: found[0] if "s" in found[0] else "", svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg[max(svg.find("<svg"), 0) :]))
    svg = svg if "'" in svg else svg.replace('"', "'")
    return f"data:image/svg+xml,{urllib.parse.quote(svg, safe=_UNQUOTED)}"

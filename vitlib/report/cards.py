"""What the index shows of a page: its title, finding, date and a small picture, taken from its HTML. No torch."""

from __future__ import annotations

import base64
import html
import io
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

_META = r'<meta name="{}" content="([^"]*)"'
_ANSWER = re.compile(r'<section class="answer">(.*?)</section>', re.DOTALL)
_IMAGE = re.compile(r"<img\b[^>]*>")
_DATA = re.compile(r'\bsrc="data:image/(svg\+xml|png|jpeg|webp);base64,([^"]*)"')
_ALT = re.compile(r'\balt="([^"]*)"')
PHOTOGRAPHS, SIDE = 4, 160  # photographs in a card, and the side in pixels that they are scaled down to


class Thumbnail(NamedTuple):
    """A picture of a card: its `data:` address, its alternative text, and whether it is a figure (SVG)."""

    src: str
    alt: str
    drawn: bool


def card(folder: Path, stem: str, status: str) -> dict[str, Any]:
    """What the index shows of one report: title, finding, pictures, status, date and links."""
    good, failed = folder / f"{stem}.html", folder / f"{stem}.failed.html"
    shown = failed if status == "failed" else good
    number, _, name = stem.partition("_")
    made: dict[str, Any] = {"title": f"{number} · {name.replace('_', ' ')}", "status": status, "finding": ""}
    text = read(shown)
    if text:
        title = _found(r"<title>(.*?)</title>", text).rpartition(" – ")[0]
        made |= {"href": shown.name, "date": date(shown, text), "thumbnails": thumbnails(text)}
        made |= {"title": f"{number} · {title}"} if title and title not in (stem, shown.stem) else {}
        made |= {"finding": _found(_META.format("description"), text)}
        notebook = shown.with_suffix(".ipynb")
        made |= {"notebook": notebook.name} if notebook.is_file() else {}
    if shown == failed and (last := read(good)):
        made |= {"last_good": good.name, "last_good_date": date(good, last)}
    return made


def read(page: Path) -> str:
    """The text of a page; '' where there is none (another process may have removed it)."""
    try:
        return page.read_text(encoding="utf-8")
    except OSError:
        return ""


def date(page: Path, text: str) -> str:
    """When the notebook ran, to the minute; for a page of an earlier version, when its file was written."""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(page.stat().st_mtime))
    return _found(_META.format("date"), text) or written


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return html.unescape(found[1]) if found else ""


def thumbnails(text: str) -> list[Thumbnail]:
    """The first figure of the page's answer as it is, or its first photographs, scaled down; none without an answer."""
    answer = _ANSWER.search(text)
    made: list[Thumbnail] = []
    for image in _IMAGE.findall(answer[1]) if answer else ():
        data = _DATA.search(image)
        if not data:
            continue
        alt = html.unescape((_ALT.search(image) or ("", ""))[1])
        if data[1] == "svg+xml":
            return made or [Thumbnail(f"data:image/svg+xml;base64,{data[2]}", alt, True)]
        made.append(Thumbnail(_small(base64.b64decode(data[2])), alt, False))
        if len(made) == PHOTOGRAPHS:
            break
    return made


def _small(picture: bytes) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        opened.thumbnail((SIDE, SIDE))
        opened.convert("RGB").save(file := io.BytesIO(), "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def drawing(path: Path) -> str:
    """The `data:` address of an SVG file; '' where there is none."""
    text = read(path)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}" if text else ""

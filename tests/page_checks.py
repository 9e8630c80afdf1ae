"""What is wrong with the pages of a study, as a reader would see them: lists of faults, empty if there is none."""

import re
from contextlib import ExitStack, contextmanager
from pathlib import Path

import nbformat
import pytest
import shots
from bs4 import BeautifulSoup

from vitlib.report import page as pages_of

HEIGHT, FIRST = 6000, 900  # pixels at 1280: of a page with details closed, and within which its answer ends or is seen
WORDS = 60  # characters of the answer that the first screen shows at least


def pages(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*_*.html"))


def in_text(page: Path) -> list[str]:
    """Faults that need no browser."""
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    described = soup.select_one('meta[name="description"]')
    title, _, study = (soup.title.get_text() if soup.title else "").rpartition(" – ")
    found = [f"no {what}" for what, there in {
        "title of its own": title not in ("", page.stem) and study,
        "description": described and described["content"].strip(),
        "answer": soup.select_one("section.answer"),
        "hardware and commit in the footer": soup.footer and re.search(r"\b[0-9a-f]{10}\b", soup.footer.get_text()),
        "notebook to link to": page.with_suffix(".ipynb").is_file()
        and soup.select_one(f'footer a[href="{page.stem}.ipynb"]'),
    }.items() if not there]  # fmt: skip
    for image in soup("img"):
        if not image.get("alt", "").strip():
            found.append(f"an image without alt: {image['src'][:40]}")
        drawn = image["src"].startswith("data:image/svg+xml")
        if not drawn and not image.find_parent("figure"):  # photographs are in a <figure> with a caption
            found.append(f"a figure that is no SVG: {image['src'][:40]}")
    policy = soup.select_one('meta[http-equiv="Content-Security-Policy"]')["content"]
    scripts = [script.get_text() for script in soup("script")]
    if any(pages_of.checksum_of(script) not in policy for script in scripts) or len(scripts) > 1:
        found.append("a script that is not ours")
    return found + _lost_rows(page, soup)


def _lost_rows(page: Path, soup: BeautifulSoup) -> list[str]:
    notebook = page.with_suffix(".ipynb")
    if not notebook.is_file():
        return []
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output.get("data", {}).get("text/html", "") for cell in cells for output in cell.get("outputs", ())]
    made, shown = sum(len(re.findall(r"<tr\b", text)) for text in outputs), len(soup.select(".jp-RenderedHTML tr"))
    return [f"{made} rows in the notebook, {shown} in the page"] if made != shown else []


@contextmanager
def _browser():
    with ExitStack() as stack:
        try:
            chromium = stack.enter_context(shots.browser())
        except shots.NoBrowser as error:
            pytest.skip(str(error))
        yield chromium


def in_browser(found: list[Path]) -> list[str]:
    """Faults that show in a window: height, place of the answer, width on a phone. Skips the test without a browser."""
    faults = []
    with _browser() as chromium:
        wide, narrow = (chromium.new_page(viewport={"width": width, "height": FIRST}) for width in shots.WIDTHS)
        for page in found:
            wide.goto(page.absolute().as_uri())
            narrow.goto(page.absolute().as_uri())
            height = wide.evaluate("document.documentElement.scrollHeight")
            if height > HEIGHT:
                faults.append(f"{page.name}: {height} px high")
            if wide.evaluate(_SEEN, FIRST) < WORDS:
                faults.append(f"{page.name}: no answer in the first {FIRST} px")
            width = narrow.evaluate("document.documentElement.scrollWidth")
            if width > narrow.viewport_size["width"]:
                faults.append(f"{page.name}: {width} px wide on a phone")
    return faults


# Characters of the answer's text blocks that end within so many pixels from the top of the page.
_SEEN = """
(first) => [...document.querySelectorAll("section.answer :is(p, li)")]
  .filter((block) => block.getBoundingClientRect().bottom <= first)
  .reduce((sum, block) => sum + block.innerText.trim().length, 0)
"""

"""Screenshots of a study's pages, PNG in its folder `shots/`, wide and narrow, light and dark: `make shots`.

`python tools/shots.py outputs/<study> outputs/gallery/demo.png` makes the one of its demo that README shows.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vitlib.report import page
from vitlib.study import files

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS, SCHEMES, HEIGHT = (1280, 390), ("light", "dark"), 900  # pixels of the window


class NoBrowser(RuntimeError):
    """Playwright or a browser is missing; the message says which and how to get it."""


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's Chromium, without a window. NoBrowser where it or playwright is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise NoBrowser("playwright is not installed: run `make setup`, or `pip install playwright`") from None
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise NoBrowser(f"there is no browser for screenshots: install one of {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def write(folder: Path) -> list[Path]:
    """Write `shots/<page>-<width>-<scheme>.png` of the index and each report, at full height; returns the paths."""
    pages = [folder / "index.html", *(folder / f"{stem}.html" for stem, _ in page.reports(folder))]
    found = [path for path in pages if path.is_file()]
    if not found:
        raise page.PageError(f"there is no page in {page.display(folder)}")
    made = []
    with browser() as chromium:
        for width, scheme in ((width, scheme) for width in WIDTHS for scheme in SCHEMES):
            tab = chromium.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
            for path in found:
                tab.goto(path.absolute().as_uri())
                made.append(folder / "shots" / f"{path.stem}-{width}-{scheme}.png")
                with files.atomic_path(made[-1]) as file:
                    tab.screenshot(path=file, full_page=True)
            tab.close()
    return made


def write_demo(folder: Path, target: Path) -> Path:
    """Write the PNG file `target` of the demo of a study after a click on its first example, 1280 pixels wide."""
    from vitlib.deploy import demo, predictor  # torch takes seconds to import
    from vitlib.network import checkpoint

    networks = demo.Networks(predictor.find(folder), checkpoint.pick_device("auto"))
    with demo.serve(networks) as address, browser() as chromium:
        tab = chromium.new_page(viewport={"width": WIDTHS[0], "height": HEIGHT * 3 // 4})
        tab.goto(address)
        tab.locator(".gallery-item").first.click()
        tab.get_by_text("in the network").last.wait_for()
        tab.wait_for_timeout(500)  # milliseconds, in which bars grow to their lengths
        with files.atomic_path(target) as file:
            tab.screenshot(path=file, full_page=True)
    return target


def main(folder: Path, demo: Path | None = None) -> int:
    """Print the paths of the screenshots; returns the exit status, 1 with one line on stderr if there are none."""
    try:
        made = [write_demo(folder, demo)] if demo else write(folder)
        print("\n".join(page.display(path) for path in made))
    except (NoBrowser, page.PageError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))

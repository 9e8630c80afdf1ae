"""Write results and findings of the gallery into README.md, and its hero.svg; `python tools/readme.py` calls it."""

import re
from pathlib import Path

import pandas as pd

from vitlib import speed
from vitlib.measure import benchmark
from vitlib.report import columns, index, page, plots, tables
from vitlib.study import files
from vitlib.study.study import Study

ROOT = Path(__file__).resolve().parents[1]
GALLERY = "outputs/gallery/h200-vit-l16"  # whose results the README shows
_MARKED = r"(<!-- {0}\b.*?-->\n).*?(?=<!-- end of {0} -->)"


def results(study: Study) -> pd.DataFrame:
    """A row a variant, all text, for the smallest and the largest batch size; page 2 has the variants left out here."""
    table = speed.variants(study)
    table = table[(table["gelu"] == "checkpoint") & (table["attention"] != "flash_attention_2")]
    ends = table[table["batch"].isin([table["batch"].min(), table["batch"].max()])]
    return tables.table(*columns.speed(ends, "model_mb", "flips")).text


def results_table(study: Study) -> str:
    """`results` as a Markdown table for GitHub, numbers aligned to the right."""
    table = results(study)
    rows = [list(table), ["---", *["---:"] * (table.shape[1] - 1)], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def findings(study: Study) -> str:
    """The finding of each of the study's pages as a Markdown list with links."""
    found = [index.card(study.folder, stem, status) for stem, status in page.reports(study.folder)]
    said = (card for card in found if card["finding"] and "href" in card)
    return "\n".join(f"- {_escaped(c['finding'])} ([{c['title']}]({GALLERY}/{c['href']}))" for c in said)


def _escaped(plain: str) -> str:
    """Plain text for Markdown; what only matters at the start of a line or in a pair of brackets stays readable."""
    return re.sub(r"[\\`*_\[\]<>|$~]", lambda found: f"\\{found[0]}", plain)


def publish(root: Path) -> None:
    """Write results and findings between their markers in `root`'s README.md, and the gallery's `hero.svg`."""
    study, readme = Study.at(root / GALLERY), root / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, written in {"results": results_table(study), "findings": findings(study)}.items():
        marked = re.compile(_MARKED.format(name), re.DOTALL)
        text, count = marked.subn(lambda m, written=written: f"{m[1]}{written}\n", text)
        if count != 1:
            raise ValueError(f"README.md has {count} places for <!-- {name} --> to <!-- end of {name} -->, not one")
    with files.atomic_path(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")
    plots.hero(benchmark.points(speed.variants(study))).saved(study.folder / "hero.svg")


if __name__ == "__main__":
    publish(ROOT)

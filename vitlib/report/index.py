"""The front page of a study (its hero figure, cards of its reports, variants, records), and that of all studies."""

from __future__ import annotations

import base64
import html
import io
import re
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from vitlib.report import columns, layout, page, tables
from vitlib.study import files, origin, provenance
from vitlib.study.study import Study

if TYPE_CHECKING:
    from nbformat import NotebookNode

HERO = "hero.svg"  # notebook 2 writes it into the study's folder
_META = r'<meta name="(\w+)" content="([^"]*)" />'
_HERO_ALT = "Milliseconds at batch size 1 against size in MB, a point a variant."
_ABOUT = "How small and how fast a Vision Transformer can be made, and what that costs in accuracy: one card a study."
_BASES = {  # kind of base, see `origin`
    "random": "trained from random weights",
    "generator": "pretrained and fine-tuned by notebook 1",
    "stand-in": "fine-tuned from a stand-in for pretrained weights",
    "hub": "fine-tuned from {base}",
    "folder": "fine-tuned from {base}",
}
_PHOTOGRAPH = re.compile(r'alt="([^"]*)" src="data:image/(?:png|jpeg|webp);base64,([^"]*)"')  # of `plots.Pictures`
_UNQUOTED = " ='/:;,()-.{}*!?+@$"  # characters that may stay in an address inside double quotes
PHOTOGRAPHS, SIDE = 4, 160  # photographs in a card, and the side in pixels that they are scaled down to


def write(folder: str | Path) -> Path:
    """Write the study's `index.html`, and that of all studies beside it (`overview`); returns the study's."""
    study = Study.at(folder)
    page.relink(study.folder)
    frame, shown_as, note = _variants(study)
    made = study.read_json("environment") if study.has("environment.json") else {}
    name = made.get("parameters", {}).get("study", study.folder.name)  # a copy may be in a folder of another name
    all_studies = overview(study.folder)
    shown = [card(study.folder, stem, status) for stem, status in page.reports(study.folder)]
    about = {"study": name, "sentence": _sentence(study, made, frame), **_about(shown)}
    # A published study is found through its repository: there, no page of all studies is beside it.
    beside = all_studies and all_studies.parent == study.folder.absolute().parent
    target = _written(
        study.folder / "index.html",
        "index.html.j2",
        title=f"Study {name}: how small and how fast a Vision Transformer can be made",
        description=about["finding"] or about["sentence"],
        about=about,
        hero=_drawing(study.folder / HERO),
        overview="../index.html" if beside else "",
        readme=(study.folder / "README.md").is_file(),
        cards=shown,
        facts=_facts(study, made, about),
        advice=study.read_json("recommendation")["sentence"] if study.has("recommendation.json") else "",
        table="" if frame.empty else page.linked(tables.table(frame, shown_as).to_html()),
        note=note,
        files=_files(study, "."),
        traces=_files(study, "traces"),
    )
    if all_studies:
        _write_overview(all_studies)
    return target


def overview(folder: str | Path) -> Path | None:
    """The page of all studies, `outputs/index.html`; None for a study that is in no such folder."""
    outputs = next((parent for parent in Path(folder).absolute().parents if parent.name == "outputs"), None)
    return outputs / "index.html" if outputs else None


def _write_overview(target: Path) -> None:
    """Write a card for each study with a finished report, from what the heads of their indexes say of them."""
    shown = []
    for own in [*target.parent.glob("*/index.html"), *target.parent.glob("gallery/*/index.html")]:
        with suppress(FileNotFoundError):  # a study may be removed meanwhile
            head = own.read_text(encoding="utf-8").partition("</head>")[0]
            said = {name: html.unescape(text) for name, text in re.findall(_META, head)}
            about = {"href": own.relative_to(target.parent).as_posix(), "hero": _drawing(own.with_name(HERO))}
            shown += [said | about] if said.get("date") else []
    shown.sort(key=lambda study: study["date"], reverse=True)
    _written(target, "studies.html.j2", title="Studies: vitlib", description=_ABOUT, about={}, studies=shown)


def _written(target: Path, template: str, **values: Any) -> Path:
    """The page that `template` makes of `values`, whole or not at all."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(page.TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    css = (page.TEMPLATES / "report" / "static" / "report.css").read_text(encoding="utf-8")
    text = environment.get_template(template).render(css=css, **values)
    with files.atomic_path(target) as temporary:
        temporary.write_text(page.with_script(text), encoding="utf-8")
    return target


def summary(folder: str | Path) -> str:
    """The table of variants as text for a terminal, the status of each report, and the path of the index."""
    study = Study.at(folder)
    frame, shown_as, note = _variants(study)
    if not frame.empty:
        note = repr(tables.table(frame, shown_as))
    states = ", ".join(f"{stem} {status}" for stem, status in page.reports(study.folder))
    where = page.display(study.folder / "index.html")
    return "\n".join([f"Study {study.folder.name}", "", note, "", f"reports: {states or 'none'}", f"open {where}"])


def _variants(study: Study) -> tuple[pd.DataFrame, dict, str]:
    """`columns.overview` of the study, and a note in words if there is no row."""
    try:
        return *columns.overview(study.read("variants")), ""
    except (OSError, ValueError) as error:  # not yet measured, or by an older version
        return pd.DataFrame(), {}, files.first_line(error)


def _about(shown: list[dict[str, Any]]) -> dict[str, str]:
    """The main finding of a study's cards, a text for its hero figure, and the date of its last report."""
    first = sorted(shown, key=lambda card: card["stem"] != "2_evaluate")  # the main result comes first
    drawn = [image["alt"] for card in first[:1] for image in card["thumbnails"] if image["drawn"]]
    finding = next((card["finding"] for card in first if card["finding"]), "")
    date = max((card["date"] for card in shown if card["status"] == "done"), default="")
    return {"finding": finding, "figure": (drawn or [_HERO_ALT])[0], "date": date}


def _sentence(study: Study, made: Mapping[str, Any], frame: pd.DataFrame) -> str:
    """Base, data and hardware of the study in one sentence; `frame` has a row a variant."""
    base, source = origin.of_study(study.folder), made.get("parameters", {}).get("data_source", "")
    count, hardware = 0 if frame.empty else (frame["status"] == "ok").sum(), made.get("hardware", {})
    machine = provenance.facts(made)["hardware"].split(", ")[0] if hardware.get("gpus") else hardware.get("cpu")
    words = [
        f"{count} variants of a Vision Transformer" if count > 1 else "A Vision Transformer",
        _BASES.get(base.get("kind"), "").format(base=Path(base.get("base", "")).name),
        f"evaluated on {'synthetic flowers' if source == 'synthetic' else source}" if source else "",
        f"measured on {machine}" if machine else "",
    ]
    return ", ".join(filter(None, words)) + "."


def _files(study: Study, below: str) -> list[str]:
    found = (path for path in (study.record("x").parent / below).glob("[!.]*.*") if path.is_file())
    return sorted(path.relative_to(study.folder).as_posix() for path in found)


def _facts(study: Study, made: Mapping[str, Any], about: Mapping[str, str]) -> Mapping[str, str]:
    """What the index folds: parameter set, base, date, hardware, versions; unknown ones are left out."""
    facts = {
        "parameter set": f"params/{about['study']}.yaml",
        "base": re.sub("[*`]", "", origin.sentence(study.folder)),
        "last report": about["date"],
        **provenance.facts(made),
        "parameters": ", ".join(f"{key} = {value}" for key, value in made.get("parameters", {}).items()),
    }
    return {fact: text for fact, text in facts.items() if text}


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


def _thumbnails(executed: NotebookNode) -> list[dict[str, Any]]:
    """The first figure of the answer as it is, or its first photographs, scaled down.

    Of each the `data:` address `src`, the alternative text `alt`, and whether it is a figure (`drawn`).
    """
    made: list[dict[str, Any]] = []
    for output in layout.answer_of(executed):
        data = output.get("data", {})
        if svg := data.get("image/svg+xml"):
            return made or [{"src": _figure(svg), "alt": data.get("text/plain", ""), "drawn": True}]
        for alt, source in _PHOTOGRAPH.findall(data.get("text/html", ""))[: PHOTOGRAPHS - len(made)]:
            made.append({"src": _small(base64.b64decode(source)), "alt": html.unescape(alt), "drawn": False})
    return made


def _small(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as opened:
        opened.thumbnail((SIDE, SIDE))
        opened.convert("RGB").save(file := io.BytesIO(), "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _drawing(path: Path) -> str:
    """The `data:` address of an SVG file; '' where there is none."""
    return _figure(path.read_text(encoding="utf-8")) if path.is_file() else ""


def _figure(svg: str) -> str:
    """The `data:` address of a figure, coordinates to 0.01 pt; none of its characters ends an attribute in quotes."""
    svg = re.sub(r"scale\([^)]*\)|(?<=\d\.\d\d)\d+", lambda found: found[0] if "s" in found[0] else "", svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg[max(svg.find("<svg"), 0) :]))
    svg = svg if "'" in svg else svg.replace('"', "'")
    return f"data:image/svg+xml,{urllib.parse.quote(svg, safe=_UNQUOTED)}"

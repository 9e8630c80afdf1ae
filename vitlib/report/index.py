"""The front page of a study: its reports and their status, facts, table of variants; and its summary. No torch."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pandas as pd

from vitlib.report import page, tables
from vitlib.report.tables import Column
from vitlib.study import files, origin, provenance
from vitlib.study.study import Study


def write(folder: str | Path) -> Path:
    """Write the study's `index.html`: reports and their status, facts, table of variants, records. Returns its path."""
    from jinja2 import Environment, FileSystemLoader

    study = Study.at(folder)
    loader = FileSystemLoader(page.TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    frame, columns, note = _variants(study)
    try:
        made = study.read_json("environment")
    except (OSError, ValueError):  # no record yet: the index is still of use
        made = {}
    # A copy of a study may be in a folder of another name.
    name = str(provenance.part(made, "parameters").get("study", ""))
    name = name if re.fullmatch(files.STUDY_NAME, name) else study.folder.name
    text = environment.get_template("index.html.j2").render(
        study=name,
        css=(page.TEMPLATES / "report" / "static" / "report.css").read_text(encoding="utf-8"),
        cards=[_card(study.folder, stem, status) for stem, status in page.reports(study.folder)],
        facts=_facts(study, name, made),
        table="" if frame.empty else tables.table(frame, columns).to_html(),
        note=note,
        files=sorted(path.relative_to(study.folder).as_posix() for path in study.record("x").parent.glob("[!.]*.*")),
    )
    target = study.folder / "index.html"
    with files.atomic_path(target) as temporary:
        temporary.write_text(page.with_script(text), encoding="utf-8")
    return target


def summary(folder: str | Path) -> str:
    """The table of variants as text for a terminal, the status of each report, and the path of the index."""
    study = Study.at(folder)
    frame, columns, note = _variants(study)
    if not frame.empty:
        note = repr(tables.table(frame, columns))
    states = ", ".join(f"{stem} {status}" for stem, status in page.reports(study.folder))
    where = page.display(study.folder / "index.html")
    return "\n".join([f"Study {study.folder.name}", "", note, "", f"reports: {states or 'none'}", f"open {where}"])


def _variants(study: Study) -> tuple[pd.DataFrame, dict[str, str | Column], str]:
    """A row a variant with batch sizes as columns, how to show them, and a note in words if there is no row."""
    try:
        measured = study.read("variants")
    except (OSError, ValueError) as error:  # not yet measured, or by an older version
        return pd.DataFrame(), {}, files.first_line(error)
    frame = measured.drop_duplicates("variant").set_index("variant").fillna({"reason": ""})
    speed = measured.dropna(subset="batch").pivot(index="variant", columns="batch", values="latency_p50_ms")
    columns: dict[str, str | Column] = {
        "variant": "variant",
        "top1": Column("Top-1 (%)", ".1f", 100),
        "agreement_with_baseline": Column("same class as the baseline (%)", ".1f", 100),
        "model_mb": Column("MB", ",.1f"),
    }
    for batch in speed:
        frame[batch] = speed[batch]
        columns[batch] = Column(f"ms, batch {batch:g}", "#.3g" if speed[batch].max() < 100 else ",.1f")
    return frame.reset_index(), {**columns, "reason": "not run because"}, ""


def _card(folder: Path, stem: str, status: str) -> dict[str, str]:
    """What the index shows of one report: title, status, date and links."""
    good, failed = folder / f"{stem}.html", folder / f"{stem}.failed.html"
    shown = failed if status == "failed" else good
    card = {"title": stem.replace("_", " ", 1), "status": status}
    if shown.exists():
        card |= {"href": shown.name, "made": _minute(shown)}
    if shown == failed and good.exists():
        card |= {"last_good": good.name, "last_good_made": _minute(good)}
    return card


def _minute(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def _facts(study: Study, name: str, made: Any) -> dict[str, str]:
    """The lines above the table: parameter set, base, date, hardware, versions; unknown ones are left out."""
    pages = [study.folder / f"{stem}.html" for stem, _ in page.reports(study.folder)]
    parameters = dict(provenance.part(made, "parameters"))
    if parameters.get("data_source", "synthetic") != "synthetic":  # they only apply to synthetic pictures
        for unused in ("image_size", "pictures_per_class"):
            parameters.pop(unused, None)
    facts = {
        "parameter set": f"params/{name}.yaml",
        "base": re.sub("[*`]", "", origin.sentence(study.folder)),
        "last report": max((_minute(path) for path in pages if path.exists()), default=""),
        **provenance.facts(made),
        "parameters": ", ".join(f"{key} = {value}" for key, value in parameters.items()),
    }
    return {fact: text for fact, text in facts.items() if text}

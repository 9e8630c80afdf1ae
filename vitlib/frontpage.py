"""The front page of a study: its reports and their status, facts, table of variants. Level 4, no torch."""

import csv
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitlib import files, origin, publish
from vitlib.params import NOTEBOOKS, STUDY

TEMPLATES = Path(__file__).parent / "templates"
# The last line of defence: a script that got into a page is not run by a browser, and nothing is fetched.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# Columns of records/variants.csv in the index, with their heading.
COLUMNS = {
    "variant": "variant",
    "status": "status",
    "model_mb": "model MB",
    "batch": "batch",
    "latency_p50_ms": "P50 ms",
    "throughput_img_s": "img/s",
    "top1": "Top-1",
    "agreement_with_baseline": "agreement",
    "reason": "reason",  # text of any length stands last, so that the numbers stay in line
}


def reports(folder: str | Path) -> list[tuple[str, str]]:
    """The study's reports in order, each with its status: done, failed (the newest run was) or missing.

    A notebook that `make study` does not run is no missing one, and where only such have run nothing is missing.
    """
    folder, apart = Path(folder), set(NOTEBOOKS) - set(STUDY)
    found = list(folder.glob("[0-9]*_*.html"))
    if not found or any(path.stem.removesuffix(".failed") not in apart for path in found):
        notebooks = (files.project_root() / "notebooks").glob("[0-9]*_*.ipynb")
        found += [path for path in notebooks if path.stem not in apart]
    stems = {path.stem.removesuffix(".failed") for path in found}

    def status(stem: str) -> str:
        if (folder / f"{stem}.failed.html").exists():
            return "failed"
        return "done" if (folder / f"{stem}.html").exists() else "missing"

    return [(stem, status(stem)) for stem in sorted(stems, key=lambda s: (int(re.match(r"\d+", s)[0]), s))]


def index(study_folder: str | Path) -> Path:
    """The study's `index.html`, written anew: reports and their status, facts, table of variants, records."""
    from jinja2 import Environment, FileSystemLoader

    folder = Path(study_folder)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    head, rows = _variants(folder)
    text = environment.get_template("index.html.j2").render(
        study=study_of(folder),
        policy=POLICY,
        css=(TEMPLATES / "report" / "static" / "report.css").read_text(encoding="utf-8"),
        cards=[_card(folder, stem, status) for stem, status in reports(folder)],
        facts=_facts(folder),
        headings=COLUMNS,
        head=head,
        rows=rows,
        files=sorted(path.relative_to(folder).as_posix() for path in (folder / "records").glob("[!.]*.*")),
    )
    target = folder / "index.html"
    with files.atomic_path(target) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    return target


def study_of(folder: Path) -> str:
    """The study's name as its record says; a copy may lie in a folder of another name. Else that of the folder."""
    name = _part(_environment(folder), "parameters").get("study")
    return name if is_study(name) else folder.name


def is_study(name: object) -> bool:
    """Whether `name` can be a study's (see `files.study_folder`)."""
    try:
        return bool(files.study_folder(name))
    except ValueError:
        return False


def _environment(folder: Path) -> Any:
    for name in ("environment.json", "bench.json"):  # the second where nothing but `make bench` has run
        with suppress(OSError, ValueError):  # no record yet: the index is still of use
            return json.loads((folder / "records" / name).read_text(encoding="utf-8"))
    return {}


def _card(folder: Path, stem: str, status: str) -> dict[str, str]:
    """What the index shows of one report: its title, status, when it was made, and where to click."""
    good, failed = folder / f"{stem}.html", folder / f"{stem}.failed.html"
    shown = failed if status == "failed" else good
    made = _minute(shown) if shown.exists() else ""
    last_good = good.name if status == "failed" and good.exists() else ""
    return {
        "title": stem.replace("_", " ", 1),
        "status": status,
        "href": shown.name if shown.exists() else "",
        "made": made,
        "last_good": last_good,
        "last_good_made": _minute(good) if last_good else "",
    }


def _minute(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def _facts(folder: Path) -> dict[str, str]:
    """The lines above the table: parameter set, date, hardware, versions; what no record tells is absent."""
    made = _environment(folder)
    pages = [folder / f"{stem}.html" for stem, _ in reports(folder)]
    git = _part(made, "git")
    facts = {
        # A bench with random weights has none.
        "parameter set": "" if study_of(folder) == "bench" else f"params/{study_of(folder)}.yaml",
        "base": origin.sentence(folder).replace("**", "").replace("`", ""),
        "last report": max((_minute(page) for page in pages if page.exists()), default=""),
        "hardware": _hardware_line(_part(made, "hardware")),
        "software": _software_line(made),
        "commit": str(git.get("commit") or "")[:10] + (" with changes" if git.get("dirty") else ""),
        "parameters": ", ".join(f"{name} = {value}" for name, value in _applying(_part(made, "parameters")).items()),
    }
    return {name: text for name, text in facts.items() if text}


def _part(record: Any, key: str) -> dict[str, Any]:
    """The mapping under `key`, an empty one if there is none: a record of another kind must not stop us."""
    part = record.get(key) if isinstance(record, dict) else None
    return part if isinstance(part, dict) else {}


def _applying(parameters: dict[str, Any]) -> dict[str, Any]:
    """Without the parameters of the synthetic pictures where the pictures are others."""
    idle = () if parameters.get("data_source", "synthetic") == "synthetic" else ("image_size", "pictures_per_class")
    return {name: value for name, value in parameters.items() if name not in idle}


def _software_line(made: Any) -> str:
    versions = _part(made, "versions")
    named = {"Python": made.get("python") if isinstance(made, dict) else None, **versions}
    shown = ("Python", "torch", "cuda", "transformers", "bitsandbytes")
    return ", ".join(f"{name} {named[name]}" for name in shown if named.get(name))


def _hardware_line(hardware: dict[str, Any]) -> str:
    """One line of the record's `hardware`: the GPUs, or else why none, then CPU, cores and memory."""
    gpus = [str(_part({"gpu": gpu}, "gpu").get("name", gpu)) for gpu in hardware.get("gpus") or ()]
    reason = str(hardware.get("gpus_reason") or "")
    parts = [
        f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else "".join(gpus) or reason,
        str(hardware.get("cpu") or ""),
        f"{hardware['cores_usable']} cores" if hardware.get("cores_usable") else "",
        f"{hardware['memory_gib']} GiB memory" if hardware.get("memory_gib") else "",
    ]
    return ", ".join(part for part in parts if part)


def _variants(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns (those of COLUMNS that the record has) and rows of records/variants.csv, made readable."""
    path = folder / "records" / "variants.csv"
    if not path.exists():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        head = [name for name in COLUMNS if name in (table.fieldnames or ())]
        return head, [{name: _readable(row[name]) for name in head} for row in table]


def _readable(value: str | None) -> str:
    """A number with 4 digits, thousands grouped; other text as it is; nothing for what was not measured."""
    try:
        number = float(value or "nan")
    except ValueError:
        return str(value)
    if not math.isfinite(number):
        return ""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def summary(study_folder: str | Path) -> str:
    """The table of variants as text for a terminal, the status of each report, and the path of the index."""
    folder = Path(study_folder)
    head, rows = _variants(folder)
    lines = [f"Study {folder.name}", ""]
    if rows:
        table = [[COLUMNS[name] for name in head], *([row[name] for name in head] for row in rows)]
        lines += _columns(table)
    else:
        lines.append("no variants measured yet")
    states = ", ".join(f"{stem} {status}" for stem, status in reports(folder))
    return "\n".join([*lines, "", f"reports: {states or 'none'}", f"open {publish.display(folder / 'index.html')}"])


def _columns(table: list[list[str]]) -> Iterator[str]:
    """Lines of `table` in columns: numbers to the right, text to the left, control characters visible."""
    table = [[repr(cell)[1:-1] if not cell.isprintable() else cell for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    bodies = zip(*table[1:], strict=True)
    sides = [">" if all(re.fullmatch(r"[-\d.,e+]*", cell) for cell in body) else "<" for body in bodies]
    for row in table:
        cells = zip(row, sides, widths, strict=True)
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

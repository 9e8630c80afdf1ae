"""What the README says of the gallery, of commands and of files is so."""

import re
from pathlib import Path

from vitlib import speed
from vitlib.report import run
from vitlib.study.study import Study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GALLERY = Study.at(ROOT / "outputs" / "gallery" / "h200-vit-l16")


def test_the_table_of_results_is_that_of_the_gallerys_records():
    shown = README.partition("<!-- results")[2].partition("-->")[2].partition("<!-- end of results -->")[0]
    assert shown.strip() == speed.readme_table(GALLERY).strip(), "run: python -m vitlib.speed"


def test_factors_in_the_text_are_those_of_the_records():
    ladder = speed.ladder(GALLERY).set_index("variant")
    for name, batch, digits in re.findall(r"<!-- (\S+) (\d+) -->([\d.]+)×", README):
        found = float(ladder.loc[name, f"batch size {batch}"].split("\u00a0")[0])
        assert f"{found:.{len(digits.partition('.')[2])}f}" == digits, (name, batch)


def test_every_file_that_is_named_exists():
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:params|notebooks|outputs/gallery|tests|vitlib)/[\w./-]+\.\w+)`", README)
    missing = [a or b for a, b in named if not (ROOT / (a or b)).exists() and "mine" not in b]
    assert not missing


def test_every_module_that_is_named_can_be_called():
    for module in re.findall(r"python -m (vitlib[\w.]*)", README):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_map_names_every_module():
    house = README.partition("## The house")[2]
    modules = {path.stem for path in (ROOT / "vitlib").glob("*/*.py")} - {"__init__", "__main__"}
    modules -= {path.stem for path in (ROOT / "vitlib" / "claims").glob("*.py")}
    assert not {name for name in modules if not re.search(rf"\b{name}\b", house)}


def test_its_notebooks_are_those_of_a_study():
    assert re.findall(r"^\| `(\d_\w+)`", README, re.M) == list(run.params.NOTEBOOKS)


def test_the_gallerys_records_have_todays_columns():
    names = [path.stem for path in (GALLERY.folder / "records").glob("*.csv")]
    assert {"variants", "accuracy", "latency", "ablation", "predictions"} <= set(names)
    assert all(len(GALLERY.read(name)) for name in names)  # raises where a column of the schema is missing

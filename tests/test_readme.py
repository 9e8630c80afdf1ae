"""What the README says of the gallery, of commands and of files is so."""

import re
import shutil
from pathlib import Path

import pytest
import readme

from vitlib.report import run
from vitlib.study import files, params
from vitlib.study.study import Study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GALLERY = Study.at(ROOT / "outputs" / "gallery" / "h200-vit-l16")


def test_results_and_findings_are_those_of_the_gallery(tmp_path):
    """The same command on a copy must change nothing."""
    (tmp_path / "README.md").write_text(README)
    copy = tmp_path / readme.GALLERY
    shutil.copytree(GALLERY.folder, copy, ignore=shutil.ignore_patterns("shots", "screenshots", "traces"))
    readme.publish(tmp_path)
    assert (tmp_path / "README.md").read_text() == README, "run: python tools/readme.py"
    drawn = [re.sub(r"[\d.]+", "#", (folder / "hero.svg").read_text()) for folder in (copy, GALLERY.folder)]
    assert len(drawn[0]) == pytest.approx(len(drawn[1]), rel=0.05)  # another matplotlib draws glyphs otherwise
    assert len(README.splitlines()) <= 200


def test_the_parameter_set_for_own_pictures_is_complete(tmp_path, monkeypatch):
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    chosen = params.check(params.load(tmp_path / "mine.yaml") | {"data_source": "synthetic"})
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    with pytest.raises(params.ParameterError, match=r"python -m vitlib\.pretrained` makes the folder"):
        params.remarks(chosen, set(params.MISSING))
    files.resolve(chosen.base_model).mkdir(parents=True)
    params.remarks(chosen, set(params.MISSING))


def test_every_file_that_is_named_exists():
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:params|notebooks|outputs/gallery|tests|vitlib)/[\w./-]+\.\w+)`", README)
    missing = [a or b for a, b in named if not (ROOT / (a or b)).exists() and "mine" not in b]
    assert not missing


def test_every_module_that_is_named_can_be_called():
    for module in re.findall(r"python -m (vitlib[\w.]*)", README):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_map_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text.partition("## The house")[2].partition("vitlib/\n")[2].partition("```")[0]
    modules = {path.stem for path in (ROOT / "vitlib").glob("*/*.py")} - {"__init__", "__main__"}
    modules -= {path.stem for door in ("claims", "ablation") for path in (ROOT / "vitlib" / door).glob("*.py")}
    assert not {name for name in modules if not re.search(rf"\b{name}\b", house)}


def test_messages_under_troubleshooting_are_real():
    """Each is in quotes; what a message fills in is left out of it as an ellipsis."""
    code = " ".join(path.read_text() for path in [*(ROOT / "vitlib").rglob("*.py"), ROOT / "Makefile"])
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    messages = re.findall(r"^\| `(.*?)` \|", README.partition("## Troubleshooting")[2], re.MULTILINE)
    assert len(messages) >= 6
    parts = [part.strip() for message in messages for part in message.split("…") if len(part.strip()) > 3]
    assert [part for part in parts if part not in code] == []


def test_its_notebooks_are_those_of_a_study():
    assert re.findall(r"^\| `(\d_\w+)`", README, re.M) == list(run.params.NOTEBOOKS)


def test_the_gallerys_records_have_todays_columns():
    names = [path.stem for path in (GALLERY.folder / "records").glob("*.csv")]
    assert {"variants", "accuracy", "latency", "ablation", "predictions"} <= set(names)
    assert all(len(GALLERY.read(name)) for name in names)  # raises where a column of the schema is missing

"""The notebooks: both twins in step, told in small cells, and run from the first cell to the last."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import page_checks
import pytest
import torch
from PIL import Image

from vitlib.report import index, run
from vitlib.study import files, params, records

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in params.NOTEBOOKS]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_twins_are_in_step(notebook):
    """`jupytext --test` passes on a pair that disagrees, so the text is compared."""
    config = jupytext.config.load_jupytext_config(str(notebook))
    written = jupytext.writes(jupytext.read(notebook, config=config), fmt="py:percent", config=config)
    assert written.strip() == notebook.with_suffix(".py").read_text().strip(), "run `make sync`"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept_in_a_source(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_calls_and_shows_and_defines_nothing(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not [n for n in nodes if isinstance(n, ast.Try | ast.ClassDef | ast.FunctionDef | ast.For | ast.While)]
        if "parameters" not in cell.metadata.get("tags", ()):
            assert len(cell.source.splitlines()) <= 8, cell.source


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_prose_holds_no_measured_number(notebook):
    """A number typed into the prose of a parametrised report is wrong for every other parameter set."""
    cells = nbformat.read(notebook, as_version=4).cells
    prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "%" not in prose.replace("%cd", "").replace("%pip", ""), "percentages are computed"


@pytest.fixture(scope="module")
def smoke():
    """Runs the notebooks one after the other with params/smoke.yaml; returns the study's folder."""
    folder = files.study_folder("smoke", root=ROOT)
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run left must not pass for what this one wrote
    for notebook in NOTEBOOKS:
        chosen = params.load(ROOT / "params" / "smoke.yaml")
        run.execute(notebook, parameters=chosen, folder=folder)
    index.write(folder)
    return folder


def test_the_whole_study_runs_and_leaves_its_files(smoke):
    for notebook in NOTEBOOKS:
        assert (smoke / notebook.name).is_file()
        assert (smoke / notebook.name).with_suffix(".html").is_file()
    for name in ("finetune", "variants", "kernels", "ablation", "predictions"):
        table = records.read_table(smoke / "records" / f"{name}.csv")
        assert len(table) > 0
        assert list(table.columns[: len(records.COLUMNS[name])]) == list(records.COLUMNS[name])
    for checkpoint in ("merged", "nf4", "nf4-calibrated", "int8"):
        assert (smoke / "checkpoints" / checkpoint / "preprocessor_config.json").is_file()
    assert (smoke / "index.html").is_file()


def test_pages_tell_and_lose_nothing(smoke):
    pages = page_checks.pages(smoke)
    assert {page.stem: faults for page in pages if (faults := page_checks.in_text(page))} == {}
    assert page_checks.in_browser(pages) == []


def test_the_readmes_commands_run(smoke, tmp_path):
    """The one that predicts a folder, in a shell, and the examples in Python; on the smoke study's checkpoints."""
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^\.venv/bin/python -m vitlib predict .*$", text, re.MULTILINE)
    pictures = tmp_path / "flat"
    pictures.mkdir()
    for shade in (40, 200):
        Image.new("RGB", (64, 48), (shade, 90, 90)).save(pictures / f"{shade}.jpg")
    command = command.replace(".venv/bin/python", sys.executable).replace("outputs/demo", str(smoke))
    output = tmp_path / "predictions.csv"
    command = command.replace("predictions.csv", str(output)).replace("path/to/folder", str(pictures))
    done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(records.read_table(output)["status"]) == ["ok", "ok"]
    picture = Image.new("RGB", (64, 48))
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        values = {"pixel_values": torch.zeros(1, 3, 48, 48, dtype=torch.float16), "picture": picture}
        exec(example.replace("outputs/demo/", f"{smoke}/"), values)
        assert values["logits"].shape == (1, len(records.read_json(smoke / "checkpoints" / "merged" / "labels.json")))


def test_snakemake_knows_every_record(smoke):
    """A record that is no output of a rule is not made again when it is missing or old."""
    declared = (ROOT / "Snakefile").read_text()
    written = [file for file in (smoke / "records").iterdir() if file.is_file()]
    assert not [file.name for file in written if f'"{file.stem}"' not in declared and f'"{file.name}"' not in declared]
    for checkpoint in ("merged", "nf4", "nf4-calibrated", "int8"):
        assert (smoke / "checkpoints" / checkpoint / "provenance.json").is_file()
        assert f'"{checkpoint}"' in declared


@pytest.mark.parametrize("study", ["", ".", "..", "a/b", "/", "gallery", "a b", "*", "$(HOME)"])
def test_clean_refuses_what_names_no_study(study, tmp_path):
    done = _clean(tmp_path, study)
    assert done.returncode and "names no study" in done.stderr
    assert (tmp_path / "outputs" / "gallery" / "index.html").is_file() and (tmp_path / "outputs" / "other").is_dir()


def test_clean_removes_one_study_and_nothing_else(tmp_path):
    assert _clean(tmp_path, "demo").returncode == 0
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {f"{place}/{name}/index.html" for place in PLACES for name in ("other", "gallery")}


PLACES = ("outputs", ".snakemake/done")


def _clean(folder, study):
    for place in PLACES:
        for name in ("demo", "other", "gallery"):
            (folder / place / name).mkdir(parents=True)
            (folder / place / name / "index.html").touch()
    command = ["make", "-f", str(ROOT / "Makefile"), "clean", f"STUDY={study}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_reports_show_no_path_and_no_noise_of_this_machine(smoke):
    for page in smoke.glob("*.html"):
        text = re.sub(
            r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL
        )  # DataTables has warnings of its own
        for unwanted in (str(ROOT), str(Path.home()) + "/", "Warning:", "USDT", "gemm_4bit_forward"):
            assert unwanted not in text, f"{page.name} shows {unwanted!r}"

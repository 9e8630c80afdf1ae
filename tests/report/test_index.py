"""The front page of a study and its summary, whatever its records are."""

import json

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from vitlib.report import index
from vitlib.study import records


@pytest.fixture
def study(tmp_path, monkeypatch):
    folder = tmp_path / "outputs" / "demo"
    for name in ("vitlib", "params", "notebooks"):
        (tmp_path / name).mkdir()
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("1_finetune", "2_evaluate", "10_extra"):
        (tmp_path / "notebooks" / f"{name}.ipynb").touch()
    for name in ("1_finetune.html", "2_evaluate.html", "2_evaluate.failed.html"):
        (folder / name).write_text("a page")
    rows = [
        {"variant": "fp32-sdpa", "status": "ok", "model_mb": 1157.4, "batch": batch, "latency_p50_ms": ms, "top1": 0.91}
        for batch, ms in ((1, 3.14159), (32, 412.3))
    ]
    rows += [
        {"variant": "<script>alert(1)</script>\x1b[1m", "status": "not run", "reason": "no CUDA device, <b>none</b>"}
    ]
    records.write_table(pd.DataFrame(rows, columns=records.COLUMNS["variants"]), folder / "records" / "variants.csv")
    environment = {
        "hardware": {"cpu": "<i>CPU</i>", "cores_usable": 2, "gpus_reason": "no CUDA device"},
        "parameters": {"study": "h200", "data_source": "data/flowers", "image_size": 48, "seed": 0},
    }
    (folder / "records" / "environment.json").write_text(json.dumps(environment))
    base = {"base": "x", "kind": "stand-in", "origin": "trained here"}
    (folder / "records" / "base.json").write_text(json.dumps(base))
    return folder


def test_index_shows_status_in_order_and_escapes(study):
    soup = BeautifulSoup(index.write(study).read_text(), "html.parser")
    cards = [(card.h3.get_text(), card["class"][1]) for card in soup.select(".card")]
    assert cards == [("1 finetune", "done"), ("2 evaluate", "failed"), ("10 extra", "missing")]
    assert [a["href"] for a in soup.select(".card a")] == [
        *("1_finetune.html", "2_evaluate.failed.html", "2_evaluate.html")
    ]
    assert soup("script") == soup("b") == soup("i") == []
    assert soup.select_one('a[href="records/variants.csv"]')


def test_the_table_has_a_row_a_variant_and_a_column_a_batch_size(study):
    soup = BeautifulSoup(index.write(study).read_text(), "html.parser")
    rows = [[cell.get_text() for cell in row(["td", "th"])] for row in soup.select("table tr")]
    assert rows[0][:4] == ["variant", "Top-1 (%)", "same class as the baseline (%)", "MB"]
    assert rows[0][4:] == ["ms, batch 1", "ms, batch 32", "not run because"]
    assert rows[1] == ["FP32 · SDPA", "91.0", "–", "1,157.4", "3.14", "412.3", ""]
    assert rows[2][0].startswith("<script>alert(1)</script>") and rows[2][-1] == "no CUDA device, <b>none</b>"
    assert len(rows) == 3


def test_a_copied_study_keeps_its_name_and_says_what_its_base_is(study):
    soup = BeautifulSoup(index.write(study).read_text(), "html.parser")
    text = soup.get_text()
    assert "Study h200" in text and "params/h200.yaml" in text and "Study demo" not in text
    assert "no CUDA device, <i>CPU</i>, 2 cores" in text
    assert "seed = 0" in text and "image_size" not in text  # of synthetic pictures, and these are none
    assert "no pretrained network. It was trained here" in text
    assert not soup.select("details dd, details p")  # the base is not folded away


def test_an_index_is_made_of_any_records(study):
    assert "run 2_evaluate first" in index.write(study.with_name("new")).read_text()
    (study / "records" / "variants.csv").write_text("variant\nfp32\n")
    for name in ("environment", "base"):
        (study / "records" / f"{name}.json").write_text("[")
    text = index.write(study).read_text()
    assert "lacks the columns" in text and "Study demo" in text


def test_summary_names_variants_reports_and_index(study):
    lines = index.summary(study).splitlines()
    assert lines[2].split()[0] == "variant" and lines[3].startswith("FP32 · SDPA   ")
    assert lines[4].startswith(r"<script>alert(1)</script>\x1b[1m") and lines[4].endswith("no CUDA device, <b>none</b>")
    assert lines[-2] == "reports: 1_finetune done, 2_evaluate failed, 10_extra missing"
    assert lines[-1] == "open outputs/demo/index.html"

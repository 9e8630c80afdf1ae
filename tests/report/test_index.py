"""The front page of a study and its summary, whatever its records are."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from vitlib.report import index, page, plots
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
    cards = [(card.h2.get_text(), card["class"][1]) for card in soup.select(".card")]
    assert cards == [("1 · finetune", "done"), ("2 · evaluate", "failed"), ("10 · extra", "missing")]
    assert [a["href"] for a in soup.select(".card a")] == [
        *("1_finetune.html", "2_evaluate.failed.html", "2_evaluate.html")
    ]
    assert soup("script") == soup("b") == soup("i") == []
    meaning = soup.select_one('.files a[href="records/variants.csv"]').parent.get_text()
    assert "a row a variant" in meaning


def test_the_table_has_a_row_a_variant_and_a_column_a_batch_size(study):
    soup = BeautifulSoup(index.write(study).read_text(), "html.parser")
    rows = [[cell.get_text() for cell in row(["td", "th"])] for row in soup.select("table tr")]
    assert rows[0][:4] == ["variant", "Top-1 (%)", "same class (%)", "MB"]
    assert rows[0][4:] == ["ms, batch 1", "ms, batch 32", "not run because"]
    assert rows[1] == ["FP32 · SDPA", "91.0", "–", "1,157.4", "3.14", "412", ""]
    assert rows[2][0].startswith("<script>alert(1)</script>") and rows[2][-1] == "no CUDA device, <b>none</b>"
    assert len(rows) == 3


def test_a_copied_study_keeps_its_name_and_says_what_its_base_is(study):
    soup = BeautifulSoup(index.write(study).read_text(), "html.parser")
    text = soup.get_text()
    assert "Study h200" in text and "params/h200.yaml" in text and "Study demo" not in text
    assert "no CUDA device, <i>CPU</i>, 2 cores" in text
    assert "seed = 0" in text
    assert "not a pretrained network. It was trained here" in text
    assert soup.select_one(".lead").get_text() == (
        "A Vision Transformer, fine-tuned from a stand-in for pretrained weights, evaluated on data/flowers, "
        "measured on <i>CPU</i>."
    )
    assert soup.footer.get_text().startswith("no CUDA device") and soup.title.get_text().startswith("Study h200: ")


def test_an_index_is_made_of_any_records(study):
    assert "run 2_evaluate first" in index.write(study.with_name("new")).read_text()
    (study / "records" / "variants.csv").write_text("variant\nfp32\n")
    for name in ("environment", "base"):
        (study / "records" / f"{name}.json").unlink()
    text = index.write(study).read_text()
    assert "lacks the columns" in text and "Study demo" in text


def test_summary_names_variants_reports_and_index(study):
    lines = index.summary(study).splitlines()
    assert lines[2].split()[0] == "variant" and lines[3].startswith("FP32 · SDPA   ")
    assert lines[4].startswith(r"<script>alert(1)</script>\x1b[1m") and lines[4].endswith("no CUDA device, <b>none</b>")
    assert lines[-2] == "reports: 1_finetune done, 2_evaluate failed, 10_extra missing"
    assert lines[-1] == "open outputs/demo/index.html"


SVG = '<?xml version="1.0"?>\n<svg viewBox="0 0 9 9">\n <path d="M 1.23456 2" transform="scale(0.015625)"/>\n</svg>'


def report(folder, stem, finding, figure, made="2020-01-02 03:04"):
    """An executed report whose answer is a sentence and a figure, as SVG or as HTML."""
    outputs = [new_output("display_data", data=data) for data in ({"text/markdown": f"- {finding} More."}, figure)]
    cells = [new_markdown_cell('# Evaluation: <b> & "x"')]
    cells += [new_code_cell("1", outputs=[output], metadata={"tags": ["summary"]}) for output in outputs]
    notebook = new_notebook(cells=cells, metadata={"vitlib": {"made": made}})
    page.write(notebook, folder / f"{stem}.ipynb")


def test_a_card_has_the_finding_and_the_picture_of_its_page(study):
    photographs = plots.picture_grid([np.full((400, 300, 3), 99, np.uint8)] * 9, ["a 'rose' \"x\""] * 9)._repr_html_()
    report(study, "1_finetune", "Top-1 is 79 %.", {"text/html": photographs, "text/plain": ""})
    (study / "2_evaluate.failed.html").unlink()
    report(study, "2_evaluate", 'NF4 is "7.3 times" faster.', {"image/svg+xml": SVG, "text/plain": "Two <points>"})
    soup = BeautifulSoup(index.write(study).read_text(), "html.parser")
    first, second, _ = soup.select(".card")
    assert second.h2.get_text() == '2 · Evaluation: <b> & "x"' and "2020-01-02 03:04" in second.get_text()
    assert second.select_one(".finding").get_text() == 'NF4 is "7.3 times" faster.'
    assert soup.select_one('meta[name="description"]')["content"] == 'NF4 is "7.3 times" faster.'
    assert [link["href"] for link in second("a")] == [*["2_evaluate.html"] * 2, "2_evaluate.ipynb"]
    assert second.img["alt"] == "Two <points>" and "scale(0.015625)" in second.img["src"]
    assert second.img["src"].startswith("data:image/svg+xml,%3Csvg viewBox='0 0 9 9'%3E%3Cpath d='M 1.23 2'")
    assert [image["alt"] for image in first("img")] == ["a 'rose' \"x\""] * 4
    small = Image.open(io.BytesIO(base64.b64decode(first.img["src"].partition(",")[2])))
    assert small.format == "WEBP" and max(small.size) == 160
    # The hero figure takes the text of the page's figure, and that card does not repeat the same picture.
    (study / "hero.svg").write_text(SVG)
    soup = BeautifulSoup(index.write(study).read_text(), "html.parser")
    assert soup.select_one("img.hero")["alt"] == "Two <points>" and not soup.select(".card")[1]("img")


def test_all_studies_have_a_page_with_the_newest_first(study):
    outputs = study.parent
    report(study, "1_finetune", "NF4 is faster.", {"image/svg+xml": SVG, "text/plain": "x"}, "2021-01-02 03:04")
    for name in ("empty", "gallery/best", "new"):
        (outputs / name).mkdir(parents=True)
    for name in ("new", "gallery/best"):
        report(outputs / name, "1_finetune", f"Top-1 of {name}.", {"image/svg+xml": SVG, "text/plain": "x"})
    (outputs / "new" / "hero.svg").write_text(SVG)
    with ThreadPoolExecutor(4) as pool:  # runs of several studies that end together
        list(pool.map(index.write, [study, outputs / "new", outputs / "gallery" / "best"] * 4))
    index.write(study)
    soup = BeautifulSoup((outputs / "index.html").read_text(), "html.parser")
    links = [card.h2.a["href"] for card in soup.select(".card")]
    assert links[0] == "demo/index.html"
    assert set(links[1:]) == {"new/index.html", "gallery/best/index.html"}
    text = soup.get_text()
    assert "h200" in text and "Top-1 of new." in text and "best (gallery)" in text and "2020-01-02" in text
    assert len(soup("img")) == 1 and soup.select_one('a[href="new/index.html"] img')
    assert {path.name for path in outputs.iterdir()} == {"demo", "empty", "gallery", "new", "index.html"}
    back = [
        BeautifulSoup((outputs / name / "index.html").read_text(), "html.parser") for name in ("new", "gallery/best")
    ]
    assert [bool(one.select_one('a[href="../index.html"]')) for one in back] == [True, False]


def test_a_study_in_no_folder_of_outputs_has_its_own_index_only(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    assert index.write(tmp_path / "elsewhere").is_file() and index.overview(tmp_path / "elsewhere") is None
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]

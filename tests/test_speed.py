"""Page 6 from the records alone: a study of today, and one that an earlier version wrote."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import readme

from vitlib import speed
from vitlib.report import plots, tables
from vitlib.study import records
from vitlib.study.study import Study

GALLERY = Path(__file__).parents[1] / "outputs" / "gallery" / "h200-vit-l16"
# weights, attention, execution, batch 1 (ms), batch 8 (ms)
MEASURED = [
    ("fp32", "sdpa", "eager", 8.0, 24.0),
    ("fp16", "sdpa", "eager", 8.0, 8.0),
    ("nf4", "sdpa", "eager", 20.0, 20.0),
    ("fp16", "sdpa", "graph", 2.0, 4.0),
    ("fp16", "direct", "fused-graph", 1.0, 3.0),
    ("nf4", "direct", "fused-graph", 1.25, 3.0),
    ("w8a8", "direct", "fused-graph", 1.25, 2.0),
]


def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    """variants.csv with what page 6 reads, and latency.csv whose medians are those of MEASURED."""
    rows, samples, first = [], [], dict(zip((1, 8), MEASURED[0][3:], strict=True))
    for number, (weights, attention, execution, *times) in enumerate(MEASURED):
        name = "-".join((weights, attention, execution)).removesuffix("-eager")
        for batch, ms in zip((1, 8), times, strict=True):
            jitter = [0.99, 0.995, 1.0, 1.0, 1.0, 1.0, 1.005, 1.01]
            samples += [(name, batch, r, 0, ms * j, np.nan) for r, j in enumerate(jitter)]
            row = dict.fromkeys(records.COLUMNS["variants"], 0.5) | {
                "variant": name,
                "weights": weights,
                "batch": batch,
            }
            row |= {"attention": attention, "execution": execution, "status": "ok", "reason": "", "flips": number}
            row |= {"latency_p50_ms": ms, "latency_low_ms": ms, "latency_high_ms": ms, "throughput_img_s": 1e3 / ms}
            row["against_baseline"] = "faster"
            row |= dict.fromkeys(("times_baseline", "times_baseline_low", "times_baseline_high"), first[batch] / ms)
            row |= {"model_mb": 100.0 / (number + 1), "held_mb": 100.0 / (number + 1) + 48 * (weights == "nf4")}
            row |= {"reference": "nf4-sdpa", "relative_error": number / 1e3, "agreement_with_reference": 1.0}
            rows.append(row | {"gelu": "checkpoint"})
    missing = dict.fromkeys(rows[0], np.nan) | {
        "variant": "fp8-direct-fused-graph",
        "status": "not run",
        "reason": "old",
    }
    return pd.DataFrame([*rows, missing]), pd.DataFrame(samples, columns=list(records.COLUMNS["latency"]))


@pytest.fixture
def study(tmp_path):
    found = Study.at(tmp_path / "unit")
    table, latencies = frames()
    found.write("variants", table)
    found.write("latency", latencies)
    return found


def test_each_row_adds_one_technique_to_the_row_that_it_names(study):
    rows = speed.ladder(study).set_index("variant")
    assert rows["technique"].to_dict() == {
        "fp32-sdpa": "out of the box",
        "fp16-sdpa": "FP16 weights",
        "nf4-sdpa": "NF4 weights",
        "fp16-sdpa-graph": "CUDA graph",
        "fp16-direct-fused-graph": "fused kernels",
        "nf4-direct-fused-graph": "NF4 weights",  # its graph was not measured: FP16 in the same form was
        "w8a8-direct-fused-graph": "W8A8 weights",
    }
    assert rows.loc["fp16-direct-fused-graph", "added to"] == "FP16 · SDPA · CUDA graph"
    assert rows.loc["nf4-direct-fused-graph", "added to"] == "FP16 · fused · CUDA graph"
    order = list(rows.index)
    assert order[0] == "fp32-sdpa" and order.index("fp16-sdpa-graph") < order.index("fp16-direct-fused-graph")
    factors = rows["batch size 1"].str.split(tables.NO_BREAK).str[0]
    assert factors.tolist()[1:] == ["1.00", "0.40", "4.00", "2.00", "0.80", "0.80"]


def test_factors_are_those_of_the_medians_with_an_interval(study):
    (row,) = (r for r in speed.against_fp16(study).to_dict("records") if r["variant"] == "w8a8-direct-fused-graph")
    value, low, _, high = row["batch size 8"].replace("(", "").replace(")", "").split(tables.NO_BREAK)
    assert value == "1.50" and float(low) <= 1.5 <= float(high)


def test_the_row_of_the_readme(study):
    row = readme.results(study).set_index("variant").loc["NF4 · fused · CUDA graph"]
    assert row["weights (MB)"] == "16.7" and row["ms, batch 1 (95 % interval)"] == "1.25"
    assert row["times faster, batch 8"] == "8.00" and row["class changed"] == "5"


def test_the_readmes_table_and_the_hero_are_published_between_the_markers(study, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "GALLERY", "unit")
    file = tmp_path / "README.md"
    marks = ("<!-- findings: -->", "<!-- end of findings -->", "before", "<!-- results: here -->", "old")
    file.write_text("\n".join([*marks, "<!-- end of results -->"]))
    readme.publish(tmp_path)
    before, marker, head, align, *rows, end = file.read_text().splitlines()[-len(MEASURED) - 5 :]
    assert (before, marker, end) == ("before", "<!-- results: here -->", "<!-- end of results -->")
    assert head.startswith("| variant | weights (MB) |") and len(rows) == len(MEASURED)
    assert align.startswith("| --- | ---: |") and len({row.count("|") for row in (head, align, *rows)}) == 1
    assert "<svg" in (study.folder / "hero.svg").read_text()
    file.write_text("no markers")
    with pytest.raises(ValueError, match="0 places"):
        readme.publish(tmp_path)


def test_the_headline_walks_to_the_fastest(study):
    first, second, *_ = speed.headline(study).splitlines()
    assert "the fastest is FP16 · fused · CUDA graph, 1.00 ms, against FP32 · SDPA 8.0 times faster" in first
    assert "FP16 weights 1.00×, CUDA graph 4.00×, fused kernels 2.00×" in first
    assert "the fastest quantized one is NF4 · fused" in second and "NF4 weights 0.80×" in second


def test_a_baseline_that_is_the_fastest_is_not_compared_with_itself(study):
    study.write("variants", study.read("variants").query("variant == 'fp32-sdpa'"))
    assert "8.00 ms, the baseline itself." in speed.headline(study)


PAGE = ("ladder", "against_fp16")


@pytest.mark.parametrize("function", PAGE)
def test_the_gallery_has_a_page(function):
    """Its records were written by an earlier version: what is missing there is left out."""
    frame = getattr(speed, function)(Study.at(GALLERY))
    assert len(frame) and "<td" in tables.table(frame).to_html()


def test_every_record_of_the_gallery_is_readable_today(tmp_path):
    for path in GALLERY.parent.glob("*/records/*.csv"):
        assert len(records.read_table(path).columns)
    shutil.copytree(GALLERY / "records", tmp_path / "old" / "records", ignore=shutil.ignore_patterns("traces"))
    old = Study.at(tmp_path / "old")
    assert len(plots.ladder(speed.variants(old), speed.ladder(old)["variant"]).figure.axes) == 3


def test_without_records_the_notebook_to_run_is_named(tmp_path):
    with pytest.raises(records.MissingRecord, match="2_evaluate"):
        speed.ladder(Study.at(tmp_path))


def test_the_headlines_factors_are_those_of_the_ladder():
    study = Study.at(GALLERY)
    ladder = speed.ladder(study).to_string()
    factors = re.findall(r"([\d.]+)×", speed.headline(study))
    assert len(factors) >= 8 and all(f" {factor}\u00a0(" in ladder for factor in factors)

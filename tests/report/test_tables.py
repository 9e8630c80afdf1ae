"""Tables show what a record holds: rounded, in words, with intervals on one line, and with markup as text."""

import re

import mistune
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vitlib.report import columns, page
from vitlib.report.tables import Column, Markdown, estimate, table, text

FRAME = pd.DataFrame(
    {
        "variant": ["fp32-sdpa", "nf4-direct-fused-graph"],
        "top1": [0.7946, np.nan],
        "low": [0.765, np.nan],
        "high": [0.821, np.nan],
        "count": [1234, 5],
        "note": ["", ""],
    }
)


def test_columns_choose_scale_and_name_what_is_shown():
    columns = {
        "variant": "variant",
        "top1": Column("Top-1 (%)", ".1f", 100),
        ("low", "high"): Column("95 %", ".1f", 100),
    }
    made = table(FRAME, columns).to_html()
    assert "FP32 · SDPA" in made and "NF4 · fused · CUDA graph" in made
    assert ">79.5<" in made and "76.5\u00a0…\u00a082.1" in made and made.count(">–<") == 2
    assert "1,234" not in made


def test_without_columns_everything_is_shown_but_empty_text():
    made = table(FRAME).to_html()
    assert ">1,234<" in made and "note" not in made


def test_markup_in_names_is_shown_as_text():
    made = table(pd.DataFrame({"file": ["<img src=x onerror=alert(1)>", "<!-- a"]})).to_html()
    assert "<img" not in made and "&lt;img" in made and "&lt;!-- a" in made


NAMES = (
    *(
        "*x*",
        "<b>bold</b>",
        "$a$",
        "a|b",
        "_x_",
        "`c`",
        "[a](b)",
        "![a](b)",
        r"\(a\)",
        r"\\(a\\)",
        r"\*",
        "&amp;",
        "&#42;",
    ),
    *(
        "# no",
        "~~s~~",
        "https://e.example/x",
        "<!-- a",
        "$$a$$",
        r"\begin{x}",
        "- a",
        "1. b",
        "x\ny",
        "<script>1</script>",
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_names_in_sentences_are_shown_as_they_are(name, tmp_path):
    """In cells and in outputs; the finding of the page has them too."""
    sentence = f"- The class {text(name)} and **{text(name)}** end."
    shown = new_output("display_data", data={"text/markdown": sentence})
    cells = [new_markdown_cell(sentence), new_code_cell("1", outputs=[shown], metadata={"tags": ["summary"]})]
    soup = BeautifulSoup(page.page_of(new_notebook(cells=cells), tmp_path / "1_x.html"), "html.parser")
    expected = "The class {0} and {0} end.".format(name.replace("\n", " "))
    assert [item.get_text() for item in soup.select("main li")] == [expected] * 2
    # JupyterLab, whose Markdown is plain, looks for mathematics in each run of text without an element in it.
    lab = BeautifulSoup(mistune.html(sentence), "html.parser").li
    assert lab.get_text() == expected
    assert not [part for part in lab.strings if re.search(r"\$.*\$|\\[a-z(]", part)]
    assert soup.select_one('meta[name="description"]')["content"] == expected


def test_an_empty_table_says_so():
    assert table(FRAME.iloc[:0], none="every file could be used") == Markdown("*every file could be used*")


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((7.346, 7.136, 7.602), "7.35 (7.14 … 7.60)"),
        ((85.4, 82.7, 87.8), "85.4 (82.7 … 87.8)"),
        ((1153.2, 1150.1, 1160.0), "1,153 (1,150 … 1,160)"),
        ((1.2944, 1.2942, 1.2946), "1.29 (1.29 … 1.29)"),
        ((0.1114, 0.1068, 0.1161), "0.11 (0.11 … 0.12)"),
        ((105.0, 98.0, 112.0), "105 (98 … 112)"),
        ((1.0, 1.0, 1.0), "1.00"),
        ((2.345, np.nan, np.nan), "2.35"),
        ((0.0, -0.5, 0.5), "0.0 (-0.5 … 0.5)"),
        ((np.nan, np.nan, np.nan), "–"),
    ],
)
def test_an_estimate_has_the_digits_that_its_interval_allows(bounds, text):
    assert estimate(*bounds).replace("\u00a0", " ") == text


def test_a_value_with_its_interval_is_one_cell_whose_best_value_is_bold():
    frame = pd.DataFrame({"variant": ["a", "b"], "ms": [2.0, 1.0], "low": [1.9, 0.9], "high": [2.1, 1.1]})
    page = table(frame, {"variant": "variant", ("ms", "low", "high"): Column("ms", ",", best="low")}).to_html()
    assert "<strong>1.00</strong>\u00a0(0.90\u00a0…\u00a01.10)</td>" in page and ">2.00\u00a0(1.90" in page


def test_batch_sizes_become_columns():
    rows = [
        (name, batch, ms * batch, 8 / ms) for batch in (1, 8) for name, ms in (("fp32-sdpa", 8.0), ("nf4-sdpa", 4.0))
    ]
    frame = pd.DataFrame(rows, columns=["variant", "batch", "latency_p50_ms", "times_baseline"])
    frame = frame.assign(latency_low_ms=frame["latency_p50_ms"], latency_high_ms=frame["latency_p50_ms"], model_mb=9.0)
    text = table(*columns.speed(frame, "model_mb")).text
    assert text["ms, batch 8 (95 % interval)"].tolist() == ["64.0", "32.0"]
    assert text["times faster, batch 1"].tolist() == ["1.00", "2.00"] and list(text)[1] == "weights (MB)"
    sizes = table(*columns.size(frame.assign(peak_memory_mb=50.0 * frame["batch"], disk_mb=9.0))).text
    assert sizes["weights + pass (MB), batch 8"].tolist() == ["400", "400"] and "with buffers (MB)" not in sizes


def test_bars_of_a_column_of_zeros_have_no_length():
    made = table(pd.DataFrame({"flips": [0, 0, np.nan]}), {"flips": Column("flips", ".0f", bar=True)}).to_html()
    assert made.count("--bar: 0%") == 2

"""Tables show what a record holds: rounded, in words, with intervals on one line, and with markup as text."""

import numpy as np
import pandas as pd

from vitlib.report.tables import Column, Markdown, table

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
    page = table(FRAME, columns).to_html()
    assert "FP32 · SDPA" in page and "NF4 · fused · CUDA graph" in page
    assert ">79.5<" in page and "76.5\u00a0…\u00a082.1" in page and page.count(">–<") == 2
    assert "1,234" not in page


def test_without_columns_everything_is_shown_but_empty_text():
    page = table(FRAME).to_html()
    assert ">1,234<" in page and "note" not in page


def test_markup_in_names_is_shown_as_text():
    page = table(pd.DataFrame({"file": ["<img src=x onerror=alert(1)>", "<!-- a"]})).to_html()
    assert "<img" not in page and "&lt;img" in page and "&lt;!-- a" in page


def test_an_empty_table_says_so():
    assert table(FRAME.iloc[:0], none="every file could be used") == Markdown("*every file could be used*")

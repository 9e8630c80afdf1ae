"""Figures that are made from records."""

import pandas as pd

from vitlib import plots


def test_fifteen_variants_have_fifteen_colours():
    for count in (3, 10, 15):
        assert len(set(plots._colours([str(number) for number in range(count)]).values())) == count


def test_nearly_equal_ceilings_get_one_label():
    assert plots._near([50.9, 735.0, 741.4, 1200.0]) == [[50.9], [735.0, 741.4], [1200.0]]
    row = {"part": "mlp", "gflop": 1.0, "mb": 1.0, "tflop_s": 10.0, "ceiling_gb_s": 4000.0}
    frame = pd.DataFrame([row | {"variant": f"v{c}", "ceiling_tflop_s": c} for c in (735.0, 741.4)])
    texts = [text.get_text() for text in plots.roofline(frame).axes[0].texts]
    assert texts == ["735 – 741 TFLOP/s"]

"""Figures are made from records, with one colour a weight format and names in words."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitlib.report import plots
from vitlib.study import records, variants

GALLERY = Path(__file__).parents[2] / "outputs" / "gallery" / "h200-vit-l16" / "records"


def drawn(plot: plots.Plot) -> list[str]:
    """The texts of a figure that can be drawn and says what it shows."""
    assert "<svg" in plot._repr_svg_() and repr(plot).endswith(".")
    axes = plot.figure.axes
    texts = [text.get_text() for axis in axes for text in (*axis.texts, *axis.get_yticklabels(), axis.title)]
    legends = [axis.get_legend() for axis in axes if axis.get_legend()]
    return texts + [text.get_text() for legend in legends for text in legend.get_texts()]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return records.read_table(GALLERY / "variants.csv")


def test_figures_of_variants_name_them_in_words(table):
    quality = records.read_table(GALLERY / "accuracy.csv")
    kernels = records.read_table(GALLERY / "kernels.csv")
    for plot in (
        plots.accuracy_against_latency(table, 1, margin=0.02),
        plots.size_against_memory(table, 32),
        plots.throughput_by_batch(table),
        plots.accuracy_intervals(quality, 0.02),
        plots.device_time_by_part(kernels, list(dict.fromkeys(kernels["part"]))),
    ):
        texts = drawn(plot)
        assert "NF4 · fused · CUDA graph" in texts
        assert not set(texts) & set(variants.VARIANTS)


def test_accuracy_is_shown_with_its_interval(table):
    (axis,) = plots.accuracy_against_latency(table, 1, 0.02).figure.axes
    rows = table[table["batch"] == 1]
    low, high = axis.get_ylim()
    assert low < 100 * rows["difference_low"].min() and high > 100 * rows["difference_high"].max()


def test_device_time_of_slow_variants_has_its_own_panel():
    times = {"fp32-sdpa": 100.0, "fp16-sdpa": 10.0, "nf4-sdpa": 11.0, "int8-sdpa": 12.0}
    rows = [{"variant": name, "batch": 8, "part": "mlp", "device_time_us": ms} for name, ms in times.items()]
    slow, others = plots.device_time_by_part(pd.DataFrame(rows), ["mlp"]).figure.axes
    assert [len(axis.patches) for axis in (slow, others)] == [1, 3]
    assert len(plots.device_time_by_part(pd.DataFrame(rows[1:]), ["mlp"]).figure.axes) == 1


def test_labels_at_the_ends_of_lines_keep_order_and_distance(table):
    axis = plots.throughput_by_batch(table).figure.axes[0]
    heights = plots._apart({"a": 100.0, "b": 101.0, "c": 3000.0, "d": 3001.0}, axis)
    assert list(heights) == ["a", "b", "c", "d"] and min(np.diff(list(heights.values()))) > 0.044
    assert len(axis.texts) == table["variant"].nunique()


def test_nearly_equal_ceilings_get_one_label():
    row = {"part": "mlp", "gflop": 1.0, "mb": 1.0, "tflop_s": 10.0, "ceiling_gb_s": 4000.0}
    frame = pd.DataFrame([row | {"variant": f"v{c}", "ceiling_tflop_s": c} for c in (735.0, 741.4, np.nan)])
    assert [text.get_text() for text in plots.roofline(frame).figure.axes[0].texts] == ["735 – 741 TFLOP/s"]
    gallery = drawn(plots.roofline(records.read_table(GALLERY / "roofline.csv")))
    assert {"NF4", "mlp", "hollow: not fused"} <= set(gallery)


def test_a_ladder_has_a_panel_a_batch_size_and_a_row_a_step():
    steps = [("FP32 out of the box", "fp32", 9.0), ("NF4 · fused", "nf4", 1.3)]
    rows = [
        {"label": label, "weights": weights, "batch": batch, "ms": ms * batch, "ms_low": ms * batch, "ms_high": 10 * ms}
        for batch in (1, 8)
        for label, weights, ms in steps
    ]
    plot = plots.ladder(pd.DataFrame(rows))
    assert [axis.get_title() for axis in plot.figure.axes] == ["batch size 1", "batch size 8"]
    assert {label for label, *_ in steps} <= set(drawn(plot))


def test_figures_of_training_ablation_and_pictures_are_drawn():
    history = pd.DataFrame(
        {"epoch": [1, 2], "train_loss": [2, 1], "valid_loss": [2, 1], "top1": [0, 1], "top5": [1, 1]}
    )
    blocks = pd.DataFrame({"bits": [4, 4, 8, 8], "block": [0, 1, 0, 1], "kl_removed": [0.5, 0.1, 0.2, -0.1]})
    blocks = blocks.assign(kl_alone=2e-3, kl_alone_low=1e-3, kl_alone_high=3e-3)
    kept = pd.DataFrame({"bits": [4, 4], "kept": ["none", "head"], "logit_kl": 2e-3}).assign(
        logit_kl_low=1e-3, logit_kl_high=3e-3
    )
    drawn(plots.learning_curves(history))
    assert "4 bits" in drawn(plots.sensitivity_bars(blocks)) and "8 bits" in drawn(plots.alone_bars(blocks))
    assert "head" in drawn(plots.kept_parts(kept, ["none", "head"]))

"""Figures are made from records, with one colour a weight format and names in words."""

from pathlib import Path

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
    kernels = records.read_table(GALLERY / "kernels.csv")
    for plot in (
        plots.ladder(table, table["variant"].unique()),
        plots.device_time_by_part(kernels, list(dict.fromkeys(kernels["part"]))),
    ):
        texts = drawn(plot)
        assert "NF4 · fused · CUDA graph" in texts
        assert not set(texts) & set(variants.VARIANTS)


def test_the_hero_says_what_its_arrow_shows(tmp_path):
    rows = [
        ("fp32-sdpa", 10.0, 1200.0, 1.0),
        ("nf4-sdpa", 20.0, 150.0, 0.5),
        ("nf4-direct-fused-graph", 1.25, 150.0, 8.0),
    ]
    points = pd.DataFrame(rows, columns=["variant", "latency_p50_ms", "model_mb", "times_baseline"])
    points = points.assign(batch=1.0, best=[False, False, True], against_baseline=["", "slower", "faster"])
    plot = plots.hero(points).saved(tmp_path / "hero.svg")
    texts = drawn(plot)
    assert "8.0× faster\n8.0× smaller" in texts and "NF4 out of the box\n20.0 ms, 150 MB" in texts
    assert "8.0× faster" in repr(plot) and (tmp_path / "hero.svg").read_text() == plots.hero(points)._repr_svg_()
    assert [path.name for path in tmp_path.iterdir()] == ["hero.svg"]
    unknown = drawn(plots.hero(points.assign(against_baseline="not shown")))
    assert "8.0× smaller" in unknown and not [text for text in unknown if "faster" in text]
    alone = plots.hero(points.iloc[:1])
    assert drawn(alone) and "arrow" not in repr(alone)


def test_device_time_of_slow_variants_has_its_own_panel():
    times = {"fp32-sdpa": 100.0, "fp16-sdpa": 10.0, "nf4-sdpa": 11.0, "int8-sdpa": 12.0}
    rows = [{"variant": name, "batch": 8, "part": "mlp", "device_time_us": ms} for name, ms in times.items()]
    slow, others = plots.device_time_by_part(pd.DataFrame(rows), ["mlp"]).figure.axes
    assert [len(axis.patches) for axis in (slow, others)] == [1, 3]
    assert len(plots.device_time_by_part(pd.DataFrame(rows[1:]), ["mlp"]).figure.axes) == 1


def test_a_ladder_has_a_panel_a_batch_size_and_a_row_a_variant():
    rows = [(name, batch, ms * batch) for batch in (1, 8) for name, ms in (("fp32-sdpa", 9.0), ("nf4-sdpa", 1.3))]
    frame = pd.DataFrame(rows, columns=["variant", "batch", "latency_p50_ms"])
    ends = {f"latency_{end}_ms": frame["latency_p50_ms"] * factor for end, factor in (("low", 0.9), ("high", 1.1))}
    plot = plots.ladder(frame.assign(**ends), ["fp32-sdpa", "nf4-sdpa"])
    assert [axis.get_title() for axis in plot.figure.axes] == ["batch size 1", "batch size 8"]
    assert {"FP32 · SDPA", "NF4 · SDPA"} <= set(drawn(plot))
    assert "batch size 8: 10.4 (NF4 · SDPA) to 72.0 (FP32 · SDPA) ms" in repr(plot)


def test_figures_of_training_ablation_and_pictures_are_drawn():
    history = pd.DataFrame(
        {"epoch": [1, 2], "train_loss": [2, 1], "valid_loss": [2, 1], "top1": [0, 1], "top5": [1, 1]}
    )
    drawn(plots.learning_curves(history))

"""The figures of the reports, each made from a record's table. No torch.

Every function returns a matplotlib figure; a notebook's last expression shows it. Colour is the weight format, the same
in every figure; marker and line style are the execution.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitlib import variants

# Told apart by colour-blind readers too; the int8 formats share a hue.
COLOURS = {
    **{"fp32": "#000000", "fp16": "#0072B2", "bf16": "#56B4E9", "nf4": "#D55E00"},
    **{"int8": "#009E73", "w8a16": "#7FCDBB", "w8a8": "#00543D", "fp8": "#CC79A7"},
}
_MARKERS = {"eager": "o", "graph": "s", "fused": "^", "fused-graph": "D"}
_LINES = {"eager": "-", "graph": "--", "fused": ":", "fused-graph": "-."}
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#8a8f98"
_STYLE = {
    **{"axes.grid": True, "grid.color": "#dfe3ea", "axes.axisbelow": True, "axes.edgecolor": "#8a8f98"},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
}


def _figure(rows: int = 1, columns: int = 1, *, width: float = 8.0, height: float = 4.5, **grid: object) -> Figure:
    """A figure with `rows` × `columns` axes in `figure.axes`, sizes in inches."""
    with plt.rc_context(_STYLE):
        figure, _ = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **grid)
    plt.close(figure)  # the notebook shows what a cell returns; an open figure would appear twice
    return figure


def _look(name: str) -> dict[str, object]:
    """Colour and marker of a variant; hollow where attention runs in FlashAttention-2."""
    if name not in variants.VARIANTS:
        return {"color": _GREY, "marker": "x"}
    variant = variants.VARIANTS[name]
    colour = COLOURS[variant.weights]
    face = "white" if variant.own_flash else colour
    return {"color": colour, "marker": _MARKERS.get(variant.execution, "*"), "markerfacecolor": face}


def _plain_log(*axes: object) -> None:
    """Ticks of a log scale as plain numbers, at 1, 2 and 5 times a power of ten."""
    for axis in axes:
        axis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(
            plt.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}".strip("0.")[:1] in "25" else "")
        )


def _legend(axis: Axes, **more: object) -> None:
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, **more)


# ---------------------------------------------------------------------------------------------- pictures


def picture_grid(
    images: Sequence[np.ndarray], titles: Sequence[str], *, columns: int = 6, right: Sequence[bool | None] = ()
) -> Figure:
    """uint8 pictures (h, w, 3) with a title each: green if `right` is true, red if false, black if None."""
    rows = max(-(-len(images) // columns), 1)
    figure = _figure(rows, columns, width=1.9 * columns, height=2.25 * rows)
    for axis in figure.axes:
        axis.axis("off")
    marks = list(right) or [None] * len(images)
    for axis, image, title, mark in zip(figure.axes, images, titles, marks, strict=False):
        axis.imshow(image)
        colour = "black" if mark is None else "#1a7f37" if mark else "#c0272d"
        axis.set_title(title, fontsize=8.5, color=colour, parse_math=False)  # a name may hold a $
    return figure


# ---------------------------------------------------------------------------------------------- training


def learning_curves(history: pd.DataFrame) -> Figure:
    """Loss in training and validation, and Top-1 and Top-5 in validation, by epoch."""
    figure = _figure(1, 2, width=10, height=3.8)
    left, right = figure.axes
    for (column, label), colour in zip(
        (("train_loss", "training (augmented)"), ("valid_loss", "validation")), (_BLUE, _ORANGE), strict=True
    ):
        left.plot(history["epoch"], history[column], marker="o", label=label, color=colour)
    for (column, label), colour in zip((("top1", "Top-1"), ("top5", "Top-5")), (_ORANGE, _GREY), strict=True):
        right.plot(history["epoch"], 100 * history[column], marker="o", label=label, color=colour)
    left.set(xlabel="epoch", ylabel="cross entropy (nats)", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Validation accuracy")
    for axis in figure.axes:
        axis.legend(frameon=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


# -------------------------------------------------------------------------------------- table of variants


def accuracy_against_latency(table: pd.DataFrame, batch: int, margin: float | None = None) -> Figure:
    """Top-1 minus the baseline's with its interval, against median latency; up and left is better.

    `margin`, a fraction of the pictures, is drawn as a band: an interval inside it is non-inferior.
    """
    rows = _ran(table, batch)
    low, high = (
        100 * (rows["difference"] - rows["difference_low"]),
        100 * (rows["difference_high"] - rows["difference"]),
    )
    figure = _scatter(rows, "latency_p50_ms", 100 * rows["difference"], error=(low, high))
    (axis,) = figure.axes
    axis.axhline(0, color="black", linewidth=0.8)
    if margin is not None:
        axis.axhspan(-100 * margin, 0, color=_GREY, alpha=0.15, zorder=0)
    axis.set(xlabel="median latency (ms, log scale)", ylabel="Top-1 minus the baseline's (points, 95 % interval)")
    axis.set_title(f"Accuracy against latency, batch size {batch}")
    return figure


def size_against_memory(table: pd.DataFrame, batch: int) -> Figure:
    """Peak memory of a forward pass against the size of the weights; down and left is better."""
    rows = _ran(table, batch)
    figure = _scatter(rows, "model_mb", rows["peak_memory_mb"])
    figure.axes[0].set(xlabel="weights (MB, log scale)", ylabel="weights + peak of a pass (MB)")
    figure.axes[0].set_title(f"Size against peak memory, batch size {batch}")
    return figure


def _scatter(rows: pd.DataFrame, x: str, y: pd.Series, error: tuple[pd.Series, pd.Series] | None = None) -> Figure:
    """A point a variant on a log x axis, with vertical errors (below, above) if given."""
    figure = _figure(width=9)
    (axis,) = figure.axes
    for at, name in enumerate(rows["variant"]):
        bars = None if error is None else [[error[0].iloc[at]], [error[1].iloc[at]]]
        axis.errorbar(
            rows[x].iloc[at], y.iloc[at], yerr=bars, linestyle="", capsize=3, markersize=8, elinewidth=0.8,
            label=variants.label(name), **_look(name),
        )  # fmt: skip
    axis.set_xscale("log")
    _plain_log(axis.xaxis)
    _legend(axis)
    return figure


def _ran(table: pd.DataFrame, batch: int) -> pd.DataFrame:
    return table[(table["status"] == "ok") & (table["batch"] == batch)]


def throughput_by_batch(table: pd.DataFrame) -> Figure:
    """Measured images per second by batch size, a line a variant, labelled at its end."""
    rows = table[table["status"] == "ok"].dropna(subset="throughput_img_s")
    names = list(dict.fromkeys(rows["variant"]))
    figure = _figure(width=9, height=max(4.5, 0.3 * len(names) + 1))
    (axis,) = figure.axes
    ends = {}
    for name in names:
        own = rows[rows["variant"] == name].sort_values("batch")
        line = _LINES[variants.VARIANTS[name].execution] if name in variants.VARIANTS else "-"
        axis.plot(own["batch"], own["throughput_img_s"], linestyle=line, **_look(name))
        ends[name] = float(own["throughput_img_s"].iloc[-1])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="batch size (log scale)", ylabel="images per second (log scale)", title="Throughput, measured")
    axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    _plain_log(axis.yaxis)
    for name, height in _apart(ends, axis).items():
        axis.annotate(
            variants.label(name), (1.0, height), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=_look(name)["color"],
        )  # fmt: skip
    return figure


def _apart(ends: Mapping[str, float], axis: Axes, gap: float = 0.045) -> dict[str, float]:
    """Heights (fractions of the axis) of labels for lines that end at `ends`, in order and at least `gap` apart."""
    low, high = np.log(axis.get_ylim())
    names = sorted(ends, key=ends.__getitem__)
    heights = {name: float((np.log(ends[name]) - low) / (high - low)) for name in names}
    for below, name in itertools.pairwise(names):
        heights[name] = max(heights[name], heights[below] + gap)
    top = 1.0
    for name in reversed(names):
        heights[name] = min(heights[name], top)
        top = heights[name] - gap
    return heights


def accuracy_intervals(quality: pd.DataFrame, margin: float) -> Figure:
    """Top-1 of each variant minus the baseline's, in points, with its paired interval; the margin is a band."""
    rows = quality[quality["verdict"] != "baseline"]
    figure = _figure(width=8, height=0.4 * len(rows) + 1.4)
    (axis,) = figure.axes
    for at, row in enumerate(rows.to_dict("records")):
        error = [[row["difference"] - row["difference_low"]], [row["difference_high"] - row["difference"]]]
        axis.errorbar(100 * row["difference"], at, xerr=100 * np.array(error), capsize=4, **_look(row["variant"]))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvspan(-100 * margin, 0, color=_GREY, alpha=0.15, zorder=0)
    axis.set_yticks(range(len(rows)), [variants.label(name) for name in rows["variant"]])
    axis.invert_yaxis()
    axis.set(xlabel="Top-1 minus the baseline's (points), 95 % interval; shaded: within the margin")
    return figure


# -------------------------------------------------------------------------------------------------- speed


def device_time_by_part(kernels: pd.DataFrame, parts: Sequence[str]) -> Figure:
    """Device time of one pass in milliseconds, stacked by part of the model, a bar a variant.

    Variants that take more than three times the median have a panel of their own, so that the others can be read.
    """
    order = list(dict.fromkeys(kernels["variant"]))
    sums = kernels.groupby(["variant", "part"])["device_time_us"].sum().unstack(fill_value=0).reindex(order) / 1000
    total = sums.sum(axis=1)
    panels = [rows for rows in (sums[total > 3 * total.median()], sums[total <= 3 * total.median()]) if len(rows)]
    sizes = [len(rows) + 1.2 for rows in panels]
    figure = _figure(len(panels), width=9, height=0.34 * sum(sizes) + 1, height_ratios=sizes)
    shown = [part for part in parts if part in sums and sums[part].sum() > 0]
    colours = plt.get_cmap("tab10").colors
    for axis, rows in zip(figure.axes, panels, strict=True):
        left = np.zeros(len(rows))
        for number, part in enumerate(shown):
            label = "attention with its linears" if part == "attention" else part  # a table shows the kernel alone
            names = [variants.label(name) for name in rows.index]
            axis.barh(names, rows[part], left=left, label=label, color=colours[number % 10])
            left = left + rows[part].to_numpy()
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    figure.axes[0].set_title("Where the device time goes")
    figure.axes[-1].set_xlabel(f"device time of one pass (ms), batch size {kernels['batch'].iloc[0]}")
    _legend(figure.axes[-1])
    return figure


def ladder(frame: pd.DataFrame) -> Figure:
    """Median latency of each step with its interval, a panel a batch size, a row a step, colour by weight format.

    Columns: label (in words), weights, batch, ms, ms_low, ms_high. Rows keep the order of their first appearance.
    """
    sizes, labels = sorted(frame["batch"].unique()), list(dict.fromkeys(frame["label"]))
    figure = _figure(1, max(len(sizes), 1), width=3.2 + 3.4 * len(sizes), height=0.3 * len(labels) + 1.2, sharey=True)
    for axis, size in zip(figure.axes, sizes, strict=False):
        for row in frame[frame["batch"] == size].to_dict("records"):
            error = [[row["ms"] - row["ms_low"]], [row["ms_high"] - row["ms"]]]
            colour = COLOURS.get(row["weights"], _GREY)
            axis.errorbar(row["ms"], labels.index(row["label"]), xerr=error, fmt="o", capsize=3, color=colour)
        axis.set_xscale("log")
        _plain_log(axis.xaxis)
        axis.set(xlabel="median latency (ms, log scale)", title=f"batch size {size}")
    figure.axes[0].set_yticks(range(len(labels)), labels, fontsize=9)
    figure.axes[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def roofline(table: pd.DataFrame) -> Figure:
    """Achieved TFLOP/s of each variant's computing parts against operations per byte, under the measured ceilings."""
    rows = table[table["gflop"] > 0].assign(intensity=lambda t: 1e3 * t["gflop"] / t["mb"])
    figure = _figure(width=9, height=5)
    (axis,) = figure.axes
    markers = dict(zip(sorted(rows["part"].unique()), "osD^vP", strict=False))
    for row in rows.to_dict("records"):
        variant = variants.VARIANTS.get(row["variant"])
        colour = _look(row["variant"])["color"]
        face = colour if variant is not None and variant.fused else "white"
        axis.plot(
            row["intensity"], row["tflop_s"], linestyle="", markersize=7, marker=markers[row["part"]], color=colour,
            markerfacecolor=face, zorder=3,
        )  # fmt: skip
    span = np.geomspace(rows["intensity"].min() / 2, rows["intensity"].max() * 2, 100)
    for ceiling, shown in rows.groupby("ceiling_tflop_s"):
        axis.plot(span, np.minimum(ceiling, span * shown["ceiling_gb_s"].iloc[0] / 1e3), color="black", linewidth=1)
    for near in _near(sorted(rows["ceiling_tflop_s"].dropna().unique())):
        ends = dict.fromkeys(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (near[0], near[-1]))
        axis.annotate(f"{' – '.join(ends)} TFLOP/s", (span[-1], near[-1]), ha="right", va="bottom", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="achieved TFLOP/s")
    axis.set_title("Achieved rate and the measured ceilings")
    formats = dict.fromkeys(v.weights for v in map(variants.VARIANTS.get, rows["variant"]) if v is not None)
    dot = {"linestyle": "", "color": _GREY}
    handles = [plt.Line2D([], [], marker="s", linestyle="", color=COLOURS[f], label=f.upper()) for f in formats]
    handles += [plt.Line2D([], [], marker=marker, label=part, **dot) for part, marker in markers.items()]
    handles += [plt.Line2D([], [], marker="o", markerfacecolor="white", label="hollow: not fused", **dot)]
    _legend(axis, handles=handles)
    return figure


def _near(values: Sequence[float], factor: float = 1.5) -> list[list[float]]:
    """Ascending values in groups within `factor` of the first: their labels would overlap."""
    groups: list[list[float]] = []
    for value in values:
        if groups and value <= factor * groups[-1][0]:
            groups[-1].append(value)
        else:
            groups.append([value])
    return groups


# ----------------------------------------------------------------------------------------------- ablation


def sensitivity_bars(blocks: pd.DataFrame) -> Figure:
    """By block: the share of the quantization error (KL) that goes away when this block stays in FP16/BF16.

    The dotted line is an equal share for every block.
    """
    figure, panels = _by_bits(blocks)
    for axis, rows in panels:
        axis.bar(rows["block"], 100 * rows["kl_removed"], color=_BLUE)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axhline(100 / len(rows), color=_GREY, linestyle=":")
        axis.set(xlabel="block kept in FP16/BF16", ylabel="KL that goes away (%)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def alone_bars(blocks: pd.DataFrame) -> Figure:
    """By block: the KL from the unquantized network when only this block is quantized, with its interval."""
    figure, panels = _by_bits(blocks)
    for axis, rows in panels:
        error = [rows["kl_alone"] - rows["kl_alone_low"], rows["kl_alone_high"] - rows["kl_alone"]]
        axis.bar(rows["block"], rows["kl_alone"], yerr=error, capsize=2, color=_GREEN)
        axis.set(xlabel="block quantized, all others in FP16/BF16", ylabel="mean KL (nats)")
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def kept_parts(frame: pd.DataFrame, kept: Sequence[str]) -> Figure:
    """Mean KL from the unquantized network with its interval, for a few configurations."""
    figure, panels = _by_bits(frame[frame["kept"].isin(kept)], height=3.2)
    for axis, rows in panels:
        rows = rows.set_index("kept").reindex(kept)
        error = [rows["logit_kl"] - rows["logit_kl_low"], rows["logit_kl_high"] - rows["logit_kl"]]
        axis.barh(rows.index, rows["logit_kl"], xerr=error, capsize=4, color=_ORANGE)
        axis.invert_yaxis()
        axis.set(xlabel="mean KL from the unquantized network (nats)")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    return figure


def _by_bits(frame: pd.DataFrame, height: float = 3.8) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each number of bits, and each panel with its rows."""
    bits = sorted(frame["bits"].unique())
    figure = _figure(1, len(bits), width=5.5 * len(bits), height=height)
    for axis, number in zip(figure.axes, bits, strict=True):
        axis.set_title(f"{number} bits")
    return figure, [(axis, frame[frame["bits"] == number]) for axis, number in zip(figure.axes, bits, strict=True)]

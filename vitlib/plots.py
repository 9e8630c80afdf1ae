"""The pictures of the reports, each from a record's table. Level 4: no torch.

Every function returns a matplotlib figure and changes nothing else; a notebook's last expression shows it.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from vitlib import variants

PALETTE = "colorblind"


def table(frame: pd.DataFrame, *, digits: int = 2, index: bool = False, none: str = "none") -> Styler | Markdown:
    """A table to read: rounded, thousands separated, a dash for what was not measured; `none` where it has no row.

    Columns of notes that say nothing are left out.
    """
    if frame.empty:
        return Markdown(f"*{none}*")
    frame = frame.loc[:, [not frame[name].astype(str).eq("").all() for name in frame]]
    numbers = frame.select_dtypes("number")
    whole = [name for name in numbers if (numbers[name].dropna() % 1 == 0).all()]
    formats = {name: "{:,.0f}" if name in whole else f"{{:,.{digits}f}}" for name in numbers}
    text = [name for name in frame if name not in numbers]
    left = [{"selector": f"th.col{list(frame).index(name)}", "props": "text-align: left"} for name in text]
    styled = frame.style.format(formats, na_rep="–").set_properties(subset=text, **{"text-align": "left"})
    styled = styled.set_table_styles(left)
    return styled if index else styled.hide(axis="index")


def _axes(columns: int = 1, *, width: float = 8.0, height: float = 4.5) -> tuple[Figure, np.ndarray]:
    sns.set_theme(style="whitegrid", palette=PALETTE)
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    plt.close(figure)  # the notebook shows what a cell returns; an open figure would appear twice
    return figure, axes[0]


def _colours(names: Sequence[str]) -> dict[str, tuple]:
    few = len(names) <= len(sns.color_palette(PALETTE))  # beyond that it would begin anew
    return dict(zip(names, sns.color_palette(PALETTE if few else "husl", max(len(names), 1)), strict=False))


def picture_grid(
    images: Sequence[np.ndarray], titles: Sequence[str], *, columns: int = 6, right: Sequence[bool | None] = ()
) -> Figure:
    """uint8 pictures (h, w, 3) with a title each; green where `right` is true, red where false, black where None."""
    rows = -(-len(images) // columns)
    sns.set_theme(style="white")
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.9 * columns, 2.25 * rows), layout="constrained", squeeze=False
    )
    plt.close(figure)
    for axis in axes.flat:
        axis.axis("off")
    marks = list(right) or [None] * len(images)
    for axis, image, title, mark in zip(axes.flat, images, titles, marks, strict=False):
        axis.imshow(image)
        colour = "black" if mark is None else "#1a7f37" if mark else "#c0272d"
        axis.set_title(title, fontsize=8.5, color=colour)
    return figure


def learning_curves(history: pd.DataFrame) -> Figure:
    """Loss of training and validation, and Top-1 and Top-5 of validation, by epoch."""
    figure, (left, right) = _axes(2, width=10, height=3.8)
    for column, label in (("train_loss", "training (augmented)"), ("valid_loss", "validation")):
        left.plot(history["epoch"], history[column], marker="o", label=label)
    for column, label in (("top1", "Top-1"), ("top5", "Top-5")):
        right.plot(history["epoch"], 100 * history[column], marker="o", label=label)
    left.set(xlabel="epoch", ylabel="cross entropy (nats)", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Validation accuracy")
    for axis in (left, right):
        axis.legend()
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def accuracy_against_latency(table: pd.DataFrame, batch: int) -> Figure:
    """Top-1 against median latency at one batch size; up and left is better."""
    return _scatter(
        _ran(table, batch),
        x="latency_p50_ms",
        y="top1",
        scale=100,
        labels=("median latency (ms, log scale)", "Top-1 (%)"),
        title=f"Accuracy against latency, batch {batch}",
    )


def size_against_memory(table: pd.DataFrame, batch: int) -> Figure:
    """Peak memory of a forward pass against the size of the weights; down and left is better."""
    return _scatter(
        _ran(table, batch),
        x="model_mb",
        y="peak_memory_mb",
        scale=1,
        labels=("weights (MB, log scale)", "weights + peak of a pass (MB)"),
        title=f"Size against peak memory, batch {batch}",
    )


def _scatter(rows: pd.DataFrame, *, x: str, y: str, scale: float, labels: tuple[str, str], title: str) -> Figure:
    figure, (axis,) = _axes(width=9)
    colours, markers = _colours(list(rows["variant"])), "osD^vPX*<>hdp8"
    for number, row in enumerate(rows.to_dict("records")):
        axis.scatter(
            row[x], scale * row[y], s=90, color=colours.get(row["variant"]), marker=markers[number % len(markers)],
            label=row["variant"], zorder=3,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(plt.FuncFormatter(_two_or_five))
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _ran(table: pd.DataFrame, batch: int) -> pd.DataFrame:
    return table[(table["status"] == "ok") & (table["batch"] == batch)]


def throughput_by_batch(table: pd.DataFrame) -> Figure:
    """Measured images per second by batch size, a line a variant."""
    figure, (axis,) = _axes(width=9)
    rows = table[table["status"] == "ok"]
    sns.lineplot(
        rows, x="batch", y="throughput_img_s", hue="variant", style="variant", markers=True, dashes=False, ax=axis
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="pictures a call (log scale)", ylabel="images per second (log scale)", title="Throughput, measured")
    for numbers in (axis.xaxis, axis.yaxis):
        numbers.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def device_time_by_part(kernels: pd.DataFrame, parts: Sequence[str]) -> Figure:
    """Device time of one pass in milliseconds, stacked by part of the model, a bar a variant."""
    figure, (axis,) = _axes(width=9)
    order = list(dict.fromkeys(kernels["variant"]))
    sums = kernels.groupby(["variant", "part"])["device_time_us"].sum().unstack(fill_value=0).reindex(order) / 1000
    left = np.zeros(len(sums))
    colours = dict(zip(parts, sns.color_palette("tab10", len(parts)), strict=True))
    for part in (part for part in parts if part in sums and sums[part].sum() > 0):
        label = "attention with its linears" if part == "attention" else part  # beside a table of the kernel alone
        axis.barh(sums.index, sums[part], left=left, label=label, color=colours[part])
        left = left + sums[part].to_numpy()
    axis.invert_yaxis()
    batch = kernels["batch"].iloc[0]
    axis.set(xlabel=f"device time of one pass (ms), batch {batch}", title="Where the device time goes")
    axis.grid(axis="y", visible=False)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def steps(table: pd.DataFrame, *, words: str = "") -> Figure | Markdown:
    """Median latency of each variant with its interval, a panel a batch size, a colour a format; from `variants.csv`.

    On a log scale; only the variants whose execution holds `words`, where given, on a linear one.
    """
    table = table[table["execution"].str.contains(words, regex=False)]
    sizes, names = sorted(table["batch"].unique()), list(dict.fromkeys(table["variant"]))
    if not names:
        return Markdown("*none*")
    figure, axes = _axes(len(sizes), width=4.2 + 3.6 * len(sizes), height=0.27 * len(names) + 1.2)
    colours = _colours(("fp32", "fp16", "nf4", "int8", "w8a16", "w8a8", "fp8"))  # the same in every figure
    for axis, size in zip(axes, sizes, strict=True):
        rows = table[table["batch"] == size].set_index("variant").reindex(names)
        for number, row in enumerate(rows.itertuples()):
            median = row.latency_p50_ms
            error = [[max(0, median - row.latency_low_ms)], [max(0, row.latency_high_ms - median)]]
            axis.errorbar(median, number, xerr=error, fmt="o", capsize=3, color=colours.get(row.weights, "grey"))
        axis.set(xlabel=f"median latency (ms{'' if words else ', log scale'})", title=f"batch size {size}")
        if not words:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(plt.FuncFormatter(_two_or_five))
        axis.set_yticks(range(len(names)), [variants.label(name) for name in names], fontsize=9)
        axis.tick_params(axis="y", labelleft=axis is axes[0])
        axis.invert_yaxis()
    return figure


def _two_or_five(value: float, _: object) -> str:
    """A tick of a log scale, labelled at 2 and 5 times a power of ten."""
    return f"{value:g}" if f"{value:g}".strip("0.")[:1] in "25" else ""


def sensitivity_bars(blocks: pd.DataFrame) -> Figure:
    """By block: the share of the quantization error (KL) that goes away when this block stays in 16 bit."""
    bits = sorted(blocks["bits"].unique())
    figure, axes = _axes(len(bits), width=5.5 * len(bits), height=3.8)
    for axis, number in zip(axes, bits, strict=True):
        rows = blocks[blocks["bits"] == number]
        axis.bar(rows["block"], 100 * rows["kl_removed"], color=sns.color_palette(PALETTE)[0])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axhline(100 / len(rows), color="grey", linestyle=":")  # if all blocks shared the divergence equally
        axis.set(xlabel="block kept in 16 bit", ylabel="KL that goes away (%)", title=f"{number} bits")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def alone_bars(blocks: pd.DataFrame) -> Figure:
    """By block: the KL from the 16-bit network when only this block is quantized, with its interval."""
    bits = sorted(blocks["bits"].unique())
    figure, axes = _axes(len(bits), width=5.5 * len(bits), height=3.8)
    for axis, number in zip(axes, bits, strict=True):
        rows = blocks[blocks["bits"] == number]
        error = [rows["kl_alone"] - rows["kl_alone_low"], rows["kl_alone_high"] - rows["kl_alone"]]
        axis.bar(rows["block"], rows["kl_alone"], yerr=error, capsize=2, color=sns.color_palette(PALETTE)[2])
        axis.set(xlabel="block quantized, all others in 16 bit", ylabel="mean KL (nats)", title=f"{number} bits")
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def accuracy_intervals(quality: pd.DataFrame, margin: float) -> Figure:
    """Top-1 of each variant minus the baseline's, in points, with its paired interval; the margin is dotted."""
    figure, (axis,) = _axes(width=8, height=0.45 * len(quality) + 1.4)
    rows = quality[quality["verdict"] != "baseline"]
    error = 100 * np.array([rows["difference"] - rows["difference_low"], rows["difference_high"] - rows["difference"]])
    axis.errorbar(100 * rows["difference"], rows["variant"], xerr=error, fmt="o", capsize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(-100 * margin, color="grey", linestyle=":")
    axis.invert_yaxis()
    axis.set(xlabel="Top-1 minus the baseline's (points), 95 % interval; dotted: margin")
    return figure


def roofline(table: pd.DataFrame) -> Figure:
    """Achieved TFLOP/s of each variant's computing parts against operations per byte, under the measured ceilings."""
    figure, (axis,) = _axes(width=9, height=5)
    rows = table[table["gflop"] > 0].assign(intensity=lambda t: 1e3 * t["gflop"] / t["mb"])
    markers = dict(zip(sorted(rows["part"].unique()), "osD^vP", strict=False))
    colours = _colours(list(dict.fromkeys(rows["variant"])))
    for row in rows.to_dict("records"):
        axis.scatter(
            row["intensity"], row["tflop_s"], s=55, color=colours[row["variant"]], marker=markers[row["part"]], zorder=3
        )
    span = np.geomspace(rows["intensity"].min() / 2, rows["intensity"].max() * 2, 100)
    for ceiling, shown in rows.groupby("ceiling_tflop_s"):
        bandwidth = shown["ceiling_gb_s"].iloc[0]
        axis.plot(span, np.minimum(ceiling, span * bandwidth / 1e3), color="black", linewidth=1)
    for near in _near(sorted(rows["ceiling_tflop_s"].unique())):
        label = " – ".join(
            f"{ceiling:,.0f}" if ceiling >= 100 else f"{ceiling:.3g}" for ceiling in dict.fromkeys((near[0], near[-1]))
        )
        axis.annotate(f"{label} TFLOP/s", (span[-1], near[-1]), ha="right", va="bottom", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="achieved TFLOP/s")
    axis.set_title("What is reached of what this hardware can do")
    handles = [plt.Line2D([], [], color=c, marker="s", linestyle="", label=name) for name, c in colours.items()]
    handles += [plt.Line2D([], [], color="grey", marker=m, linestyle="", label=part) for part, m in markers.items()]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _near(values: Sequence[float], factor: float = 1.2) -> list[list[float]]:
    """Ascending values in groups whose members lie within `factor` of the first: labels that would overlap."""
    groups: list[list[float]] = []
    for value in values:
        if groups and value <= factor * groups[-1][0]:
            groups[-1].append(value)
        else:
            groups.append([value])
    return groups


def kept_parts(frame: pd.DataFrame, kept: Sequence[str]) -> Figure:
    """Mean KL from the 16-bit network with its interval, for a few configurations, a panel for each number of bits."""
    bits = sorted(frame["bits"].unique())
    figure, axes = _axes(len(bits), width=5.5 * len(bits), height=3.2)
    for axis, number in zip(axes, bits, strict=True):
        rows = frame[(frame["bits"] == number) & frame["kept"].isin(kept)].set_index("kept").reindex(kept)
        error = [rows["logit_kl"] - rows["logit_kl_low"], rows["logit_kl_high"] - rows["logit_kl"]]
        axis.barh(rows.index, rows["logit_kl"], xerr=error, capsize=4, color=sns.color_palette(PALETTE)[1])
        axis.invert_yaxis()
        axis.set(xlabel="mean KL from the 16-bit network (nats)", title=f"{number} bits")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    return figure

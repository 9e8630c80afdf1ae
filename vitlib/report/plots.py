"""The figures of the reports, each made from a record's table. No torch.

Every function returns a `Plot` or, of photographs, `Pictures`; a notebook's last expression shows it. Colour is the
weight format, the same in every figure; marker and line style are the execution.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vitlib.study import variants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {name: row.colour for name, row in variants.FORMATS.items()}
_MARKERS = {"eager": "o", "graph": "s", "fused": "^", "fused-graph": "D"}
_LINES = {"eager": "-", "graph": "--", "fused": ":", "fused-graph": "-."}
_BLUE, _ORANGE, _PALE, _GREY = "#0072B2", "#D55E00", "#b8c9d9", "#8a8f98"
_SMALL = 160  # pixels: narrower pictures are enlarged to it
_STYLE = {
    **{"axes.grid": True, "grid.color": "#dfe3ea", "axes.axisbelow": True, "axes.edgecolor": "#8a8f98"},
    **{"axes.spines.top": False, "axes.spines.right": False},
}


class Plot:
    """A figure that a notebook shows as SVG, and its message in words for a reader who does not see it."""

    def __init__(self, figure: Figure, message: str) -> None:
        self.figure, self.message = figure, message

    def _repr_svg_(self) -> str:
        import matplotlib

        text = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "vitlib"}):  # the same figure gives the same text
            self.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return text.getvalue()

    def __repr__(self) -> str:
        return self.message


class Pictures:
    """Photographs with a caption each, in rows that fill the width of the page; a notebook shows them as HTML."""

    def __init__(
        self, sources: Sequence[str], captions: Sequence[str], right: Sequence[bool | None], columns: int = 0
    ) -> None:
        self.sources, self.captions, self.right = list(sources), list(captions), list(right)
        self.columns = columns

    def _repr_html_(self) -> str:
        # Styles are for JupyterLab; pages drop them and have classes.
        kinds = {True: ("right", "#1a7f37"), False: ("wrong", "#c0272d"), None: ("", "inherit")}
        made = []
        for source, caption, right in zip(self.sources, self.captions, self.right, strict=True):
            kind, colour = kinds[right]
            text = html.escape(caption)
            made.append(
                f'<figure class="{kind}" style="margin: 0"><img style="width: 100%" alt="{text}" src="{source}">'
                f'<figcaption style="color: {colour}">{text}</figcaption></figure>'
            )
        style = f"display: grid; gap: 0.7rem; grid-template-columns: repeat({self.columns or 6}, minmax(4rem, 1fr))"
        kind = f"pictures of{self.columns}" if self.columns else "pictures"
        return f'<div class="{kind}" style="{style}">{"".join(made)}</div>'

    def __repr__(self) -> str:
        return "; ".join(self.captions)


def _figure(rows: int = 1, columns: int = 1, *, width: float = 8.0, height: float = 4.5, **grid: object) -> Figure:
    """A figure with `rows` × `columns` axes in `figure.axes`, sizes in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(rows, columns, **grid)
    return figure


def _look(name: str) -> dict[str, object]:
    """Colour and marker of a variant; hollow where attention runs in FlashAttention-2."""
    if name not in variants.VARIANTS:
        return {"color": _GREY, "marker": "x"}
    variant = variants.VARIANTS[name]
    face = "white" if variant.own_flash else variant.format.colour
    return {"color": variant.format.colour, "marker": _MARKERS[variant.execution], "markerfacecolor": face}


def _log(axis: Axes, name: str) -> None:
    """A log scale on `name` ("x" or "y"), with plain numbers at 1, 2 and 5 times a power of ten."""
    axis.set(**{f"{name}scale": "log"})
    ticks = getattr(axis, f"{name}axis")
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}".strip("0.")[:1] in "25" else "")


def _legend(axis: Axes, **more: object) -> None:
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False, **more)


def _around(rows: pd.DataFrame, column: str, scale: float = 1.0) -> np.ndarray:
    """Distances (2, n) from a column to its bounds `<column>_low` and `<column>_high`, for `errorbar`."""
    return scale * np.array([rows[column] - rows[f"{column}_low"], rows[f"{column}_high"] - rows[column]])


def picture_grid(
    images: Sequence[np.ndarray], titles: Sequence[str], *, right: Sequence[bool | None] = (), columns: int = 0
) -> Pictures:
    """uint8 pictures (h, w, 3) with a caption each: green if `right` is true, red if false. 0 columns: as fit."""
    marks = list(right) or [None] * len(images)
    return Pictures([_data_address(image) for image in images], titles, marks, columns)


def _data_address(image: np.ndarray) -> str:
    """A uint8 picture (h, w, 3) as the text of a `data:` address; small ones enlarged, so that browsers smooth them."""
    from PIL import Image

    picture, file = Image.fromarray(image), io.BytesIO()
    if picture.width < _SMALL:
        picture = picture.resize((_SMALL, _SMALL * picture.height // picture.width), Image.Resampling.BICUBIC)
    picture.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def learning_curves(history: pd.DataFrame) -> Plot:
    """Loss in training and validation, and Top-1 and Top-5 in validation, by epoch."""
    figure = _figure(1, 2, width=10, height=3.8)
    left, right = figure.axes
    curves = history.set_index("epoch")
    left.plot(curves["train_loss"], marker="o", label="training (augmented)", color=_BLUE)
    left.plot(curves["valid_loss"], marker="o", label="validation", color=_ORANGE)
    right.plot(100 * curves["top1"], marker="o", label="Top-1", color=_ORANGE)
    right.plot(100 * curves["top5"], marker="o", label="Top-5", color=_GREY)
    left.set(xlabel="epoch", ylabel="cross entropy (nats)", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Validation accuracy")
    for axis in figure.axes:
        axis.legend(frameon=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return Plot(figure, f"Loss and validation accuracy by epoch; Top-1 ends at {100 * history['top1'].iloc[-1]:.1f} %.")


def accuracy_against_latency(table: pd.DataFrame, batch: int, margin: float) -> Plot:
    """Top-1 minus the baseline's with its interval, against median latency; up and left is better.

    `margin`, a fraction of the pictures, is drawn as a band: an interval inside it is non-inferior.
    """
    rows = table[(table["status"] == "ok") & (table["batch"] == batch)]
    axis = _scatter(rows, "latency_p50_ms", 100 * rows["difference"], _around(rows, "difference", 100))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhspan(-100 * margin, 0, color=_GREY, alpha=0.15, zorder=0)
    axis.set(xlabel="median latency (ms, log scale)", ylabel="Top-1 minus the baseline's (points, 95 % interval)")
    axis.set(title=f"Accuracy against latency, batch size {batch}")
    return Plot(
        axis.figure, f"Top-1 minus the baseline's against median latency at batch size {batch}, a point a variant."
    )


def size_against_memory(table: pd.DataFrame, batch: int) -> Plot:
    """Peak memory of a forward pass against the size of the weights; down and left is better."""
    rows = table[(table["status"] == "ok") & (table["batch"] == batch)]
    axis = _scatter(rows, "model_mb", rows["peak_memory_mb"])
    axis.set(xlabel="weights (MB, log scale)", ylabel="weights + peak of a pass (MB)")
    axis.set_title(f"Size against peak memory, batch size {batch}")
    return Plot(
        axis.figure,
        f"Weights plus the peak of a forward pass against weights at batch size {batch}, a point a variant.",
    )


def _scatter(rows: pd.DataFrame, x: str, y: pd.Series, errors: np.ndarray | None = None) -> Axes:
    """A point a variant on a log x axis, with vertical `errors` (2, n) if given."""
    (axis,) = _figure(width=9).axes
    for at, (name, across, up) in enumerate(zip(rows["variant"], rows[x], y, strict=True)):
        bars = None if errors is None else errors[:, [at]]
        style = {"linestyle": "", "capsize": 3, "markersize": 8, "elinewidth": 0.8, **_look(name)}
        axis.errorbar(across, up, yerr=bars, label=variants.label(name), **style)
    _log(axis, "x")
    _legend(axis)
    return axis


def throughput_by_batch(table: pd.DataFrame) -> Plot:
    """Measured images per second by batch size, a line a variant, labelled at its end."""
    rows = table[table["status"] == "ok"].dropna(subset="throughput_img_s").sort_values("batch", kind="stable")
    (axis,) = _figure(width=9, height=max(4.5, 0.3 * rows["variant"].nunique() + 1)).axes
    for name, own in rows.groupby("variant", sort=False):
        line = _LINES[variants.VARIANTS[name].execution] if name in variants.VARIANTS else "-"
        axis.plot(own["batch"], own["throughput_img_s"], linestyle=line, **_look(name))
    _log(axis, "y")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="batch size (log scale)", ylabel="images per second (log scale)", title="Throughput, measured")
    for name, height in _apart(rows.groupby("variant")["throughput_img_s"].last(), axis).items():
        axis.annotate(
            variants.label(name), (1.0, height), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=_look(name)["color"],
        )  # fmt: skip
    return Plot(axis.figure, "Images per second by batch size, a line a variant.")


def _apart(ends: Mapping[str, float], axis: Axes, gap: float = 0.045) -> dict[str, float]:
    """Heights (fractions of the axis) of labels for lines that end at `ends`, in order and at least `gap` apart."""
    low, high = np.log(axis.get_ylim())
    names = sorted(ends.keys(), key=ends.__getitem__)
    heights = {name: float((np.log(ends[name]) - low) / (high - low)) for name in names}
    for below, name in itertools.pairwise(names):
        heights[name] = max(heights[name], heights[below] + gap)
    top = 1.0
    for name in reversed(names):
        heights[name] = min(heights[name], top)
        top = heights[name] - gap
    return heights


def accuracy_intervals(quality: pd.DataFrame, margin: float) -> Plot:
    """Top-1 of each variant minus the baseline's, in points, with its paired interval; the margin is a band."""
    rows = quality[quality["verdict"] != "baseline"]
    (axis,) = _figure(width=8, height=0.4 * len(rows) + 1.4).axes
    errors = _around(rows, "difference", 100)
    for at, (name, points) in enumerate(zip(rows["variant"], 100 * rows["difference"], strict=True)):
        axis.errorbar(points, at, xerr=errors[:, [at]], capsize=4, **_look(name))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvspan(-100 * margin, 0, color=_GREY, alpha=0.15, zorder=0)
    axis.set_yticks(range(len(rows)), [variants.label(name) for name in rows["variant"]])
    axis.invert_yaxis()
    axis.set(xlabel="Top-1 minus the baseline's (points), 95 % interval; shaded: within the margin")
    return Plot(axis.figure, "Top-1 of each variant minus the baseline's, with its 95 % interval and the margin.")


def device_time_by_part(kernels: pd.DataFrame, parts: Sequence[str]) -> Plot:
    """Device time of one pass in milliseconds, stacked by part of the model, a bar a variant.

    Variants that take more than three times the median have a panel of their own, so that the others can be read.
    """
    sums = kernels.pivot_table("device_time_us", "variant", "part", "sum", fill_value=0, sort=False) / 1000
    slow = sums.sum(axis=1) > 3 * sums.sum(axis=1).median()
    panels = [rows for rows in (sums[slow], sums[~slow]) if len(rows)]
    sizes = [len(rows) + 1.2 for rows in panels]
    figure = _figure(len(panels), width=9, height=0.34 * sum(sizes) + 1, height_ratios=sizes)
    shown = [part for part in parts if part in sums and sums[part].sum() > 0]
    for axis, rows in zip(figure.axes, panels, strict=True):
        names, left = [variants.label(name) for name in rows.index], np.zeros(len(rows))
        for number, part in enumerate(shown):
            label = "attention with its linears" if part == "attention" else part  # a table shows the kernel alone
            axis.barh(names, rows[part], left=left, label=label, color=f"C{number}")
            left += rows[part].to_numpy()
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    figure.axes[0].set_title("Where the device time goes")
    figure.axes[-1].set_xlabel(f"device time of one pass (ms), batch size {kernels['batch'].iloc[0]}")
    _legend(figure.axes[-1])
    return Plot(figure, "Device time of one forward pass by part of the model, a bar a variant.")


def ladder(frame: pd.DataFrame) -> Plot:
    """Median latency of each step with its interval, a panel a batch size, a row a step, colour by weight format.

    Columns: label (in words), weights, batch, ms, ms_low, ms_high. Rows keep the order of their first appearance.
    """
    sizes, labels = sorted(frame["batch"].unique()), list(dict.fromkeys(frame["label"]))
    figure = _figure(1, max(len(sizes), 1), width=3.2 + 3.4 * len(sizes), height=0.3 * len(labels) + 1.2, sharey=True)
    for axis, size in zip(figure.axes, sizes, strict=False):
        rows = frame[frame["batch"] == size]
        errors = _around(rows, "ms")
        for at, row in enumerate(rows.itertuples()):
            style = {"fmt": "o", "capsize": 3, "color": COLOURS.get(row.weights, _GREY)}
            axis.errorbar(row.ms, labels.index(row.label), xerr=errors[:, [at]], **style)
        _log(axis, "x")
        axis.set(xlabel="median latency (ms, log scale)", title=f"batch size {size}")
    figure.axes[0].set_yticks(range(len(labels)), labels, fontsize=9)
    figure.axes[0].set_ylim(len(labels) - 0.5, -0.5)
    return Plot(figure, "Median latency of each step with its 95 % interval, a panel a batch size.")


def roofline(table: pd.DataFrame) -> Plot:
    """Achieved TFLOP/s of each variant's computing parts against operations per byte, under the measured ceilings."""
    from matplotlib.lines import Line2D

    rows = table[table["gflop"] > 0].assign(intensity=lambda t: 1e3 * t["gflop"] / t["mb"])
    (axis,) = _figure(width=9, height=5).axes
    markers, formats = dict(zip(sorted(rows["part"].unique()), "osD^vP", strict=False)), []
    for row in rows.to_dict("records"):
        variant, colour = variants.VARIANTS.get(row["variant"]), _look(row["variant"])["color"]
        formats += [variant.format] if variant else []
        face = colour if variant and variant.fused else "white"
        style = {"marker": markers[row["part"]], "markersize": 7, "color": colour, "markerfacecolor": face}
        axis.plot(row["intensity"], row["tflop_s"], linestyle="", zorder=3, **style)
    span = np.geomspace(rows["intensity"].min() / 2, rows["intensity"].max() * 2, 100)
    for ceiling, shown in rows.groupby("ceiling_tflop_s"):
        axis.plot(span, np.minimum(ceiling, span * shown["ceiling_gb_s"].iloc[0] / 1e3), color="black", linewidth=1)
    ceilings = np.sort(rows["ceiling_tflop_s"].dropna().unique())
    for near in np.split(ceilings, 1 + np.flatnonzero(ceilings[1:] > 1.5 * ceilings[:-1])):  # one label: no overlap
        ends = dict.fromkeys(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (near[0], near[-1]))
        axis.annotate(f"{' – '.join(ends)} TFLOP/s", (span[-1], near[-1]), ha="right", va="bottom", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="achieved TFLOP/s")
    axis.set_title("Achieved rate and the measured ceilings")
    entries = [{"marker": "s", "color": row.colour, "label": row.name.upper()} for row in dict.fromkeys(formats)]
    entries += [{"marker": marker, "color": _GREY, "label": part} for part, marker in markers.items()]
    entries += [{"marker": "o", "color": _GREY, "markerfacecolor": "white", "label": "hollow: not fused"}]
    _legend(axis, handles=[Line2D([], [], linestyle="", **entry) for entry in entries])
    return Plot(
        axis.figure, "Achieved arithmetic rate of each part against operations per byte, below the measured ceilings."
    )


def sensitivity_bars(blocks: pd.DataFrame) -> Plot:
    """By block: the share of the quantization error (KL) that is removed when it alone stays in FP16."""
    shown = blocks.assign(**dict.fromkeys(("shown", "shown_low", "shown_high"), 100 * blocks["kl_removed"]))
    plot = _block_bars(shown, "error removed (%)", "block kept in FP16 (dotted: equal share)", "{:.0f} %")
    for axis in plot.figure.axes:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axhline(100 / len(axis.patches), color="black", linestyle=":", linewidth=1)
    return plot


def alone_bars(blocks: pd.DataFrame) -> Plot:
    """By block: the quantization error (KL) when it alone is quantized, with its interval."""
    shown = blocks.rename(columns=lambda name: name.replace("kl_alone", "shown"))
    return _block_bars(shown, "error (KL, nats)", "block quantized, all others in FP16", "{:.1e}")


def _block_bars(blocks: pd.DataFrame, ylabel: str, xlabel: str, form: str) -> Plot:
    """A bar a block as high as `shown`, with its interval; the highest is dark and has a label."""
    said = []
    for axis, rows in _by_bits(blocks):
        first = rows["shown"].idxmax()
        block, others = int(rows.loc[first, "block"]), rows["shown"].drop(first)
        colours = [_BLUE if at == first else _PALE for at in rows.index]
        axis.bar(rows["block"], rows["shown"], yerr=_around(rows, "shown"), color=colours)
        left = block < rows["block"].median()  # the label extends towards the middle
        place = (block - 0.4 if left else block + 0.4, max(0, rows.loc[first, "shown_high"]))
        style = {"ha": "left" if left else "right", "va": "bottom", "textcoords": "offset points", "xytext": (0, 2)}
        label = f"block {block}: {form.format(rows.loc[first, 'shown'])}"
        axis.annotate(label, place, **style)
        axis.margins(y=0.12)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="x", visible=False)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        said.append(f"{axis.get_title()}, {label}{f', others at most {form.format(others.max())}' * bool(len(others))}")
    return Plot(axis.figure, f"{ylabel.capitalize()} by {xlabel}. {'; '.join(said)}.")


def kept_parts(frame: pd.DataFrame, kept: Mapping[str, str]) -> Plot:
    """The error (KL) left when some parts stay in FP16, in percent of that of the first, by their names in words."""
    said = []
    for axis, rows in _by_bits(frame[frame["kept"].isin(kept)], height=0.4 * len(kept) + 1.2):
        rows = rows.set_index("kept").reindex(kept)
        whole = 100 / rows["logit_kl"].iloc[0]
        shares = whole * rows["logit_kl"]
        axis.barh(list(kept.values()), shares, xerr=whole * _around(rows, "logit_kl"), capsize=4, color=_PALE)
        for at, (share, end) in enumerate(zip(shares, whole * rows["logit_kl_high"], strict=True)):
            axis.annotate(f"{share:.0f} %", (end, at), xytext=(6, 0), textcoords="offset points", va="center")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set(xlabel="error left (%), 95 % interval", ylabel="kept in FP16")
        listed = (f"{name} {share:.0f} %" for name, share in zip(kept.values(), shares, strict=True))
        said.append(f"at {axis.get_title()}, {', '.join(listed)}")
    return Plot(axis.figure, f"Quantization error (KL) left when a part stays in FP16: {'; '.join(said)}.")


def verdict_bars(counts: pd.Series) -> Plot:
    """The number of claims by verdict; the last kind is what could not be tested."""
    (axis,) = _figure(width=8, height=0.28 * len(counts) + 0.1).axes
    bars = axis.barh(list(counts.index), counts, color=[_BLUE] * (len(counts) - 1) + [_PALE])
    axis.bar_label(bars, padding=4)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.grid(visible=False)
    return Plot(axis.figure, f"Claims by verdict: {', '.join(f'{kind} {count}' for kind, count in counts.items())}.")


def _by_bits(frame: pd.DataFrame, height: float = 3.4) -> list[tuple[Axes, pd.DataFrame]]:
    """A panel of one figure for each number of bits, with its rows."""
    panels = list(frame.groupby("bits"))
    figure = _figure(1, len(panels), width=5.2 * len(panels), height=height)
    for axis, (bits, _) in zip(figure.axes, panels, strict=True):
        axis.set_title(f"{bits} bits")
    return [(axis, rows) for axis, (_, rows) in zip(figure.axes, panels, strict=True)]

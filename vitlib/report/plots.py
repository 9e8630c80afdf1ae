"""The figures of the reports, each made from a record's table. No torch.

Every function returns a `Plot` or, of photographs, `Pictures`; a notebook's last expression shows it. Colour is the
weight format, the same in every figure; the marker is the execution.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from vitlib.report.tables import NO_MATHS, number
from vitlib.study import files, variants

COLOURS = {name: row.colour for name, row in variants.FORMATS.items()}
_MARKERS = {"eager": "o", "graph": "s", "fused": "^", "fused-graph": "D"}
_BLUE, _ORANGE, _PALE, _GREY = "#0072B2", "#D55E00", "#b8c9d9", "#8a8f98"
_PARTS = ("#56B4E9", "#0072B2", "#E69F00", "#000000", "#F0E442", "#8a8f98", "#D55E00", "#CC79A7", "#009E73")
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
        text = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "vitlib"}):  # the same figure gives the same text
            self.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return text.getvalue()

    def saved(self, path: Path) -> Plot:
        """The same plot, which is now also in the SVG file `path`, whole or not at all."""
        with files.atomic_path(path) as temporary:
            temporary.write_text(self._repr_svg_(), encoding="utf-8")
        return self

    def __repr__(self) -> str:
        return self.message


class Pictures:
    """uint8 pictures (h, w, 3) with a title each: green if `right` is true, red if false. Shown as HTML.

    They fill the width of the page, in rows of `columns` (0: as fit).
    """

    def __init__(
        self, images: Sequence[np.ndarray], titles: Sequence[str], right: Sequence[bool | None] = (), columns: int = 0
    ) -> None:
        self.sources, self.titles, self.columns = [_data_address(image) for image in images], list(titles), columns
        self.right = list(right) or [None] * len(self.titles)

    def _repr_html_(self) -> str:
        # Styles are for JupyterLab; pages drop them and have classes.
        kinds = {True: ("right", "#1a7f37"), False: ("wrong", "#c0272d"), None: ("", "inherit")}
        made = []
        for source, title, right in zip(self.sources, map(html.escape, self.titles), self.right, strict=True):
            made.append(
                f'<figure class="{kinds[right][0]}" style="margin: 0"><img style="width: 100%" alt="{title}" '
                f'src="{source}"><figcaption style="color: {kinds[right][1]}">{title}</figcaption></figure>'
            )
        style = f"display: grid; gap: 0.7rem; grid-template-columns: repeat({self.columns or 6}, minmax(4rem, 1fr))"
        kind = f"pictures of{self.columns}" if self.columns else "pictures"
        return f'<div class="{kind} {NO_MATHS}" style="{style}">{"".join(made)}</div>'

    def __repr__(self) -> str:
        return f"{len(self.titles)} pictures: {'; '.join(self.titles)}"


picture_grid = Pictures


def _figure(rows: int = 1, columns: int = 1, *, width: float = 8.0, height: float = 4.5, **grid: object) -> Figure:
    """A figure with `rows` × `columns` axes in `figure.axes`, sizes in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(rows, columns, **grid)
    return figure


def _look(name: str) -> dict[str, object]:
    """Colour and marker of a variant; hollow where attention runs in FlashAttention-2."""
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


def _data_address(image: np.ndarray) -> str:
    """A uint8 picture (h, w, 3) as the text of a `data:` address; small ones enlarged, so that browsers smooth them."""
    picture, file = Image.fromarray(image), io.BytesIO()
    if picture.width < _SMALL:
        picture = picture.resize((_SMALL, _SMALL * picture.height // picture.width), Image.Resampling.BICUBIC)
    picture.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def learning_curves(history: pd.DataFrame) -> Plot:
    """Loss in training and validation, and the accuracies in validation that `history` has (Top-1, Top-5), by epoch."""
    figure = _figure(1, 2, width=10, height=3.8)
    left, right = figure.axes
    curves = history.set_index("epoch")
    left.plot(curves["train_loss"], marker="o", label="training", color=_BLUE)
    left.plot(curves["valid_loss"], marker="o", label="validation", color=_ORANGE)
    for name, label, colour in (("top1", "Top-1", _ORANGE), ("top5", "Top-5", _GREY)):
        if name in curves:
            right.plot(100 * curves[name], marker="o", label=label, color=colour)
    left.set(xlabel="epoch", ylabel="cross entropy (nats)", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Validation accuracy")
    loss, top1 = curves["valid_loss"], 100 * curves["top1"]
    said = f"Validation loss goes from {loss.iloc[0]:.2f} to {loss.iloc[-1]:.2f}"
    for axis in figure.axes:
        axis.legend(frameon=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return Plot(figure, f"{said} and Top-1 from {top1.iloc[0]:.1f} % to {top1.iloc[-1]:.1f} % in {len(curves)} epochs.")


def hero(points: pd.DataFrame) -> Plot:
    """Weights against the latency of a call, a labelled point a variant, and an arrow from the first to the best.

    `points` is what `benchmark.points` gives. A difference in speed that was not found is not written on the arrow.
    """
    (axis,) = _figure(width=8, height=4.6).axes
    rows, batch = points.set_index("variant"), points["batch"].iloc[0]
    ms, mb, said = rows["latency_p50_ms"], rows["model_mb"], []
    _log(axis, "x")
    _log(axis, "y")
    ends = rows[rows["best"] | (rows.index == rows.index[0])].sort_values("model_mb")[["model_mb", "latency_p50_ms"]]
    arrow = np.exp(np.interp(np.log(mb), *np.log(ends).to_numpy().T))  # where it is at the height of each point
    room = max(ms.max() / ms.min(), 1.6)  # on both sides, for labels
    axis.set(xlim=(ms.min() / room, ms.max() * room**0.8), ylim=(mb.min() / 2, mb.max() * 1.8))
    axis.tick_params(which="both", labelsize=11)
    axis.set_xlabel(f"milliseconds per call, batch size {batch:.0f} (log scale)", fontsize=12)
    axis.set_ylabel("weights (MB, log scale)", fontsize=12)
    for name, middle in zip(rows.index, arrow, strict=True):
        axis.plot(ms[name], mb[name], linestyle="", markersize=12, zorder=3, **_look(name))
        size = f"{number(ms[name])} ms, {mb[name]:{',.0f' if mb[name] >= 100 else '.2g'}} MB"
        away, ha, va = ((-12, 0), "right", "center") if ms[name] < middle else ((12, 0), "left", "center")
        if name == rows.index[0] or rows.loc[name, "best"]:  # the ends of the arrow
            away, ha, va = ((0, 11), "center", "bottom") if name == rows.index[0] else ((0, -11), "center", "top")
        where = {"xytext": away, "textcoords": "offset points", "ha": ha, "va": va, "fontsize": 12}
        axis.annotate(f"{_short(name)}\n{size}", (ms[name], mb[name]), **where)
        said.append(f"{_short(name)} {size}")
    for name in rows.index[rows["best"]]:
        size = mb.iloc[0] / mb[name]
        factors = [] if 1 / 1.05 < size < 1.05 else [_times(size, "smaller", "larger")]
        if rows.loc[name, "against_baseline"] in ("faster", "slower"):
            factors.insert(0, _times(rows.loc[name, "times_baseline"], "faster", "slower"))
        _arrow(axis, (ms.iloc[0], mb.iloc[0]), (ms[name], mb[name]), "\n".join(factors))
        said.append(f"the arrow says {', '.join(factors)}")
    return Plot(axis.figure, f"Latency at batch size {batch:.0f} and weights: {'; '.join(said)}.")


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    """Draw an arrow between two points on logarithmic axes, with `text` at its middle."""
    style = {"arrowstyle": "-|>", "linewidth": 2, "shrinkA": 11, "shrinkB": 11, "mutation_scale": 20, "color": "black"}
    axis.annotate("", end, start, arrowprops=style)
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
    middle = np.sqrt(np.multiply(start, end))
    axis.text(*middle, text, fontsize=14, weight="bold", ha="center", va="center", bbox=box, zorder=2)


def _short(name: str) -> str:
    """A variant in words, where one as the libraries load it is "out of the box"."""
    weights, *others = name.split("-")
    return f"{weights.upper()} out of the box" if others == ["sdpa"] else variants.label(name)


def _times(ratio: float, more: str, less: str) -> str:
    """A ratio as "7.3× smaller", or how much `less` below 1."""
    ratio, word = (ratio, more) if ratio >= 1 else (1 / ratio, less)
    return f"{ratio:.{2 if ratio < 2 else 1}f}× {word}"


def _range(values: pd.Series, form: Callable[[float], str]) -> str:
    """The least and the largest value with the variants that have them: "1.1 (NF4 · fused) to 9.5 (FP32 · SDPA)"."""
    ends = ((values.min(), values.idxmin()), (values.max(), values.idxmax()))
    return " to ".join(f"{form(value)} ({variants.label(name)})" for value, name in ends)


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
        for place, part in enumerate(shown):
            label = "attention with its linears" if part == "attention" else part  # a table shows the kernel alone
            axis.barh(names, rows[part], left=left, label=label, color=_PARTS[place % len(_PARTS)], edgecolor="white")
            left += rows[part].to_numpy()
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    figure.axes[0].set_title("Where the device time goes")
    figure.axes[-1].set_xlabel(f"device time of one pass (ms), batch size {kernels['batch'].iloc[0]}")
    _legend(figure.axes[-1])
    said = f"Device time of one pass: {_range(sums.sum(axis=1), number)} ms"
    return Plot(figure, f"{said}; most of it in the part {sums.sum().idxmax()}.")


def ladder(frame: pd.DataFrame, names: Sequence[str]) -> Plot:
    """Median latency of each variant with its interval, a panel a batch size, a row a variant of `names`.

    Columns: variant, batch, latency_p50_ms, latency_low_ms, latency_high_ms.
    """
    sizes, names = sorted(frame["batch"].unique()), list(names)
    figure = _figure(1, max(len(sizes), 1), width=3 + 2.6 * len(sizes), height=0.24 * len(names) + 1.2, sharey=True)
    said = []
    for axis, size in zip(figure.axes, sizes, strict=False):
        rows = frame[frame["batch"] == size].set_index("variant")
        for name, ms, low, high in rows[["latency_p50_ms", "latency_low_ms", "latency_high_ms"]].itertuples():
            errors = [[ms - low], [high - ms]]
            axis.errorbar(ms, names.index(name), xerr=errors, linestyle="", capsize=3, **_look(name))
        _log(axis, "x")
        axis.set(xlabel="median latency (ms, log scale)", title=f"batch size {size}")
        said.append(f"Median latency at batch size {size}: {_range(rows['latency_p50_ms'], number)} ms.")
    figure.axes[0].set_yticks(range(len(names)), map(variants.label, names), fontsize=10)
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    return Plot(figure, " ".join(said))


def verdict_bars(counts: pd.Series) -> Plot:
    """The number of claims by verdict; the last kind is what could not be tested."""
    (axis,) = _figure(width=8, height=0.28 * len(counts) + 0.1).axes
    bars = axis.barh(list(counts.index), counts, color=[_BLUE] * (len(counts) - 1) + [_PALE])
    axis.bar_label(bars, padding=4)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.grid(visible=False)
    return Plot(axis.figure, f"Claims by verdict: {', '.join(f'{kind} {count}' for kind, count in counts.items())}.")


def front(plans: pd.DataFrame) -> Plot:
    """KL (log) against bits a weight: a line of searched plans, plans kept by hand, and one format in all linears."""
    (axis,) = _figure(width=8, height=4.6).axes
    rows = plans[plans["kl"] > 0].sort_values("bits")  # FP16 itself has none
    searched, kept = (rows[rows["kind"] == kind] for kind in ("searched", "kept by hand"))
    looks = [(searched, "searched plan", COLOURS["mixed"], "o-"), (kept, "blocks kept in FP16 by hand", _GREY, "x")]
    for own, label, colour, line in looks:
        style = {"capsize": 2, "elinewidth": 1, "markersize": 6, "color": colour, "label": label}
        axis.errorbar(own["bits"], own["kl"], yerr=_around(own, "kl"), fmt=line, **style)
    for one in rows[rows["kind"] == "one format"].itertuples():
        bars = [[one.kl - one.kl_low], [one.kl_high - one.kl]]
        axis.errorbar(one.bits, one.kl, yerr=bars, fmt="D", markersize=8, capsize=3, color=COLOURS[one.format])
        axis.annotate(one.name, (one.bits, one.kl), (9, 4), textcoords="offset points", fontsize=11)
    _log(axis, "y")
    axis.set(xlabel="bits a weight, all linear layers of the encoder", ylabel="KL from FP16 (nats, log scale)")
    axis.legend(frameon=False)
    said = [f"{name} {one['bits']:.2f} bits, {one['kl']:.1e}" for name, one in rows.set_index("name").iterrows()]
    return Plot(axis.figure, f"KL on validation pictures by plan: {'; '.join(said)}.")


def predicted(random: pd.DataFrame, plans: pd.DataFrame) -> Plot:
    """Measured against predicted KL, both log: random mixtures on the pictures of the search, plans on others."""
    (axis,) = _figure(width=6.4, height=4.6).axes
    mixed, said = plans[plans["format"] == "mixed"], []
    for label, rows, column, colour, marker in (
        ("random mixtures, sum of single layers", random, "predicted", _GREY, "o"),
        ("random mixtures, with pairs", random, "predicted_pairs", _ORANGE, "s"),
        ("plans, on validation pictures", mixed, "predicted_kl", COLOURS["mixed"], "D"),
    ):
        if rows[column].notna().any():
            style = {"fmt": marker, "color": colour, "markersize": 5, "elinewidth": 1, "label": label}
            axis.errorbar(rows[column], rows["kl"], yerr=_around(rows, "kl"), **style)
            said.append(f"{label} {np.median(rows['kl'] / rows[column]):.2f}")
    axis.axline((mixed["kl"].min(),) * 2, (mixed["kl"].max(),) * 2, color="black", linewidth=0.8)
    for name, label in (("x", "predicted KL (nats, log scale)"), ("y", "measured KL (nats, log scale)")):
        _log(axis, name)
        axis.set(**{f"{name}label": label})
    axis.tick_params(which="minor", labelbottom=False, labelleft=False)
    axis.legend(frameon=False, fontsize=9)
    return Plot(axis.figure, f"Measured KL as a multiple of the predicted, median: {'; '.join(said)}.")


def linear_grid(sensitivity: pd.DataFrame, kinds: Mapping[str, str]) -> Plot:
    """KL of each linear alone in low precision, block by block; a panel a format of `kinds`, with its name in words."""
    panels = {name: sensitivity[sensitivity["format"] == kind] for kind, name in kinds.items()}
    kl = pd.concat(panels.values())["kl"].clip(lower=np.finfo(float).tiny)
    figure, said = _figure(1, len(panels), width=5 * len(panels), height=2.6), []
    for axis, (name, rows) in zip(figure.axes, panels.items(), strict=True):
        table = rows.pivot(index="linear", columns="block", values="kl").loc[rows["linear"].unique()]
        shown = _grid(axis, table, norm=LogNorm(kl.min(), kl.max()), cmap="Blues")
        axis.set_title(name)
        most = rows.loc[rows["kl"].idxmax()]
        said.append(f"{name}, largest {most['linear']} of block {most['block']} with {most['kl']:.1e}")
    figure.colorbar(shown, ax=figure.axes, label="KL (nats, log scale)", format="{x:g}")
    return Plot(figure, f"KL of one linear layer in low precision: {'; '.join(said)}.")


def plan_grid(plan: Mapping[str, str], kinds: Mapping[str, str]) -> Plot:
    """The format of each linear, block by block; `plan` has it by the linear's name, `kinds` what it is called."""
    parts = [(name.split(".")[-1].removesuffix("_proj"), int(name.split(".")[1]), kind) for name, kind in plan.items()]
    rows = pd.DataFrame(parts, columns=["linear", "block", "kind"])
    table = rows.assign(kind=rows["kind"].map(list(kinds).index)).pivot(index="linear", columns="block", values="kind")
    colours = {"fp16": COLOURS["fp16"], "int8": COLOURS["w8a16"], "nf4": COLOURS["nf4c"]}
    palette, counts = ListedColormap([colours[kind] for kind in kinds]), rows["kind"].value_counts()
    (axis,) = _figure(width=8, height=2.6).axes
    _grid(axis, table.loc[rows["linear"].unique()], cmap=palette, vmin=-0.5, vmax=len(kinds) - 0.5)
    labels = {kind: f"{name} ({counts.get(kind, 0)})" for kind, name in kinds.items()}
    _legend(axis, handles=[Patch(color=colours[kind], label=label) for kind, label in labels.items()])
    return Plot(axis.figure, f"Formats of the {len(rows)} linear layers: {', '.join(labels.values())}.")


def _grid(axis: Axes, table: pd.DataFrame, **look: object) -> object:
    """A cell for each linear (row) and block (column) of `table`, with white lines between them."""
    shown = axis.imshow(table, aspect="auto", **look)
    axis.set_yticks(range(len(table)), table.index)
    axis.set_xticks(range(0, len(table.columns), max(1, len(table.columns) // 12)))
    axis.set_xticks(np.arange(-0.5, len(table.columns)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(table)), minor=True)
    axis.grid(visible=False)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.set(xlabel="block", axisbelow=False)
    return shown

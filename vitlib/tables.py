"""Tables and sentences of the reports, made from records. No torch.

table(frame, {"variant": "variant", "top1": Column("Top-1 (%)", ".2f", 100),
              ("top1_low", "top1_high"): Column("95 % interval", ".1f", 100)})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
from pandas.io.formats.style import Styler

from vitlib import variants

NO_BREAK = "\u00a0"  # keeps a figure and its interval on one line
MISSING = "–"


class Markdown(str):
    """Text that a notebook renders as Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)


class Column(NamedTuple):
    """How a column is shown: heading, format specification ('' for text) and the factor that it is multiplied by."""

    title: str
    format: str = ""
    scale: float = 1.0


def table(
    frame: pd.DataFrame,
    columns: Mapping[str | tuple[str, str], str | Column] | None = None,
    *,
    digits: int = 2,
    index: bool = False,
    none: str = "none",
) -> Styler | Markdown:
    """A table to read: numbers rounded and grouped, a dash for what was not measured, `none` where there is no row.

    `columns` chooses and orders what is shown; a key of two names is an interval, its lower and upper bound. Columns
    that it names and `frame` lacks are left out, and so are columns without any text. Names of variants become words.
    """
    if frame.empty:
        return Markdown(f"*{none}*")
    shown = frame if columns is None else _chosen(frame, columns)
    if "variant" in shown:
        shown = shown.assign(variant=[variants.label(str(name)) for name in shown["variant"]])
    shown = shown.loc[:, [not shown[name].astype(str).eq("").all() for name in shown]]
    numbers = list(shown.select_dtypes("number"))
    whole = [name for name in numbers if (shown[name].dropna() % 1 == 0).all()]
    formats = {name: "{:,.0f}" if name in whole else f"{{:,.{digits}f}}" for name in numbers}
    right = [*numbers, *shown.attrs.get("right", ())]
    left = [
        {"selector": f".col{at}", "props": "text-align: left"} for at, name in enumerate(shown) if name not in right
    ]
    styled = shown.style.format(formats, na_rep=MISSING, escape="html").set_table_styles(left)
    return styled if index else styled.hide(axis="index")


def _chosen(frame: pd.DataFrame, columns: Mapping[str | tuple[str, str], str | Column]) -> pd.DataFrame:
    """The columns named, each under its heading. Formatted ones are text; their headings are in `attrs["right"]`."""
    made, right = {}, []
    for key, about in columns.items():
        about = Column(about) if isinstance(about, str) else about
        names = (key,) if isinstance(key, str) else key
        if not set(names) <= set(frame):
            continue
        if about.format:
            parts = [[_number(value, about) for value in frame[name]] for name in names]
            made[about.title] = [_joined(values) for values in zip(*parts, strict=True)]
            right.append(about.title)
        else:
            made[about.title] = frame[names[0]]
    result = pd.DataFrame(made, index=frame.index)
    result.attrs["right"] = right
    return result


def _number(value: object, about: Column) -> str:
    return MISSING if pd.isna(value) else format(about.scale * float(value), about.format)


def _joined(values: tuple[str, ...]) -> str:
    """One figure, or an interval that does not break over lines."""
    text = MISSING if set(values) == {MISSING} else " … ".join(values)
    return text.replace(" ", NO_BREAK)

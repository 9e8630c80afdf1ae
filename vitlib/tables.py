"""Tables and sentences of the reports, made from records. No torch.

table(frame, {"variant": "variant", "top1": Column("Top-1 (%)", ".2f", 100),
              ("top1_low", "top1_high"): Column("95 % interval", ".1f", 100)})
"""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping
from numbers import Real
from typing import NamedTuple

import pandas as pd

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


class Table:
    """A table that a notebook renders. Cells are text, escaped in HTML; numbers are aligned to the right."""

    def __init__(self, data: pd.DataFrame, numbers: Collection[str], digits: int, index: bool) -> None:
        self.data = data
        self._numbers, self._digits, self._index = numbers, digits, index

    def text(self) -> pd.DataFrame:
        """The cells as they are shown."""
        shown = {name: self._column(self.data.iloc[:, at]) for at, name in enumerate(self.data.columns)}
        return pd.DataFrame(shown, index=self.data.index)

    def _column(self, values: pd.Series) -> list[str]:
        digits = self._digits
        if pd.api.types.is_numeric_dtype(values) and (values.dropna() % 1 == 0).all():
            digits = 0
        return [_cell(value, digits) for value in values]

    def to_html(self) -> str:
        """A `<table>` whose cells have the class `num` or `text`; no ids and no style sheet."""
        text, right = self.text(), set(self._numbers)
        # The class is for the pages' style sheet; JupyterLab has none, and aligns to the right by itself.
        kinds = ['class="num"' if name in right else 'class="text" style="text-align: left"' for name in text]
        head = "".join(f"<th {kind}>{_escaped(name)}</th>" for kind, name in zip(kinds, text, strict=True))
        rows = []
        for label, row in zip(text.index, text.itertuples(index=False, name=None), strict=True):
            first = f"<th>{_escaped(label)}</th>" if self._index else ""
            cells = (f"<td {kind}>{_escaped(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
            rows.append(f"<tr>{first}{''.join(cells)}</tr>")
        corner = f"<th>{_escaped(text.index.name or '')}</th>" if self._index else ""
        return f"<table>\n<thead><tr>{corner}{head}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>"

    _repr_html_ = to_html

    def __repr__(self) -> str:
        """Text for a terminal; control characters are shown as escapes."""
        shown = self.text().map(lambda text: text if text.isprintable() else repr(text)[1:-1])
        for name in shown.columns.difference(list(self._numbers)):
            width = max(shown[name].str.len().max(), len(str(name)))
            shown[name] = shown[name].str.ljust(width)
            shown = shown.rename(columns={name: str(name).ljust(width)})
        return "\n".join(line.rstrip() for line in shown.to_string(index=self._index).splitlines())


def table(
    frame: pd.DataFrame,
    columns: Mapping[str | tuple[str, str], str | Column] | None = None,
    *,
    digits: int = 2,
    index: bool = False,
    none: str = "none",
) -> Table | Markdown:
    """A table to read: numbers rounded and grouped, a dash for what was not measured, `none` if there is no row.

    `columns` chooses and orders what is shown; a key of two names is an interval, its lower and upper bound. Columns
    that `frame` lacks and columns without any text are left out. Names of variants become words.
    """
    if frame.empty:
        return Markdown(f"*{none}*")
    shown = frame if columns is None else _chosen(frame, columns)
    if "variant" in shown:
        shown = shown.assign(variant=[variants.label(str(name)) for name in shown["variant"]])
    shown = shown.loc[:, [not shown[name].astype(str).eq("").all() for name in shown]]
    numbers = [*shown.select_dtypes("number"), *shown.attrs.get("right", ())]
    return Table(shown, numbers, digits, index)


def _cell(value: object, digits: int) -> str:
    if isinstance(value, str):
        return value
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return MISSING
    return f"{value:,.{digits}f}" if isinstance(value, Real) and not isinstance(value, bool) else str(value)


def _escaped(text: object) -> str:
    return html.escape(str(text), quote=False)


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

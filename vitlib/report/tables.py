"""Tables and sentences of the reports, made from records. No torch.

table(frame, {"variant": "variant", "top1": Column("Top-1 (%)", ".2f", 100),
              ("top1_low", "top1_high"): Column("95 % interval", ".1f", 100)})
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import NamedTuple

import pandas as pd

from vitlib.study import origin, variants
from vitlib.study.study import Study

NO_BREAK = "\u00a0"  # keeps a figure and its interval on one line
MISSING = "–"
NO_MATHS = "tex2jax_ignore mathjax_ignore"  # classes in which JupyterLab sets no mathematics


class Markdown(str):
    """Text that a notebook renders as Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)


def base(study: Study) -> Markdown:
    """What the base of the study is, and what follows for its accuracies."""
    return Markdown(origin.sentence(study.folder))


def text(name: object) -> str:
    """A name of a class or a file for a sentence in Markdown, in which nothing of it counts as markup."""
    escaped = re.sub(r"[\\`*_{}\[\]()<>#|$~&!:@^=.]", lambda found: f"&#{ord(found[0])};", " ".join(str(name).split()))
    # JupyterLab looks for mathematics in what it shows too: not across an element.
    return re.sub("&#(36|92);", "<span>&#\\1;</span>", escaped)


def number(value: float) -> str:
    """Three significant digits, zeros kept: 1.06, 14.5, 1,230."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


class Column(NamedTuple):
    """How a column is shown: heading, format ('' for text) and the factor that it is multiplied by.

    The format is a specification or a function, `number` say.

    `best`, "low" or "high", says which value is printed in bold; `bar` draws each value as a bar behind its figure.
    """

    title: str
    format: str | Callable[[float], str] = ""
    scale: float = 1.0
    best: str = ""
    bar: bool = False


class Table:
    """A table that a notebook renders. Cells are text, escaped in HTML; those of numeric columns are on the right.

    `values` holds the numbers behind the text of numeric columns, `columns` how each is shown, and `record` the file
    that the table was made from (`records/x.csv`), which a page links to.
    """

    def __init__(
        self, text: pd.DataFrame, values: Mapping[str, pd.Series], columns: Mapping[str, Column], record: str
    ) -> None:
        self.text, self.values, self.columns, self.record = text, values, columns, record

    def to_html(self) -> str:
        """A `<table>` whose cells have the class `num` or `text`; no ids and no style sheet."""
        head = "".join(f"<th {self._kind(name)}>{_escaped(name)}</th>" for name in self.text)
        rows = zip(*(self._cells(name) for name in self.text), strict=True)
        body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
        caption = f"<caption>{_escaped(self.record)}</caption>\n" if self.record else ""
        head = f'<table class="{NO_MATHS}">\n{caption}<thead><tr>{head}</tr></thead>'
        return f"{head}\n<tbody>\n{body}\n</tbody>\n</table>"

    def _kind(self, name: str) -> str:
        # The class is for the pages' style sheet; JupyterLab has none, and aligns to the right by itself.
        return 'class="num"' if name in self.values else 'class="text" style="text-align: left"'

    def _cells(self, name: str) -> list[str]:
        """The `<td>` of a column: with the number to sort by, the best in bold, a bar as long as its share."""
        if name not in self.values:
            return [f"<td {self._kind(name)}>{_escaped(text)}</td>" for text in self.text[name]]
        about, values = self.columns[name], self.values[name]
        best = {"low": values.min(), "high": values.max()}.get(about.best) if values.nunique() > 1 else None
        made, longest = [], values.max() or 1  # all are zero: no bar
        for text, value in zip(self.text[name], values, strict=True):
            known = pd.notna(value)
            order = f' data-order="{value:.9g}"' if known else ' data-order=""'
            bar = f' style="--bar: {max(0, round(100 * value / longest))}%"' if about.bar and known else ""
            shown, gap, interval = _escaped(text).partition(f"{NO_BREAK}(")
            shown = f"<strong>{shown}</strong>" if known and value == best else shown
            made.append(f'<td class="num{" bar" if bar else ""}"{order}{bar}>{shown}{gap}{interval}</td>')
        return made

    _repr_html_ = to_html

    def __repr__(self) -> str:
        """Text for a terminal; control characters are shown as escapes."""
        shown = self.text.map(lambda text: text if text.isprintable() else repr(text)[1:-1])
        for name in shown.columns.difference(list(self.values)):
            width = max(len(name), *shown[name].str.len())
            shown[name] = shown[name].str.ljust(width)
            shown = shown.rename(columns={name: name.ljust(width)})
        return "\n".join(line.rstrip() for line in shown.to_string(index=False).splitlines())


def table(
    frame: pd.DataFrame,
    columns: Mapping[str | tuple[str, str], str | Column] | None = None,
    *,
    index: bool = False,
    none: str = "none",
) -> Table | Markdown:
    """A table to read: numbers rounded and grouped, a dash for what was not measured, `none` if there is no row.

    `columns` chooses and orders what is shown; a key of two names is an interval, its lower and upper bound, and one of
    three is a value with its interval (`estimate`). Columns that `frame` lacks and columns without any text are left
    out. Names of variants become words. With `index` the first column is the frame's index.
    """
    if frame.empty:
        return Markdown(f"*{none}*")
    record, text, values, shown_as = frame.attrs.get("record", ""), {}, {}, {}  # `Study.write` and `Study.read` set it
    frame = frame.rename_axis(frame.index.name or "").reset_index() if index else frame
    for key, about in (columns or {name: name for name in frame}).items():
        about = about if isinstance(about, Column) else Column(about)
        names = key if isinstance(key, tuple) else (key,)
        if not set(names) <= set(frame):
            continue
        if len(names) == 3:
            each = zip(*(about.scale * frame[name] for name in names), strict=True)
            text[about.title] = [estimate(*bounds, form=about.format) for bounds in each]
        elif any((parts := [_cells(frame[name], about) for name in names])[0]):
            text[about.title] = [_interval(bounds) for bounds in zip(*parts, strict=True)] if about.format else parts[0]
        if about.format or frame[names[0]].dtype.kind in "iuf":
            values[about.title], shown_as[about.title] = pd.to_numeric(frame[names[0]], errors="coerce"), about
    return Table(pd.DataFrame(text, index=frame.index), values, shown_as, record)


def estimate(value: float, low: float, high: float, *, form: str = ",") -> str:
    """A value with its interval, "7.3 (7.1 … 7.6)", in the digits that the interval allows, at most three as in "0.84".

    Half an interval keeps two digits up to 3.55 and one above, the rule of the Particle Data Group's review (5.3).

    The value alone where its bounds are NaN or equal. `form` is what a format specification has before the digits.
    """
    if math.isnan(value):
        return MISSING
    half, size = (high - low) / 2, math.floor(math.log10(abs(value) or 1.0))
    known = 2 if size == -1 else 2 - size
    digits = max(0, min(known, math.ceil(-math.log10(half / 3.55))) if half > 0 else known)
    text, *bounds = (f"{each:{form}.{digits}f}" for each in (value, low, high))
    return f"{text} ({' … '.join(bounds)})".replace(" ", NO_BREAK) if half > 0 else text


def _cells(values: pd.Series, about: Column) -> list[str]:
    """The values as text: names of variants in words, numbers grouped, whole ones without digits."""
    if about.title in ("variant", "compared with"):
        return [variants.label(str(value)) for value in values]
    whole = values.dtype.kind in "iuf" and (values.dropna() % 1 == 0).all()
    form = about.format or (",.0f" if whole else ",.2f")
    return [_cell(value, form, about.scale) for value in values]


def _cell(value: object, form: str | Callable[[float], str], scale: float) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return MISSING
    if not isinstance(value, Real) or isinstance(value, bool):
        return str(value)
    return form(scale * value) if callable(form) else format(scale * value, form)


def _interval(bounds: tuple[str, ...]) -> str:
    """One figure, or an interval that does not break over lines."""
    return (MISSING if set(bounds) == {MISSING} else " … ".join(bounds)).replace(" ", NO_BREAK)


def _escaped(text: object) -> str:
    """As HTML; what follows a line break in a cell is small text below."""
    text, _, below = html.escape(str(text), quote=False).partition("\n")
    return f"{text}<br><small>{below}</small>" if below else text

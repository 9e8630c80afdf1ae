"""What of an executed notebook may be published: bars at their end, no machine paths, safe HTML. Level 0."""

import functools
import html
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlib import files

if TYPE_CHECKING:
    from nbformat import NotebookNode


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Elements whose content is not prose either, so that they go with everything inside them.
DROPPED = _words(
    "applet base embed form frame frameset iframe link math meta noscript object script style svg template"
)
TAGS = _words(
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i img"
    " ins kbd li mark ol p pre progress s samp small span strong sub summary sup table tbody td tfoot th"
    " thead tr u ul"
)
CSS_PROPERTIES = _words(
    "background-color border border-bottom border-collapse border-color border-left border-right border-top"
    " color display font-family font-size font-style font-weight height line-height margin margin-bottom"
    " margin-left margin-right margin-top max-width min-width opacity padding padding-bottom padding-left"
    " padding-right padding-top text-align text-decoration vertical-align white-space width"
)
_EVERYWHERE = _words("class id style title")
_SOMEWHERE = {
    "a": _words("href"),
    "img": _words("src alt width height"),
    "progress": _words("value max"),
    "th": _words("colspan rowspan scope"),
    "td": _words("colspan rowspan"),
    "col": _words("span"),
    "ol": _words("start"),
    "details": _words("open"),
}
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[a-z0-9+/=]*", re.IGNORECASE)
_LINK = re.compile(r"(https?:|mailto:|[^:]*$|[^:]*[/?#])", re.IGNORECASE)
_IGNORED = re.compile(r"[\x00-\x20\x7f-\xa0\u2000-\u200f\u2028-\u202f\ufeff]")


def clean(source: str | bytes) -> str:
    """`source` with its text, tables, pictures and colours; no script, frame or form, nothing from elsewhere.

    pandas' two stylings survive: `style` attributes, and a Styler's rules that address its own table.
    """
    import bleach
    from bleach.css_sanitizer import CSSSanitizer

    class PlainValues(CSSSanitizer):
        def sanitize_css(self, style: str) -> str:
            return declarations(style)

    text = source.decode() if isinstance(source, bytes) else str(source)
    styles, text = _take_out(text)
    body = bleach.clean(
        text,
        tags=TAGS,
        attributes=_allowed,
        protocols=frozenset({"http", "https", "mailto", "data"}),
        strip=True,
        css_sanitizer=PlainValues(),
    )
    return f"<style>{styles}</style>{body}" if styles else body


def declarations(style: str) -> str:
    """The declarations of `style` that only change looks: no url(), no function but colours, no at-rule."""
    import tinycss2

    kept = []
    for part in tinycss2.parse_declaration_list(style, skip_comments=True, skip_whitespace=True):
        if part.type == "declaration" and part.lower_name in CSS_PROPERTIES and _plain(part.value):
            kept.append(f"{part.lower_name}: {tinycss2.serialize(part.value).strip()}")
    return "; ".join(kept)


def rules(sheet: str) -> str:
    """The rules of a style sheet whose selectors all address `#T_…`, the id pandas gives a styled table."""
    import tinycss2

    kept = []
    for part in tinycss2.parse_stylesheet(sheet, skip_comments=True, skip_whitespace=True):
        if part.type != "qualified-rule":
            continue
        selector = tinycss2.serialize(part.prelude).strip()
        content = declarations(tinycss2.serialize(part.content))
        if content and re.fullmatch(r"(#T_\w+[\w\s.:#-]*)(,\s*#T_\w+[\w\s.:#-]*)*", selector):
            kept.append(f"{selector} {{{content}}}")
    return "\n".join(kept)


def _plain(tokens: list) -> bool:
    """Whether a value is words, numbers and colours: `url(`, `expression(`, `var(` and escapes are not."""
    for token in tokens:
        if token.type == "function":
            if token.lower_name not in ("rgb", "rgba", "hsl", "hsla") or not _plain(token.arguments):
                return False
        elif token.type == "literal":
            if token.value not in (",", "/"):
                return False
        elif token.type in ("ident", "string"):
            if re.search(r"[^\w .,'%#+-]|script|expression", token.value, re.IGNORECASE):
                return False
        elif token.type not in ("whitespace", "number", "percentage", "dimension", "hash"):
            return False
    return True


def _take_out(text: str) -> tuple[str, str]:
    """The safe rules of all <style> elements, and the text without the elements in DROPPED.

    Only for looks: what a parser disagreement lets through here still meets the allow-list in `clean`.
    """
    if not re.search(rf"<\s*({'|'.join(DROPPED)})\b", text, re.IGNORECASE):
        return "", text  # not parsed at all, so a plain table stays as pandas wrote it
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    styles = "\n".join(filter(None, (rules(element.get_text()) for element in soup.find_all("style"))))
    for element in soup.find_all(list(DROPPED)):
        element.decompose()
    return styles, str(soup)


def _allowed(tag: str, name: str, value: str) -> bool:
    if name in _EVERYWHERE:
        return True
    if name not in _SOMEWHERE.get(tag, ()):
        return False
    # Browsers ignore control characters and spaces inside a scheme, so they are removed before judging it.
    address = _IGNORED.sub("", html.unescape(value))
    if name == "href":
        return _LINK.match(address) is not None
    if name == "src":
        return _PICTURE.fullmatch(address) is not None
    return True


def tidy(executed: "NotebookNode") -> "NotebookNode":
    """`executed` fit to publish: progress bars at their last state, no widgets, no path of this machine."""
    executed.cells = [cell for cell in executed.cells if "papermill-error-cell-tag" not in _tags(cell)]
    executed.metadata.pop("widgets", None)
    origin = executed.metadata.pop("papermill", {})
    kept = {key: origin[key] for key in ("parameters", "start_time", "duration", "version") if key in origin}
    executed.metadata["papermill"] = scrubbed(kept)
    for cell in executed.cells:
        if "injected-parameters" in _tags(cell):
            cell.source = scrubbed(cell.source)
        if cell.cell_type == "code":
            outputs = [output for output in cell.outputs if not _is_widget(output)]
            tidied = [_tidy_output(output) for output in _joined(outputs)]
            cell.outputs = [output for output in tidied if output.get("text", "-").strip()]  # no empty streams
    return executed


def _tags(cell: "NotebookNode") -> Sequence[str]:
    return cell.metadata.get("tags", ())


def _is_widget(output: "NotebookNode") -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _joined(outputs: Sequence["NotebookNode"]) -> list["NotebookNode"]:
    """`outputs` with streams of one name that follow each other made one, so that a bar is seen whole."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if output.output_type == "stream" and last and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _tidy_output(output: "NotebookNode") -> "NotebookNode":
    if output.output_type == "stream":
        output.text = scrubbed(last_state(output.text))
    elif output.output_type == "error":
        output.evalue, output.traceback = scrubbed(output.evalue), scrubbed(output.traceback)
    else:
        for kind in output.data.keys() - {"image/png", "image/jpeg"}:
            output.data[kind] = scrubbed(output.data[kind])
    return output


def last_state(text: str) -> str:
    """`text` as a terminal would have left it: of what a carriage return overwrote, only the last state."""
    text = re.sub(r"\x1b\[\d*[A-DJK]", "", text.replace("\r\n", "\n"))
    lines = (line.rstrip("\r").rsplit("\r", maxsplit=1)[-1] for line in text.split("\n"))
    return "\n".join(lines)


def scrubbed(value: Any) -> Any:
    """`value` (text, or lists and mappings of it) with the project's root as `.`, the home folder as `~`.

    Files of installed libraries start at the library's name.
    """
    if isinstance(value, str):
        for pattern, short in _machine_paths(str(files.project_root()), str(Path.home())):
            value = pattern.sub(short, value)
        return value
    if isinstance(value, Mapping):
        return type(value)({key: scrubbed(item) for key, item in value.items()})
    return [scrubbed(item) for item in value] if isinstance(value, list) else value


@functools.cache
def _machine_paths(root: str, home: str) -> list[tuple[re.Pattern[str], str]]:
    """Patterns of this machine's folders; the root first, as it often lies in the home folder."""
    # Before a path may stand the end of a colour code, whose last letter must not count as part of a name.
    before, after = r"(^|[^\w.~-]|\x1b\[[\d;]*m)", r"(?![\w-]|\.\w)"
    kernel = rf"{re.escape(tempfile.gettempdir())}/ipykernel_\d+/\d+\.py"
    library = r"/[\w./+-]*/(?:site|dist)-packages/"  # a warning names the file that it comes from
    pairs = [(folder, short) for folder, short in ((root, "."), (os.path.realpath(root), "."), (home, "~"))]
    patterns = [
        (re.compile(before + re.escape(folder) + after), rf"\g<1>{short}")
        for folder, short in pairs
        if len(Path(folder).parts) > 1  # a home of `/` would match every path
    ]
    return [(re.compile(kernel), "<cell>"), (re.compile(library), ""), *patterns]


def display(path: Path) -> str:
    """The path as a reader would type it: relative to the project where it lies inside."""
    root = files.project_root()
    return str(path.absolute().relative_to(root)) if path.absolute().is_relative_to(root) else str(path)

"""The one script of a page: its tables can be sorted and filtered. No torch.

The script is DataTables as itables ships it, allowed by its checksum in the page's policy. Without itables, or where
scripts are off, the page is complete all the same.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import re
from pathlib import Path

# The last defence: a browser runs no script but the one of `with_script`, and fetches nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SORTED_ROWS = 8  # a page whose longest table has fewer rows needs no script to sort and filter them
_ACTIVATE = """
const last = (sign) => (a, b) => a === b ? 0 : a === -Infinity ? 1 : b === -Infinity ? -1 : sign * (a - b);
Object.assign(jQuery.fn.dataTable.ext.type.order, {"num-asc": last(1), "num-desc": last(-1)});
for (const table of document.querySelectorAll("table")) {
  if (table.rows.length <= ROWS || !table.tHead) continue;
  const filtered = table.rows.length > 2 * ROWS;
  jQuery(table).DataTable({paging: false, info: false, order: [], searching: filtered, autoWidth: false});
}
"""


def with_script(text: str) -> str:
    """`text` with its policy and, if a table has at least `SORTED_ROWS` rows, with the script that sorts and filters.

    Whatever the direction, what was not measured is sorted last.
    """
    rows = max((table.count("<tr") for table in re.findall(r"<table.*?</table>", text, re.DOTALL)), default=0) - 1
    script = _script() if rows >= SORTED_ROWS else ""
    policy = POLICY
    if script:
        policy += f"; script-src '{checksum_of(script)}'"
        before, _, after = text.rpartition("</body>")
        text = f'{before}<script type="module">{script}</script>\n</body>{after}'
    return text.replace("<!--policy-->", f'<meta http-equiv="Content-Security-Policy" content="{policy}" />')


def checksum_of(script: str) -> str:
    """The source expression with which a content security policy allows the script with this text, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@functools.cache
def _script() -> str:
    """DataTables and the lines that apply it, as the text of a module script; '' where itables is not installed."""
    found = importlib.util.find_spec("itables")
    if found is None or not found.submodule_search_locations:
        return ""
    source = Path(found.submodule_search_locations[0], "html", "dt_bundle.js").read_text(encoding="utf-8")
    # Neither may stand in a <script>: after both, HTML would look for a second end of it. All are in strings.
    source = re.sub(r"<(?=!--|/?script)", r"\\x3c", source)
    jquery = re.search(r"(\w+) as jQuery", source)
    source = re.sub(r"\bexport\s*\{[^}]*\};?", "", source)
    return f"{source}\nconst jQuery = {jquery[1]};{_ACTIVATE.replace('ROWS', str(SORTED_ROWS))}"

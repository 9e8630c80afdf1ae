"""The published pages: an answer first, every row and every alternative text there, no page endless."""

import re
from pathlib import Path

import nbformat
import page_checks
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

STUDIES = sorted((Path(__file__).parents[1] / "outputs" / "gallery").glob("*/"))
PAGES = [page for study in STUDIES for page in page_checks.pages(study)]


def test_the_gallery_has_pages():
    assert STUDIES and PAGES


def test_the_checks_find_what_is_wrong(tmp_path):
    bad = tmp_path / "1_bad.html"
    bad.write_text(
        '<meta http-equiv="Content-Security-Policy" content=""><title>1_bad – demo</title><img src="data:image/png;x">'
        '<p style="height: 6900px; width: 500px">x</p><section class="answer"><p>late</p></section><script>1</script>'
    )
    table = "<table><tr><td>1</td></tr></table>"
    output = new_output("display_data", data={"text/html": table})
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=[output])]), bad.with_suffix(".ipynb"))
    words = ("title", "description", "footer", "notebook to", "without alt", "no SVG", "not ours", "1 rows")
    faults = page_checks.in_text(bad)
    assert len(faults) == len(words) and all(any(word in fault for fault in faults) for word in words)
    seen = page_checks.in_browser([bad])
    assert [re.sub(r"[\d.]+", "N", fault.split(": ")[1]) for fault in seen] == [
        *("N px high", "no answer in the first N px", "N px wide on a phone")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_tells_and_loses_nothing(page):
    assert page_checks.in_text(page) == []


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_pages_show_their_answer_and_end(study):
    assert page_checks.in_browser(page_checks.pages(study)) == []

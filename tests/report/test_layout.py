"""A page answers first: the summary below the title, contents, folded sections; and its tables lose nothing."""

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vitlib.report import layout, page, plots, tables
from vitlib.report.tables import Column


def code(*outputs: dict[str, str], tags: tuple[str, ...] = ()):
    shown = [new_output("display_data", data=data) for data in outputs]
    return new_code_cell("1", outputs=shown, execution_count=1, metadata={"tags": list(tags)})


def notebook(answer: tuple[dict[str, str], ...]):
    def text(source: str, *tags: str):
        return new_markdown_cell(source, metadata={"tags": list(tags), "around": ["<script>", ""]})

    cells = [text("# Speed: a title\n\nWhat this notebook is about."), text("## One"), code({"text/plain": "first"})]
    cells += [text("## More & more\n\nFolded text.", "details"), text("### Deeper"), code({"text/plain": "second"})]
    cells += [text("## Two"), code({"text/plain": "third"}), text("## Three"), text("## Summary", "summary")]
    return new_notebook(cells=[*cells, code(*answer, tags=("summary",))])


ANSWER = (
    {"text/markdown": "- NF4 is **2.5×** faster & small. It is also new.\n- Second."},
    {"image/svg+xml": "<svg/>", "text/plain": "A hill"},
)


@pytest.fixture
def soup(tmp_path):
    return BeautifulSoup(page.page_of(notebook(ANSWER), tmp_path / "6_speed.html"), "html.parser")


def test_the_answer_stands_below_the_title_and_nowhere_else(soup):
    text = soup.main.get_text()
    order = ["a title", "NF4 is 2.5× faster", "What this notebook is about", "first", "third"]
    assert [text.count(part) for part in order] == [1] * 5
    assert sorted(order, key=text.index) == order
    assert "Summary" not in text
    figure = soup.select_one("section.answer img.plot")
    assert figure["alt"] == "A hill" and figure["src"].startswith("data:image/svg+xml;base64,")
    assert soup.title.get_text().startswith("Speed: a title – ")
    assert soup.select_one('meta[name="description"]')["content"] == "NF4 is 2.5× faster & small."


def test_a_section_is_folded_up_to_the_next_heading_of_its_level(soup):
    (fold,) = soup.select("details.fold")
    assert fold.summary.get_text() == "More & more" and not fold.has_attr("open")
    inside = fold.get_text()
    assert "Folded text." in inside and "Deeper" in inside and "second" in inside
    assert "third" not in inside and not soup.find(string="<script>")
    links = {a.get_text(): a["href"][1:] for a in soup.select("nav.contents a")}
    assert list(links) == ["One", "More & more", "Two", "Three"]
    assert all(soup.find(id=name) for name in links.values())


def test_a_notebook_without_an_answer_keeps_its_order(tmp_path):
    failed = BeautifulSoup(page.page_of(notebook(()), tmp_path / "6_speed.html"), "html.parser")
    assert not failed.select("section.answer") and "What this notebook is about" in failed.main.get_text()


def test_the_finding_is_one_plain_sentence():
    assert layout.plain("- **A** *b* `c_d` [e](f.html) 1\\*2 \\_ &#42;") == "A b c_d e 1*2 _ *"
    assert (
        layout.finding_of(notebook(({"text/markdown": "## Heading\n\nA takes 1.5 ms. B more."},))) == "A takes 1.5 ms."
    )


def test_tables_sort_by_numbers_mark_the_best_and_link_their_record(tmp_path):
    frame = pd.DataFrame({"variant": [f"v{n}" for n in range(9)], "ms": [1200.5, None, *range(3, 10)]})
    frame.attrs["record"] = "records/speed.csv"
    made = tables.table(frame, {"variant": "variant", "ms": Column("ms", ",.1f", best="low", bar=True)})
    text = page.page_of(new_notebook(cells=[code({"text/html": made.to_html()})]), tmp_path / "x.html")
    soup = BeautifulSoup(text, "html.parser")
    cells = soup.select("tbody tr td:last-child")
    assert [cell["data-order"] for cell in cells[:3]] == ["1200.5", "", "3"]
    assert cells[0]["style"] == "--bar: 100%" and soup.strong.get_text() == "3.0"
    assert soup.select_one('caption a[href="records/speed.csv"]')
    # Nine rows: the script is there, and its policy allows it and nothing else.
    (script,) = soup("script")
    policy = soup.select_one('meta[http-equiv="Content-Security-Policy"]')["content"]
    assert script.get_text().count("<!--") == 0 and policy.count("'sha256-") == 1
    assert page.checksum_of(script.get_text()) in policy


def test_figures_and_photographs_say_what_they_show():

    figure = plots.learning_curves(
        pd.DataFrame({"epoch": [1, 2], "train_loss": 1.0, "valid_loss": 1.0, "top1": 0.5, "top5": 1})
    )
    assert figure._repr_svg_() == figure._repr_svg_() and "<svg" in figure._repr_svg_() and "50.0 %" in repr(figure)
    names = ["<b>rose", "x"]
    made = BeautifulSoup(
        plots.picture_grid([np.zeros((4, 4, 3), np.uint8)] * 2, names, right=[True, False])._repr_html_(), "html.parser"
    )
    assert [tag["alt"] for tag in made("img")] == names == [tag.get_text() for tag in made("figcaption")]
    assert page.clean(str(made)).count("data:image/webp;base64,") == 2

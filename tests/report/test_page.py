"""Pages: nothing in them can run, load or name a machine, and no text is lost."""

import base64
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vitlib.report import page, run, tables

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A study's folder in an empty project: `files.project_root()` finds it from the working directory."""
    for name in ("vitlib", "params", "notebooks", "outputs/demo"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / "demo"


SCRIPTS = {
    "script": "<script>alert(1)</script>",
    "onerror": '<img src="x" onerror="alert(1)">',
    "javascript": '<a href="java&#10;script:alert(1)">x</a>',
    "svg": '<svg onload="alert(1)"><script>alert(1)</script></svg>',
    "iframe": '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    "data": '<a href="data:text/html;base64,PHM=">x</a><img src="data:image/svg+xml;base64,PHN2Zz4=">',
    "refresh": '<meta http-equiv="refresh" content="0;url=javascript:alert(1)">',
    "object": '<object data="javascript:alert(1)"></object><embed src="https://evil.example/x.swf">',
    "form": '<form action="javascript:alert(1)"><button formaction="javascript:alert(1)">x</button></form>',
    "style": '<p style="width: expression(alert(1)); background: url(javascript:1); color: red">p</p>',
    "sheet": "<style>@import 'https://evil.example/x.css'; #T_a {color: url(https://evil.example)}</style>",
    "base": '<base href="https://evil.example/">',
    "vbscript": '<a href=" VBScript:msgbox(1)">x</a>',
    "link": '<link rel="import" href="https://evil.example/x.html">',
    "broken scheme": '<a href="da\tta:text/html,x">x</a><a href="javascript&colon;alert(1)">x</a>',
    "mutation": '<math><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
}


def alive(page: str) -> list[str]:
    """What in a page could run, load, or send: the judgement of a parser other than the sanitizer's."""
    soup = BeautifulSoup(page, "html.parser")
    found = [str(tag) for tag in soup(["script", "iframe", "object", "embed", "form", "base", "link", "svg"])]
    found += [str(tag) for tag in soup("meta") if tag.get("http-equiv", "").lower() == "refresh"]
    for tag in soup(True):
        for name, value in tag.attrs.items():
            address = re.sub(r"[\x00-\x20]", "", str(value)).lower()
            scheme = re.match(r"(javascript|vbscript|data:text|data:image/svg)", address)
            if name.startswith("on") or name in ("srcdoc", "formaction") or scheme:
                found.append(f"{tag.name} {name}={value}")
            if name == "style" and re.search(r"expression|url\(", address):
                found.append(address)
    return found + [sheet.get_text() for sheet in soup("style") if "evil" in sheet.get_text()]


def render(folder: Path, *outputs: nbformat.NotebookNode, markdown: str = "text") -> str:
    cell = new_code_cell("1", outputs=list(outputs), execution_count=1)
    page.write(new_notebook(cells=[new_markdown_cell(markdown), cell]), folder / "2_evaluate.ipynb")
    return (folder / "2_evaluate.html").read_text()


def shown(data: dict[str, str], **more: object) -> nbformat.NotebookNode:
    return new_output("display_data", data=data, **more)


def test_no_script_survives_in_a_page(folder):
    everything = "\n".join(SCRIPTS.values())
    outputs = [shown({kind: text}) for text in SCRIPTS.values() for kind in ("text/html", "text/markdown")]
    outputs += [shown({"text/plain": everything}), new_output("stream", name="stderr", text=everything)]
    outputs += [shown({kind: everything}) for kind in ("text/vnd.mermaid", "application/javascript")]
    outputs += [shown({"text/latex": everything}), new_output("error", ename="<script>", evalue=everything)]
    outputs += [shown({"image/png": PNG}, metadata={"image/png": {"width": "1 onload=alert(1)"}})]
    text = render(folder, *outputs, markdown="\n\n".join(SCRIPTS.values()))
    assert alive(text) == []
    assert "default-src 'none'" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_check_itself_would_find_each_script(name):
    assert alive(f"<body>{SCRIPTS[name]}</body>") or name == "mutation"


def test_hostile_names_are_shown_as_text_and_no_row_is_lost(folder):
    """In the page, and in the notebook's own output, which JupyterLab shows without sanitising."""
    names = [*SCRIPTS.values(), "<!-- a", "<style>", "</table>", "a & b", "<b>bold", "1 < 2"]
    made = tables.table(pd.DataFrame({"file": names, "top1": range(len(names))}))
    for text in (made._repr_html_(), render(folder, shown({"text/html": made._repr_html_()}))):
        soup = BeautifulSoup(text, "html.parser")
        rows = [row("td") for row in soup.select("tbody tr")]
        assert [file.get_text() for file, _ in rows] == names
        kinds = {(file["class"][0], count["class"][0]) for file, count in rows}
        assert kinds == {("text", "num")}
        assert alive(str(soup.table)) == []


def test_pandas_own_tables_and_pictures_survive(folder):
    frame = pd.DataFrame({"variant": ["fp32", "<script>alert(1)</script>"], "top1": [0.9, 0.5]})
    picture = shown({"image/png": PNG}, metadata={"image/png": {"width": 320}})
    text = render(folder, shown({"text/html": frame._repr_html_()}), picture)
    soup = BeautifulSoup(text, "html.parser")
    assert len(soup.select("table tbody tr")) == 2 and "style scoped" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not soup.select_one(f'img[src="data:image/png;base64,{PNG}"]').has_attr("width")


def test_links_within_the_study_and_to_the_web_survive():
    targets = ["2_evaluate.html#speed", "https://example.org/?a=1:2", "#x"]
    links = page.clean(" ".join(f'<a href="{target}">a</a>' for target in targets))
    assert [a["href"] for a in BeautifulSoup(links, "html.parser")("a")] == targets


def test_a_page_needs_no_network_and_stays_small(folder):
    text = render(folder, shown({"text/plain": "42"}))
    assert re.findall(r"(?:src|href)=\"(?!data:|#|[\w.]+\.(?:html|ipynb)\b)[^\"]*", text) == []
    assert not re.findall(r"@import|url\(", text)
    assert len(text) < 100_000
    soup = BeautifulSoup(text, "html.parser")
    assert soup.select_one("main .code pre") and not soup.select_one("#show-code").has_attr("checked")
    assert [link["href"] for link in soup.select("header a")] == ["index.html", "2_evaluate.html"]


def test_paths_are_shortened_and_what_only_begins_alike_stays(folder):
    text = "/opt/x/.venv/lib/python3.12/site-packages/torch/profiler.py:224: UserWarning: cleared"
    assert page.scrubbed(text) == "torch/profiler.py:224: UserWarning: cleared"
    project = folder.parents[1]
    text = f"{project}s {project}-old {project}.bak x{project} file://{project}/a {project}."
    assert page.scrubbed(text) == f"{project}s {project}-old {project}.bak x{project} file://./a .."


def test_only_the_last_state_of_a_progress_bar_is_kept():
    pieces = ["0%\r", "50%\r", "100%\r\n", "x\x1b[A\n", " "]
    outputs = [new_output("stream", name="stderr", text=piece) for piece in pieces]
    outputs.insert(2, new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}))
    (cell,) = page.tidy(new_notebook(cells=[new_code_cell("1", outputs=outputs)])).cells
    assert [output.text for output in cell.outputs] == ["100%\r\nx\n "]


def test_a_page_shows_warnings_and_no_progress_bars(folder):
    bar = new_output("stream", name="stderr", text="decoding: 100%|###| 9/9\ncareful\n")
    text = BeautifulSoup(render(folder, bar, new_output("stream", name="stderr", text="1%|# |\n")), "html.parser")
    (stream,) = text.select('[data-mime-type="application/vnd.jupyter.stderr"]')
    assert stream.get_text().split() == ["careful"]


def test_pages_are_rendered_again_with_the_facts_of_their_run(folder, capsys):
    notebook = new_notebook(cells=[new_markdown_cell("# Title\n\nold")])
    notebook.metadata["vitlib"] = {"hardware": "one H200", "commit": "0123456789", "made": "2020-01-02 03:04"}
    page.write(notebook, folder / "2_evaluate.ipynb")
    (folder / "2_evaluate.html").write_text("an old template")
    assert run.main(["render", "--folder", str(folder)]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written == ["outputs/demo/2_evaluate.html", "outputs/demo/index.html", "outputs/index.html"]
    assert "one H200 · 0123456789 · 2020-01-02 03:04" in (folder / "2_evaluate.html").read_text()
    assert "2020-01-02 03:04" in (folder / "index.html").read_text()
    assert run.main(["render", "--study", "none"]) == 1
    assert "no executed notebook in outputs/none" in capsys.readouterr().err
    assert not (folder.parent / "none").exists()


@pytest.mark.parametrize(("given", "shown"), [({"study": "h200"}, "h200"), ({}, "copy")])
def test_a_page_is_named_by_its_notebooks_parameter(folder, given, shown):
    notebook = new_notebook(cells=[new_code_cell("1")], metadata={"papermill": {"parameters": given}})
    text = page.page_of(notebook, folder.with_name("copy") / "2_evaluate.html")
    assert BeautifulSoup(text, "html.parser").select_one("a.home").get_text() == shown

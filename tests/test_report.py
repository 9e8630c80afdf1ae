"""Reports: what counts as done, what a failure leaves, what a parameter file and an output cannot do."""

import base64
import json
import re
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vitlib import frontpage, imports, params, publish, report

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project: `files.project_root()` finds it from the working directory."""
    for folder in ("vitlib", "params", "notebooks", "outputs/demo"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(project):
    return project / "outputs" / "demo"


def write(project: Path, *sources: str, name: str = "2_evaluate", parameters: str = "") -> Path:
    cells = [new_code_cell(source) for source in sources]
    if parameters:
        cells.insert(0, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), *cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = project / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def execute(notebook: Path, folder: Path, **parameters: object) -> Path:
    return report.execute(notebook, parameters=parameters, folder=folder, progress=False)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------- done and not done


def test_failure_keeps_the_last_good_report_and_success_clears_the_mark(project, folder):
    good = execute(write(project, "print('first')"), folder)
    before = good.read_bytes(), good.with_suffix(".html").read_bytes()

    with pytest.raises(report.ReportError, match=r"2_evaluate FAILED in cell 2: ValueError: <b>no</b> \(see"):
        execute(write(project, "print('second')", "raise ValueError('<b>no</b>')", "print('third')"), folder)

    assert (good.read_bytes(), good.with_suffix(".html").read_bytes()) == before
    assert names(folder) == {
        *("2_evaluate.ipynb", "2_evaluate.html", "2_evaluate.failed.ipynb", "2_evaluate.failed.html")
    }
    failed = (folder / "2_evaluate.failed.html").read_text()
    banner = BeautifulSoup(failed, "html.parser").select(".alert-danger")[0]
    assert banner.get_text() == "FAILED in cell 2: ValueError: <b>no</b>"
    assert "second" in failed
    assert dict(frontpage.reports(folder)) == {"2_evaluate": "failed"}

    execute(write(project, "print('fourth')"), folder)
    assert names(folder) == {"2_evaluate.ipynb", "2_evaluate.html"}
    assert dict(frontpage.reports(folder)) == {"2_evaluate": "done"}


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("import sys; sys.exit(0)", "cell 2: SystemExit: 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "cell 2: DeadKernelError"),
    ],
)
def test_a_run_that_ends_early_does_not_count_as_done(project, folder, ending, expected):
    notebook = write(project, "1", ending, "print('never')")
    with pytest.raises(report.ReportError, match=expected):
        execute(notebook, folder)
    assert names(folder) == {"2_evaluate.failed.ipynb", "2_evaluate.failed.html"}
    assert f"FAILED in {expected}" in re.sub("<[^>]+>", "", (folder / "2_evaluate.failed.html").read_text())


def test_a_cell_that_takes_too_long_fails(project, folder):
    notebook = write(project, "import time; time.sleep(30)")
    with pytest.raises(report.ReportError, match="cell 1: CellTimeoutError"):
        report.execute(notebook, parameters={}, folder=folder, cell_timeout_s=1, progress=False)


@pytest.mark.parametrize(
    ("counts", "cell"), [([1, 2, 3], None), ([1, None, None], 2), ([2, 1, 3], 1), ([1, 3, 4], 2), ([None], 1)]
)
def test_cells_must_have_run_in_order(counts, cell):
    cells = [new_code_cell("x", execution_count=count) for count in counts]
    notebook = new_notebook(cells=[*cells, new_code_cell("  "), new_markdown_cell("end")])
    problem = report.first_problem(notebook)
    assert (problem and problem.cell) == cell


def test_a_twin_with_other_cells_is_refused(project, folder):
    notebook = write(project, "print('new')")
    notebook.with_suffix(".py").write_text("# %% [markdown]\n# # 2_evaluate\n\n# %%\nprint('old')\n")
    with pytest.raises(report.ReportError, match="make sync"):
        execute(notebook, folder)
    assert names(folder) == set()


def test_missing_or_broken_notebook_is_an_error_of_one_line(project, folder):
    with pytest.raises(report.ReportError, match=r"there is no notebook notebooks/9_none\.ipynb"):
        execute(project / "notebooks" / "9_none.ipynb", folder)
    (project / "notebooks" / "8_broken.ipynb").write_text("not json")
    with pytest.raises(report.ReportError, match="is not a notebook"):
        execute(project / "notebooks" / "8_broken.ipynb", folder)


# -------------------------------------------------------------------------------------------- parameters


def test_parameters_arrive_as_they_are_and_unused_ones_are_left_out(project, folder):
    declared = 'text: str = "a"  # with an = in its comment\nnumber: float = 1.0\nitems: list[int] = [1]'
    hostile = "\"\"\"'; import os; os.system('touch pwned') #\n\\ {text} \u2028 \x00 é"
    notebook = write(project, "print(ascii([text, number, items]))", parameters=declared)
    assert report.declared(notebook) == ["text", "number", "items"]
    executed = execute(notebook, folder, text=hostile, number=2.5, items=[1, 2], epochs=3)
    nb = nbformat.read(executed, as_version=4)
    assert nb.cells[-1].outputs[0].text.strip() == ascii([hostile, 2.5, [1, 2]])
    assert "epochs" not in executed.read_text()
    assert not list(project.rglob("pwned"))


class Text(str):
    def __str__(self) -> str:
        return '"; import os #'


@pytest.mark.parametrize(
    "parameters",
    [
        {"x=__import__('os').system('touch pwned')": 1},
        {"a\nimport os": 1},
        {"a b": 1},
        {"": 1},
        {"class": 1},
        {"None": 1},
        {"__builtins__": 1},
        {"_": 1},
        {1: 1},
        {"x": b"bytes"},
        {"x": {1, 2}},
        {"x": (1, 2)},
        {"x": {1: 2}},
        {"x": float("nan")},
        {"x": Text("t")},
        {"x": [[[[[[[[[[1]]]]]]]]]]},
        {"x": object()},
    ],
)
def test_what_is_not_plain_never_reaches_papermill(project, folder, parameters):
    notebook = write(project, "print('ran')", parameters="x = 0")
    with pytest.raises(report.ReportError):
        report.execute(notebook, parameters=parameters, folder=folder)
    assert names(folder) == set()


LAUGHS = "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nvariants: [*c, *c, *c, *c]\n"
HOSTILE_FILES = {
    "apply": "seed: !!python/object/apply:os.system ['touch pwned']",
    "new": "seed: !!python/object/new:os.system ['touch pwned']",
    "name": "seed: !!python/name:os.system",
    "module": "? !!python/module:os\n: 1",
    "binary": "data_source: !!binary dG91Y2ggcHduZWQ=",
    "pairs": "variants: !!pairs [a: 1, a: 2]",
    "set": "batch_sizes: !!set {1, 2}",
    "laughs": LAUGHS,
    "merge": "base_values: &b {seed: 1}\n<<: *b",
    "code key": "\"x=__import__('os').system('touch pwned')\": 1",
    "newline key": "\"seed\\nimport os; os.system('touch pwned')\": 1",
    "dunder": "__builtins__: {}",
    "keyword": "import: os",
    "complex key": "? [seed]\n: 1",
    "nested": "seed: {a: {b: {c: 1}}}",
    "own tag": "seed: !touch pwned",
    "list": "- seed",
    "two documents": "seed: 1\n---\nseed: 2",
    "quotes": "variants: [\"fp32'''); import os; os.system('touch pwned') #\"]",
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_parameter_file_executes_nothing(project, folder, name, capfd):
    (project / "params" / "demo.yaml").write_text(HOSTILE_FILES[name])
    notebook = write(project, "print('ran')", parameters="seed = 0")
    assert report.main(["run", str(notebook), "--study", "demo"]) == 1
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and "Traceback" not in printed
    assert not list(project.rglob("pwned")) and names(folder) == set()


def test_hostile_text_in_an_allowed_parameter_stays_text(project, folder):
    text = "'''\"\"\"); import os; os.system('touch pwned')\n#"
    (project / "params" / "demo.yaml").write_text(f"data_source: {json.dumps(text)}\n")
    values = params.load(project / "params" / "demo.yaml")
    notebook = write(project, "print(data_source)", parameters='data_source = ""')
    pasted = report._declared_only(notebook, values)  # read back from the cell that papermill would write
    assert pasted == {"data_source": text}


# -------------------------------------------------------------------------------------------------- pages

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
    "mutation": '<math><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
}


def alive(page: str) -> list[str]:
    """What in a page could run, load, or send: the judgement of a parser other than the sanitizer's."""
    soup = BeautifulSoup(page, "html5lib" if _has_html5lib() else "html.parser")
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


def _has_html5lib() -> bool:
    try:
        import html5lib  # noqa: F401
    except ImportError:
        return False
    return True


def page(folder: Path, *outputs: nbformat.NotebookNode, markdown: str = "text") -> str:
    cell = new_code_cell("1", outputs=list(outputs), execution_count=1)
    nbformat.write(new_notebook(cells=[new_markdown_cell(markdown), cell]), folder / "2_evaluate.ipynb")
    return report.render(folder / "2_evaluate.ipynb").read_text()


def shown(data: dict[str, str], **more: object) -> nbformat.NotebookNode:
    return new_output("display_data", data=data, **more)


def test_no_script_survives_in_a_page(folder):
    everything = "\n".join(SCRIPTS.values())
    outputs = [shown({kind: text}) for text in SCRIPTS.values() for kind in ("text/html", "text/markdown")]
    outputs += [shown({"text/plain": everything}), new_output("stream", name="stderr", text=everything)]
    outputs += [shown({kind: everything}) for kind in ("text/vnd.mermaid", "application/javascript")]
    outputs += [shown({"text/latex": everything}), new_output("error", ename="<script>", evalue=everything)]
    outputs += [shown({"image/png": PNG}, metadata={"image/png": {"width": "1 onload=alert(1)"}})]
    text = page(folder, *outputs, markdown="\n\n".join(SCRIPTS.values()))
    assert alive(text) == []
    assert "default-src 'none'" in text
    assert "color: red" in text  # the harmless part of a style stays


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_check_itself_would_find_each_script(name):
    assert alive(f"<body>{SCRIPTS[name]}</body>") or name == "mutation"


def test_tables_and_pictures_survive(folder):
    import pandas as pd

    frame = pd.DataFrame({"variant": ["fp32", "<script>alert(1)</script>"], "top1": [0.9, 0.5]})
    styled = frame.style.set_properties(subset="top1", **{"background-color": "#fff7fb"}).to_html()
    picture = shown({"image/png": PNG}, metadata={"image/png": {"width": 320}})
    text = page(folder, shown({"text/html": frame._repr_html_()}), shown({"text/html": styled}), picture)
    soup = BeautifulSoup(text, "html.parser")
    assert len(soup("table")) == 2 and len(soup("th")) >= 6
    assert "background-color: #fff7fb" in text and "style scoped" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert soup.select_one(f'img[src="data:image/png;base64,{PNG}"]')["width"] == "320"


def test_a_page_needs_no_network_and_stays_small(folder):
    text = page(folder, shown({"text/plain": "42"}))
    assert re.findall(r"(?:src|href)=\"(?!data:|#|[\w.]+\.html)[^\"]*", text) == []
    assert not re.findall(r"@import|url\(", text)
    assert len(text) < 100_000
    soup = BeautifulSoup(text, "html.parser")
    assert soup.select_one("details.code:not([open]) summary").get_text() == "code"
    assert [link["href"] for link in soup.select("nav a")] == ["index.html"]


def test_machine_paths_and_progress_bars_are_tidied(project, folder):
    source = """
import os, sys, warnings
from pathlib import Path
root, home = os.getcwd(), Path.home()
print(f"\\x1b[32m{root}/data:{root}", home / "secret")
sys.stderr.write("  0%|\\r 50%|\\r100%| 2/2\\n")
sys.stderr.write("next\\n")
display({"text/html": f"<p>{root}/x</p>"}, raw=True)
warnings.warn("careful")
"""
    executed = execute(write(project, source, parameters='data = ""'), folder, data=f"{project}/pictures")
    assert str(project) not in executed.read_text() + executed.with_suffix(".html").read_text()
    outputs = nbformat.read(executed, as_version=4).cells[-1].outputs
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.startswith("\x1b[32m./data:. ~/secret\n100%| 2/2\nnext\n")
    assert "<cell>:8: UserWarning: careful" in printed
    assert next(output for output in outputs if "data" in output).data["text/html"] == "<p>./x</p>"
    injected = nbformat.read(executed, as_version=4).cells[2]
    assert injected.source == '# Parameters\ndata = "./pictures"\n'


def test_a_warning_names_the_library_and_not_where_it_is_installed():
    text = "/opt/x/.venv/lib/python3.12/site-packages/torch/profiler.py:224: UserWarning: cleared"
    assert publish.scrubbed(text) == "torch/profiler.py:224: UserWarning: cleared"
    assert publish.scrubbed("in /usr/lib/python3/dist-packages/x.py") == "in x.py"


def test_a_path_that_only_begins_alike_stays(project):
    text = f"{project}s {project}-old {project}.bak x{project} file://{project}/a {project}."
    assert publish.scrubbed(text) == f"{project}s {project}-old {project}.bak x{project} file://./a .."


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\r\nb\n", "a\nb\n"),
        ("0%\r50%\r100%\n", "100%\n"),
        ("0%\r50%\r", "50%"),
        ("x\x1b[A\n\ry", "x\ny"),
        ("", ""),
    ],
)
def test_last_state_of_a_line(text, seen):
    assert publish.last_state(text) == seen


# ---------------------------------------------------------------------------------------- index and shell


@pytest.fixture
def study(project, folder):
    for name in ("1_finetune", "2_evaluate", "10_extra"):
        write(project, "1", name=name)
    (folder / "1_finetune.html").write_text("good")
    (folder / "2_evaluate.html").write_text("good")
    (folder / "2_evaluate.failed.html").write_text("bad")
    (folder / "records").mkdir()
    (folder / "records" / "variants.csv").write_text(
        "variant,weights,status,reason,model_mb,batch,latency_p50_ms,top1\n"
        "fp32,fp32,measured,,22.123456,1,3.14159,0.91\n"
        '"<script>alert(1)</script>",int8,not run,"no CUDA device, <b>none</b>",,,,\n'
    )
    environment = {"hardware": {"cpu": "<i>CPU</i>", "cores_usable": 2, "gpus_reason": "no CUDA device"}}
    (folder / "records" / "environment.json").write_text(json.dumps(environment))
    return folder


def test_index_shows_status_in_order_and_escapes(study):
    text = frontpage.index(study).read_text()
    soup = BeautifulSoup(text, "html.parser")
    cards = [(card.h3.get_text(), card["class"][1]) for card in soup.select(".card")]
    assert cards == [("1 finetune", "done"), ("2 evaluate", "failed"), ("10 extra", "missing")]
    assert [a["href"] for a in soup.select(".card a")] == [
        *("1_finetune.html", "2_evaluate.failed.html", "2_evaluate.html")
    ]
    assert alive(text) == [] and "<b>none" not in text and "<i>CPU" not in text
    cells = [[cell.get_text() for cell in row("td")] for row in soup.select("tbody tr")]
    assert cells[0] == ["fp32", "measured", "22.12", "1", "3.142", "0.91", ""]
    assert cells[1][0] == "<script>alert(1)</script>"
    assert "no CUDA device, <i>CPU</i>, 2 cores" in soup.get_text()
    assert soup.select_one('a[href="records/variants.csv"]')


def test_index_of_an_empty_study(project):
    text = frontpage.index(project / "outputs" / "new").read_text()
    assert "Nothing measured yet" in text


def test_a_copied_study_keeps_its_name(study, project):
    environment = json.loads((study / "records" / "environment.json").read_text())
    environment["parameters"] = {"study": "h200", "data_source": "data/flowers", "image_size": 48, "seed": 0}
    (study / "records" / "environment.json").write_text(json.dumps(environment))
    (study / "records" / "base.json").write_text(
        json.dumps({"base": "x", "kind": "stand-in", "origin": "trained here"})
    )
    study.rename(project / "outputs" / "copy")
    soup = BeautifulSoup(frontpage.index(project / "outputs" / "copy").read_text(), "html.parser")
    text = soup.get_text()
    assert "no pretrained network" not in " ".join(hidden.get_text() for hidden in soup("details"))
    assert "Study h200" in text and "params/h200.yaml" in text and "Study copy" not in text
    assert "seed = 0" in text and "image_size" not in text  # of synthetic pictures, and these are none
    assert "no pretrained network: it was trained here" in text


@pytest.mark.parametrize(
    ("sources", "shown"),
    [
        (['study: str = "demo"  # name', 'study = "h200"'], "h200"),
        (['study: str = "demo"'], "demo"),
        (['study: str = "../out"'], "copy"),
        (["study ="], "copy"),
        (["other = 1"], "copy"),
    ],
)
def test_a_page_is_named_by_its_notebooks_parameter(project, sources, shown):
    cells = [
        new_code_cell(source, metadata={"tags": [tag]})
        for source, tag in zip(sources, ("parameters", "injected-parameters"), strict=False)
    ]
    text = report.page_of(new_notebook(cells=cells), project / "outputs" / "copy" / "2_evaluate.html")
    assert BeautifulSoup(text, "html.parser").select_one("p.where").get_text().split() == [shown, "/", "2_evaluate"]


def test_a_page_that_stands_apart_lists_itself_the_first_time(project):
    page = project / "outputs" / "alone" / "6_speed.html"
    soup = BeautifulSoup(report.page_of(new_notebook(), page), "html.parser")
    assert soup.select_one("nav").get_text().split("\n") == ["", "6 speed", "index", ""]


def test_where_nothing_but_a_bench_ran_nothing_is_missing(project):
    folder = project / "outputs" / "bench"
    folder.mkdir(parents=True)
    (folder / "6_speed.failed.html").write_text("x")
    assert frontpage.reports(folder) == [("6_speed", "failed")]
    (folder / "6_speed.html").write_text("x")
    (folder / "6_speed.failed.html").unlink()
    assert frontpage.reports(folder) == [("6_speed", "done")]


def test_summary_names_variants_reports_and_index(study):
    lines = frontpage.summary(study).splitlines()
    assert lines[2].split() == ["variant", "status", "model", "MB", "batch", "P50", "ms", "Top-1", "reason"]
    assert lines[4].endswith("no CUDA device, <b>none</b>")
    assert lines[-2] == "reports: 1_finetune done, 2_evaluate failed, 10_extra missing"
    assert lines[-1] == "open outputs/demo/index.html"


def test_sources_follow_imports(project):
    texts = {
        "__init__": "",
        "a": "def f():\n    from . import b\n",
        "b": "import vitlib.c\nfrom .c import g\n",
        "c": "import json\n",
        "d": "",
    }
    for name, text in texts.items():
        (project / "vitlib" / f"{name}.py").write_text(text)
    script = project / "notebooks" / "1_finetune.py"
    script.write_text("# %%\nfrom vitlib import a\nimport numpy\n")
    found = imports.sources(script, package=project / "vitlib")
    assert [file.stem for file in found] == ["__init__", "a", "b", "c"]


def test_shell_runs_and_reports_failure_in_one_line(project, folder, capfd):
    (project / "params" / "demo.yaml").write_text("seed: 3\n")
    good = write(project, "print('seed', seed, study)", parameters='seed = 0\nstudy = ""', name="1_finetune")
    bad = write(project, "1 / 0")

    assert report.main(["run", str(good), "--study", "demo"]) == 0
    assert "seed 3 demo" in (folder / "1_finetune.ipynb").read_text()
    capfd.readouterr()

    assert report.main(["run", str(bad), "--study", "demo"]) == 1
    printed = capfd.readouterr().err
    assert printed.splitlines()[-1] == (
        "error: 2_evaluate FAILED in cell 1: ZeroDivisionError: division by zero"
        " (see outputs/demo/2_evaluate.failed.html)"
    )
    assert "Traceback" not in printed and "WARNING" not in printed
    assert 'class="card failed"' in (folder / "index.html").read_text()

    assert report.main(["render", "--study", "demo"]) == 0
    assert report.main(["summary", "--study", "demo"]) == 0
    assert "reports: 1_finetune done, 2_evaluate failed" in capfd.readouterr().out
    assert report.main(["summary", "--study", "../x"]) == 1

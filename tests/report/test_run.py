"""Runs: what counts as done, what a failure leaves, what a parameter file cannot do."""

import ast
import errno
import json
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.translators import PythonTranslator
from sources import sources

from vitlib.report import page, run
from vitlib.study import files, params
from vitlib.study.study import Study


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


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock", "records"}


HOSTILE = "\"\"\"'''; import os; os.system('touch pwned') #\n\\ {text} \u2028 é"
SOURCE = """
import os, sys, warnings
from pathlib import Path
root, home = os.getcwd(), Path.home()
print(f"\\x1b[32m{root}/data:{root}", home / "secret")
sys.stderr.write("  0%|\\r 50%|\\r100%| 2/2\\n")
sys.stderr.write("next\\n")
display({"text/html": f"<p>{root}/x</p>"}, raw=True)
warnings.warn("careful")
print(ascii([study, seed, data_source, pictures]))
"""


def test_a_failure_keeps_the_last_good_report_and_success_clears_the_mark(project, folder, capfd):
    """From a shell; two kernels. The second run receives hostile text and paths of this machine."""
    good = [folder / "2_evaluate.ipynb", folder / "2_evaluate.html"]
    for path in good:
        path.write_text("the last good report")
    set_ = {"seed": 3, "data_source": HOSTILE, "pictures": f"{project}/pictures", "epochs": 3}
    (project / "params" / "demo.yaml").write_text(json.dumps(set_))
    (project / "pictures").mkdir()

    (folder / "records").mkdir()
    (folder / "records" / "other.json").write_text("of the last good run")
    record = "for name in 'other', 'new': open(f'outputs/demo/records/{name}.json', 'w').write('of this run')"
    bad = write(project, f"print('second')\n{record}", "raise ValueError('<b>no</b>')", "print('third')")
    assert run.main(["run", str(bad), "--study", "demo"]) == 1
    printed = capfd.readouterr().err
    assert printed.splitlines()[-1] == (
        "error: 2_evaluate FAILED in cell 2: ValueError: <b>no</b> (see outputs/demo/2_evaluate.failed.html)"
    )
    assert "Traceback" not in printed and "WARNING" not in printed
    assert {path.read_text() for path in good} == {"the last good report"}
    failed = (folder / "2_evaluate.failed.html").read_text()
    banner = BeautifulSoup(failed, "html.parser").select(".alert-danger")[0]
    kept = "Records and reports are those of the last good run."
    assert banner.get_text() == f"FAILED in cell 2: ValueError: <b>no</b>{kept}" and "second" in failed
    assert [path.read_text() for path in (folder / "records").iterdir()] == ["of the last good run"]
    assert names(folder) == {*(path.name for path in good), *FAILED, "index.html"}
    assert page.reports(folder) == [("2_evaluate", "failed")]
    assert 'class="card failed"' in (folder / "index.html").read_text()

    cell = 'study: str = "demo"\nseed: int = 0\ndata_source: str = ""  # an = in its comment\npictures: str = ""'
    assert run.main(["run", str(write(project, SOURCE, parameters=cell)), "--study", "demo"]) == 0
    assert names(folder) == {*(path.name for path in good), "index.html"}
    assert page.reports(folder) == [("2_evaluate", "done")]
    assert str(project) not in good[0].read_text() + good[1].read_text()
    assert "epochs" not in good[0].read_text()  # not declared, so not pasted
    cells = nbformat.read(good[0], as_version=4).cells
    assert 'pictures = "./pictures"' in cells[2].source
    printed = "".join(output.get("text", "") for output in cells[-1].outputs)
    assert printed.startswith("\x1b[32m./data:. ~/secret\n100%| 2/2\nnext\n")
    assert "<cell>:8: UserWarning: careful" in printed
    assert ascii(["demo", 3, HOSTILE, "./pictures"]) in printed
    assert next(output for output in cells[-1].outputs if "data" in output).data["text/html"] == "<p>./x</p>"
    assert not list(project.rglob("pwned"))


FAILED = {"2_evaluate.failed.ipynb", "2_evaluate.failed.html"}


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("import sys; sys.exit(0)", "cell 2: SystemExit: 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "cell 2: DeadKernelError"),
    ],
)
def test_a_run_that_ends_early_does_not_count_as_done(project, folder, ending, expected):
    notebook = write(project, "1", ending, "print('never')")
    with pytest.raises(run.ReportError, match=expected):
        run.execute(notebook, parameters={}, folder=folder)
    assert names(folder) == FAILED
    text = BeautifulSoup((folder / "2_evaluate.failed.html").read_text(), "html.parser").get_text()
    assert f"FAILED in {expected}" in text


@pytest.mark.parametrize(
    ("counts", "cell"), [([1, 2, 3], None), ([1, None, None], 2), ([2, 1, 3], 1), ([1, 3, 4], 2), ([None], 1)]
)
def test_cells_must_have_run_in_order(counts, cell):
    cells = [new_code_cell("x", execution_count=count) for count in counts]
    notebook = new_notebook(cells=[*cells, new_code_cell("  "), new_markdown_cell("end")])
    problem = run.first_problem(notebook)
    assert (problem and problem.cell) == cell


@pytest.mark.parametrize("room", [True, False])
def test_a_full_disk_leaves_records_and_page_as_they_were(project, folder, monkeypatch, capfd, room):
    """Every cell has run; with `room` there is some for the page of the failure and the index."""
    (project / "params" / "demo.yaml").touch()
    good, record, flush = folder / "2_evaluate.html", folder / "records" / "other.json", files._flush
    for path in (good, record):
        path.parent.mkdir(exist_ok=True)
        path.write_text("of the last good run")
    lacking = ("-2_evaluate.html",) if room else ("-2_evaluate.html", "-2_evaluate.failed.html", "-index.html")

    def full(path):
        if path.name.endswith(lacking):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    def papermill(*_):
        record.write_text("of this run")
        return nbformat.writes(new_notebook(cells=[new_code_cell("1", execution_count=1)])), None

    monkeypatch.setattr(files, "_flush", full)
    monkeypatch.setattr(run, "_papermill", papermill)
    said = refused(capfd, "run", str(write(project, "1")))
    assert {good.read_text(), record.read_text()} == {"of the last good run"}
    assert "2_evaluate FAILED in cell 1: OSError: every cell ran, but [Errno 28] no room on the disk for demo/2" in said
    if room:
        assert names(folder) == {good.name, "index.html", *FAILED} and page.reports(folder) == [
            ("2_evaluate", "failed")
        ]
        assert 'class="card failed"' in (folder / "index.html").read_text()
    else:
        assert names(folder) == {good.name}
        assert "of this there is no page: [Errno 28] no room on the disk for demo/2_evaluate.failed." in said
        assert "the index does not show it: [Errno 28] no room on the disk for demo/index.html: free some" in said


# Refused before a kernel starts


def refused(capfd, *words: str) -> str:
    assert run.main([*words, "--study", "demo"]) == 1
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and "Traceback" not in printed
    return printed


def test_a_second_run_of_a_study_is_refused(project, folder, capfd, monkeypatch):
    (project / "params" / "demo.yaml").write_text("seed: 3\n")
    notebook = write(project, "print('ran')")
    with Study.at(folder).locked(), monkeypatch.context() as patch:
        patch.delenv("VITLIB_HOLDS")  # another process does not have it
        assert "another process is running study 'demo'" in refused(capfd, "run", str(notebook))
        assert names(folder) == {".lock.holder"}
    assert names(folder) == set()


def test_a_twin_with_other_cells_is_refused(project, folder, capfd):
    (project / "params" / "demo.yaml").touch()
    notebook = write(project, "print('new')")
    notebook.with_suffix(".py").write_text("# %% [markdown]\n# # 2_evaluate\n\n# %%\nprint('old')\n")
    assert "run `make sync`" in refused(capfd, "run", str(notebook))
    assert names(folder) == {"index.html"}


def test_parameters_that_cannot_work_are_refused_and_others_remarked_on_before_a_kernel(project, monkeypatch, capfd):
    monkeypatch.setattr(run, "_papermill", lambda *_: pytest.fail("a kernel was started"))
    finetune = write(project, "1", name="1_finetune", parameters='data_source: str = ""\nbase_model: str = ""')
    set_ = project / "params" / "demo.yaml"
    set_.write_text("data_source: data/mine\nbase_model: random\nmethod: full")
    assert "there is no data folder 'data/mine'" in refused(capfd, "run", str(finetune))
    set_.write_text("base_model: ./none")
    assert "base_model './none' is neither" in refused(capfd, "run", str(finetune))
    set_.write_text("base_model: random")
    assert "set `method: full`" in refused(capfd, "run", str(finetune))

    set_.write_text("rounds: 3")
    monkeypatch.setattr(run, "_papermill", lambda *_: ("", None))
    monkeypatch.setattr(run, "_judged", lambda *_: (None, run.Problem(1, "no", "kernel")))
    monkeypatch.setattr(run, "_marked", lambda *_: new_notebook(cells=[]))
    run.main(["run", str(write(project, "1", parameters="rounds: int = 20")), "--study", "demo"])
    assert "2_evaluate: 3 rounds give no verdict on speed" in capfd.readouterr().err


def test_a_missing_or_broken_notebook_or_set_is_an_error_of_one_line(project, folder, capfd):
    assert "there is no parameter set 'demo.yaml'" in refused(capfd, "run", "notebooks/9_none.ipynb")
    (project / "params" / "demo.yaml").touch()
    assert "there is no notebook notebooks/9_none.ipynb" in refused(capfd, "run", "notebooks/9_none.ipynb")
    (project / "notebooks" / "8_broken.ipynb").write_text("not json")
    assert "is not a notebook" in refused(capfd, "run", "notebooks/8_broken.ipynb")
    assert run.main(["summary", "--study", "../x"]) == 1


def test_every_value_that_a_file_can_give_is_pasted_as_that_value(project):
    """papermill writes the parameters as code."""
    texts = [HOSTILE, "\\", '\\"', "'", "\x00", "\r\n", "{x}", "${x}", "%s", "\u202e", "a" * 10_000, "# no"]
    values = [{"data_source": text, "pictures": text} for text in texts]
    values += [{"learning_rate": 1e-300}, {"max_megapixels": 1e300}, {"seed": 2**32 - 1}, {"resume": True}]
    values += [{"train_batch_size": 10**15}, {"batch_sizes": [1, 4096]}, {"variants": ["fp32-sdpa", "nf4-sdpa"]}]
    for value in values:
        file = project / "params" / "x.yaml"
        file.write_text(yaml.safe_dump(value))
        pasted = ast.parse(PythonTranslator.codify(params.load(file))).body
        assert {node.targets[0].id: ast.literal_eval(node.value) for node in pasted} == value


# Dependencies of a report


def test_sources_follow_imports_through_packages_and_functions(tmp_path, monkeypatch):
    texts = {
        **dict.fromkeys(("__init__", "room/__init__", "apart"), ""),
        "door": "def late():\n    from .room import thing\n",
        "room/thing": "import house.other\n",
        "room/unused": "from house import door\n",
        "other": "import json\n",
    }
    for name, text in texts.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    script = tmp_path / "notebook.py"
    script.write_text("# %%\nfrom house import door\nimport numpy\n")
    expected = ["house/__init__.py", "house/door.py", "house/other.py", "house/room/__init__.py", "house/room/thing.py"]
    assert sources(script, package="house") == expected
    assert "house" not in sys.modules

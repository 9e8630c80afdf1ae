"""Parameter sets: one place for defaults, every fault explained, and no file that executes anything."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitlib.measure import stats
from vitlib.network import checkpoint
from vitlib.study import params
from vitlib.study.params import ParameterError, Parameters

ROOT = Path(__file__).resolve().parents[2]
SETS = sorted((ROOT / "params").glob("*.yaml"))
NAMES = set(Parameters.model_fields)


def code_cells(notebook: str) -> list[dict]:
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def is_parameters(cell: dict) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def formatted(code: str) -> str:
    """The code as ruff writes it with this project's settings: long lines are broken in the notebooks."""
    pytest.importorskip("ruff", reason="the linter is not installed")
    command = [sys.executable, "-m", "ruff", "format", "-", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout.strip()


def bound_names(code: str) -> set[str]:
    """Every name that the code binds: by assignment, import, definition, loop, with or except."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.alias(name=name, asname=other):
                names.add(other or name.partition(".")[0])
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                names.add(name)
    return names


@pytest.fixture
def read(tmp_path):
    """Load the text or bytes of a parameter file."""

    def read(content: str | bytes) -> dict:
        file = tmp_path / "set.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return params.load(file)

    return read


# The files and the notebooks


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_every_set_loads_and_is_named_after_its_file(path):
    """Otherwise two files would write to one outputs/<study>/."""
    assert {"demo", "smoke", "flowers102"} <= {path.stem for path in SETS}
    assert params.load(path)["study"] == path.stem


@pytest.mark.parametrize("notebook", params.NOTEBOOKS)
def test_a_notebook_declares_the_parameters_printed_from_the_module_and_binds_no_other(notebook):
    printed = formatted(params.cell(notebook))
    for node in ast.parse(printed).body:
        assert ast.literal_eval(node.value) == getattr(Parameters(), node.target.id)
    cells = code_cells(notebook)
    assert [cell["source"] for cell in cells if is_parameters(cell)] == [printed]
    assert f'# %% tags=["parameters"]\n{printed}\n\n# %%' in (ROOT / f"notebooks/{notebook}.py").read_text("utf-8")
    bound = set().union(*(bound_names(cell["source"]) for cell in cells if not is_parameters(cell)))
    assert bound and bound & NAMES <= {"study"}  # the name becomes the opened study, whose cell may run twice


def test_every_parameter_is_read_somewhere():
    files = [*(ROOT / "vitlib").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert NAMES - read == set()


# Faults


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all():
    for typo, meant in {"epohcs": "epochs", "batchsizes": "batch_sizes", "lora_r": "lora_rank"}.items():
        with pytest.raises(ParameterError, match=f"unknown parameter '{typo}': did you mean '{meant}'"):
            params.check({typo: 1})
    with pytest.raises(ParameterError, match=r"known: study, data_source, .*grid"):
        params.check({"zzz": 1})
    with pytest.raises(ParameterError, match=r"no parameter set 'flower102\.yaml'; did you mean 'flowers102'"):
        params.load(ROOT / "params/flower102.yaml")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"epochs": 0}, "epochs: .*greater than or equal to 1, it is 0"),
        ({"epochs": 2.5}, r"epochs: .*integer, it is 2\.5"),
        ({"seed": "1"}, "seed: .*integer, it is '1'"),
        ({"seed": True}, "seed: .*integer, it is True"),
        ({"study": "../elsewhere"}, "study: .*use at most 100 letters, digits"),
        ({"study": ""}, "study: .*use at most 100 letters, digits"),
        ({"study": "x" * 101}, "study: .*use at most 100 letters"),
        ({"print": 3}, "unknown parameter 'print': known: study"),
        ({"architecture": "vit-huge"}, "architecture: .*'vit-micro', .* or 'vit-large', it is 'vit-huge'"),
        ({"recipes": ["lora", "lora"]}, "recipes: a value is named twice"),
        ({"image_size": 17}, "image_size 17 is no multiple of 8, the side of a patch of vit-micro"),
        ({"batch_sizes": [1, 100_000_000]}, "batch_sizes: .*at most 4,096"),
        ({"base_model": "a/b", "base_revision": "main; rm"}, "base_revision 'main; rm' is no commit"),
        ({"checkpoints_of": "-x"}, "checkpoints_of: .*use at most 100 letters, digits"),
        ({"resume": "yes"}, "resume: .*boolean, it is 'yes'"),
        ({"lora_dropout": 1}, "lora_dropout: .*less than 1, it is 1"),
        ({"learning_rate": float("nan")}, "learning_rate: .*finite"),
        ({"method": "lorra"}, "method: .*'lora', 'qlora', 'full' or 'head', it is 'lorra'"),
        ({"variants": []}, "variants: .*at least 1 item"),
        ({"variants": ["fp32-spda"]}, "unknown variant 'fp32-spda': did you mean 'fp32-sdpa'"),
        ({"variants": ["fp32-sdpa", "fp32-sdpa"]}, "variants: a variant is named twice"),
        ({"variants": ["nf4-sdpa"]}, "variants: .*baseline .*must not be quantized"),
        ({"variant": "nf4-flash"}, "variant: unknown variant"),
        ({"batch_sizes": [8, 1]}, "batch_sizes: .*rising"),
        ({"batch_sizes": [0, 1]}, "batch_sizes: .*positive"),
        ({"batch_sizes": [1, "8"]}, r"batch_sizes\.1: .*integer, it is '8'"),
        ({"ablation_bits": [3]}, r"ablation_bits\.0: .*4 or 8, it is 3"),
        ({"base_model": "random"}, "method lora leaves random weights frozen: set `method: full`"),
        ({"base_model": "random", "method": "head"}, "method head leaves random weights frozen"),
    ],
    ids=lambda value: "=".join(map(str, list(value.items())[-1])) if isinstance(value, dict) else "",
)
def test_a_wrong_value_says_what_is_allowed(values, says):
    with pytest.raises(ParameterError, match=says):
        params.check(values)


def test_all_faults_are_told_at_once():
    with pytest.raises(ParameterError) as told:
        params.check({"epochs": 0, "methd": "lora", "seed": -1})
    assert len(str(told.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("learning_rate: 1e-3", 1e-3), ("learning_rate: 1.0e-3", 1e-3), ("learning_rate: .5", 0.5)),
        *(("seed: 0o17", 15), ("seed: 010", 10), ("seed: 0x1F", 31), ("seed: +7", 7), ("resume: True", True)),
        *(("data_source: yes", "yes"), ("data_source: on", "on"), ("data_source: 1:30", "1:30")),
        *(("data_source: 1_000", "1_000"), ("data_source: 2024-01-01", "2024-01-01"), ("data_source: =", "=")),
        *(("study: 2024-99-99", "2024-99-99"), ('data_source: "1e-3"', "1e-3"), ("batch_sizes: [1, 0x8]", [1, 8])),
    ],
)
def test_values_are_read_as_yaml_1_2_reads_them(read, text, value):
    (found,) = read(text).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["seed: 1:30", "seed: 1_000", "resume: yes", "resume: off", "seed: 0b1", "study: ~"])
def test_what_only_yaml_1_1_takes_for_a_number_or_a_truth_is_refused(read, text):
    with pytest.raises(ParameterError, match="true or false" if text.startswith("resume") else "valid integer|study"):
        read(text)


def test_what_is_no_parameter_file_is_said(tmp_path):
    (tmp_path / "dir.yaml").mkdir()
    (tmp_path / "long.yaml").write_text("study: demo\n# " + "x" * 1_000_000)
    with pytest.raises(ParameterError, match=r"dir\.yaml is no regular file"):
        params.load(tmp_path / "dir.yaml")
    with pytest.raises(ParameterError, match=r"long\.yaml has more than 1,000,000 bytes: it is no parameter set"):
        params.load(tmp_path / "long.yaml")


def test_the_patches_are_those_of_the_networks():
    assert {name: sizes[-1] for name, sizes in checkpoint.ARCHITECTURES.items()} == params.PATCHES


def test_only_a_base_from_the_hub_needs_a_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(params.files, "project_root", lambda: tmp_path)
    (tmp_path / "outputs/base").mkdir(parents=True)
    hub = {"base_model": "google/vit-large-patch16-224"}
    with pytest.raises(ParameterError, match="set base_revision"):
        params.check(hub)
    assert params.check({**hub, "base_revision": "8041a8c"}).base_revision == "8041a8c"
    for base in ("pretrain", "random", "./some/folder", "/some/folder", "~/folder", "outputs/base"):
        assert params.check({"base_model": base, "method": "full"}).base_model == base


def test_parameters_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Parameters().epochs = 3


# Said or refused before a notebook starts

DRAWN = "trained on drawn flowers only"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without pictures and bases, but for `data/photos`."""
    monkeypatch.setattr(params.files, "project_root", lambda: tmp_path)
    (tmp_path / "data/photos").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("values", "notebook", "says"),
    [
        ({"data_source": "data/none"}, "3_ablation", r"no data folder 'data/none' .*train/<class>/"),
        ({"data_source": "data/none"}, "4_inference", "no data folder"),
        ({"pictures": "~no-such-user/pictures"}, "4_inference", "no folder of pictures"),
        ({"data_source": "\0"}, "2_evaluate", "no data folder"),
        ({"base_model": "./none"}, "1_finetune", r"base_model './none' is neither pretrain, random, a folder nor"),
        ({"data_source": "data/photos"}, "1_finetune", f"{DRAWN}.*set `base_model` to a pretrained network"),
        ({"data_source": "hub:someone/photos"}, "1_finetune", DRAWN),
    ],
)
def test_what_cannot_work_is_refused(project, values, notebook, says):
    declared = params.used_by(Parameters(), notebook)
    with pytest.raises(ParameterError, match=says):
        params.remarks(params.check(values), declared, values)


@pytest.mark.parametrize(
    ("values", "notebook", "says"),
    [
        ({"data_source": "data/photos", "base_model": "pretrain"}, "1_finetune", [DRAWN]),
        ({"data_source": "data/photos", "base_model": "random", "method": "full"}, "1_finetune", []),
        ({"data_source": "data/photos", "base_model": "someone/vit", "base_revision": "8041a8c"}, "1_finetune", []),
        ({"data_source": "data/photos"}, "2_evaluate", []),
        ({"data_source": "torchvision:data"}, "3_ablation", []),
        ({"data_source": "data/none"}, "6_speed", []),
        ({"data_source": "data/none", "pictures": "data/photos"}, "4_inference", []),
        ({"rounds": 7}, "2_evaluate", ["7 rounds give no verdict on speed: set `rounds` to 8"]),
        ({"rounds": 7}, "3_ablation", []),
        ({"rounds": 8}, "2_evaluate", []),
    ],
)
def test_what_disappoints_is_said(project, values, notebook, says):
    found = params.remarks(params.check(values), params.used_by(Parameters(), notebook), values)
    assert len(found) == len(says) and all(text in said for text, said in zip(says, found, strict=True))


def test_the_smallest_number_of_rounds_is_that_of_the_statistics():
    assert params.VERDICT_ROUNDS == stats.MINIMUM_ROUNDS


def test_a_notebook_refuses_the_same(project):
    """JupyterLab does not tell which values of the parameters cell were changed, so a base counts as given."""
    with pytest.raises(ParameterError, match="no data folder"):
        params.collect({"data_source": "data/none"})
    here = {"data_source": "data/photos", "base_model": "pretrain"}
    assert params.collect(here).data_source == "data/photos"
    with pytest.raises(ParameterError, match=DRAWN):
        params.collect(here | {"In": ["# Parameters\ndata_source = 'data/photos'\n"]})
    assert params.collect(here | {"In": ["# Parameters\ndata_source = 'data/photos'\nbase_model = 'pretrain'\n"]})


def test_a_notebook_opened_in_lab_writes_to_a_study_that_no_set_has():
    assert Parameters().study == "lab" and "lab" not in {path.stem for path in SETS}


# Hostile files

TRAP = "open('trap', 'w').close()"  # executed in any way, it leaves a file
HOSTILE = {
    "call tag": f"study: !!python/object/apply:eval [\"{TRAP}\"]",
    "tag by a handle": f"%TAG ! tag:yaml.org,2002:python/\n---\nstudy: !object/apply:eval [\"{TRAP}\"]",
    "harmless tag": "study: !!str demo",
    "binary": "study: !!binary ZGVtbw==",
    "alias": "seed: &one 1\nepochs: *one",
    "merge key": "<<: {seed: 1}",
    "billion laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]",
    "key set twice": "seed: 1\nseed: 2",
    "key that is code": f"\"{TRAP}\": 1",
    "key that ends a line": f"\"seed = 1\\n{TRAP}\\nseed\": 1",
    "key that is a list": "? [seed]\n: 1",
    "key that is a keyword": "import: 1",
    "key that is a dunder": "__class__: 1",
    "text": "seed",
    "two documents": "seed: 1\n---\nseed: 2",
    "not closed": "batch_sizes: [1, 2",
    "NUL": "study: \0",
    "not UTF-8": b"study: \xff\xfe",
    "deep lists": "study: " + "[" * 900_000,  # to the end it would take hours
    "deep blocks": "study:\n" + "\n".join(" " * depth + "-" for depth in range(1, 1000)),
    "endless number": "seed: " + "9" * 5_000,
    "infinity": "learning_rate: .inf",
    "a megabyte": "# " + "x" * 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_and_executes_nothing(read, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError):
        read(content)
    assert not Path("trap").exists()


@pytest.mark.parametrize("kind", ["call tag", "alias", "key set twice", "key that is code", "text", "deep lists"])
def test_a_refusal_names_file_and_line(read, kind):
    with pytest.raises(ParameterError, match=r"set\.yaml, line \d"):
        read(HOSTILE[kind])


def test_text_that_is_code_stays_text_and_an_empty_file_changes_nothing(read):
    """Values are typed: code can only arrive as a string, which papermill quotes."""
    assert read(f'data_source: "{TRAP}"') == {"data_source": TRAP}
    assert read("") == read("# nothing but a comment\n") == read("---\n") == {}


# In a notebook


def test_collect_takes_checked_values_and_finds_a_typo_in_the_cell_that_papermill_injected():
    injected = ["", "mine = 1", "# Parameters\nstudy = 'demo'\nepochs = 3\n"]
    found = params.collect({"In": injected, "epochs": 3, "study": "mine", "mine": object()})
    assert (found.epochs, found.study, found.seed) == (3, "mine", 0)
    with pytest.raises(ParameterError, match="'epohcs': did you mean 'epochs'"):
        params.collect({"In": [*injected, "# Parameters\nepohcs = 3\n"], "epochs": 6, "epohcs": 3})
    with pytest.raises(ParameterError, match="epochs: "):
        params.collect({"epochs": "many"})

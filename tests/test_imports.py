"""The levels of vitlib: a module imports only downwards, and importing one touches no device and no network."""

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from vitlib import imports

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    0: {
        "__init__",
        "params",
        "files",
        "records",
        "provenance",
        "study",
        "stats",
        "variants",
        "imports",
        "monitor",
        "origin",
    },
    1: {
        *("data", "synthetic", "preprocess", "attention", "quantize", "adapters", "kernels", "linears", "ahead"),
        *("profile", "timing", "roofline"),
    },
    2: {"models", "fused", "engine", "pipeline", "training"},
    3: {
        *("finetune", "evaluate", "benchmark", "ablation", "inference", "standin", "claims", "mismatch"),
        "speed",
    },
    4: {"tables", "plots", "report", "frontpage", "publish"},
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules}
MODULES = sorted(path.stem for path in imports.PACKAGE.glob("*.py"))
WITHOUT_TORCH = sorted(LEVELS[0] | LEVELS[4])
HEAVY = {"torch", "transformers", "bitsandbytes", "peft", "accelerate", "torchvision"}


def own_imports(module: str) -> set[str]:
    """Modules of vitlib that `module` imports, anywhere in its text."""
    return {path.stem for path in imports.imported(imports.PACKAGE / f"{module}.py")} - {module, "__init__"}


def test_every_module_has_a_level():
    """A new module fails here until it is listed above and in the design's table of levels."""
    assert sorted(LEVEL) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_level_or_below(module):
    upwards = {other for other in own_imports(module) if LEVEL[other] > LEVEL[module]}
    assert upwards == set()


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: own_imports(module) for module in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_first_and_the_last_level_name_no_heavy_library(module):
    tree = ast.parse((imports.PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in names} & HEAVY == set()


SCRIPT = """
import importlib, json, sys

connections = []
sys.addaudithook(lambda event, args: connections.append(event) if event in EVENTS else None)
import vitlib

heavy = {"vitlib": HEAVY & set(sys.modules)}
for module in WITHOUT_TORCH:
    importlib.import_module(f"vitlib.{module}")
    heavy[module] = HEAVY & set(sys.modules)
import bitsandbytes, torch

theirs = torch.cuda.is_initialized()  # where there is a GPU, bitsandbytes looks at it while it is imported
for module in MODULES:
    importlib.import_module(f"vitlib.{module}")

heavy = {module: sorted(names) for module, names in heavy.items() if names}
print(json.dumps({"heavy": heavy, "cuda": torch.cuda.is_initialized() and not theirs, "connections": connections}))
"""


def test_importing_loads_no_torch_where_none_is_needed_and_touches_no_device_and_no_network():
    """One fresh process for all three, because importing everything takes longer than the rest of this file."""
    names = {
        "HEAVY": HEAVY,
        "WITHOUT_TORCH": [module for module in WITHOUT_TORCH if module != "__init__"],
        "MODULES": [module for module in MODULES if module != "__init__"],
        "EVENTS": {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"},
    }
    code = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + SCRIPT
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"heavy": {}, "cuda": False, "connections": []}


@pytest.mark.parametrize(
    "line",
    [
        "import vitlib.low",
        "import vitlib.low as other",
        "from vitlib import low",
        "from vitlib import low as other",
        "from vitlib.low import thing",
        "from . import low",
        "from .low import thing",
        "def late():\n    from vitlib.low import thing",
    ],
)
def test_every_way_to_import_is_seen(tmp_path, line):
    """Otherwise the levels would hold only for the way that somebody thought of."""
    package = tmp_path / "vitlib"
    package.mkdir()
    for name in ("__init__", "low", "unrelated"):
        (package / f"{name}.py").touch()
    script = package / "high.py"
    script.write_text(f"import os\nimport low\n{line}\n")
    assert imports.imported(script, package=package) - {package / "__init__.py"} == {package / "low.py"}


def test_sources_follow_imports_through_each_other(tmp_path):
    package = tmp_path / "vitlib"
    package.mkdir()
    texts = {
        "__init__": "",
        "a": "from vitlib import b",
        "b": "from vitlib import a, c",
        "c": "",
        "d": "import vitlib.a",
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    script = tmp_path / "notebook.py"
    script.write_text("from vitlib import a")
    found = imports.sources(script, package=package)
    assert [path.stem for path in found] == ["__init__", "a", "b", "c"]

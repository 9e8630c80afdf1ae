"""Two lists of versions: pyproject.toml has the ranges in which the code runs, constraints.txt the exact ones."""

import importlib.metadata
import itertools
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: list(map(Requirement, lines)) for name, lines in PROJECT["optional-dependencies"].items()}
CORE = list(map(Requirement, PROJECT["dependencies"]))
OWN = [one for one in itertools.chain(CORE, *EXTRAS.values()) if one.name != PROJECT["name"]]
UNPINNED = {"triton"}  # the CUDA build of torch sets its version, the CPU build has none
RANGES = {one.name: one.specifier for one in OWN if one.name not in UNPINNED}
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = dict(line.split("==") for line in LINES if not line.startswith("#"))
# What a Colab runtime comes with and must keep; these are of the oldest runtime in range.
COLAB = {"torch": "2.9.0", "pandas": "2.2.2", "numpy": "2.0.2", "ipykernel": "6.17.1"}


def test_every_requirement_is_a_range_and_stands_once():
    assert len(OWN) == len({one.name.lower() for one in OWN})
    assert all(">=" in str(specifier) for specifier in RANGES.values())
    assert "==" not in "".join(map(str, RANGES.values()))
    assert {one.name for one in OWN} - set(RANGES) == UNPINNED


def test_every_requirement_is_pinned_in_its_range():
    """An open range of torch would bring another torch every month, and numbers of two runs would not compare."""
    assert set(PINS) == set(RANGES) and len(PINS) == len(LINES) - 1
    assert all(re.fullmatch(r"\d+(\.\d+)+(\.post\d+)?", version) for version in PINS.values())
    assert [name for name, version in PINS.items() if version not in RANGES[name]] == []


def test_extras_build_on_each_other():
    inner = {name: [one.extras for one in lines if one.name == PROJECT["name"]] for name, lines in EXTRAS.items()}
    own = {name: [] for name in ("report", "gpu", "hub", "pretrained", "hqq", "demo", "parquet")}
    assert inner == own | {
        "lab": [{"report"}],
        "export": [{"pretrained"}],
        "dev": [{"lab", "hqq", "demo", "export", "parquet"}],
    }
    assert "triton" in {one.name for one in EXTRAS["dev"]}  # the kernels' tests run wherever the tests run


def test_colab_keeps_its_own_kernel_and_libraries():
    """What `pip install -e '.[report]'` asks for is satisfied by what is there."""
    asked = {one.name: one.specifier for one in (*CORE, *EXTRAS["report"])}
    assert {"jupyterlab", "ipykernel", "ipython", "notebook", "tornado"} & set(asked) == set()
    assert all(version in asked[name] for name, version in COLAB.items() if name in asked)


def test_make_and_conda_install_the_pinned_versions():
    """A library from conda would be a third list of versions."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["name"] == PROJECT["name"]
    pip = {"pip": ["-c constraints.txt", "-e .[dev]"]}
    assert conda["dependencies"] == [f"python{PROJECT['requires-python']}", "pip", pip]
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt -e '.[dev]'" in make
    assert ".venv/installed: pyproject.toml constraints.txt\n" in make


@pytest.mark.parametrize("name", PINS)
def test_what_is_installed_is_what_is_pinned(name):
    """In the environment of `make setup`. Elsewhere, as on Colab, versions are not ours to set."""
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("the environment is not that of `make setup`")
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    assert installed.partition("+")[0] == PINS[name]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {key: citation[key] for key in ("version", "license")} == {
        key: PROJECT[key] for key in ("version", "license")
    }


def test_every_file_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:vitlib|tests|notebooks|params)/[\w./-]+\.\w+|\w+\.(?:txt|toml))`", text))
    assert len(named) > 8 and [name for name in named if not (ROOT / name).exists()] == []

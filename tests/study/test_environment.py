"""One list of versions: pyproject.toml has it, environment.yml installs from it, and it is what runs here."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TORCH_PINS = "triton; platform_system == 'Linux'"  # whose version the CUDA build of torch sets; its CPU build has none
PINNED = [requirement for requirement in (*PROJECT["dependencies"], *EXTRAS["dev"]) if requirement != TORCH_PINS]


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def test_conda_takes_python_and_pip_and_leaves_the_rest_to_pip():
    """A library from conda would be a second list of versions."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["name"] == PROJECT["name"]
    assert conda["dependencies"] == [f"python{PROJECT['requires-python']}", "pip", {"pip": ["-e .[dev]"]}]


def test_every_version_is_exact_and_listed_once():
    """An open range of torch would pull gigabytes of CUDA packages, and numbers of two runs would not compare."""
    for requirement in (*PINNED, *EXTRAS["gpu"], *EXTRAS["hub"]):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==\d+(\.\d+)+", requirement)
    lists = (PROJECT["dependencies"], *EXTRAS.values())
    names = [name_of(requirement).lower() for requirements in lists for requirement in requirements]
    assert len(names) == len(set(names))
    assert TORCH_PINS in EXTRAS["dev"]  # the interpreter runs the kernels' tests wherever the tests run


@pytest.mark.parametrize("requirement", PINNED, ids=name_of)
def test_what_is_installed_is_what_is_pinned(requirement):
    """Where this project was installed by pip. Elsewhere, as on a cluster's own torch, versions are not ours to set."""
    name, version = requirement.split("==")
    try:
        importlib.metadata.version(PROJECT["name"])
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    assert installed.partition("+")[0] == version

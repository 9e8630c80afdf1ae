"""One list of versions: pyproject.toml has it, environment.yml installs from it, and it is what runs here."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
TORCH_PINS = "triton; platform_system == 'Linux'"  # whose version the CUDA build of torch sets; its CPU build has none
PINNED = [requirement for requirement in (*PROJECT["dependencies"], *EXTRAS["dev"]) if requirement != TORCH_PINS]


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def test_conda_takes_python_and_pip_and_leaves_the_rest_to_pip():
    """A library from conda would be a second list of versions."""
    plain = [entry for entry in CONDA["dependencies"] if isinstance(entry, str)]
    assert [name_of(entry) for entry in plain] == ["python", "pip"]
    assert [entry for entry in CONDA["dependencies"] if not isinstance(entry, str)] == [{"pip": ["-e .[dev]"]}]


def test_the_environment_is_called_like_the_project():
    assert CONDA["name"] == PROJECT["name"]


def test_both_ask_for_the_same_python():
    assert f"python{PROJECT['requires-python']}" in CONDA["dependencies"]


def test_the_extras_that_conda_installs_exist():
    (pip,) = (entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    asked = re.fullmatch(r"-e \.\[(.+)\]", pip[0])[1].split(",")
    assert set(asked) <= set(EXTRAS)


def test_no_version_is_typed_in_environment_yml():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert re.findall(r"\d+\.\d+[\d.]*", text) == [PROJECT["requires-python"].removeprefix(">=")]


@pytest.mark.parametrize("requirement", [*PINNED, *EXTRAS["gpu"], *EXTRAS["hub"]], ids=name_of)
def test_every_version_is_exact(requirement):
    """An open range of torch would pull gigabytes of CUDA packages, and numbers of two runs would not compare."""
    assert re.fullmatch(r"[A-Za-z0-9._-]+==\d+(\.\d+)+", requirement)


def test_the_kernels_can_be_tested_wherever_the_tests_run():
    """A skip of the interpreter's tests would go unnoticed, and only the plain forms would be tested."""
    assert TORCH_PINS in EXTRAS["dev"]


def test_no_package_is_listed_twice():
    lists = (PROJECT["dependencies"], *EXTRAS.values())
    names = [name_of(requirement).lower() for requirements in lists for requirement in requirements]
    assert len(names) == len(set(names))


def test_the_stack_of_the_study_is_listed():
    stack = {"torch", "transformers", "bitsandbytes", "peft", "accelerate", "jupyterlab", "jupytext", "papermill"}
    stack |= {"seaborn", "pandas", "scikit-learn"}
    assert stack <= {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert [name_of(requirement) for requirement in EXTRAS["gpu"]] == ["flash-attn"]


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

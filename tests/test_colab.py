"""Colab: its notebook, the repository's address, and a GPU without BF16 and FlashAttention-2."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch

from vitlib import evaluate
from vitlib.network import attention, checkpoint, testbench, verify
from vitlib.pictures.decode import Decoded, Picture
from vitlib.study import params
from vitlib.study.variants import VARIANTS, find
from vitlib.training import trainer

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
CELLS = nbformat.read(NOTEBOOK, as_version=4).cells
CODE = [cell.source for cell in CELLS if cell.cell_type == "code"]
PROSE = "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")


# The notebook


def test_twins_are_in_step_without_outputs():
    config = jupytext.config.load_jupytext_config(str(NOTEBOOK))
    written = jupytext.writes(jupytext.read(NOTEBOOK, config=config), fmt="py:percent", config=config)
    assert written.strip() == NOTEBOOK.with_suffix(".py").read_text().strip(), "run `make sync`"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
    assert all(len(source.splitlines()) <= 8 for source in CODE)


def test_it_runs_the_first_four_notebooks_with_an_extra_that_exists():
    ran = re.findall(r"-m vitlib\.report run notebooks/(\w+)\.ipynb --study \{study\}", "\n".join(CODE))
    assert tuple(ran) == params.NOTEBOOKS[:4]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.findall(r"pip install --quiet -e '\.\[(\w+)\]'", "\n".join(CODE))
    assert extra in project["optional-dependencies"]


def test_it_unpacks_the_archive_that_its_command_makes(tmp_path):
    """Its first cells in an IPython of their own, twice, as they are run again in a runtime that is still there."""
    (command,) = re.findall(r"`(git archive [^`]+)`", PROSE)
    made = subprocess.run([*command.split()[:-1], f"--output={tmp_path}/vitlib.zip", "HEAD"], cwd=ROOT, check=False)
    if made.returncode:
        pytest.skip("this is no checkout of git")
    cells = [*CODE[:1], f"place = {str(tmp_path)!r}", *CODE[1:2], *CODE[1:2], "print('AT', Path.cwd())"]
    script = "import json, sys\nfrom IPython.core.interactiveshell import InteractiveShell\n"
    script += "shell = InteractiveShell.instance()\nshell.run_cell('from pathlib import Path')\n"
    script += "[shell.run_cell(cell).raise_error() for cell in json.loads(sys.argv[1])]"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(cells)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"AT {tmp_path}/vitlib\n" in done.stdout
    assert (tmp_path / "vitlib" / "vitlib" / "report" / "run.py").is_file()


# The address


@pytest.fixture
def project(tmp_path):
    """A copy of what holds the address, with `set_address(url)`."""
    for name in ("pyproject.toml", "README.md", "tools", "notebooks"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def written(project: Path, address: str | None) -> dict[str, str]:
    """README and notebooks as the script writes them where pyproject.toml has `address`."""
    file = project / "pyproject.toml"
    text = re.sub(r"^\[project\.urls\]\nRepository = .*\n", "", file.read_text(), flags=re.MULTILINE)
    line = f'[project.urls]\nRepository = "{address}"\n' if address else ""
    file.write_text(text.replace("[project.optional-dependencies]", line + "[project.optional-dependencies]"))
    subprocess.run([sys.executable, project / "tools" / "address.py"], check=True, capture_output=True)
    files = [project / "README.md", *(project / "notebooks").glob("*.*")]
    return {file.name: file.read_text() for file in files if file.suffix in (".md", ".py", ".ipynb")}


def test_what_is_here_has_the_address_of_pyproject():
    """For the address that is set, or for none."""
    done = subprocess.run([sys.executable, "tools/address.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run `make sync`: {done.stdout}"


def test_an_address_gives_readme_and_notebooks_their_badge_and_none_takes_it_away(project):
    without = written(project, None)
    assert len(without) == 1 + 2 * 7 and not any("colab-badge" in text for text in without.values())
    address = "https://github.com/someone/flowers"
    badged = written(project, address + ".git")
    opens = "https://colab.research.google.com/github/someone/flowers/blob/main/notebooks/colab.ipynb"
    assert all(text.count("colab-badge") == 1 and text.count(opens) == 1 for text in badged.values())
    assert f'repository: str = "{address}.git"' in badged["colab.py"]
    assert nbformat.reads(badged["1_finetune.ipynb"], 4).cells[0].source.splitlines()[2].startswith("[![Open in Colab]")
    assert written(project, address + ".git") == badged
    elsewhere = written(project, "https://example.org/flowers.git")
    assert not any("colab-badge" in text for text in elsewhere.values())
    assert 'repository: str = \\"https://example.org/flowers.git\\"' in elsewhere["colab.ipynb"]
    assert written(project, None) == without


# A runtime with a T4

NO_BF16 = "bf16 is only emulated below compute capability 8.0 (Tesla T4)"
NO_FLASH = "FlashAttention-2 needs compute capability 8.0 (Ampere), Tesla T4 has 7.5"
NO_FP8 = "fp8 products need compute capability 8.9, Tesla T4 has less"
GPU = torch.device("cuda")


@pytest.fixture
def t4(monkeypatch):
    """What torch says on a T4: BF16 is emulated, which it counts as support unless asked not to."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def test_a_t4_runs_every_variant_but_bf16_flash_attention_and_fp8(t4):
    reasons = {name: attention.not_runnable(variant, GPU) for name, variant in VARIANTS.items()}
    for name, reason in reasons.items():
        if "flash_attention_2" in name:
            assert reason in (NO_FLASH, "FlashAttention-2 takes fp16 and bf16 only")
        elif name.startswith(("bf16", "fp8")):
            assert reason == (NO_BF16 if name.startswith("bf16") else NO_FP8)
        else:
            assert bool(reason) == (name.startswith("int8") and name.endswith("graph"))


def test_training_on_a_t4_computes_in_fp16(t4):
    assert trainer.precision_of("auto", GPU) == "fp16"


def test_their_rows_are_not_run_with_the_reason(t4, checkpoints, labels, pixels, monkeypatch):
    """Loaded on the CPU here, judged as on the T4."""
    cpu, judge = torch.device("cpu"), attention.not_runnable
    monkeypatch.setattr(attention, "not_runnable", lambda variant, _: judge(variant, GPU))
    names = ["fp32-sdpa", "fp16-sdpa", "bf16-sdpa", "nf4-flash_attention_2", "fp8-direct-fused", "w8a8-direct-fused"]
    variants = [find(name) for name in names]
    engines, reasons = testbench.engines_of(variants, checkpoints, cpu, (1,))
    assert reasons == dict(zip(names[2:5], (NO_BF16, NO_FLASH, NO_FP8), strict=True))
    valid = Decoded(pixels[:1], [Picture("a.png", "2", None)], [])
    found = {name: verify.evidence(engine.network) for name, engine in engines.items()}
    bench = testbench.Bench(variants, engines, reasons, labels, cpu, valid, checkpoints, found)
    status = evaluate.status(bench).set_index("variant")["status"]
    assert status.to_dict() == {name: f"not run: {reasons[name]}" if name in reasons else "runs" for name in names}
    with pytest.raises(checkpoint.NotRun, match="bf16 is only emulated"):  # a baseline must run
        testbench.engines_of(variants[2:], checkpoints, cpu, (1,))

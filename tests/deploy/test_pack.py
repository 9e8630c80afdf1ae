"""An archive is a checkpoint like any other, for vitlib and for transformers alone, and always the same bytes."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from vitlib import __main__ as command
from vitlib.deploy import predictor
from vitlib.network import checkpoint, engine, samples, tuning
from vitlib.study import files, records
from vitlib.study.variants import FORMATS, Variant

ROOT = Path(__file__).parents[2]
KINDS = ("merged", "nf4", "nf4-calibrated", "int8", "mixed")
# A process that cannot import vitlib runs the first snippet of each model card, from the folder with the checkpoints.
ALONE = """
import itertools, json, os, re, sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "vitlib":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from PIL import Image, ImageSequence

found = {}
for folder in sorted(entry.name for entry in os.scandir(".") if entry.is_dir()):
    code = re.search(r"```python\\n(.*?)```", open(folder + "/README.md", encoding="utf-8").read(), re.DOTALL)[1]
    found[folder] = []
    with Image.open(folder + "/samples.tif") as file, torch.no_grad():
        for page in itertools.islice(ImageSequence.Iterator(file), 2):
            known = {"picture": page.convert("RGB")}
            exec(code, known)
            found[folder] += known["logits"].float().tolist()
assert not [name for name in sys.modules if name.startswith("vitlib")]
print(json.dumps(found))
"""


@pytest.fixture
def measured(checkpoints, tmp_path):
    """The checkpoints in a study with a record of two variants of NF4 and one of INT8."""
    (tmp_path / "outputs" / "unit" / "records").mkdir(parents=True)
    shutil.copytree(checkpoints, tmp_path / "outputs" / "unit" / "checkpoints")
    row = {"status": "ok", "gelu": "checkpoint", "batch": 1, "n": 40, "top1": 0.75, "top1_low": 0.6, "top1_high": 0.86}
    row |= {"model_mb": 2.5, "latency_p50_ms": 5.0, "latency_low_ms": 4.9, "latency_high_ms": 5.2}
    rows = [{"variant": name, **row} for name in ("nf4-sdpa", "int8-sdpa", "nf4-direct-fused-graph")]
    frame = pd.DataFrame(rows).reindex(
        columns=[*records.COLUMNS["variants"], *row.keys() - records.COLUMNS["variants"]]
    )
    records.write_table(frame, tmp_path / "outputs" / "unit" / "records" / "variants.csv")
    made = {"hardware": {"cpu": "Some CPU", "cores_usable": 2}}
    records.write_json(made, tmp_path / "outputs" / "unit" / "records" / "environment.json")
    return tmp_path / "outputs" / "unit"


def packed(folder: Path, output: Path, *more: str) -> Path:
    assert command.main(["pack", str(folder), "--output", str(output), *more]) == 0
    with zipfile.ZipFile(output) as archive:
        archive.extractall(output.parent / "unpacked")
    return output.parent / "unpacked" / output.stem


def test_transformers_alone_computes_what_vitlib_does_from_each_unpacked_archive(checkpoints, tmp_path):
    for kind in KINDS:
        packed(checkpoints / kind, tmp_path / f"unit-{kind}.zip")
    run = {"cwd": tmp_path / "unpacked", "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], **run)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {f"unit-{kind}" for kind in KINDS}
    for kind in KINDS:
        weights = next(row.name for row in FORMATS.values() if row.checkpoint == kind and row.dtype == "float16")
        loaded = checkpoint.load(checkpoints, Variant(weights), torch.device("cpu"))
        pixels = samples.pixels(samples.read(checkpoints / kind)[0][:2], loaded.preprocess)
        own = engine.logits(engine.Engine(loaded), pixels, 1)
        assert tuning.relative_error(torch.tensor(found[f"unit-{kind}"]), own) < 1e-3


def test_an_archive_is_whole_measured_and_the_same_again(measured, tmp_path, monkeypatch):
    folder = packed(measured / "checkpoints" / "nf4", tmp_path / "a" / "unit-nf4.zip", "--licence", "cc-by-4.0")
    again = packed(measured / "checkpoints" / "nf4", tmp_path / "b" / "unit-nf4.zip", "--licence", "cc-by-4.0")
    archives = [tmp_path / place / "unit-nf4.zip" for place in "ab"]
    assert archives[0].read_bytes() == archives[1].read_bytes()
    digest = (tmp_path / "a" / "unit-nf4.zip.sha256").read_text()
    assert digest == f"{files.checksum(archives[0])}  unit-nf4.zip\n"
    found = predictor.find(folder)
    assert dict(found.folders) == {"nf4": folder}
    assert found.measured["variant"].tolist() == ["nf4-sdpa", "nf4-direct-fused-graph"]
    assert set(found.measured["hardware"]) == {"Some CPU, 2 cores"}
    assert checkpoint.whole(again)["weights"] == "nf4"
    assert engine.load(folder, "nf4-direct-fused", batch_sizes=(1,)).loaded.folder == folder
    with pytest.raises(checkpoint.CheckpointError, match="holds the weights 'nf4': nf4c-sdpa needs 'nf4-calibrated'"):
        engine.load(folder, "nf4c-sdpa")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        *("cc-by-4.0", "image-classification"),
        "transformers",
    )
    (result,) = card.data.eval_results
    assert result.metric_value == 0.75 and "95 % interval 0.6000 … 0.8600 of 40 pictures" in result.metric_name
    assert "| NF4 · SDPA | 75 (60 … 86) |" in card.text.replace("\u00a0", " ")


def test_what_is_unknown_is_called_so_and_the_base_is_named(measured, tmp_path):
    folder = measured / "checkpoints" / "mixed"
    base = {"kind": "package", "base": "/home/me/x", "origin": "a pretrained ViT", "licence": "MIT | as they say"}
    checkpoint.seal(folder, checkpoint.whole(folder) | {"origin": base, "parameters": {"data_source": "/data/my|own"}})
    card = ModelCard.load(packed(folder, tmp_path / "mine.zip") / "README.md")
    assert (card.data.license, card.data.license_name, card.data.eval_results) == ("other", "unknown", None)
    assert "| the weights | unknown: nobody has stated one |" in card.text
    assert "| the base network | MIT &#124; as they say |" in card.text
    assert "The base is a pretrained ViT." in card.text and "fine-tuned on myown" in card.text
    assert "/home" not in card.content and "/data" not in card.content
    assert re.search(
        r"format of each of the encoder's linear layers \(\d+ in FP16, \d+ in INT8, \d+ in NF4\)", card.text
    )


def test_what_cannot_be_packed_is_refused_in_a_line(measured, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = measured / "checkpoints" / "nf4"
    assert command.main(["pack", str(folder)]) == 0  # its study is not recorded
    before = Path("vitlib-nf4.zip").read_bytes()
    about = checkpoint.whole(folder)
    refusals = {
        "vitlib-nf4.zip exists: name another --output, or replace it with --overwrite": ["pack", str(folder)],
        "has several checkpoints: name one, such as": ["pack", str(measured)],
        "'a b.zip' cannot name the archive": ["pack", str(folder), "--output", "a b.zip"],
        "'x.tar' cannot name the archive": ["pack", str(folder), "--output", "x.tar"],
        "'My own!' is no licence identifier": ["pack", str(folder), "--licence", "My own!", "--overwrite"],
        "there is no checkpoint in": ["pack", str(tmp_path / "nothing")],
    }
    for message, words in refusals.items():
        capsys.readouterr()
        assert command.main(words) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    checkpoint.seal(folder, about | {"study": "../../../escaped"})
    assert command.main(["pack", str(folder)]) == 0 and Path("escaped-nf4.zip").is_file()
    (folder / "labels.json").write_text("[]")
    assert command.main(["pack", str(folder), "--overwrite"]) == 1
    assert "labels.json of the checkpoint 'nf4' is not as it was saved" in capsys.readouterr().err
    (folder / checkpoint.PROVENANCE).unlink()
    assert command.main(["pack", str(folder), "--overwrite"]) == 1
    assert "'nf4' has no checksums" in capsys.readouterr().err
    assert Path("vitlib-nf4.zip").read_bytes() == before
    made = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert made == [f"{name}{end}" for name in ("escaped-nf4", "vitlib-nf4") for end in (".zip", ".zip.sha256")]


def test_the_snippets_of_the_readme_give_the_logits_of_the_engine(checkpoints, tmp_path, monkeypatch):
    """Whatever they load must be a checkpoint of NF4."""
    place = tmp_path / "outputs" / "demo"
    place.mkdir(parents=True)
    (place / "checkpoints").symlink_to(checkpoints)
    monkeypatch.chdir(tmp_path)
    plain = engine.load(checkpoints, "nf4-sdpa", device="cpu")
    picture = samples.read(checkpoints / "nf4")[0][3]
    pre = plain.loaded.preprocess
    pixel_values = pre.normalise(samples.pixels([picture], pre), torch.float16)
    picture.save("picture.png")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for code in snippets:
        known = {"picture": Image.open("picture.png"), "pixel_values": pixel_values}
        exec(code, known)
        assert tuning.relative_error(known["logits"].detach(), plain(pixel_values)) < 5e-3, code

"""Checkpoints that are enough by themselves, and variants that are what they are called."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, DeiTConfig

from vitlib.network import attention, checkpoint, verify
from vitlib.network.checkpoint import CheckpointError, NotRun
from vitlib.network.verify import EvidenceError
from vitlib.pictures import preprocess
from vitlib.pictures.sources import Labels, Picture
from vitlib.study.variants import FORMATS, VARIANTS, Variant

CPU = torch.device("cpu")
BASE = {"side": 16, "revision": "", "dtype": torch.float32, "quantized": False, "device": CPU}  # options of `load_base`


def test_parameter_count_of_vit_large_with_102_classes():
    with torch.device("meta"):
        network = checkpoint.new("vit-large", image_size=224, labels=Labels(*[tuple(map(str, range(102)))] * 2))
    count = sum(p.numel() for p in network.parameters())
    assert count == 303_406_182
    assert round(count * 4 / 2**20, 1) == 1157.4  # megabytes in fp32, as the original study reports


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ValueError, match="vit-large"):
        checkpoint.new("vit-larg", image_size=32, labels=Labels(("a",), ("a",)))


@pytest.mark.parametrize("folder", ["merged", "nf4", "nf4-calibrated", "int8", "mixed"])
def test_plain_transformers_loads_a_checkpoint(checkpoints, folder, labels):
    options = {"device_map": {"": CPU}, "attn_implementation": "direct"}  # registered by importing `attention`
    network = AutoModelForImageClassification.from_pretrained(checkpoints / folder, **options)
    assert network.config._attn_implementation == "direct"
    assert network.config.id2label == dict(enumerate(labels.names))
    assert AutoImageProcessor.from_pretrained(checkpoints / folder, backend="pil").size["height"] == 32


# Each plain format with each attention, each fused format once: executions and GELUs load the same network.
LOADED = [name for name, row in VARIANTS.items() if row.execution in ("eager", "fused") and row.gelu == "checkpoint"]


@pytest.mark.parametrize("name", LOADED)
def test_every_variant_is_loaded_as_itself_or_says_why_not(checkpoints, name):
    variant = VARIANTS[name]
    try:
        loaded = checkpoint.load(checkpoints, variant, CPU)
    except NotRun as reason:
        assert variant.own_flash
        assert "CUDA" in str(reason) or "fp16 and bf16 only" in str(reason)
    else:
        assert verify.evidence(loaded.model)["attention"] == variant.attention
        assert loaded.dtype == getattr(torch, variant.format.dtype)


@pytest.mark.parametrize("row", [row for row in FORMATS.values() if not row.planned], ids=lambda row: row.name)
def test_bytes_per_weight_of_each_checkpoint_are_those_of_its_format(checkpoints, row):
    """Bits of the codes, and of NF4 8 bits for each 64 weights and 32 for each 256 of those scales."""
    plain = checkpoint.load(checkpoints, Variant(row.name, "direct", "fused" if row.fused_only else "eager"), CPU)
    layer = plain.model.vit.layers[1].mlp.fc1
    weights, biases = layer.in_features * layer.out_features, 2 * layer.out_features
    bits = 8 * (verify.model_mb(layer) * verify.MB - (2 * biases if row.bits == 32 else biases)) / weights
    expected = {4: 4 + 8 / 64 + 32 / 64 / 256 + 8 * (4 + 4 * 16 + 4 * 256) / weights, 8: 8 + 32 / 128}
    stored = FORMATS[row.reference].bits if row.fused_only else row.bits
    assert bits == pytest.approx(expected.get(stored, stored))


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        (Variant("fp32"), lambda network: setattr(network.config, "_attn_implementation", "eager")),
        (Variant("fp32"), lambda network: network.half()),
        (Variant("fp32"), lambda network: network.train()),
        (Variant("fp16"), lambda network: network.classifier.float()),
        (Variant("nf4"), lambda network: network.set_submodule("vit.layers.0.mlp.fc1", torch.nn.Linear(1, 1).half())),
    ],
    ids=["attention", "dtype", "training mode", "one dtype", "one layer not quantized"],
)
def test_a_silent_replacement_is_an_error(checkpoints, variant, change):
    network = checkpoint.load(checkpoints, variant, CPU).model
    change(network)
    with pytest.raises(EvidenceError, match="asked was"):
        verify.verify(network, variant)


@pytest.mark.parametrize(
    ("variant", "capability", "reason"),
    [
        (Variant("fp32", "flash_attention_2"), (9, 0), "fp16 and bf16 only"),
        (Variant("nf4", "flash_attention_2"), None, "needs a CUDA device"),
        (Variant("nf4", "flash_attention_2"), (7, 5), "Tesla T4 has 7.5"),
        (Variant("nf4", "flash_attention_2"), (9, 0), "not installed"),
        (Variant("fp16", "sdpa", "graph"), None, "needs? a CUDA device"),
        (Variant("int8", "sdpa", "graph"), (9, 0), "cannot be captured"),
        (Variant("nf4", "direct", "fused-graph"), (7, 5), ""),
        (Variant("fp8", "direct", "fused"), (8, 0), "8.9"),
        (Variant("fp8", "direct", "fused"), (8, 9), ""),
        (Variant("fp8", "direct", "fused"), None, ""),
        (Variant("bf16"), (7, 5), r"only emulated below compute capability 8.0 \(Tesla T4\)"),
        (Variant("bf16"), (8, 0), ""),
        (Variant("bf16"), None, ""),
    ],
)
def test_each_variant_says_where_it_cannot_run(monkeypatch, variant, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    found = attention.not_runnable(variant, torch.device("cuda" if capability else "cpu"))
    assert re.search(reason, found) and bool(reason) == bool(found)


def test_ids_come_from_the_checkpoint_not_from_sorting(checkpoints, labels):
    found = checkpoint.read_labels(checkpoints / "merged")
    assert found == labels
    pictures = [Picture(name, name, lambda: None) for name in sorted(found.folders)]  # '1', '10', '2'
    assert found.ids(pictures).tolist() == [2, 1, 0]


def _swap_two_names(folder):
    entries = json.loads((folder / "labels.json").read_text())
    entries[0]["name"], entries[1]["name"] = entries[1]["name"], entries[0]["name"]
    (folder / "labels.json").write_text(json.dumps(entries))


def _without_labels(folder):
    (folder / "labels.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 3}))


def _without_preprocessing(folder):
    (folder / "preprocessor_config.json").unlink()


def _without_block_1(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layer.1." not in name and ".layers.1." not in name}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_swap_two_names, CheckpointError, "disagree"),
        (_without_labels, CheckpointError, "no labels"),
        (_without_preprocessing, preprocess.PreprocessError, "preprocessor_config"),
        (_without_block_1, CheckpointError, "lacks weights"),  # and not replaced by random ones
        (shutil.rmtree, CheckpointError, "1_finetune"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoints, tmp_path, labels, damage, error, message):
    folder = shutil.copytree(checkpoints / "merged", tmp_path / "merged")
    (folder / "provenance.json").unlink()  # as of another tool: no list of checksums
    damage(folder)
    with pytest.raises(error, match=message):
        checkpoint.load(tmp_path, Variant("fp32"), CPU)
    if damage is _without_block_1:
        with pytest.raises(CheckpointError, match="lacks weights"):
            checkpoint.load_base(str(tmp_path / "merged"), labels=labels, **BASE)


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _edit(file, **change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def _rotate_labels(folder):
    """In both files, so that they agree."""
    entries = json.loads((folder / "labels.json").read_text())
    names = [entry["name"] for entry in entries]
    turned = [entry | {"name": name} for entry, name in zip(entries, names[1:] + names[:1], strict=True)]
    (folder / "labels.json").write_text(json.dumps(turned))
    _edit(folder / "config.json", id2label={entry["id"]: entry["name"] for entry in turned})


EDITS = {
    "labels": _rotate_labels,
    "mean": lambda folder: _edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
    "normalisation": lambda folder: _edit(folder / "preprocessor_config.json", do_normalize=False),
    "blocks": lambda folder: _edit(folder / "config.json", num_hidden_layers=3),
    "provenance": lambda folder: _edit(folder / "provenance.json", merged_sha256="other"),
    "no list": lambda folder: _edit(folder / "provenance.json", files={}),
    "no seal": lambda folder: _edit(folder / "provenance.json", record_sha256=""),
    "added": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "lost": lambda folder: (folder / "labels.json").unlink(),
}


@pytest.mark.parametrize("weights", ["fp16", "nf4", "int8", "mixed"])
def test_a_checkpoint_that_is_not_as_it_was_saved_is_refused_by_name(checkpoints, tmp_path, weights):
    """A bit of every file, and edits after which all would load; the file that is blamed is one that was changed."""
    variant, copy = Variant(weights, *(("direct", "fused") if FORMATS[weights].fused_only else ())), tmp_path / "copy"
    names = [file.name for file in (checkpoints / variant.checkpoint).iterdir()]
    assert len(names) >= 5
    flips = {name: lambda folder, name=name: _flip(folder / name) for name in names}
    for what, change in (flips | EDITS).items():
        folder = shutil.copytree(checkpoints / variant.checkpoint, copy / variant.checkpoint)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        change(folder)
        after = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(CheckpointError, match="is not as it was saved: make the checkpoint again") as error:
            checkpoint.load(copy, variant, CPU)
        blamed = str(error.value).split()[0]
        assert before.get(blamed) != after.get(blamed), what
        shutil.rmtree(copy)
    assert "files" in checkpoint.load(checkpoints, variant, CPU).about


@pytest.mark.parametrize("weights", ["fp16", "nf4", "int8"])
def test_no_missing_tensor_and_no_infinite_one_is_silent_without_a_list_of_checksums(checkpoints, tmp_path, weights):
    folder = shutil.copytree(checkpoints / Variant(weights).checkpoint, tmp_path / Variant(weights).checkpoint)
    (folder / "provenance.json").unlink()
    assert checkpoint.load(tmp_path, Variant(weights), CPU).about == {}
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    some = [name for name in tensors if "layer.1.output" in name or ".layer." not in name]  # one linear, and the rest
    assert any(name.endswith(("nested_absmax", "SCB")) for name in some) or weights == "fp16"
    for name in (name for name in some if not name.endswith("weight_format")):  # a number that nothing depends on
        kept = {other: tensor for other, tensor in tensors.items() if other != name}
        safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises((CheckpointError, RuntimeError)):
            checkpoint.load(tmp_path, Variant(weights), CPU)
    for name in ("classifier.bias", "vit.layernorm.weight"):
        spoilt = {**tensors, name: torch.full_like(tensors[name], torch.inf)}
        safetensors.torch.save_file(spoilt, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"NaN or infinity in {name}"):
            checkpoint.load(tmp_path, Variant(weights), CPU)


def test_unreadable_labels_and_another_checkpoints_preprocessing_are_named(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "merged", tmp_path / "merged")
    (folder / "provenance.json").unlink()  # as if another tool had written it: it has no checksums
    preprocess.new(24).save(folder)
    with pytest.raises(CheckpointError, match="'merged' prepares pictures of 24 × 24 pixels for a network that takes"):
        checkpoint.load(tmp_path, Variant("fp32"), CPU)
    (folder / "labels.json").write_text("{")
    with pytest.raises(ValueError, match=r"merged/labels\.json is not JSON"):
        checkpoint.read_labels(folder)


def test_the_head_of_a_base_is_new_even_with_as_many_classes(checkpoints, labels):
    old = checkpoint.load(checkpoints, Variant("fp32"), CPU).model.classifier.weight
    base = checkpoint.load_base(str(checkpoints / "merged"), labels=labels, **BASE)
    assert base.classifier.weight.shape == old.shape
    assert not torch.equal(base.classifier.weight, old)
    assert torch.equal(base.classifier.bias, torch.zeros(3))


def test_a_base_of_another_kind_is_refused(tmp_path, labels):
    DeiTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'deit' network"):
        checkpoint.load_base(str(tmp_path), labels=labels, **BASE)


def test_an_interrupted_save_leaves_the_old_checkpoint(checkpoints, tmp_path, labels, monkeypatch):
    folder = shutil.copytree(checkpoints / "merged", tmp_path / "merged")
    before = (folder / "model.safetensors").read_bytes()
    network = checkpoint.load(tmp_path, Variant("fp32"), CPU).model

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess.Preprocess, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(network, folder, pre=preprocess.new(32), labels=labels, provenance={})
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]

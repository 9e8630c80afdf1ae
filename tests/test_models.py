"""Checkpoints that are enough by themselves, and variants that are what they are called."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, DeiTConfig

from vitlib import attention, models, preprocess
from vitlib.models import CheckpointError, EvidenceError, NotRun
from vitlib.sources import Labels, Picture
from vitlib.variants import STUDY, VARIANTS, Variant

CPU = torch.device("cpu")


def test_parameter_count_of_vit_large_with_102_classes():
    with torch.device("meta"):
        network = models.new("vit-large", image_size=224, labels=Labels(*[tuple(map(str, range(102)))] * 2))
    count = sum(p.numel() for p in network.parameters())
    assert count == 303_406_182
    assert round(count * 4 / 2**20, 1) == 1157.4  # megabytes in fp32, as the original study reports


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ValueError, match="vit-large"):
        models.new("vit-larg", image_size=32, labels=Labels(("a",), ("a",)))


@pytest.mark.parametrize("folder", ["merged", "nf4", "int8"])
def test_plain_transformers_loads_a_checkpoint(checkpoints, folder, labels):
    network = AutoModelForImageClassification.from_pretrained(checkpoints / folder, device_map={"": CPU})
    assert network.config.id2label == dict(enumerate(labels.names))
    assert AutoImageProcessor.from_pretrained(checkpoints / folder, backend="pil").size["height"] == 32


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_loaded_as_itself_or_says_why_not(checkpoints, name):
    variant = VARIANTS[name]
    try:
        loaded = models.load(checkpoints, variant, CPU)
    except NotRun as reason:
        assert variant.own_flash or variant.graphed
        assert "CUDA" in str(reason)
    else:
        assert models.evidence(loaded.model)["attention"] == variant.attention


def test_all_five_variants_of_the_original_study_are_rows():
    five = {("fp32", "sdpa"), *((w, a) for w in ("nf4", "int8") for a in ("sdpa", "flash_attention_2"))}
    assert five <= {(variant.weights, variant.attention) for variant in STUDY}


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        (Variant("fp32"), lambda network: setattr(network.config, "_attn_implementation", "eager")),
        (Variant("fp32"), lambda network: network.half()),
        (Variant("fp32"), lambda network: network.train()),
        (Variant("fp16"), lambda network: network.classifier.float()),
        (
            Variant("nf4"),
            lambda network: network.set_submodule("vit.layers.0.mlp.fc1", torch.nn.Linear(128, 512).half()),
        ),
    ],
    ids=["attention", "dtype", "training mode", "one dtype", "one layer not quantized"],
)
def test_a_silent_replacement_is_an_error(checkpoints, variant, change):
    network = models.load(checkpoints, variant, CPU).model
    change(network)
    with pytest.raises(EvidenceError, match="asked was"):
        models.verify(network, variant)


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "8.0"), ((9, 0), "not installed")])
def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    assert reason in attention.not_runnable(Variant("nf4", "flash_attention_2"), torch.device("cuda"))


@pytest.mark.parametrize(
    ("variant", "capability", "reason"),
    [
        (Variant("fp16", "direct_cudnn"), None, "needs a CUDA device"),
        (Variant("fp16", "direct_fa2", "fused"), None, "needs a CUDA device"),
        (Variant("fp32", "direct_cudnn"), (9, 0), "fp16 and bf16 only"),
        (Variant("fp32", "direct_fa"), (9, 0), "fp16 and bf16 only"),
        (Variant("fp16", "direct_fa"), (7, 5), "Tesla T4 has 7.5"),
        (Variant("fp32", "direct_efficient"), (7, 5), ""),
        (Variant("fp32", "direct_math"), None, ""),
        (Variant("fp8", "direct", "fused"), (8, 0), "8.9"),
        (Variant("fp8", "direct", "fused"), None, ""),
    ],
)
def test_each_attention_says_where_it_cannot_run(monkeypatch, variant, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    found = attention.not_runnable(variant, torch.device("cuda" if capability else "cpu"))
    assert reason in found and bool(reason) == bool(found)


def test_plain_transformers_takes_the_registered_attention(checkpoints):
    network = AutoModelForImageClassification.from_pretrained(checkpoints / "merged", attn_implementation="direct")
    assert network.config._attn_implementation == "direct"


def test_ids_come_from_the_checkpoint_not_from_sorting(checkpoints, labels):
    found = models.read_labels(checkpoints / "merged")
    assert found == labels
    pictures = [Picture(name, name, lambda: None) for name in sorted(found.folders)]  # '1', '10', '2'
    assert found.ids(pictures).tolist() == [2, 1, 0]


def test_a_checkpoint_whose_labels_disagree_with_its_config_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "merged", tmp_path / "merged")
    entries = json.loads((folder / "labels.json").read_text())
    entries[0]["name"], entries[1]["name"] = entries[1]["name"], entries[0]["name"]
    (folder / "labels.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match="disagree"):
        models.load(tmp_path, Variant("fp32"), CPU)


def test_a_checkpoint_without_labels_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "merged", tmp_path / "merged")
    (folder / "labels.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 3}))
    with pytest.raises(CheckpointError, match="no labels"):
        models.load(tmp_path, Variant("fp32"), CPU)


def test_a_checkpoint_without_preprocessing_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "merged", tmp_path / "merged")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(preprocess.PreprocessError, match="preprocessor_config"):
        models.load(tmp_path, Variant("fp32"), CPU)


def _without_block_1(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layer.1." not in name and ".layers.1." not in name}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_missing_are_not_replaced_by_random_ones(checkpoints, tmp_path, labels):
    _without_block_1(shutil.copytree(checkpoints / "merged", tmp_path / "merged"))
    with pytest.raises(CheckpointError, match="lacks weights"):
        models.load(tmp_path, Variant("fp32"), CPU)
    with pytest.raises(CheckpointError, match="lacks weights"):
        models.load_base(
            str(tmp_path / "merged"), revision="", labels=labels, dtype=torch.float32, quantized=False, device=CPU
        )


def test_the_head_of_a_base_is_new_even_with_as_many_classes(checkpoints, labels):
    old = models.load(checkpoints, Variant("fp32"), CPU).model.classifier.weight
    base = models.load_base(
        str(checkpoints / "merged"), revision="", labels=labels, dtype=torch.float32, quantized=False, device=CPU
    )
    assert base.classifier.weight.shape == old.shape
    assert not torch.equal(base.classifier.weight, old)
    assert torch.equal(base.classifier.bias, torch.zeros(3))


def test_a_base_of_another_kind_is_refused(tmp_path, labels):
    DeiTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="'deit' network"):
        models.load_base(str(tmp_path), revision="", labels=labels, dtype=torch.float32, quantized=False, device=CPU)


def test_a_missing_checkpoint_says_what_to_run(tmp_path):
    with pytest.raises(CheckpointError, match="1_finetune"):
        models.load(tmp_path, Variant("nf4"), CPU)


def test_an_interrupted_save_leaves_the_old_checkpoint(checkpoints, tmp_path, labels, monkeypatch):
    folder = shutil.copytree(checkpoints / "merged", tmp_path / "merged")
    before = (folder / "model.safetensors").read_bytes()
    network = models.load(tmp_path, Variant("fp32"), CPU).model

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess.Preprocess, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        models.save(network, folder, pre=preprocess.new(32), labels=labels, provenance={})
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]

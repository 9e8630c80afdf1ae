"""What is trained, and that what is saved is what was trained."""

import copy
import dataclasses
import re

import pandas as pd
import peft
import pytest
import torch

from vitlib import finetune
from vitlib.finetune import Base, FinetuneError
from vitlib.network import checkpoint, quantize
from vitlib.pictures import decode, preprocess
from vitlib.pictures.sources import DataError
from vitlib.study import files, params, records
from vitlib.study.study import Study
from vitlib.training import adapters

CPU = torch.device("cpu")


def settings(**changes):
    return Study.of(params.check({"study": "unit", "precision": "fp32", **changes}))


@pytest.fixture
def base(labels):
    torch.manual_seed(0)
    return Base(checkpoint.new("vit-micro", image_size=32, labels=labels), preprocess.new(32), labels, CPU, {})


@pytest.fixture
def nf4_base(checkpoints, labels):
    network = checkpoint.load_base(
        str(checkpoints / "merged"),
        revision="",
        side=32,
        labels=labels,
        dtype=torch.bfloat16,
        quantized=True,
        device=CPU,
    )
    return Base(network, preprocess.new(32), labels, CPU, {})


def test_lora_trains_the_head_and_an_adapter_on_every_encoder_linear(base):
    model = finetune.make_trainable(settings(), base)
    table = finetune.parameter_table(model)
    adapters = 4 * 8 * (4 * (128 + 128) + 2 * (128 + 512))  # blocks × rank × Σ (in + out)
    assert table.loc["adapters", "trainable"] == adapters
    assert table.loc["head", "trainable"] == 128 * 3 + 3
    assert table.loc["encoder", "trainable"] == 0


def test_a_frozen_head_or_a_linear_without_adapter_is_an_error(base):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with pytest.raises(adapters.AdapterError, match="have an adapter"):
        adapters.check(peft.get_peft_model(copy.deepcopy(base.model), config), "classifier")
    model = finetune.make_trainable(settings(), base).requires_grad_(False)
    with pytest.raises(adapters.AdapterError, match="classifier is frozen"):
        adapters.check(model, "classifier")


def _stir(model):
    """Give adapters and head values that training could have given."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_every_method_trains_the_head_and_merging_changes_nothing_but_the_format(base, method):
    model = _stir(finetune.make_trainable(settings(method=method), base))
    assert any("classifier" in name and p.requires_grad for name, p in model.named_parameters())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values=x).logits
        merged = finetune.merge(settings(method=method), model, base)
        found = merged(pixel_values=x.half()).logits.float()
    assert merged.classifier.weight.dtype == torch.float16
    assert (found - expected).norm() / expected.norm() < 5e-3


def test_merging_qlora_keeps_the_dequantized_weights(nf4_base):
    model = _stir(finetune.make_trainable(settings(method="qlora"), nf4_base))
    layer = model.base_model.model.vit.layers[1].mlp.fc1
    weight = quantize.bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    expected = weight.float() + layer.get_delta_weight("default").float()
    head = model.base_model.model.classifier.modules_to_save["default"].weight.detach().clone()
    merged = finetune.merge(settings(method="qlora"), model, nf4_base)
    found = merged.vit.layers[1].mlp.fc1.weight.float()
    assert type(merged.vit.layers[1].mlp.fc1) is torch.nn.Linear
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(merged.classifier.weight, head.half())
    assert not hasattr(merged.config, "quantization_config")


def test_a_missing_base_or_data_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = settings(base_model="no-such-folder")
    with pytest.raises(FinetuneError, match="pretrain, random, a folder"):
        finetune.load_base(chosen, finetune.dataset(chosen))
    with pytest.raises(DataError, match="no data folder"):
        finetune.dataset(settings(data_source="no/such/folder"))
    with pytest.raises(params.ParameterError, match="no data folder"):
        finetune.open({"study": "unit", "data_source": "no/such/folder"})


def test_the_origin_of_the_base_is_recorded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    base.origin = {"base": "pretrain", "kind": "generator"}
    assert finetune.introduce(settings(), base).startswith("**")
    assert settings().read_json("base") == base.origin


def test_saved_checkpoints_are_reproduced_and_another_network_is_refused(base, tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    merged = finetune.merge(settings(), _stir(finetune.make_trainable(settings(), base)), base)
    history = pd.DataFrame({"top1": [0.5]})
    valid = decode.Decoded(pixels, _pictures(base), [])
    train = decode.Decoded(
        pixels.flip(0), [dataclasses.replace(one, file=f"t{one.file}") for one in _pictures(base)], []
    )
    saved = finetune.save_checkpoints(settings(), merged, base, history, {"train": train, "valid": valid})
    table = finetune.check_reload(merged, base, saved, valid)
    assert table.loc["merged", "reload_difference"] == 0
    assert 0 < table.loc["int8", "from_merged"] < table.loc["nf4", "from_merged"] < 0.5
    assert table.loc["nf4-calibrated", "from_merged"] < table.loc["nf4", "from_merged"]
    assert checkpoint.read_labels(saved["nf4"].folder) == base.labels
    note = records.read_json(saved["nf4-calibrated"].folder / "provenance.json")
    assert note["calibrated_on"] == [f"t{k}" for k in range(8)]  # training pictures, none of the evaluation
    with torch.no_grad():
        found = merged(pixel_values=base.preprocess.normalise(pixels, torch.float16)).logits.argmax(1)
        assert table.loc["merged", "top1"] == (found == base.labels.ids(valid.pictures)).float().mean().item()
        merged.classifier.weight.mul_(1.5)
    checkpoint.save(merged, saved["merged"].folder, pre=base.preprocess, labels=base.labels, provenance={})
    with pytest.raises(FinetuneError, match="other logits"):
        finetune.check_reload(merged, base, saved, valid)


def _pictures(base):
    return [decode.Picture(str(k), base.labels.folders[k % len(base.labels.folders)], None) for k in range(8)]


@pytest.fixture
def trained():
    """A history, and what was found of the three checkpoints of 4 validation pictures."""
    history = pd.DataFrame({"epoch": [1, 2, 3], "top1": [0.5, 1.0, 0.75], "top5": 0.9, "images_per_s": 1234.0})
    history["train_loss"], history["valid_loss"] = [0.9, 0.5, 0.1], [0.9, 0.5, 0.6]
    rows = {"model_mb": [4.0, 1.0, 1.0, 2.0], "top1": 0.5, "same_class": [1.0, 0.75, 1.0, 1.0]}
    return history, pd.DataFrame(rows, index=["merged", "nf4", "nf4-calibrated", "int8"])


def _split(base, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return decode.Decoded(
        torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw), _pictures(base)[:count], []
    )


def test_headline_starts_with_the_accuracy(base, trained):
    text = finetune.headline(settings(), *trained, base, {"train": _split(base, 8, 1), "valid": _split(base, 4)})
    first = "- LoRA reaches **50.0 % Top-1** on 4 validation pictures of 3 classes after 3 epochs. "
    assert text.startswith(first) and len(first) < 160
    assert "8 pictures ran at about 1,200 images/s" in text and "changed Top-1 by 1 picture." in text
    assert "best epoch was 2 with 100.0 %" in text and "the base reached" not in text
    assert "No picture appears in both" in text
    assert (
        "NF4 takes 4.0 times and INT8 2.0 times less memory than FP16. Of 4 pictures, INT8 gives 0, NF4 1 and" in text
    )
    assert (
        "calibrated NF4, which is as small, 0 another class than the FP16 checkpoint does, in batches of 32 (notebook 2"
        in text
    )


def test_headline_says_what_a_stand_in_reached(base, trained):
    history, reloaded = trained
    base.origin = {"kind": "stand-in", "top1": 0.7555012}
    text = finetune.headline(
        settings(),
        history.assign(top1=[0.4, 0.45, 0.5]),
        reloaded,
        base,
        {"train": _split(base, 8, 1), "valid": _split(base, 4)},
    )
    first = text.split(" The 95 %")[0]
    assert first.endswith("after 3 epochs (the base reached 75.6 % on the same pictures).") and len(first) <= 160


def test_headline_without_top5_or_rounding(base, trained):
    history, reloaded = trained
    history = history.assign(top1=0.5).drop(columns="top5")
    text = finetune.headline(
        settings(method="full"), history, reloaded, base, {"train": _split(base, 1, 1), "valid": _split(base, 4)}
    )
    assert text.startswith("- Training all weights reaches ") and "LoRA" not in text
    assert not [word for word in ("Top-5", "FP16 changed", "1 pictures") if word in text]


def test_a_leak_is_said_with_its_weight(base, trained):
    """Two of the four validation pictures are in training, one of them twice."""
    valid = _split(base, 4)
    leaked = decode.Decoded(valid.pixels[[0, 1, 1]], _pictures(base)[:3], [])
    text = finetune.headline(settings(), *trained, base, {"train": leaked, "valid": valid})
    assert "share 2 pictures** (3 exact and 0 near copies)" in text and "too high by at most 50.0 points" in text


def test_what_is_trained_is_said_without_adapters_that_are_not_there(base):
    model = finetune.make_trainable(settings(method="full"), base)
    table = finetune.parameter_table(model)
    assert "adapters" not in table.index
    said = finetune.trained(settings(method="full"), table)
    assert "All weights are trained" in said and said.endswith("parameters are trained, all of the network.")
    said = finetune.trained(settings(), finetune.parameter_table(finetune.make_trainable(settings(), base)))
    assert "LoRA adds" in said and re.search(r"parameters are trained, [\d.]+ % of the network", said)


@pytest.fixture
def compared():
    """Recipes as on a GPU, where QLoRA saves 70 of 1,092 MB."""
    rows = {"recipe": ["lora-frozen-head", "lora", "qlora", "full"], "top1": [0.125, 0.5, 0.5, 0.25]}
    rows |= {"top1_low": 0.1, "top1_high": 0.6, "images_per_s": [900, 1000, 500, 800]}
    rows |= {"weights_mb": [80, 80, 10, 80], "activations_mb": 1000, "peak_mb": [1092, 1092, 1022, 1300]}
    return pd.DataFrame(rows)


def test_a_comparison_answers_for_the_frozen_head_speed_and_memory(compared, base, trained):
    text = finetune.answers(compared)
    original = (
        "LoRA with a frozen random head, reaches 12.5 % Top-1 (95 % interval 10.0 … 60.0 %); with the head trained 50"
    )
    assert original in text and "LoRA trains 1.2 times as many" in text and "More than 1.5 times is impossible" in text
    assert "The peak goes from 1,092 to 1,022 MB, as weights are only 7 % of LoRA's peak and activations 92 %. " in text
    assert "QLoRA trains 0.5 times as many images/s" in text
    without_gpu = finetune.answers(compared.assign(peak_mb=float("nan")))
    assert "QLoRA's weights take 10.0 MB, LoRA's 80.0 MB. QLoRA trains" in without_gpu
    assert finetune.answers(compared[2:3]) == "- No learning rate was tuned."
    assert "None was compared" in finetune.answers(compared[:0])
    splits = {"train": _split(base, 8, 1), "valid": _split(base, 4)}
    assert original in finetune.headline(settings(), *trained, base, splits, compared)
    assert "original" not in finetune.headline(settings(), *trained, base, splits, compared[:0])


def test_a_head_is_trained_on_class_tokens_and_classifies_pictures(base, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    chosen = settings(method="head", epochs=3, learning_rate=0.01, compile_training="always", resume=True)
    encoder = {name: value.clone() for name, value in base.model.vit.state_dict().items()}
    split = _split(base, 8)
    model = finetune.make_trainable(chosen, base)
    history = finetune.train(chosen, model, base, {"train": split, "valid": split})
    assert all(torch.equal(value, encoder[name]) for name, value in model.vit.state_dict().items())
    with torch.no_grad():
        logits = model.eval()(pixel_values=base.preprocess.normalise(split.pixels)).logits
    labels = base.labels.ids(split.pictures)
    assert history["valid_loss"].iloc[-1] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert (history["images_per_s"] * history["epoch_s"]).tolist() == pytest.approx([8] * 3)
    assert "without augmentation" in finetune.trained(chosen, finetune.parameter_table(model))

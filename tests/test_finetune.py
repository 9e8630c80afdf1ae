"""What is trained, and that what is saved is what was trained."""

import copy

import pandas as pd
import peft
import pytest
import torch

from vitlib import finetune
from vitlib.finetune import Base, FinetuneError
from vitlib.network import checkpoint, quantize
from vitlib.pictures import decode, preprocess
from vitlib.pictures.sources import DataError
from vitlib.study import files, params
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
        str(checkpoints / "merged"), revision="", labels=labels, dtype=torch.bfloat16, quantized=True, device=CPU
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"data_source": "data/photographs"}, "trained on drawn flowers only"),
        ({"base_model": "random", "method": "full"}, ""),
    ],
)
def test_a_base_that_does_not_fit_is_said(base, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    chosen = settings(**change)
    base.origin = {"base": chosen.settings.base_model, "kind": "generator"}
    text = finetune.introduce(chosen, base)
    assert said in text and ("\n\n**" in text) == bool(said)
    assert chosen.read_json("base") == base.origin


def test_saved_checkpoints_are_reproduced_and_another_network_is_refused(base, tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    merged = finetune.merge(settings(), _stir(finetune.make_trainable(settings(), base)), base)
    history = pd.DataFrame({"top1": [0.5]})
    paths = finetune.save_checkpoints(settings(), merged, base, history)
    valid = decode.Decoded(pixels, _pictures(base), [])
    table = finetune.check_reload(merged, base, paths, valid)
    assert table.loc["merged", "reload_difference"] == 0
    assert 0 < table.loc["int8", "from_merged"] < table.loc["nf4", "from_merged"] < 0.5
    assert checkpoint.read_labels(paths["nf4"]) == base.labels
    with torch.no_grad():
        found = merged(pixel_values=base.preprocess.normalise(pixels, torch.float16)).logits.argmax(1)
        assert table.loc["merged", "top1"] == (found == base.labels.ids(valid.pictures)).float().mean().item()
        merged.classifier.weight.mul_(1.5)
    with pytest.raises(FinetuneError, match="other logits"):
        finetune.check_reload(merged, base, paths, valid)


def _pictures(base):
    return [decode.Picture(str(k), base.labels.folders[k % len(base.labels.folders)], None) for k in range(8)]


def test_headline_names_the_best_epoch_the_merged_accuracy_and_copies(base):
    history = pd.DataFrame({"epoch": [1, 2, 3], "top1": [0.7, 0.79, 0.78], "top5": 0.9, "images_per_s": 500.0})
    history["valid_loss"] = [0.9, 0.5, 0.6]
    rows = {"model_mb": [4.0, 1.0, 2.0], "top1": [0.776, 0.77, 0.77], "reload_difference": 0.0, "same_class": 1.0}
    reloaded = pd.DataFrame(rows, index=["merged", "nf4", "int8"])
    empty = decode.Decoded(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), [], [])
    text = finetune.headline(history, reloaded, base, {"train": empty, "valid": empty})
    assert "best epoch was 2 with 79.00 %" in text and "lowest in epoch 2 and rose afterwards" in text
    assert "has Top-1 **77.60 %**, because its weights are rounded to FP16" in text
    assert "No picture appears in both" in text
    reloaded["top1"], history["valid_loss"] = 0.78, 0.5
    one = decode.Decoded(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8), _pictures(base)[:1], [])
    text = finetune.headline(history, reloaded, base, {"train": one, "valid": one})
    assert "has Top-1 **78.00 %**." in text and "overfits" not in text
    assert "**Training and validation share pictures** (1 exact and 0 near copies)" in text

"""Blocks exchanged in place give the outputs of a network quantized from the start, for half the work."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from PIL import Image
from torch import nn

from vitlib.ablation import blocks as ablation
from vitlib.ablation import exchange
from vitlib.ablation.exchange import Subject, prepare
from vitlib.network import checkpoint, quantize
from vitlib.pictures import sources
from vitlib.pictures.decode import Picture
from vitlib.study import files, params
from vitlib.study.study import Study
from vitlib.study.variants import Variant

CPU = torch.device("cpu")


def study(**changes) -> Study:
    return Study.of(params.check({"study": "unit", "device": "cpu", "eval_batch_size": 8, **changes}))


@pytest.fixture
def subject(checkpoints, pixels):
    loaded = checkpoint.load(checkpoints, Variant("fp16"), CPU)
    return Subject(loaded, pixels, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), pixels[:4])


@pytest.mark.parametrize("bits", [4, 8])
def test_every_configuration_equals_a_network_quantized_that_way(subject, bits):
    model = subject.loaded.model
    wanted = ablation.configurations(len(subject.blocks), ablation.FORMATS[bits])
    x = subject.loaded.preprocess.normalise(subject.pixels, torch.float16)
    with torch.inference_mode():
        found = ablation.exchange(subject, bits).logits(x, wanted)
        assert set(found) == {configuration.name for configuration in wanted}
        for configuration in wanted:
            naive = copy.deepcopy(model)
            for number, formats in enumerate(configuration.blocks):
                assert len(set(formats)) == 1
                if formats[0] != exchange.FULL:
                    naive.vit.layers[number] = quantized_copy(naive.vit.layers[number], bits)
            if configuration.classifier != exchange.FULL:
                naive.classifier = quantized_copy(naive.classifier, bits)
            torch.testing.assert_close(found[configuration.name], naive(pixel_values=x).logits)


def quantized_copy(module: nn.Module, bits: int) -> nn.Module:
    return quantize.exchanged(module, lambda _, linear: quantize.quantize_linear(linear, bits))


def needed_runs(blocks: int) -> int:
    """Distinct beginnings of the configurations, summed over the blocks at which they end: the least possible cost."""
    wanted = ablation.configurations(blocks, "nf4")
    return sum(len({one.blocks[: k + 1] for one in wanted}) for k in range(blocks))


@pytest.fixture
def deep(tmp_path, labels, pre, pixels, monkeypatch):
    """A network of 24 blocks, as ViT-L has: 52 configurations."""
    monkeypatch.setitem(checkpoint.ARCHITECTURES, "unit", (64, 24, 1, 64, 16))
    torch.manual_seed(0)
    network = checkpoint.new("unit", image_size=32, labels=labels).eval()
    with torch.no_grad():
        network.classifier.weight.mul_(20)
    checkpoint.save(network.half(), tmp_path / "checkpoints" / "merged", pre=pre, labels=labels, provenance={})
    loaded = checkpoint.load(tmp_path / "checkpoints", Variant("fp16"), CPU)
    return Subject(loaded, pixels, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), pixels[:4])


def test_bitsandbytes_gets_no_strided_input(subject, monkeypatch):
    """A ViT's classifier reads the class token, a view that its CUDA product takes for contiguous."""
    seen, original = [], bnb.nn.Linear8bitLt.forward
    monkeypatch.setattr(
        bnb.nn.Linear8bitLt, "forward", lambda self, x: seen.append(x.is_contiguous()) or original(self, x)
    )
    ablation.measure(study(ablation_bits=[8]), subject)
    assert len(seen) > 0 and all(seen)


@pytest.mark.parametrize("bits", [4, 8])
def test_52_configurations_share_blocks_and_leave_the_network_as_it_was(deep, bits):
    runs, before = [], [type(module) for module in deep.loaded.model.modules()]
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: runs.append(len(args[0])) if type(module) is type(deep.blocks[0]) else None
    )
    with hook:
        found, share = ablation.measure(study(eval_batch_size=4, ablation_bits=[bits]), deep)
    assert runs == [4] * 2 * needed_runs(24) and share == len(runs) / (2 * 52 * 24) <= 0.55
    assert len(found) == 52 and [type(module) for module in deep.loaded.model.modules()] == before


def test_the_checkpoint_is_loaded_once(checkpoints, labels, monkeypatch):
    loads, load = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *args: loads.append(args) or load(*args))
    monkeypatch.setattr(files, "study_folder", lambda name: checkpoints.parent)
    image = Image.new("RGB", (32, 32))
    pictures = [Picture(folder, folder, image.copy) for folder in labels.folders]
    subject = prepare(study(), sources.Dataset({"train": pictures, "valid": pictures}, {}))
    assert len(loads) == 1 and len(subject.pixels) == 3


def test_the_records_have_every_configuration_and_both_rankings(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    logits, _ = ablation.measure(study(), subject)
    frame = ablation.table(study(), logits, subject)
    assert len(frame) == 2 * 12 and list(study().read("ablation").columns) == list(frame.columns)
    assert frame.loc[frame["kept"] == ablation.ALL, "logit_kl"].abs().max() < 1e-12
    nothing = frame[frame["kept"] == ablation.NONE].set_index("bits")["logit_kl"]
    assert (nothing > 0).all()
    table = ablation.reliability(study(), logits, subject)
    assert table["bits"].tolist() == [4] * 3 + [8] * 3 and table["ranking"].nunique() == 3
    by_kl = table[table["ranking"].str.startswith("KL")]
    assert by_kl["correlation"].between(-1, 1).all() and (by_kl["low"] <= by_kl["high"]).all()

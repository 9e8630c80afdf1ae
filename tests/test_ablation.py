"""Blocks exchanged in place give what a network quantized from the start would give, for half the work."""

import copy

import pandas as pd
import pytest
import torch
from PIL import Image

from vitlib import ablation, checkpoint, files, params, quantize, sources
from vitlib.decode import Picture
from vitlib.study import Study
from vitlib.variants import Variant

CPU = torch.device("cpu")


def study(**changes) -> Study:
    return Study.of(params.check({"study": "unit", "device": "cpu", "eval_batch_size": 8, **changes}))


@pytest.fixture
def subject(checkpoints, pixels):
    loaded = checkpoint.load(checkpoints, Variant("fp16"), CPU)
    return ablation.Subject(loaded, pixels, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_configuration_equals_a_network_quantized_that_way(subject, bits):
    model = subject.loaded.model
    wanted = ablation.configurations(len(subject.blocks))
    x = subject.loaded.preprocess.normalise(subject.pixels, torch.float16)
    with torch.inference_mode():
        found = ablation.Exchange(model, bits).logits(x, wanted)
        assert set(found) == {configuration.kept for configuration in wanted}
        for configuration in wanted:
            naive = copy.deepcopy(model)
            for number, block in enumerate(naive.vit.layers):
                if number not in configuration.blocks:
                    naive.vit.layers[number] = quantize.quantized_copy(block, bits)
            if not configuration.classifier:
                naive.classifier = quantize.quantized_copy(naive.classifier, bits)
            torch.testing.assert_close(found[configuration.kept], naive(pixel_values=x).logits)


def test_the_network_is_left_as_it_was(subject):
    before = [type(m) for m in subject.loaded.model.modules()]
    ablation.measure(study(eval_batch_size=4), subject)
    assert [type(m) for m in subject.loaded.model.modules()] == before


def test_configurations_of_24_blocks_need_at_most_55_percent_of_the_block_evaluations():
    wanted = ablation.configurations(24)

    def count(number: int, group: list) -> int:
        if number == 24:
            return 0
        parts = [[c for c in group if (number in c.blocks) == kept] for kept in (True, False)]
        return sum(1 + count(number + 1, part) for part in parts if part)

    assert count(0, wanted) / (24 * len(wanted)) <= 0.55


def needed_runs(blocks: int) -> int:
    """Distinct beginnings of all configurations: what `configurations` must cost at least, counted by hand.

    Nothing kept: every block. Block k kept: those from k on. First and last: the last. Everything kept: all after the
    first, as "first and last" has that. All but block k: those from k on, for k = 0 and 1 without those that "block 1
    kept" and "block 0 kept" have.
    """
    rest = (blocks - 1) * (blocks - 2) // 2
    return blocks + blocks * (blocks + 1) // 2 + 1 + (blocks - 1) + 2 * (blocks - 2) + rest


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
    return ablation.Subject(loaded, pixels, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))


@pytest.mark.parametrize("bits", [4, 8])
def test_52_configurations_share_blocks_and_calls(deep, bits):
    wanted = ablation.configurations(24)
    assert len(wanted) == 52
    alone, one_by_one = ablation.evaluate(deep.loaded, deep.pixels, wanted, bits, batch_size=4, together=0)
    found, exchange = ablation.evaluate(deep.loaded, deep.pixels, wanted, bits, batch_size=4)
    assert exchange.block_runs == one_by_one.block_runs == 2 * needed_runs(24) <= 0.55 * 2 * 52 * 24
    assert one_by_one.block_calls == one_by_one.block_runs
    # Both ways through a block in a call each; an int8 one keeps its calls, of which there are less than half.
    assert exchange.block_calls == 2 * (24 + 24) if bits == 4 else exchange.block_calls < 0.6 * one_by_one.block_calls
    for kept, logits in found.items():
        torch.testing.assert_close(logits, alone[kept], rtol=0, atol=1e-6)


def test_together_bounds_the_pictures_of_a_call(subject):
    sizes, wanted = [], ablation.configurations(4)
    for block in subject.blocks:
        block.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    ablation.evaluate(subject.loaded, subject.pixels, wanted, 4, batch_size=4, together=11)
    assert set(sizes) == {4, 8}


@pytest.fixture
def loads(monkeypatch):
    """How often a checkpoint was loaded."""
    calls, load = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *args: calls.append(args) or load(*args))
    return calls


def test_measuring_loads_nothing(subject, loads):
    ablation.measure(study(), subject)
    assert loads == []


def test_preparing_loads_once(checkpoints, labels, loads, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "study_folder", lambda name: checkpoints.parent)
    image = Image.new("RGB", (32, 32))
    pictures = [Picture(folder, folder, image.copy) for folder in labels.folders]
    ablation.prepare(study(), sources.Dataset({"valid": pictures}, {}))
    assert len(loads) == 1


def test_measured_share_counts_what_was_run(subject):
    _, share = ablation.measure(study(ablation_bits=[4]), subject)
    assert share == needed_runs(4) / (12 * 4) == 25 / 48


def test_table_has_every_configuration_and_everything_kept_has_no_divergence(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    logits, _ = ablation.measure(study(), subject)
    frame = ablation.table(study(), logits, subject)
    assert len(frame) == 2 * 12
    everything = frame[frame["kept"] == ablation.ALL]
    assert everything["logit_kl"].abs().max() < 1e-12
    assert (frame.loc[frame["kept"] == ablation.NONE, "logit_kl"] > 0).all()
    written = study().read("ablation")
    assert list(written.columns) == list(frame.columns)


def test_reliability_has_both_rankings_and_the_smallest_difference(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    logits, _ = ablation.measure(study(), subject)
    frame = ablation.table(study(), logits, subject)
    table = ablation.reliability(study(), logits, frame, subject)
    assert table["bits"].tolist() == [4, 8]
    assert table["split_half_kl_only_quantized"].between(-1, 1).all()
    assert table["fewest_pictures"].tolist() == [9, 9]  # 11 tests; of 8 pictures not so many can change
    assert table["smallest_points"].isna().all()


RELIABLE = {
    **{"bits": 4, "pictures": 818, "split_half_kl_only_quantized": 0.94, "split_half_kl_only_kept": 0.46},
    **{"split_half_top1_only_kept": 0.12, "top1_splits": 200, "top1_splits_undefined": 31},
    **{"fewest_pictures": 11, "smallest_points": 1.34, "detectable_points": float("nan")},
}


@pytest.mark.parametrize(
    ("change", "removed", "words"),
    [
        ({}, 0.6, "removes most of it (60 %)"),
        ({}, 0.37, "removes the largest share (37 %)"),
        ({}, 0.6, "of one quantized block repeats on other pictures (rank correlation 0.94)"),
        ({}, 0.6, "of one kept block does not repeat on other pictures (rank correlation 0.46)"),
        ({}, 0.6, "accuracy the rank correlation is 0.12, over the 169 of 200 splits in which no half ties."),
        ({"top1_splits_undefined": 0}, 0.6, "accuracy the rank correlation is 0.12."),
        ({"top1_splits_undefined": 200}, 0.6, "cannot rank the blocks: in each of 200 splits all blocks tie"),
        ({}, 0.6, "11 pictures that all change in one direction, 1.34 points of 818 pictures."),
        ({"smallest_points": float("nan"), "pictures": 8}, 0.6, "that takes 11 pictures and there are 8"),
    ],
)
def test_headline_says_what_can_be_ranked_and_shown(change, removed, words):
    kl = {ablation.NONE: 1.0, "block 0": 1 - removed, "block 1": 0.9, "all but block 0": 0.5, "all but block 1": 0.1}
    columns = {"bits": 4, "top1": 0.8, "logit_kl_low": 1e-3, "logit_kl_high": 2e-2, "holm_p": 1.0}
    frame = pd.DataFrame([{"kept": name, "logit_kl": kl.get(name, 0.0), **columns} for name in (*kl, ablation.ALL)])
    reliable = pd.DataFrame([RELIABLE | change])
    text = ablation.headline(frame, ablation.sensitivity(frame), reliable)
    assert words in text and "nan" not in text
    assert set(ablation.RELIABILITY) <= set(reliable)


def test_one_block_alone_quantized_diverges_less_than_everything(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    logits, _ = ablation.measure(study(), subject)
    frame = ablation.table(study(), logits, subject)
    blocks = ablation.sensitivity(frame)
    nothing = frame[frame["kept"] == ablation.NONE].set_index("bits")["logit_kl"]
    assert (blocks["kl_alone"] > 0).all()
    assert blocks.loc[blocks["bits"] == 4, "kl_alone"].mean() < nothing[4]  # 8 bits: all of it is rounding

"""Blocks exchanged in place give the outputs of a network quantized from the start, for half the work."""

import copy

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from vitlib.ablation import blocks as ablation
from vitlib.ablation import exchange
from vitlib.ablation.subject import Subject, prepare
from vitlib.network import checkpoint, quantize
from vitlib.pictures import sources
from vitlib.pictures.decode import Picture
from vitlib.report import plots
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


@pytest.fixture
def sizes(subject):
    """The batch size of every call of an encoder block, quantized or not."""
    found, block = [], type(subject.blocks[0])
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: found.append(len(args[0])) if type(module) is block else None
    )
    yield found
    hook.remove()


@pytest.mark.parametrize("bits", [4, 8])
def test_52_configurations_share_blocks_and_calls(deep, bits, sizes, monkeypatch):
    settings = study(eval_batch_size=4, ablation_bits=[bits])
    found, share = ablation.measure(settings, deep)
    together = len(sizes)
    monkeypatch.setattr(exchange, "TOGETHER", 0)
    alone, share_alone = ablation.measure(settings, deep)
    one_by_one = len(sizes) - together
    assert one_by_one == 2 * needed_runs(24) and share == share_alone == one_by_one / (2 * 52 * 24) <= 0.55
    # One call for each block and one for its twin; an int8 twin runs each configuration in a call of its own.
    assert together == 2 * (24 + 24) if bits == 4 else together < 0.6 * one_by_one
    assert len(found) == 52
    for key, logits in found.items():
        torch.testing.assert_close(logits, alone[key], rtol=0, atol=1e-6)


def test_a_call_is_bounded_and_the_network_is_left_as_it_was(subject, sizes, monkeypatch):
    before = [type(m) for m in subject.loaded.model.modules()]
    monkeypatch.setattr(exchange, "TOGETHER", 11)
    _, share = ablation.measure(study(eval_batch_size=4, ablation_bits=[4]), subject)
    assert set(sizes) == {4, 8} and share == needed_runs(4) / (12 * 4) == 25 / 48
    assert [type(m) for m in subject.loaded.model.modules()] == before


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
    blocks = ablation.sensitivity(frame)
    assert blocks["block"].tolist() == [0, 1, 2, 3] * 2 and (blocks["kl_alone"] > 0).all()
    assert blocks.loc[blocks["bits"] == 4, "kl_alone"].mean() < nothing[4]  # at 8 bits all of it is rounding
    by_name = frame.set_index(["bits", "kept"])["logit_kl"]
    last = blocks.iloc[-1]
    assert last["kl_removed"] == pytest.approx(1 - by_name[8, "block 3"] / nothing[8])
    assert last["kl_alone"] == by_name[8, "all but block 3"]
    table = ablation.reliability(study(), logits, subject)
    assert table["bits"].tolist() == [4, 8] and set(ablation.RELIABILITY) <= set(table)
    assert table["split_half_kl_only_quantized"].between(-1, 1).all()
    assert table["fewest_pictures"].tolist() == [9, 9]  # 11 tests; there are only 8 pictures
    assert table["smallest_points"].isna().all()


RELIABLE = {
    **{"bits": 4, "pictures": 818, "split_half_kl_only_quantized": 0.94, "split_half_kl_only_kept": 0.46},
    **{"split_half_top1_only_kept": 0.12, "top1_splits": 200, "top1_splits_undefined": 31},
    **{"fewest_pictures": 11, "smallest_points": 1.34},
}


NAN = float("nan")
REPEATING = "one quantized block repeats on other pictures (rank correlation 0.94)"
CHANGING = "one kept block does not repeat on other pictures (rank correlation 0.46)"
TIES, POINTS = (
    "is 0.12, over the 169 of 200 splits in which no half ties.",
    "in one direction (1.34 points of 818 pictures).",
)
TOO_FEW = ["in each of 200 splits all blocks tie in a half", "that takes 11 pictures and there are 8"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, [REPEATING, CHANGING, TIES, POINTS]),
        ({"top1_splits_undefined": 0}, ["the rank correlation is 0.12."]),
        ({"top1_splits_undefined": 200, "smallest_points": NAN, "pictures": 8}, TOO_FEW),
    ],
)
def test_words_say_whether_the_ranking_repeats_and_what_could_be_shown(change, words):
    text = ablation.reliability_in_words(pd.DataFrame([RELIABLE | change]))
    assert [word for word in words if word not in text] == [] and "nan" not in text


def records_of(removed: list[float], bits: int = 4, classifier: float = 0.0, p: float = 1.0) -> pd.DataFrame:
    """An ablation in which keeping block k removes `removed[k]` of the error, and block k alone has an error of it."""
    kl = {ablation.NONE: 1.0, ablation.HEADS: 1 - classifier, ablation.ENDS: 0.9, ablation.ALL: 0.0}
    for block, share in enumerate(removed):
        kl |= {f"block {block}": 1 - share, f"all but block {block}": abs(share)}
    frame = pd.DataFrame({"bits": bits, "kept": list(kl), "logit_kl": list(kl.values()), "flips": 7, "holm_p": p})
    return frame.assign(logit_kl_low=0.9 * frame["logit_kl"], logit_kl_high=1.1 * frame["logit_kl"])


@pytest.mark.parametrize(
    ("removed", "changes", "first"),
    [
        (
            [0.6, 0.02],
            {},
            "Keeping block 0 in FP16 removes 60 % of the 4-bit error; the next block removes 2 %.",
        ),
        ([-0.1, 0.3], {}, "Keeping block 1 in FP16 removes 30 % of the 4-bit error; no other block helps."),
        ([0.3], {}, "Keeping block 0 in FP16 removes 30 % of the 4-bit error."),
        ([-0.1, -0.2], {}, "Keeping a single block in FP16 does not reduce the 4-bit error."),
        (
            [0.28, 0.03],
            {"classifier": 0.64},
            "the 4-bit error, keeping the classifier 64 %; the next block removes 3 %",
        ),
        (
            [0.52, 0.08],
            {"classifier": 0.2},
            "the 4-bit error, keeping the classifier 20 %; the next block removes 8 %",
        ),
        ([0.7, 0.15], {"classifier": 0.02}, "removes 70 % of the 4-bit error; the next block removes 15 %."),
    ],
)
def test_the_first_sentence_names_the_most_sensitive_block(removed, changes, first):
    frame = records_of(removed, **changes)
    text = ablation.headline(study(), frame, ablation.sensitivity(frame), pd.DataFrame([RELIABLE]))
    sentence = text.split("**")[1]
    assert first in sentence and len(sentence) <= 160 and len(text.splitlines()) == 4
    assert "the classifier too (page 2 keeps it in FP16), at 4 bits" in text and "7 of 818 pictures change" in text
    assert "that ranking repeats on other pictures (rank correlation 0.94 at 4 bits); the ranking by kept" in text
    assert "by kept blocks does not repeat (0.46 at 4 bits)." in text
    assert text.endswith("network: 0 of the {} configurations tested.".format(frame["holm_p"].count()))
    some = ablation.headline(study(ablation_pictures=818), frame, ablation.sensitivity(frame), pd.DataFrame([RELIABLE]))
    assert "7 of the 818 validation pictures used here change class" in some


def test_the_answer_covers_all_bits_and_counts_significant_differences():
    removed = {4: [0.6, 0.02], 8: [0.1, 0.2]}
    frame = pd.concat([records_of(shares, bits, p=0.01) for bits, shares in removed.items()], ignore_index=True)
    blocks, reliable = ablation.sensitivity(frame), pd.DataFrame([RELIABLE, RELIABLE | {"bits": 8}])
    text = ablation.headline(study(), frame, blocks, reliable)
    assert "quantized, the error is largest for block 0 at 4 bits and block 1 at 8 bits, and that ranking" in text
    assert "(0.46 at 4 bits and 0.46 at 8 bits).\n- Accuracy differs significantly from" in text
    assert text.endswith(f"in {len(frame)} of the {len(frame)} configurations tested.")
    frame = pd.concat([records_of([0.6, 0.02], bits) for bits in (4, 8)], ignore_index=True)
    reliable.loc[1, "split_half_kl_only_kept"] = 0.7
    same = ablation.headline(study(), frame, ablation.sensitivity(frame), reliable)
    assert "- Block 0 also has the largest error when it alone is quantized, and that ranking repeats" in same
    assert "kept blocks repeats (0.70 at 8 bits) and does not repeat (0.46 at 4 bits)." in same
    assert "Keeping block 1 in FP16 removes 20 % of the 8-bit error" in text


@pytest.mark.parametrize("count", [1, 2, 4, 12, 24])
def test_figures_name_the_most_sensitive_block_of_any_network(count):
    removed = [0.01 * (k % 3 - 1) for k in range(count)]
    removed[count // 2] = 0.4
    frame = records_of(removed)
    blocks = ablation.sensitivity(frame)
    kept, alone = plots.sensitivity_bars(blocks), plots.alone_bars(blocks)
    assert f"block {count // 2}: 40 %" in [text.get_text() for text in kept.figure.axes[0].texts]
    assert f"4 bits, block {count // 2}: 40 %" in repr(kept) and f"block {count // 2}: 4.0e-01" in repr(alone)
    assert "first and last block 90 %" in repr(plots.kept_parts(frame, ablation.PARTS))
    assert all("<svg" in plot._repr_svg_() and "nan" not in repr(plot) for plot in (kept, alone))

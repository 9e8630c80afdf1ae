"""Blocks exchanged in place give what a network quantized from the start would give, for half the work."""

import copy

import pytest
import torch

from vitlib import ablation, models, params, quantize, records
from vitlib.variants import Variant

CPU = torch.device("cpu")


@pytest.fixture
def subject(checkpoints, pixels):
    loaded = models.load(checkpoints, Variant("fp16"), CPU)
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
    settings = params.check({"eval_batch_size": 4})
    ablation.measure(subject, settings)
    assert [type(m) for m in subject.loaded.model.modules()] == before


def test_configurations_of_24_blocks_need_at_most_55_percent_of_the_block_evaluations():
    wanted = ablation.configurations(24)

    def count(number: int, group: list) -> int:
        if number == 24:
            return 0
        parts = [[c for c in group if (number in c.blocks) == kept] for kept in (True, False)]
        return sum(1 + count(number + 1, part) for part in parts if part)

    assert count(0, wanted) / (24 * len(wanted)) <= 0.55


def test_measured_share_counts_what_was_run(subject):
    _, share = ablation.measure(subject, params.check({"eval_batch_size": 8, "ablation_bits": [4]}))
    # 4 blocks, 12 configurations. Nothing kept: 4 runs. Block k kept: 4, 3, 2, 1 that nothing kept has not. First and
    # last: 1 more than block 0 kept. Everything kept: 3 more than that. All but block k: 2, 2, 2, 1 more than others.
    assert share == (4 + (4 + 3 + 2 + 1) + 1 + 3 + (2 + 2 + 2 + 1)) / (12 * 4)


def test_table_has_every_configuration_and_everything_kept_has_no_divergence(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    settings = params.check({"study": "unit", "eval_batch_size": 8})
    logits, _ = ablation.measure(subject, settings)
    frame = ablation.table(logits, subject, settings)
    assert len(frame) == 2 * 12
    everything = frame[frame["kept"] == ablation.ALL]
    assert everything["logit_kl"].abs().max() < 1e-12
    assert (frame.loc[frame["kept"] == ablation.NONE, "logit_kl"] > 0).all()
    written = records.read_table(tmp_path / "outputs" / "unit" / "records" / "ablation.csv")
    assert list(written.columns) == list(frame.columns)


def test_reliability_has_both_rankings_and_the_smallest_difference(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    settings = params.check({"study": "unit", "eval_batch_size": 8})
    logits, _ = ablation.measure(subject, settings)
    frame = ablation.table(logits, subject, settings)
    table = ablation.reliability(logits, frame, subject, settings)
    assert table["bits"].tolist() == [4, 8]
    assert table["split_half_kl_only_quantized"].between(-1, 1).all()


def test_one_block_alone_quantized_diverges_less_than_everything(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    settings = params.check({"study": "unit", "eval_batch_size": 8})
    logits, _ = ablation.measure(subject, settings)
    frame = ablation.table(logits, subject, settings)
    blocks = ablation.sensitivity(frame)
    nothing = frame[frame["kept"] == ablation.NONE].set_index("bits")["logit_kl"]
    assert (blocks["kl_alone"] > 0).all()
    assert blocks.loc[blocks["bits"] == 4, "kl_alone"].mean() < nothing[4]  # 8 bits: all of it is rounding

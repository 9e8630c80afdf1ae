"""Linears in low precision equal bitsandbytes' own layers; plans are what was measured, and keep to their size."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from vitlib import ablation
from vitlib.ablation import linears, plans
from vitlib.ablation.exchange import Subject
from vitlib.measure import search
from vitlib.network import checkpoint
from vitlib.pictures import sources
from vitlib.report import layout, plots, tables
from vitlib.study import params
from vitlib.study.study import Study
from vitlib.study.variants import Variant

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("plans")
    settings = params.check({"study": "unit", "device": "cpu", "eval_batch_size": 8, "plan_bits": 6.0})
    shutil.copytree(checkpoints, root / "checkpoints")  # a plan is saved among them
    return Study(settings, root)


@pytest.fixture(scope="module")
def mixer(study):
    torch.manual_seed(3)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    loaded = checkpoint.load(study.checkpoints, Variant("fp16"), CPU)
    return linears.load(study, Subject(loaded, pixels[:12], torch.arange(12) % 3, pixels[12:]))


@pytest.fixture(scope="module")
def measured(study, mixer):
    return linears.sensitivity(study, mixer)


@pytest.fixture(scope="module")
def prediction(study, mixer, measured):
    return plans.predict(study, mixer, measured[1])[0]


@pytest.fixture(scope="module")
def front(study, prediction):
    return plans.front(study, prediction)


@pytest.mark.parametrize("kind", linears.OPTIONS[1:])
def test_a_linear_gives_what_bitsandbytes_layer_gives(mixer, study, kind):
    stored = checkpoint.load(study.checkpoints, Variant(kind), CPU).model.vit.get_submodule(mixer.names[11])
    x = torch.randn(4, 7, stored.in_features).half()
    with torch.inference_mode():
        found, expected = mixer.exchange.linear(mixer.names[11], kind)(x.float()), stored(x).float()
    # int8 multiplies codes of activations too
    torch.testing.assert_close(found, expected, rtol=0, atol=(0.03 if kind == "int8" else 4e-3) * expected.abs().max())


def test_a_mixture_of_one_format_is_the_network_of_that_checkpoint(mixer, study):
    pixels = mixer.subject.pixels
    found = mixer.logits(pixels, {"nf4": mixer.uniform(linears.PLAIN), "fp16": mixer.uniform()}, "test")
    network = checkpoint.load(study.checkpoints, Variant("nf4"), CPU)
    with torch.inference_mode():
        expected = network.model(pixel_values=network.preprocess.normalise(pixels, torch.float16)).logits.float()
    np.testing.assert_allclose(found["nf4"], expected, atol=0.02 * expected.abs().max())
    assert np.abs(found["fp16"] - found["nf4"]).max() > 0.05 * expected.abs().max()


def test_the_fisher_diagonal_is_that_of_the_networks_own_predictions(mixer):
    """Its mean over draws is the expectation of squared gradients of log p(class), each class with its probability."""
    model, pre, name = mixer.exchange.model, mixer.subject.loaded.preprocess, mixer.names[-1]
    weight, total = model.vit.get_submodule(name).weight, 0
    for picture in mixer.subject.calibration:
        logits = model(pixel_values=pre.normalise(picture[None])).logits[0]
        p = logits.softmax(0).detach()
        for own, chance in zip(logits.log_softmax(0), p, strict=True):
            total = total + chance * torch.autograd.grad(own, weight, retain_graph=True)[0].square()
    exact = total / len(mixer.subject.calibration)
    draws = torch.stack([linears.fisher(mixer, seed)[name] for seed in range(40)])
    assert draws.mean(0).sum().item() == pytest.approx(exact.sum().item(), rel=0.1)
    assert torch.corrcoef(torch.stack([draws.mean(0).flatten(), exact.flatten()]))[0, 1] > 0.9


def test_sensitivity_has_every_linear_in_every_format(mixer, measured, study):
    frame, kl = measured
    assert len(frame) == 3 * 24 and kl.shape == (4, 24, 8) and not kl[0].any()
    assert (frame["kl"] >= frame["kl_low"]).all() and (frame["kl"] > 0).all()
    by_format = frame.groupby("format")[["kl", "weight_error"]].mean()
    assert by_format.loc["int8", "kl"] < 0.1 * by_format.loc["nf4", "kl"]
    assert 0.08 < by_format.loc["nf4", "weight_error"] < 0.11
    row = frame[(frame["format"] == "nf4") & (frame["block"] == 2) & (frame["linear"] == "fc1")].iloc[0]
    alone = mixer.kl({"one": mixer.only(linears.PLAIN, mixer.names.index("layers.2.mlp.fc1"))}, "test")["one"]
    assert row["kl"] == pytest.approx(alone.mean()) and row["parameters"] == 128 * 512
    ranks = linears.correlations(study, frame, kl)
    assert len(ranks) == 3 * 4 and (ranks["low"] <= ranks["correlation"]).all() and (ranks["high"] <= 1).all()


def test_sizes_count_scales(mixer):
    bits = mixer.bits[mixer.names.index("layers.0.attention.q_proj")]
    assert bits == pytest.approx([16, 8 + 32 / 128, 4 + 8 / 64 + 32 / (64 * 256), 4 + 8 / 64 + 32 / (64 * 256)])


def test_pairs_are_used_only_where_they_help(prediction, mixer):
    pairs = [(0, 1, linears.FOUR, linears.FOUR, 1.0)]
    both = mixer.only(linears.FOUR, 0, 1)
    for error, more in (((0.3,), 0), ((0.3, 0.4), 0), ((0.3, 0.2), 1)):
        made = plans.Prediction(mixer, prediction.cost, prediction.size, pairs, error)
        assert made.kl(both) == pytest.approx(search.total(prediction.cost, both) + more)
        assert (set(made.best(4.3)[:2]) != {linears.FOUR}) == bool(more)


def test_plans_keep_to_their_size_and_are_compared_with_those_kept_by_hand(front, prediction, study):
    rows = front.set_index("name")
    equal, eight = rows.loc[plans.AS_INT8], rows.loc["INT8 rows"]
    assert equal["bits"] <= eight["bits"] and equal["predicted_kl"] <= eight["predicted_kl"] * (1 + 1e-6)
    searched = rows[rows["kind"] == plans.SEARCHED].drop(plans.AS_INT8)
    limits = searched.index.str.extract(r"≤ ([\d.]+)", expand=False).astype(float)
    assert (searched["bits"] <= limits + 0.005).all() and searched["predicted_kl"].is_monotonic_decreasing
    kept = rows[rows["kind"] == plans.KEPT]
    assert set(kept.index) == {f"block {k} in FP16" for k in range(4)} | {"first and last block in FP16"}
    for _, row in kept.iterrows():
        rival = rows.loc[row["rival"]]
        assert rival["bits"] <= row["bits"] + 1e-9 and rival["predicted_kl"] <= row["predicted_kl"] + 1e-12
        assert row["more"] == pytest.approx(row["kl"] - rival["kl"])
    assert rows.loc["FP16", "kl"] == 0 and rows.loc["FP16", "flips"] == 0 and rows.loc["NF4", "format"] == "nf4"
    assert list(study.read("plans").columns) == list(front.columns)


def test_the_saved_plan_is_a_checkpoint_with_the_outputs_that_were_measured(study, prediction, mixer):
    chosen = plans.save(study, prediction)
    assert json.loads((study.checkpoint("mixed") / "plan.json").read_text()) == chosen and len(chosen) == 24
    loaded = checkpoint.load(study.checkpoints, Variant("mixed"), CPU)
    with torch.inference_mode():
        x = loaded.preprocess.normalise(mixer.subject.pixels, torch.float16)
        found = loaded.model(pixel_values=x).logits.float().numpy()
    expected = mixer.logits(mixer.subject.pixels, {"plan": prediction.best(6.0)}, "test")["plan"]
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_no_calibration_picture_is_a_validation_picture(checkpoints, labels, tmp_path):
    study = Study(params.check({"study": "unit", "device": "cpu", "pictures_per_class": 6}), tmp_path)
    dataset = sources.load(study.settings)
    files_of = {split: {picture.file for picture in dataset.splits[split]} for split in ("train", "valid")}
    used = {picture.file for picture in sources.evenly(dataset.splits["train"], study.settings.calibration_pictures)}
    assert used <= files_of["train"] and not used & files_of["valid"]


def test_the_answer_and_the_figures(study, measured, prediction, front):
    ranks = linears.correlations(study, *measured)
    text = ablation.headline(study, measured[0], ranks, prediction, front, pd.DataFrame())
    sentence = layout.plain(text.split("**")[1])
    assert sentence.startswith("NF4 costs a KL of ") and len(sentence) <= 160 and "nan" not in text
    assert f"Of {(front['kind'] == plans.KEPT).sum()} plans that keep blocks" in text and "By kind of layer" in text
    ratio = (front["kl"] / front["predicted_kl"]).where(front["kind"] == plans.SEARCHED).median()
    assert ("training pictures rank plans" in text) == (ratio > 2)  # not said where they do tell how large it will be
    larger = ablation.headline(
        study, measured[0], ranks, prediction, front.assign(predicted_kl=front["kl"] / 5), pd.DataFrame()
    )
    assert "is 5.00 times as large: training pictures rank plans" in larger
    additivity = study.read("additivity")
    names = {"fp16": "FP16", "int8": "INT8 rows", "nf4": "NF4 calibrated"}
    plan = dict(zip(prediction.linears.names, ["nf4", "int8", "fp16"] * 8, strict=True))
    figures = [plots.front(front), plots.predicted(additivity, front), plots.plan_grid(plan, names)]
    figures.append(plots.linear_grid(measured[0], {"nf4": "NF4", "nf4c": "NF4 calibrated"}))
    assert all("<svg" in figure._repr_svg_() and "nan" not in repr(figure) for figure in figures)
    assert "NF4 4.13 bits" in repr(figures[0]) and "INT8 rows (8)" in repr(figures[2])
    assert "≤ 6.00 bits" in repr(tables.table(front, plans.PLANS))

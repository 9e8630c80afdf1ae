"""The original's preprocessing mistake: the same one, in two halves, on a checkpoint of this project."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vitlib import files, mismatch, params, preprocess, sources


def test_the_mismatched_preprocessing_is_the_original_one():
    own = preprocess.new(224)
    wrong = mismatch.preprocessings(own)["the original's"]
    assert wrong.describe()["size"] == {"shortest_edge": 256}
    assert wrong.side == own.side == (224, 224)
    assert list(wrong.describe()["image_mean"]) == [0.485, 0.456, 0.406]


def test_each_half_of_the_mistake_changes_what_the_network_sees():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    seen = {
        name: pre.normalise(pre.resize(picture)[None])
        for name, pre in mismatch.preprocessings(preprocess.new(32)).items()
    }
    assert {tuple(values.shape) for values in seen.values()} == {(1, 3, 32, 32)}
    names = list(seen)
    assert not any(torch.equal(seen[a], seen[b]) for i, a in enumerate(names) for b in names[i + 1 :])
    crop, both = seen["only the crop"] * 0.5 + 0.5, seen["the original's"]
    mean, std = (torch.tensor(mismatch.IMAGENET[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    torch.testing.assert_close(both * std + mean, crop)  # the same pixels, normalised otherwise


def test_mismatched_evaluates_the_checkpoint_in_four_ways(checkpoints, labels, monkeypatch):
    monkeypatch.setattr(files, "study_folder", lambda study: checkpoints.parent)
    pixels = np.random.default_rng(1).integers(0, 256, (12, 40, 56, 3), dtype=np.uint8)
    pictures = [
        sources.Picture(f"valid/{k}", labels.folders[k % 3], lambda k=k: Image.fromarray(pixels[k])) for k in range(12)
    ]
    dataset = sources.Dataset({"valid": pictures}, dict(zip(labels.folders, labels.names, strict=True)))
    settings = params.Parameters(device="cpu", eval_batch_size=5)
    frame = mismatch.mismatched(settings, dataset)
    fp32 = frame[frame["weights"] == "fp32"].set_index("preprocessing")
    assert list(fp32.index) == ["its own", "the original's", "only the crop", "only the normalisation"]
    assert frame["weights"].tolist() == ["fp32"] * 4 + ["nf4"] * 2 + ["int8"] * 2
    assert (frame["n"] == 12).all() and (frame.loc[frame["preprocessing"] == "its own", "agreement"] == 1).all()
    assert (frame["top1_low"] <= frame["top1"]).all() and (frame["top1"] <= frame["top1_high"]).all()
    assert (fp32["from_fp32"] == 0).all()
    for row in frame[frame["weights"] != "fp32"].to_dict("records"):
        assert row["from_fp32"] == pytest.approx(row["top1"] - fp32.loc[row["preprocessing"], "top1"])
    assert len(mismatch.readable(frame).columns) == 11
    images, titles = mismatch.looks(settings, dataset, 2)
    assert len(images) == len(titles) == 8 and images[0].dtype == np.uint8


def row(name: str, weights: str, top1: float, difference: float, from_fp32: float = 0.0) -> dict:
    found = {"preprocessing": name, "weights": weights, "n": 818, "top1": top1, "agreement": 0.7}
    for column, value in (("difference", difference), ("from_fp32", from_fp32)):
        found |= {column: value, f"{column}_low": value - 0.01, f"{column}_high": value + 0.01}
    return found


def test_headline_says_how_much_of_the_originals_difference_is_reproduced():
    fp32 = [row(mismatch.OWN, "fp32", 0.7763, 0.0), row(mismatch.ORIGINAL, "fp32", 0.7115, -0.0648)]
    text = mismatch.headline(pd.DataFrame(fp32))
    assert "-31.06 points apart" in text and "-6.48 points, **21 % of that**" in text
    assert "**nf4** with the wrong preprocessing is not tested here (the slides: -6.24 points)" in text
    nf4 = [row(mismatch.OWN, "nf4", 0.77, 0.0, -0.005), row(mismatch.ORIGINAL, "nf4", 0.69, -0.08, -0.02)]
    text = mismatch.headline(pd.DataFrame(fp32 + nf4))
    assert "-0.50 points (-1.50 … +0.50) with its own preprocessing, -2.00 points (-3.00 … -1.00) with the" in text
    assert "none of that" in mismatch.headline(pd.DataFrame([fp32[0], row(mismatch.ORIGINAL, "fp32", 0.8, 0.02)]))


def test_a_study_without_quantized_checkpoints_is_still_told(checkpoints, tmp_path):
    (tmp_path / "merged").symlink_to(checkpoints / "merged")
    cpu = torch.device("cpu")
    assert mismatch._loaded(tmp_path, "nf4", cpu) is None
    assert mismatch._loaded(tmp_path, "fp32", cpu) is not None

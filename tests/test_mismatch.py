"""The original's preprocessing mistake: the same one, in two halves, on a checkpoint of this project."""

import numpy as np
import torch
from PIL import Image

from vitlib import data, mismatch, params, preprocess, records


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
    monkeypatch.setattr(records, "study_folder", lambda study: checkpoints.parent)
    pixels = np.random.default_rng(1).integers(0, 256, (12, 40, 56, 3), dtype=np.uint8)
    pictures = [
        data.Picture(f"valid/{k}", labels.folders[k % 3], lambda k=k: Image.fromarray(pixels[k])) for k in range(12)
    ]
    dataset = data.Dataset({"valid": pictures}, dict(zip(labels.folders, labels.names, strict=True)))
    settings = params.Parameters(device="cpu", eval_batch_size=5)
    frame = mismatch.mismatched(settings, dataset).set_index("preprocessing")
    assert list(frame.index) == ["its own", "the original's", "only the crop", "only the normalisation"]
    assert (frame["n"] == 12).all() and frame.loc["its own", "agreement"] == 1
    assert (frame["top1_low"] <= frame["top1"]).all() and (frame["top1"] <= frame["top1_high"]).all()
    assert mismatch.headline(frame.reset_index()).count("points") == 3
    images, titles = mismatch.looks(settings, dataset, 2)
    assert len(images) == len(titles) == 8 and images[0].dtype == np.uint8

"""The original's preprocessing mistake: the same one, in two halves, on a checkpoint of this project."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vitlib import claims
from vitlib.claims import mismatch
from vitlib.pictures import decode, preprocess, sources
from vitlib.study import params
from vitlib.study.study import Study


def test_each_half_of_the_mistake_changes_what_the_network_sees():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    pres = mismatch.preprocessings(preprocess.new(224))
    assert pres[mismatch.ORIGINAL].describe()["size"] == {"shortest_edge": 256}
    seen = {name: pre.normalise(pre.resize(picture)[None]) for name, pre in pres.items()}
    assert {tuple(values.shape) for values in seen.values()} == {(1, 3, 224, 224)}
    names = list(seen)
    assert not any(torch.equal(seen[a], seen[b]) for i, a in enumerate(names) for b in names[i + 1 :])
    crop, both = seen["only the crop"] * 0.5 + 0.5, seen[mismatch.ORIGINAL]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(both * std + mean, crop)  # the same pixels with another normalisation


def test_the_mistake_is_made_on_every_checkpoint_that_runs(checkpoints, labels, tmp_path):
    for name in ("merged", "nf4"):  # int8 is missing, and the study still gets its table
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).symlink_to(checkpoints / name)
    pixels = np.random.default_rng(1).integers(0, 256, (12, 40, 56, 3), dtype=np.uint8)
    pictures = [
        decode.Picture(f"valid/{k}", labels.folders[k % 3], lambda k=k: Image.fromarray(pixels[k])) for k in range(12)
    ]
    dataset = sources.Dataset({"valid": pictures}, dict(zip(labels.folders, labels.names, strict=True)))
    study = Study(params.Parameters(device="cpu", eval_batch_size=5), tmp_path)
    frame = claims.mistake(study, dataset)
    fp32 = frame[frame["weights"] == "fp32"].set_index("preprocessing")
    assert list(fp32.index) == ["its own", "the original's", "only the crop", "only the normalisation"]
    assert frame["weights"].tolist() == ["fp32"] * 4 + ["nf4"] * 2 and (frame["n"] == 12).all()
    assert (frame["top1_low"] <= frame["top1"]).all() and (frame["top1"] <= frame["top1_high"]).all()
    assert (fp32["from_fp32"] == 0).all() and fp32.loc["its own", "agreement"] == 1
    for row in frame[frame["weights"] != "fp32"].to_dict("records"):
        assert row["from_fp32"] == pytest.approx(row["top1"] - fp32.loc[row["preprocessing"], "top1"])
    pd.testing.assert_frame_equal(study.read("preprocessing"), frame, check_dtype=False)
    images, titles = claims.looks(study, dataset, 2)
    assert len(images) == len(titles) == 8 and images[0].dtype == np.uint8


def row(name: str, difference: float) -> dict:
    found = {"preprocessing": name, "weights": "fp32", "difference": difference}
    return found | {"difference_low": difference - 0.01, "difference_high": difference + 0.01}


def test_words_say_what_the_originals_mistake_costs():
    own, wrong = row("its own", 0.0), row("the original's", -0.0648)
    text = mismatch.baselines(pd.DataFrame([own, wrong]))
    assert "Top-1 of 90.6 % and 59.5 % for the same FP32 network: **31 points apart**" in text
    assert text.endswith("; the same mistake costs this network **6.5 points** (5.5 … 7.5).")
    text = mismatch.baselines(pd.DataFrame([own, row("the original's", 0.02)]))
    assert "+2.0 points (+1.0 … +3.0): **no significant loss**." in text

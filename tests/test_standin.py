"""The stand-in: randomness is what the papers say, one compilation serves a stage, both stages are kept."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import standin
import torch
from PIL import Image
from standin import StandIn, StandInError
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForImageClassification

from vitlib.network import checkpoint
from vitlib.pictures import decode, preprocess
from vitlib.pictures.decode import Picture
from vitlib.pictures.sources import Dataset, Labels
from vitlib.study import files, records
from vitlib.training import trainer

CPU = torch.device("cpu")
COLOURS = {"1": (200, 40, 40), "2": (40, 200, 40), "10": (40, 40, 200)}
TINY = {
    **{"architecture": "vit-micro", "decode_side": 24, "stage1_side": 16, "stage2_side": 32},
    **{"stage1_steps": 12, "stage2_steps": 6, "stage1_batch_size": 16, "stage2_batch_size": 8},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_jitter_keeps_the_range_and_changes_only_the_brightness_of_grey():
    batch = torch.randint(0, 256, (16, 3, 24, 32), generator=generator(1)).float()
    views = standin.jittered(batch, 0.3, generator(1))
    assert 0 <= views.min() <= views.max() <= 255 and not torch.equal(views, batch)
    found = standin.jittered(torch.full_like(batch, 100), 0.3, generator(1)).mean(dim=(1, 2, 3))
    assert 70 <= found.min() < 85 and 115 < found.max() <= 130


def picture(colour, index):
    noise = np.random.default_rng(index).normal(0, 25, (20, 20, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def coloured(train=8, valid=4):
    """Three classes that differ by colour: a network that trains at all tells them apart."""
    splits = {
        split: [
            Picture(f"{split}/{key}/{index}", key, lambda key=key, index=index: picture(key, index))
            for key in COLOURS
            for index in range(start, start + count)
        ]
        for split, start, count in (("train", 0, train), ("valid", 100, valid))
    }
    return Dataset(splits, {"1": "red", "2": "green", "10": "blue"})


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    labels = Labels(("1", "2", "10"), ("red", "green", "blue"))
    model = checkpoint.new("vit-micro", image_size=32, labels=labels).eval()
    with torch.no_grad():  # biases and positions start near zero: a forward that forgot one would look right
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    return folder, standin.train(StandIn(**TINY), coloured(), folder, CPU)


def test_stochastic_depth_skips_branches_and_keeps_the_mean(network):
    model = copy.deepcopy(network)
    standin.drop_paths(model, 0.2)
    rates = torch.stack([layer.dropout.rate for layer in model.vit.layers])
    torch.testing.assert_close(rates, torch.tensor([0, 0.2 / 3, 0.4 / 3, 0.2]))  # rises linearly
    path, ones = standin.DropPath(0.25, CPU).train(), torch.ones(20_000, 2, 3)
    torch.manual_seed(0)
    out = path(ones)
    assert (out == out[:, :1, :1]).all()  # a picture's branch as a whole
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    assert path.eval()(ones) is ones
    assert set(model.state_dict()) == set(network.state_dict())  # nothing of it is in a checkpoint


def test_one_compilation_serves_every_block_of_a_stage(network):
    """Blocks differ by their rate of stochastic depth."""
    model, counter = copy.deepcopy(network), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    standin.drop_paths(model, 0.2)
    frames = []
    with trainer.compiled_blocks(model.train(), counter):
        for count in (2, 3):  # pictures a step differ between the stages
            for _ in range(2):
                model(pixel_values=torch.randn(count, 3, 32, 32)).logits.sum().backward()
            frames.append(counter.frame_count)
    torch._dynamo.reset()
    assert frames == [1, 2]


def test_a_network_at_another_side_shares_weights_and_interpolates_positions_only(network):
    labels = Labels(("1", "2", "10"), ("red", "green", "blue"))
    larger = standin.at_side(network, StandIn(**TINY), 64, labels).eval()
    assert larger.config.image_size == 64
    assert larger.classifier.weight.data_ptr() == network.classifier.weight.data_ptr()
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in larger.parameters())
    x = torch.randn(1, 3, 64, 64)
    own = network(pixel_values=x, interpolate_pos_encoding=True).logits  # of the small network
    torch.testing.assert_close(own, larger(pixel_values=x).logits, rtol=1e-4, atol=1e-5)
    same = standin.at_side(network, StandIn(**TINY), 32, labels)
    assert torch.equal(same.state_dict()[standin.POSITIONS], network.state_dict()[standin.POSITIONS])


def test_the_share_is_that_of_the_pixels_kept():
    """Pictures of ones and zeros: the mean of a mixture is the share of its own picture."""
    images = torch.cat((torch.ones(2, 3, 40, 40), torch.zeros(2, 3, 40, 40)))
    rng, blended, pasted = np.random.default_rng(0), 0, 0
    for _ in range(40):
        mixed, share = standin.mix(images, 0.8, rng)
        assert 0 <= share <= 1
        assert mixed[0].mean().item() == pytest.approx(share, abs=1e-5)
        assert mixed[3].mean().item() == pytest.approx(1 - share, abs=1e-5)
        values = len(mixed[0].unique())
        blended, pasted = blended + (values == 1 and 0 < share < 1), pasted + (values == 2)
    assert blended >= 10
    assert pasted >= 10


@pytest.mark.parametrize("size", [4, 10, 25])
def test_batches_are_full_and_take_each_picture_once_a_pass(size):
    rows = standin.batches(10, size, generator())
    drawn = torch.cat([next(rows) for _ in range(20)])
    assert len(drawn) == 20 * size
    for start in range(0, len(drawn) - 9, 10):
        assert drawn[start : start + 10].sort().values.tolist() == list(range(10))


def test_the_rate_warms_up_then_falls_as_a_cosine():
    stage = StandIn().stages()[0]
    rates = [standin.learning_rate(stage, step, step / 2500) for step in range(2500)]
    assert rates[0] == pytest.approx(6e-4 / 300, rel=1e-3)
    assert 250 <= int(np.argmax(rates)) <= 300
    assert rates[1250] == pytest.approx(3e-4, rel=1e-3)
    assert rates[-1] < 1e-8
    slow = standin.learning_rate(
        stage, 10, standin.WARMUP_SHARE
    )  # a card too slow for the warm-up reaches the peak too
    assert slow > 0.9 * stage.learning_rate


def test_only_matrices_decay(network):
    decayed, others = standin.optimizer(network).param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) == 1 + 4 * 6 + 1  # patches, six of a block, head
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "vit-lage"}, "vit-large"),
        ({"stage1_side": 20}, "multiple of the patch"),
        ({"stage2_seconds": 0.0, "stage2_steps": 0}, "stage2: batch size and seconds"),
        ({"stage1_batch_size": 0}, "positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(StandInError, match=said):
        StandIn(**{**TINY, **change})


def test_the_defaults_are_the_recipe_that_was_measured():
    first, second = StandIn().stages()
    assert first == standin.Stage(1, 112, 512, 6e-4, 300, True, 288.0, 0)
    assert second == standin.Stage(2, 224, 192, 1.5e-4, 50, False, 112.0, 0)


def test_the_stand_in_learns_and_both_stages_are_in_the_history(trained):
    folder, history = trained
    assert history["stage"].tolist() == [1, 2] and history["step"].tolist() == [12, 6]
    assert history["epoch"].tolist() == [12 * 16 / 24, 6 * 8 / 24]
    assert history["side"].tolist() == [16, 32]
    assert history[["top1", "top5"]].notna().all(axis=None)
    assert (history["images_per_s"] > 0).all()
    assert records.read_table(folder / "history.csv")["step"].tolist() == [12, 6]
    assert history["top1"].iloc[-1] >= 0.9


@pytest.mark.parametrize("stage", [1, 2])
def test_each_checkpoint_is_enough_by_itself_and_as_good_as_it_says(trained, stage):
    folder = trained[0] / f"stage{stage}"
    model = AutoModelForImageClassification.from_pretrained(folder, dtype="auto").eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.image_size == 32
    assert checkpoint.read_labels(folder) == Labels(("1", "2", "10"), ("red", "green", "blue"))
    pre = preprocess.load(folder)
    assert pre.side == (32, 32)
    note = json.loads((folder / "provenance.json").read_text())
    assert note["origin"] == standin.ORIGIN and note["pretrained"] is False
    measured = [(entry["after stage"], entry["side"]) for entry in note["accuracy"]]
    assert measured == [(1, 16), (1, 32), (2, 32)][: stage + 1]
    part = decode.decode(coloured().splits["valid"], pre)
    with torch.no_grad():
        found = model(pixel_values=pre.normalise(part.pixels)).logits.argmax(dim=1)
    right = (found == checkpoint.read_labels(folder).ids(part.pictures)).double().mean().item()
    assert right == pytest.approx(note["top1"])


def test_the_same_seed_gives_the_same_weights(trained, tmp_path):
    standin.train(StandIn(**TINY), coloured(), tmp_path, CPU)
    first, again = (files.checksum(folder / "stage2" / "model.safetensors") for folder in (trained[0], tmp_path))
    assert first == again


def test_a_stage_ends_with_its_time_whatever_the_speed(tmp_path, monkeypatch):
    """The clock advances by 10 ms whenever it is read."""
    clock = itertools.count()
    monkeypatch.setattr(standin.time, "perf_counter", lambda: next(clock) / 100)
    timed = {"stage1_steps": 0, "stage1_seconds": 0.4, "stage2_steps": 1, "log_seconds": 0.1}
    history = standin.train(StandIn(**{**TINY, **timed}), coloured(), tmp_path, CPU)
    rows = history[history["stage"] == 1]
    assert len(rows) == 4 and rows["seconds"].iloc[-1] == pytest.approx(0.41, abs=0.02)
    assert rows["learning_rate"].iloc[-1] < 0.1 * rows["learning_rate"].max()
    assert rows["top1"].notna().tolist() == [False] * (len(rows) - 1) + [True]


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, monkeypatch):
    loss = standin._loss
    monkeypatch.setattr(standin, "_loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(StandInError, match="loss of stage 1 is nan at step 1"):
        standin.train(StandIn(**{**TINY, "stage1_steps": 1}), coloured(), tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_trains_and_ends_with_a_table(tmp_path, capsys):
    for picture_ in (part for split in coloured(4, 2).splits.values() for part in split):
        file = tmp_path / "data" / f"{picture_.file}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture_.open().save(file)
    (tmp_path / "data" / "train" / "1" / "broken.jpg").write_bytes(b"no picture")
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "stage1_steps": 1, "stage2_steps": 1}.items()
    ]
    standin.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--device", "cpu", *flags])
    printed = capsys.readouterr().out
    assert "skipped in train: train/1/broken.jpg" in printed
    assert printed.splitlines()[-1].split()[0] == "2"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"stage1", "stage2", "history.csv"}


def test_bad_data_is_one_line_and_another_exit_code(tmp_path):
    with pytest.raises(SystemExit) as ended:
        standin.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert "there is no data folder" in ended.value.code  # text: Python prints it to standard error and exits with 1
    assert "\n" not in ended.value.code
    assert not (tmp_path / "out").exists()

"""The stand-in: the functional forward is the network's, randomness is what the papers say, both stages are kept."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForImageClassification

from vitlib import checkpoint, data, files, preprocess, records, standin
from vitlib.data import Dataset, Labels, Picture
from vitlib.standin import StandIn, StandInError

CPU = torch.device("cpu")
COLOURS = {"1": (200, 40, 40), "2": (40, 200, 40), "10": (40, 40, 200)}
TINY = {
    **{"architecture": "vit-micro", "decode_side": 24, "stage1_side": 16, "stage2_side": 32},
    **{"stage1_steps": 12, "stage2_steps": 6, "stage1_batch_size": 16, "stage2_batch_size": 8, "jitter": 0.1},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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


# --- the network


def test_the_functional_forward_gives_the_logits_of_transformers(network):
    x = torch.randn(3, 3, 32, 32, generator=generator())
    with torch.no_grad():
        expected, found = network(pixel_values=x).logits, standin.forward(network, x)
        ones = standin.forward(network, x, keep=torch.ones(4, 2, 3))
        sixteen = standin.forward(network, x, dtype=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ones, found, rtol=0, atol=0)
    assert sixteen.dtype == torch.float32
    assert ((sixteen - expected).norm() / expected.norm()).item() < 0.05


def test_the_functional_forward_gives_the_gradients_of_transformers(network):
    x, y = torch.randn(4, 3, 32, 32, generator=generator()), torch.tensor([0, 1, 2, 0])
    grads = []
    for logits in (network(pixel_values=x).logits, standin.forward(network, x)):
        grads.append(torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), list(network.parameters())))
    for (name, _), expected, found in zip(network.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=name)


def test_one_compilation_serves_every_block_of_a_stage(network):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(standin.block, dynamic=False, fullgraph=True, backend=counter)
    expected = []
    for side in (2, 3):  # pictures a step differ between the stages
        x, keep = torch.randn(side, 3, 32, 32), standin.draw_keep(4, side, 0.2, generator())
        for _ in range(2):
            found = standin.forward(network, x, keep=keep, run_block=compiled)
            found.sum().backward()
        torch.testing.assert_close(found, standin.forward(network, x, keep=keep))
        expected.append(counter.frame_count)
    network.zero_grad(set_to_none=True)
    assert expected == [1, 2]


def test_a_picture_that_skips_every_branch_is_its_embedding_only(network):
    x, keep = torch.randn(2, 3, 32, 32), torch.ones(4, 2, 2)
    keep[:, :, 1] = 0
    with torch.no_grad():
        found, whole = standin.forward(network, x, keep=keep), standin.forward(network, x)
        h = standin.embed(network, x, torch.float32)[1, 0]
        torch.testing.assert_close(found[1], network.classifier(network.vit.layernorm(h)))
    torch.testing.assert_close(found[0], whole[0])


def test_positions_keep_their_place_when_interpolated():
    table = torch.randn(1, 1 + 49, 8, generator=generator())
    assert torch.equal(standin.interpolate_positions(table, 7), table)
    larger = standin.interpolate_positions(table, 14)
    assert larger.shape == (1, 1 + 196, 8)
    assert torch.equal(larger[:, 0], table[:, 0])
    ramp = torch.arange(7.0).view(1, 1, 7, 1).expand(1, 7, 7, 1).reshape(1, 49, 1)  # rises to the right, not downwards
    square = standin.interpolate_positions(torch.cat((torch.zeros(1, 1, 1), ramp), 1), 14)[0, 1:, 0].view(14, 14)
    assert (square.diff(dim=1)[:, 2:-2] > 0).all()
    torch.testing.assert_close(square[0], square[-1])


def test_a_network_at_another_side_shares_weights_and_trains(network):
    labels = Labels(("1", "2", "10"), ("red", "green", "blue"))
    larger = standin.at_side(network, StandIn(**TINY), 64, labels)
    assert larger.config.image_size == 64
    assert larger.classifier.weight.data_ptr() == network.classifier.weight.data_ptr()
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in larger.parameters())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(standin.forward(larger, x), larger(pixel_values=x).logits, rtol=1e-4, atol=1e-5)
    own = network(pixel_values=x, interpolate_pos_encoding=True).logits  # transformers' own interpolation
    torch.testing.assert_close(own, larger(pixel_values=x).logits, rtol=1e-4, atol=1e-5)


# --- randomness


def test_views_have_the_stage_size_and_range_and_follow_the_generator():
    pixels = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8, generator=generator())
    settled = {"crop_area": 0.25, "rotation": 20.0, "jitter": 0.3}
    views = standin.augment(pixels, 16, generator=generator(1), **settled)
    assert views.shape == (5, 3, 16, 16)
    assert views.dtype == torch.float32
    assert 0 <= views.min() <= views.max() <= 1
    assert torch.equal(views, standin.augment(pixels, 16, generator=generator(1), **settled))
    assert not torch.equal(views, standin.augment(pixels, 16, generator=generator(2), **settled))


def test_with_nothing_to_vary_a_view_is_the_picture_or_its_mirror():
    pixels = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8, generator=generator())
    views = standin.augment(pixels, 24, crop_area=1.0, rotation=0.0, jitter=0.0, generator=generator(1)) * 255
    same = [torch.allclose(view, own.float(), atol=0.1) for view, own in zip(views, pixels, strict=True)]
    mirrored = [torch.allclose(view, own.float().flip(2), atol=0.1) for view, own in zip(views, pixels, strict=True)]
    assert all(one != other for one, other in zip(same, mirrored, strict=True))
    assert 0 < sum(same) < 16


def test_rotation_turns_without_stretching():
    """The middle of a picture that brightens to the right: its slope keeps its length under rotation."""
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(8, 3, 64, 64)
    views = standin.augment(ramp, 64, crop_area=1.0, rotation=20.0, jitter=0.0, generator=generator()) * 255
    middle = views[:, 0, 24:40, 24:40]
    across, down = middle.diff(dim=2).mean(dim=(1, 2)), middle.diff(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close((across**2 + down**2).sqrt(), torch.full((8,), 4.0), rtol=0.02, atol=0)
    angles = (down / across).atan().rad2deg().abs()
    assert angles.max() < 20.5
    assert angles.max() > 5


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


def test_skipping_rises_linearly_and_keeps_the_mean():
    keep = standin.draw_keep(5, 20_000, 0.2, generator())
    skipped = (keep == 0).float().mean(dim=(1, 2))
    torch.testing.assert_close(skipped, torch.tensor([0, 0.05, 0.1, 0.15, 0.2]), rtol=0, atol=0.01)
    torch.testing.assert_close(keep.mean(dim=(1, 2)), torch.ones(5), rtol=0, atol=0.01)
    assert (standin.draw_keep(3, 4, 0.0, generator()) == 1).all()


@pytest.mark.parametrize("size", [4, 10, 25])
def test_batches_are_full_and_take_each_picture_once_a_pass(size):
    rows = standin.batches(10, size, generator())
    drawn = torch.cat([next(rows) for _ in range(20)])
    assert len(drawn) == 20 * size
    for start in range(0, len(drawn) - 9, 10):
        assert drawn[start : start + 10].sort().values.tolist() == list(range(10))


# --- schedule and settings


def test_the_rate_warms_up_then_falls_as_a_cosine():
    stage = StandIn().stages()[0]
    rates = [standin.learning_rate(stage, step, step / 2500) for step in range(2500)]
    assert rates[0] == pytest.approx(6e-4 / 300, rel=1e-3)
    assert 250 <= int(np.argmax(rates)) <= 300
    assert rates[1250] == pytest.approx(3e-4, rel=1e-3)
    assert rates[-1] < 1e-8


def test_a_card_too_slow_for_the_warm_up_still_reaches_the_peak():
    stage = StandIn().stages()[0]
    assert standin.learning_rate(stage, 10, standin.WARMUP_SHARE) > 0.9 * stage.learning_rate


def test_only_matrices_decay(network):
    decayed, others = standin.optimizer(network, StandIn(**TINY)).param_groups
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
        ({"stage2_seconds": 0.0, "stage2_steps": 0}, "stage2_seconds"),
        ({"stage1_batch_size": 0}, "positive"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(StandInError, match=said):
        StandIn(**{**TINY, **change})


def test_the_defaults_are_the_recipe_that_was_measured():
    first, second = StandIn().stages()
    assert (first.side, first.seconds, first.batch_size, first.learning_rate, first.mixing) == (
        112,
        288,
        512,
        6e-4,
        True,
    )
    assert (second.side, second.seconds, second.batch_size) == (224, 112, 192)
    assert (second.learning_rate, second.mixing) == (1.5e-4, False)


# --- both stages


def test_both_stages_are_in_the_history(trained):
    folder, history = trained
    assert history.groupby("stage")["step"].max().to_dict() == {1: 12, 2: 6}
    assert history["epoch"].tolist() == [12 * 16 / 24, 6 * 8 / 24]
    assert history["side"].tolist() == [16, 32]
    assert history[["top1", "top5"]].notna().all(axis=None)
    assert (history["images_per_s"] > 0).all()
    assert records.read_table(folder / "history.csv")["step"].tolist() == [12, 6]
    assert standin.summary(history)["step"].to_dict() == {1: 12, 2: 6}


def test_the_stand_in_learns(trained):
    assert trained[1]["top1"].iloc[-1] >= 0.9


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
    assert "random initialisation" in note["origin"]
    assert "stand-in" in note["origin"]
    assert note["pretrained"] is False
    assert [(entry["after stage"], entry["side"]) for entry in note["accuracy"]] == [(1, 16), (1, 32), (2, 32)][
        : stage + 1
    ]
    part = data.decode(coloured().splits["valid"], pre)
    with torch.no_grad():
        found = model(pixel_values=pre.normalise(part.pixels)).logits.argmax(dim=1)
    right = (found == checkpoint.read_labels(folder).ids(part.pictures)).double().mean().item()
    assert right == pytest.approx(note["top1"])


def test_stage_one_is_a_base_for_fine_tuning(trained):
    labels = Labels(("a", "b"), ("a", "b"))
    base = checkpoint.load_base(
        str(trained[0] / "stage1"), revision="", labels=labels, dtype=torch.float32, quantized=False, device=CPU
    )
    assert base(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    short = StandIn(**{**TINY, "stage1_steps": 2, "stage2_steps": 2})
    for name in ("a", "b"):
        standin.train(short, coloured(), tmp_path / name, CPU)
    sums = {files.checksum(tmp_path / name / "stage2" / "model.safetensors") for name in ("a", "b")}
    assert len(sums) == 1


def test_a_stage_ends_with_its_time_whatever_the_speed(tmp_path):
    timed = {"stage1_steps": 0, "stage1_seconds": 0.4, "stage2_steps": 1, "log_seconds": 0.1}
    history = standin.train(StandIn(**{**TINY, **timed}), coloured(), tmp_path, CPU)
    rows = history[history["stage"] == 1]
    assert len(rows) >= 3
    assert 0.4 <= rows["seconds"].iloc[-1] < 1.5
    assert rows["learning_rate"].iloc[-1] < 0.1 * rows["learning_rate"].max()
    assert rows["top1"].notna().tolist() == [False] * (len(rows) - 1) + [True]


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, monkeypatch):
    forward = standin.forward
    monkeypatch.setattr(standin, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * math.nan)
    with pytest.raises(StandInError, match="loss of stage 1 is nan at step 12"):
        standin.train(StandIn(**TINY), coloured(), tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []


# --- command line


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

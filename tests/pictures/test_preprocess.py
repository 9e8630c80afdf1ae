"""One preprocessing for training, evaluation and plain transformers; crops that can be repeated."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vitlib.network import checkpoint
from vitlib.pictures import preprocess
from vitlib.pictures.preprocess import Preprocess, PreprocessError

SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "ViTImageProcessorPil": {"size": SQUARE},
    "BeitImageProcessorPil": {"size": SQUARE, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.6, 0.7]},
    "DeiTImageProcessorPil": {"size": {"height": 40, "width": 40}, "crop_size": SQUARE},
    "CLIPImageProcessorPil": {"size": {"shortest_edge": 40}, "crop_size": SQUARE},
}


def load(name: str, folder, **settings) -> Preprocess:
    """A processor of transformers, saved and loaded as a checkpoint's is."""
    getattr(transformers, name)(**{**PROCESSORS.get(name, {}), **settings}).save_pretrained(folder)
    return preprocess.load(folder)


def photograph(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The processor's own output


@pytest.mark.parametrize("size", [(90, 60), (45, 120), (32, 32), (9, 9)], ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_resize_then_normalise_is_what_the_processor_does(tmp_path, name, size):
    pre, image = load(name, tmp_path), photograph(*size)
    expected = pre.processor(images=image, return_tensors="pt")["pixel_values"]
    pixels = pre.resize(image)
    assert (pixels.dtype, tuple(pixels.shape), pre.side) == (torch.uint8, (3, 32, 32), (32, 32))
    torch.testing.assert_close(pre.normalise(pixels[None]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"do_rescale": False}, {"do_normalize": False}, {"size": {"height": 32, "width": 48}}], ids=str
)
def test_what_the_checkpoint_says_is_done(tmp_path, changes):
    pre, image = load("ViTImageProcessorPil", tmp_path, **changes), photograph(60, 90)
    expected = pre.processor(images=image, return_tensors="pt")["pixel_values"].float()
    assert pre.side == tuple(expected.shape[2:])
    torch.testing.assert_close(pre.normalise(pre.resize(image)[None]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalise_computes_in_fp32_and_rounds_last(dtype):
    pre, pixels = preprocess.new(16), torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert pre.normalise(pixels, dtype).equal(pre.normalise(pixels).to(dtype))


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(200, 150), (31, 500), (12, 9)])
def test_the_resize_of_the_device_is_that_of_pillow_but_for_rounding(resample, size):
    pre = preprocess.new(32)
    pre.processor.resample = resample
    small = np.random.default_rng(0).integers(0, 256, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    difference = (pre.resize_on_device([pixels])[0].int() - pre.resize(image).int()).abs()
    assert difference.max() <= resample - 1 and difference.float().mean() < 0.25  # 1 bilinear, 2 bicubic


def test_constants_of_the_normalisation_are_made_once_and_training_may_use_them():
    pre = preprocess.new(8)
    with torch.inference_mode():
        pre.normalise(torch.zeros(1, 3, 8, 8))
    kept = pre._mean_and_std(torch.device("cpu"))
    values = torch.ones(1, 3, 8, 8, requires_grad=True)
    pre.normalise(values).sum().backward()
    assert pre._mean_and_std(torch.device("cpu"))[0] is kept[0] and values.grad is not None


# Which preprocessing


def test_a_checkpoint_without_preprocessing_is_refused_with_advice(checkpoints, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoints / "merged/config.json").read_bytes())
    with pytest.raises(PreprocessError, match=r"no preprocessor_config\.json.*Save one with the checkpoint"):
        preprocess.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"image_processor_type": "NoSuchProcessor"}'])
def test_a_preprocessing_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(PreprocessError, match="cannot be read"):
        preprocess.load(tmp_path)


def test_a_repository_that_cannot_be_reached_is_not_called_a_folder(monkeypatch):
    def offline(*_, **__):
        raise OSError("Can't load image processor. Make sure you don't have a local directory with the same name.")

    monkeypatch.setattr(preprocess.AutoImageProcessor, "from_pretrained", offline)
    with pytest.raises(
        PreprocessError, match=r"^a/b cannot be read from the Hub at commit 8041a8c: there is no con.*g$"
    ):
        preprocess.load("a/b", "8041a8c")


def test_a_preprocessing_without_a_fixed_size_is_refused(tmp_path):
    pre = load("ConvNextImageProcessorPil", tmp_path, size={"shortest_edge": 32})
    with pytest.raises(PreprocessError, match="no fixed height and width"):
        _ = pre.side


@pytest.mark.parametrize("name", PROCESSORS)
def test_saved_and_loaded_again_it_says_the_same_and_no_other_does(tmp_path, name):
    pre = load(name, tmp_path / "first")
    pre.save(tmp_path / "second")
    assert preprocess.load(tmp_path / "second").describe() == pre.describe()
    assert {"size", "resample", "image_mean", "image_std"} <= set(pre.describe())
    assert load(name, tmp_path / "other", image_mean=[0.485, 0.456, 0.406]).describe() != pre.describe()


def test_what_trained_a_network_evaluates_it(checkpoints, pre):
    """The fault of the original study: 0.5 in training, the ImageNet mean and another crop in evaluation."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator())
    trained = pre
    for name in ("fp32", "nf4", "int8"):
        evaluated = checkpoint.load(checkpoints, checkpoint.Variant(name), torch.device("cpu")).preprocess
        assert evaluated.describe() == trained.describe()
        assert evaluated.normalise(pixels).equal(trained.normalise(pixels))


# Augmentation


@pytest.fixture
def batch() -> torch.Tensor:
    """Sixteen pictures (16, 3, 24, 32) of which no two rows or columns are alike."""
    return torch.randint(0, 256, (16, 3, 24, 32), dtype=torch.uint8, generator=generator(1))


def test_the_same_seed_cuts_the_same_crops_of_the_batchs_own_size_in_fp32(batch):
    before = batch.clone()
    first, again, other = (preprocess.augment(batch, crop_area=0.5, generator=generator(seed)) for seed in (3, 3, 4))
    assert first.equal(again) and not first.equal(other)
    assert (first.shape, first.dtype) == (batch.shape, torch.float32) and batch.equal(before)


def test_a_crop_of_everything_is_the_picture_or_its_mirror_image(batch):
    out = preprocess.augment(batch, crop_area=1, generator=generator())
    plain = (out - batch).abs().amax(dim=(1, 2, 3)) < 0.05  # grey levels
    mirrored = (out - batch.flip(3)).abs().amax(dim=(1, 2, 3)) < 0.05
    assert (plain ^ mirrored).all()
    assert plain.any()
    assert mirrored.any()


@pytest.mark.parametrize("crop_area", [0.25, 0.6, 0.9, 1.0])
def test_no_crop_keeps_less_than_asked_or_is_more_stretched_than_4_to_3(crop_area):
    """Ramps along x and y: their range in a crop is the share of width and height that it keeps."""
    ramp = torch.linspace(-1, 1, 129)
    batch = torch.stack([ramp.expand(129, 129), ramp[:, None].expand(129, 129)]).expand(500, 2, 129, 129)
    out = preprocess.augment(batch, crop_area=crop_area, generator=generator())
    width, height = (out.amax(dim=(2, 3)) - out.amin(dim=(2, 3))).div(2).unbind(1)
    assert (width * height).min() > crop_area - 0.02
    assert (width * height).min() < crop_area + 0.05  # and small ones do occur
    assert (width / height).log().abs().max() < np.log(4 / 3) + 0.01


def test_crops_lie_everywhere_and_half_are_flipped():
    ramp = torch.linspace(-1, 1, 65)
    batch = ramp.expand(400, 1, 65, 65)
    out = preprocess.augment(batch, crop_area=0.25, generator=generator())
    centres = out.mean(dim=(1, 2, 3))
    assert centres.min() < -0.3
    assert centres.max() > 0.3
    flipped = (out[:, 0, 0, 0] > out[:, 0, 0, -1]).float().mean().item()
    assert flipped == pytest.approx(0.5, abs=0.1)


def test_rotation_turns_without_stretching():
    """The middle of a picture that brightens to the right: its slope keeps its length under rotation."""
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(8, 3, 64, 64)
    views = preprocess.augment(ramp, side=64, crop_area=1.0, rotation=20.0, generator=generator())
    middle = views[:, 0, 24:40, 24:40]
    across, down = middle.diff(dim=2).mean(dim=(1, 2)), middle.diff(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close((across**2 + down**2).sqrt(), torch.full((8,), 4.0), rtol=0.02, atol=0)
    angles = (down / across).atan().rad2deg().abs()
    assert 5 < angles.max() < 20.5


def test_views_have_the_side_asked_for(batch):
    views = preprocess.augment(batch, side=16, crop_area=0.25, rotation=20.0, generator=generator(1))
    assert views.shape == (16, 3, 16, 16) and 0 <= views.min() <= views.max() <= 255

"""From a decoded picture to the tensor that a checkpoint expects.

The settings are those of the checkpoint's own image processor, shared by training and evaluation. A picture is resized
once, on the CPU; batches are cropped, flipped and normalised on their device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, ViTImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor

# What torch calls Pillow's filters; its other modes have no counterpart.
TENSOR_MODES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
SETTINGS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
SETTINGS += ("do_normalize", "image_mean", "image_std")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # of its training pictures


class PreprocessError(ValueError):
    """A checkpoint whose preprocessing is missing or not usable; the message says what to do."""


@dataclass(frozen=True)
class Preprocess:
    """One checkpoint's preprocessing, in two parts: resize a picture, normalise a batch."""

    processor: BaseImageProcessor
    _constants: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False)

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json`, readable by plain transformers."""
        self.processor.save_pretrained(folder)

    def describe(self) -> dict[str, object]:
        """The settings that decide what the network sees, for provenance and comparison."""
        settings = self.processor.to_dict()
        return {key: settings[key] for key in SETTINGS if settings.get(key) is not None}

    def in_words(self) -> str:
        """What happens to every picture before the network sees it, as a sentence."""
        about, side = self.describe(), " × ".join(map(str, self.side))
        steps = [f"resized{' and cropped' * self._crops} to {side} pixels"]
        if about.get("do_rescale"):
            steps.append(f"its values are divided by {1 / about['rescale_factor']:g}")
        if about.get("do_normalize"):
            mean, std = (", ".join(f"{value:.3g}" for value in about[f"image_{name}"]) for name in ("mean", "std"))
            steps.append(f"normalised with means {mean} and standard deviations {std} of red, green and blue")
        return f"Every picture is {'; '.join(steps)}."

    @cached_property
    def side(self) -> tuple[int, int]:
        """Height and width in pixels of what the network sees."""
        size = self.processor.crop_size if self._crops else self.processor.size
        if not size.get("height"):
            raise PreprocessError(f"the preprocessing has no fixed height and width, it has {dict(size)}")
        return size["height"], size["width"]

    @property
    def _crops(self) -> bool:
        return bool(getattr(self.processor, "do_center_crop", False))

    def resize(self, image: Image.Image) -> Tensor:
        """uint8 tensor (3, height, width) of an RGB picture, resized as the checkpoint's processor does it."""
        if self.processor.do_resize and not self._crops:  # the same PIL call without the processor's overhead
            resized = image.resize(self.side[::-1], resample=Image.Resampling(int(self.processor.resample)))
            return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)
        out = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return out["pixel_values"][0].to(torch.uint8)

    @property
    def resizes_on_device(self) -> bool:
        """Whether `resize_on_device` can replace `resize`: the preprocessing is one bilinear or bicubic resize."""
        return self.processor.do_resize and not self._crops and int(self.processor.resample) in TENSOR_MODES

    def resize_on_device(self, pictures: Sequence[Tensor]) -> Tensor:
        """uint8 (n, 3, height, width) of n uint8 pictures (3, h, w), each of any size, on their device.

        The filter of `resize` in float32, rounded once and not between its two passes: some values differ by 1 of 255,
        bicubic ones by at most 2.
        """
        mode = TENSOR_MODES[int(self.processor.resample)]
        values = (picture.to(torch.float32).unsqueeze(0) for picture in pictures)
        resized = [functional.interpolate(one, size=self.side, mode=mode, antialias=True) for one in values]
        return torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both (3, 1, 1), made once a device: copying them to a GPU waits for everything that is queued there."""
        if device not in self._constants:
            with torch.inference_mode(False):  # a first call from an evaluation must not spoil them for training
                pair = (self.processor.image_mean, self.processor.image_std)
                self._constants[device] = tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in pair)
        return self._constants[device]

    def normalise(self, batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`pixel_values` (n, 3, h, w) of `dtype` from a batch with values 0…255 on any device."""
        values = batch.to(torch.float32)
        if self.processor.do_rescale:
            values = values * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = self._mean_and_std(batch.device)
            values = (values - mean) / std
        return values.to(dtype)


def load(folder: str | Path, revision: str | None = None) -> Preprocess:
    """The preprocessing of a checkpoint folder or Hub id. PreprocessError where it has none."""
    if Path(folder).is_dir() and not (Path(folder) / "preprocessor_config.json").is_file():
        lacks = f"the checkpoint {Path(folder).name!r} has no preprocessor_config.json"
        advice = "Save one with the checkpoint (AutoImageProcessor(...).save_pretrained(folder))."
        raise PreprocessError(f"{lacks}: nobody knows how its pictures were prepared. {advice}")
    try:
        return Preprocess(AutoImageProcessor.from_pretrained(folder, revision=revision, backend="pil"))
    except (OSError, ValueError) as error:
        if not Path(folder).is_dir():
            why = "there is no connection, or no such commit, or it has no preprocessing"
            raise PreprocessError(f"{folder} cannot be read from the Hub at commit {revision}: {why}") from error
        raise PreprocessError(f"the preprocessing of {folder} cannot be read: {error}") from error


def new(side: int) -> Preprocess:
    """The ViT default (bilinear resize to side × side, mean and std 0.5) for a network that is trained from scratch."""
    return Preprocess(ViTImageProcessorPil(size={"height": side, "width": side}))


def augment(batch: Tensor, *, crop_area: float, generator: Generator, side: int = 0, rotation: float = 0) -> Tensor:
    """Random views (n, 3, side, side) of a batch (n, 3, h, w) with values 0…255; float32 on the same device.

    Crops of `crop_area`…1 of the area with an aspect of ¾…4/3 (Szegedy et al. 2015, section 6), mirrored half the time
    and turned by up to `rotation` degrees, in one resampling, reflected at the border. A `side` of 0 is the batch's.
    A generator of the CPU cuts the same crops on every device.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(batch), device=generator.device).uniform_(low, high, generator=generator)

    shortest = uniform(crop_area, 1).sqrt()
    aspect = (uniform(-1, 1) * (np.log(4 / 3) / 2)).exp()
    aspect = aspect.clamp(min=shortest, max=1 / shortest)  # a crop wider or higher than the picture would lose area
    wide, high = shortest * aspect, shortest / aspect
    shift_x, shift_y = uniform(-1, 1) * (1 - wide), uniform(-1, 1) * (1 - high)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle = uniform(-1, 1) * np.radians(rotation) if rotation else torch.zeros_like(wide)
    across = torch.stack((angle.cos() * wide * mirror, -angle.sin() * high, shift_x), dim=1)
    down = torch.stack((angle.sin() * wide * mirror, angle.cos() * high, shift_y), dim=1)
    theta = torch.stack((across, down), dim=1)
    if batch.is_cuda and not theta.is_cuda:  # from pinned memory the copy is queued; else the host waits at each step
        theta = theta.pin_memory().to(batch.device, non_blocking=True)
    size = (side, side) if side else batch.shape[2:]
    grid = functional.affine_grid(theta, [*batch.shape[:2], *size], align_corners=False)
    return functional.grid_sample(batch.to(torch.float32), grid, padding_mode="reflection", align_corners=False)

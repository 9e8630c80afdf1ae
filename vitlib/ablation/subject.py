"""What notebook 3 works on: the network of the merged checkpoint, and its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vitlib.network import checkpoint
from vitlib.pictures import sources
from vitlib.pictures.sources import Dataset
from vitlib.study.study import Study
from vitlib.study.variants import Variant


@dataclass
class Subject:
    """The FP16 network, its validation pictures (n, 3, h, w) in uint8 with their class ids (n,), and training pictures.

    Formats are chosen on the training pictures `calibration` (m, 3, h, w) and judged on the others.
    """

    loaded: checkpoint.Loaded
    pixels: torch.Tensor
    labels: torch.Tensor
    calibration: torch.Tensor

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder blocks."""
        return self.loaded.model.vit.layers


def prepare(study: Study, dataset: Dataset | None = None) -> Subject:
    """The merged checkpoint in FP16, for bitsandbytes' int8 product, and the pictures (default: the study's)."""
    checkpoint.quiet_libraries()
    settings, dataset = study.settings, dataset or sources.load(study.settings)
    loaded = checkpoint.load(study.checkpoints, Variant("fp16"), checkpoint.pick_device(settings.device))
    loaded.labels.check(dataset, "valid")
    for split, count in (("train", settings.calibration_pictures), ("valid", settings.ablation_pictures)):
        dataset.splits[split] = sources.evenly(dataset.splits[split], count)
    decoded = sources.decode_splits(dataset, ["train", "valid"], loaded.preprocess, settings.workers)
    valid, calibration = decoded["valid"], decoded["train"].pixels
    return Subject(loaded, valid.pixels, loaded.labels.ids(valid.pictures), calibration)

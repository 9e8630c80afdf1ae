"""The demo's base: a small ViT trained on the flowers of the generator that the study does not use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import set_seed

from vitlib import checkpoint, files, preprocess, sources, synthetic, trainer
from vitlib.decode import Decoded
from vitlib.sources import Labels
from vitlib.study import Study
from vitlib.trainer import Examples, Recipe

PICTURES = 100  # of a class
RECIPE = Recipe(
    epochs=10,
    batch_size=64,
    learning_rate=2e-3,
    weight_decay=0.05,
    warmup=0.1,
    label_smoothing=0.0,
    crop_area=0.7,
    precision="auto",
    seed=0,
)


def base(study: Study, device: torch.device) -> Path:
    """The checkpoint of the base among those of the study; it is trained where a setting of it has changed."""
    settings = study.settings
    keys = ("architecture", "image_size", "pretrain_epochs", "seed", "precision")
    settled = {key: getattr(settings, key) for key in keys} | {"recipe": vars(RECIPE)}
    settled["generator"] = files.checksum(Path(synthetic.__file__))  # other pictures make another base
    folder = study.checkpoint("base-" + hashlib.sha256(json.dumps(settled).encode()).hexdigest()[:8])
    if (folder / "config.json").is_file():
        return folder
    pictures = settings.model_copy(update={"pictures_per_class": PICTURES})
    drawn = sources.from_synthetic(synthetic.PRETRAIN_CLASSES, pictures)
    pre, labels = preprocess.new(settings.image_size), sources.new_labels(drawn)
    set_seed(settings.seed)
    model = checkpoint.new(settings.architecture, image_size=settings.image_size, labels=labels)
    decoded = sources.decode_splits(drawn, ("train", "valid"), pre, settings.workers)
    shared = {"epochs": settings.pretrain_epochs, "seed": settings.seed, "precision": settings.precision}
    history = trainer.train(
        model,
        examples(decoded, labels),
        pre=pre,
        recipe=replace(RECIPE, **shared),
        folder=study.training("base"),
        device=device,
    )
    top1 = float(history["top1"].iloc[-1])
    about = {"trained on": "the generator's pretraining classes", "top1": top1, **settled}
    return checkpoint.save(model.cpu(), folder, pre=pre, labels=labels, provenance=about)


def examples(decoded: Mapping[str, Decoded], labels: Labels) -> dict[str, Examples]:
    """Pixels with the checkpoint's class ids of the two splits that training uses."""
    used = {split: decoded[split] for split in ("train", "valid")}
    return {split: Examples(part.pixels, labels.ids(part.pictures)) for split, part in used.items()}

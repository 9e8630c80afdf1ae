"""The base of the demo, which needs no download: a small ViT trained on drawn flowers."""

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from transformers import set_seed

from vitlib.network import checkpoint
from vitlib.network.checkpoint import CheckpointError
from vitlib.pictures import preprocess, sources, synthetic
from vitlib.study import files
from vitlib.study.study import Study
from vitlib.training import trainer
from vitlib.training.trainer import Examples, Recipe

PICTURES = 100  # of a class
VALID = 300  # in all: only the accuracy after the last epoch is kept
RECIPE = Recipe(
    epochs=10, train_batch_size=64, learning_rate=2e-3, weight_decay=0.05, warmup=0.1, label_smoothing=0.0,
    crop_area=0.7, precision="auto", seed=0,
)  # fmt: skip


def base(study: Study, device: torch.device) -> Path:
    """The demo's base, trained where a setting has changed: a small ViT that knows the generator's other flowers."""
    settings = study.settings
    keys = ("architecture", "image_size", "pretrain_epochs", "seed", "precision")
    settled = {key: getattr(settings, key) for key in keys} | {"recipe": vars(RECIPE)}
    drawn_by = (Path(synthetic.__file__), synthetic.CLASSES)  # other pictures make another base
    settled["generator"] = [files.checksum(file) for file in drawn_by]
    folder = study.checkpoint("base-" + hashlib.sha256(json.dumps(settled).encode()).hexdigest()[:8])
    if (folder / "config.json").is_file():
        with suppress(CheckpointError):  # a damaged one is made again
            checkpoint.whole(folder)
            return folder
    many = settings.model_copy(update={"pictures_per_class": PICTURES})
    drawn = sources.from_synthetic(synthetic.classes("before it"), many)
    drawn.splits["valid"] = sources.evenly(drawn.splits["valid"], VALID)
    pre, labels = preprocess.new(settings.image_size), sources.new_labels(drawn)
    set_seed(settings.seed)
    model = checkpoint.new(settings.architecture, image_size=settings.image_size, labels=labels)
    decoded = sources.decode_splits(drawn, ("train", "valid"), pre, settings.workers)
    examples = {split: Examples.of(part, labels) for split, part in decoded.items()}
    own = {"epochs": settings.pretrain_epochs, "seed": settings.seed, "precision": settings.precision}
    run = {"pre": pre, "recipe": replace(RECIPE, **own), "folder": study.training("base"), "device": device}
    run["resume"] = settings.resume
    top1 = float(trainer.train(model, examples, **run)["top1"].iloc[-1])
    about = {"trained on": "the generator's pretraining classes", "top1": top1, **settled}
    return checkpoint.save(model.cpu(), folder, pre=pre, labels=labels, provenance=about)

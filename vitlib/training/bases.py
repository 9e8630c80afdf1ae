"""From a parameter set to a network in training: its base, what of it is trained, and the run."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed
from transformers.modeling_outputs import BaseModelOutput

from vitlib.network import checkpoint, quantize
from vitlib.pictures import preprocess, sources
from vitlib.pictures.decode import Decoded
from vitlib.pictures.preprocess import Preprocess
from vitlib.pictures.sources import Dataset, Labels
from vitlib.study import files, origin
from vitlib.study.params import Parameters, is_hub_id, missing
from vitlib.study.study import Study
from vitlib.training import adapters, demo, trainer
from vitlib.training.trainer import Examples, Recipe


class FinetuneError(RuntimeError):
    """Training would not do what was asked; the message says what is wrong."""


@dataclass
class Base:
    """A network to fine-tune, its preprocessing, the labels of its new head, and its origin."""

    model: nn.Module
    preprocess: Preprocess
    labels: Labels
    device: torch.device
    origin: dict[str, object]


def load_base(study: Study, dataset: Dataset) -> Base:
    """The base that `base_model` names, with a new head for the classes of the data. FinetuneError where it is none."""
    checkpoint.quiet_libraries()
    settings, name, revision = study.settings, study.settings.base_model, study.settings.base_revision
    device, labels = checkpoint.pick_device(settings.device), sources.new_labels(dataset)
    labels.check(dataset, "valid")  # before the training and not only in the evaluation after it
    if name == "random":
        set_seed(settings.seed)
        model = checkpoint.new(settings.architecture, image_size=settings.image_size, labels=labels).to(device)
        pre = preprocess.new(settings.image_size)
    else:
        if reason := missing("base_model", name):
            raise FinetuneError(reason)
        folder = demo.base(study, device) if name == "pretrain" else files.resolve(name)
        source, quantized = name if is_hub_id(name) else str(folder), settings.method == "qlora"
        pre = preprocess.load(source, revision or None)
        set_seed(settings.seed)  # the new head's initialisation
        how = {"dtype": torch.float32, "quantized": quantized, "device": device}  # NF4 layers compute in bf16
        model = checkpoint.load_base(source, revision=revision, side=pre.side[0], labels=labels, **how)
    about = origin.describe(name, revision=revision, architecture=settings.architecture)
    return Base(model, pre, labels, device, about)


def make_trainable(study: Study, base: Base, *, frozen_head: bool = False) -> nn.Module:
    """The model with the parameters of `method` trainable, including the head unless it is to stay at random.

    Training in bf16 rounds the frozen weights once, here; what is trained stays in fp32, as do all weights where
    adapters without dropout are added into them (`adapters.SummedLinear`). AdapterError where a linear gets no adapter.
    """
    settings, model = study.settings, base.model
    if settings.method in ("lora", "qlora"):
        rank, alpha, dropout = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
        summed = settings.method == "lora" and not dropout
        head = "" if frozen_head else quantize.CLASSIFIER
        model = adapters.attach(model, rank=rank, alpha=alpha, dropout=dropout, head=head, summed=summed)
    else:
        model.requires_grad_(settings.method == "full")
        model.classifier.requires_grad_(True)
    if settings.method != "full" and trainer.precision_of(settings.precision, base.device) == "bf16":
        adapters.round_frozen(model, torch.bfloat16)
    return model


def fit(
    settings: Parameters, model: nn.Module, base: Base, decoded: dict[str, Decoded], **options: object
) -> pd.DataFrame:
    """Train `model` on the decoded splits as `settings` say; a row an epoch. `options` are those of `trainer.train`.

    A head alone is trained on class tokens that are computed once: without augmentation, and too fast to be resumed.
    """
    names = ("method", "lora_rank", "lora_alpha", "lora_dropout", "base_model", "base_revision", "architecture")
    options |= {"about": {name: getattr(settings, name) for name in names}, "device": base.device}
    examples = {split: Examples.of(decoded[split], base.labels) for split in ("train", "valid")}
    options |= {"pre": base.preprocess, "recipe": Recipe.of(settings)}
    return (_fit_head if settings.method == "head" else trainer.train)(model, examples, **options)


def _fit_head(model: nn.Module, examples: dict[str, Examples], **options: Any) -> pd.DataFrame:
    """`trainer.train` for the head, on class tokens. The epochs share the encoder's time and have its peak memory."""
    on_gpu, recipe, pre = options["device"].type == "cuda", options["recipe"], options["pre"]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tokens = {split: _class_tokens(model.eval(), part, pre, recipe.precision) for split, part in examples.items()}
    share = (time.perf_counter() - start) / recipe.epochs
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")
    options |= {"pre": None, "recipe": replace(recipe, compile_training="never"), "keep": False, "resume": False}
    encoder, model.vit = model.vit, _Tokens()
    try:
        history = trainer.train(model, tokens, **options)
    finally:
        model.vit = encoder
    seconds = history["epoch_s"] + share
    speed = history["images_per_s"] * history["epoch_s"] / seconds
    return history.assign(epoch_s=seconds, images_per_s=speed, peak_vram_mb=history["peak_vram_mb"].clip(lower=peak))


class _Tokens(nn.Module):
    """In place of an encoder whose class tokens (n, hidden) are the inputs."""

    gradient_checkpointing = False  # transformers asks for it

    def forward(self, tokens: torch.Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=tokens[:, None])


@torch.no_grad()
def _class_tokens(model: nn.Module, examples: Examples, pre: Preprocess, precision: str) -> Examples:
    """The encoder's class tokens (n, hidden) in fp32 on the CPU, computed in the arithmetic of training."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.precision_of(precision, model.device))
    with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
        parts = tqdm(examples.pixels.split(64), "encoding", unit="batch")
        encoded = [model.vit(pre.normalise(part.to(model.device))).last_hidden_state[:, 0] for part in parts]
    return Examples(torch.cat(encoded).float().cpu(), examples.labels)

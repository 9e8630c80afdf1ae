"""Notebook 1: fine-tune a base network, with LoRA or without, and save it as three self-sufficient checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import set_seed

from vitlib.measure import stats
from vitlib.network import checkpoint, engine, quantize, tuning
from vitlib.pictures import decode, preprocess, sources
from vitlib.pictures.decode import Decoded
from vitlib.pictures.preprocess import Preprocess
from vitlib.pictures.sources import Dataset, Labels
from vitlib.report.tables import Column, Markdown
from vitlib.study import files, origin, provenance
from vitlib.study.params import is_hub_id, missing, used_by
from vitlib.study.study import Study
from vitlib.study.variants import Variant
from vitlib.training import adapters, standin, trainer
from vitlib.training.trainer import Examples, Recipe

HISTORY = {
    "epoch": "epoch",
    "train_loss": Column("training loss (augmented)", ".3f"),
    "valid_loss": Column("validation loss", ".3f"),
    "top1": Column("Top-1 (%)", ".2f", 100),
    "top5": Column("Top-5 (%)", ".2f", 100),
    "epoch_s": Column("seconds", ".1f"),
    "images_per_s": Column("images/s", ",.0f"),
    "peak_vram_mb": Column("peak GPU memory (MB)", ",.0f"),
}
RELOADED = {
    "checkpoint": "checkpoint",
    "disk_mb": Column("on disk (MB)", ",.2f"),
    "model_mb": Column("in memory (MB)", ",.2f"),
    "reload_difference": Column("difference after loading", ".1e"),
    "from_merged": Column("difference from FP16", ".1e"),
    "top1": Column("Top-1 (%)", ".2f", 100),
    "same_class": Column("same class (%)", ".2f", 100),
}
# ‖merged − trained‖ / ‖trained‖ of logits. QLoRA trains in bf16 (8 bits of mantissa), the others in fp32.
MERGE_TOLERANCE = {"lora": 0.02, "full": 0.02, "head": 0.02, "qlora": 0.05}
RELOAD_TOLERANCE = 1e-3


class FinetuneError(RuntimeError):
    """Training would not do what was asked; the message says what is wrong."""


open = Study.open
duplicates = decode.duplicates


def dataset(study: Study) -> Dataset:
    """The study's pictures, found but not yet read. DataError where they are missing or do not fit together."""
    return sources.load(study.settings)


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
        folder = standin.demo_base(study, device) if name == "pretrain" else files.resolve(name)
        source, quantized = name if is_hub_id(name) else str(folder), settings.method == "qlora"
        pre = preprocess.load(source, revision or None)
        set_seed(settings.seed)  # the new head's initialisation
        how = {"dtype": torch.bfloat16 if quantized else torch.float32, "quantized": quantized, "device": device}
        model = checkpoint.load_base(source, revision=revision, labels=labels, **how)
    about = origin.describe(name, revision=revision, architecture=settings.architecture)
    return Base(model, pre, labels, device, about)


def decoded(study: Study, dataset: Dataset, base: Base) -> dict[str, Decoded]:
    """Every split, read and resized once; what cannot be read joins `dataset.skipped`."""
    return sources.decode_splits(dataset, list(dataset.splits), base.preprocess, study.settings.workers)


def examples(decoded: dict[str, Decoded], base: Base, count: int) -> tuple[list[np.ndarray], list[str]]:
    """The first training picture (h, w, 3) of each of `count` classes, with the class names."""
    return sources.one_of_each(decoded["train"], base.labels, count)


def describe(base: Base) -> pd.DataFrame:
    """What is fine-tuned: origin, size and shape of the base."""
    config = base.model.config
    count = sum(quantize.parameter_count(p) for p in base.model.parameters())
    facts = {"base": f"{base.origin['base']} {base.origin.get('revision', '')[:10]}".strip()}
    facts |= {"blocks": config.num_hidden_layers, "width": config.hidden_size, "heads": config.num_attention_heads}
    facts |= {"patch": config.patch_size, "pixels": " × ".join(map(str, base.preprocess.side))}
    return pd.DataFrame([facts | {"parameters (M)": round(count / 1e6, 2), "new classes": len(base.labels.names)}])


def introduce(study: Study, base: Base) -> Markdown:
    """What the base is and what that means for accuracies; its facts go to `records/base.json`."""
    settings, about = study.settings, dict(base.origin)
    if about["base"].startswith(("/", "~")):  # a folder of this machine: its name is enough for a reader
        about["base"] = Path(about["base"]).name
    study.write_json("base", about)
    text = origin.sentence(about)
    if settings.base_model == "pretrain" and settings.data_source != "synthetic":
        text += "\n\n**The base was trained on drawn flowers only, and the pictures of this study are not drawn.** "
        text += "Expect low accuracy; set `base_model` to a pretrained network (a folder or a Hub id)."
    return Markdown(text)


def make_trainable(study: Study, base: Base) -> nn.Module:
    """The model with the parameters of `method` trainable, always including the head.

    Training in bf16 rounds the frozen weights once, here; what is trained stays in fp32, as do all weights where
    adapters without dropout are added into them (`adapters.SummedLinear`). AdapterError where a linear gets no adapter.
    """
    settings, model = study.settings, base.model
    if settings.method in ("lora", "qlora"):
        rank, alpha, dropout = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
        summed = settings.method == "lora" and not dropout
        model = adapters.attach(model, rank=rank, alpha=alpha, dropout=dropout, head=quantize.CLASSIFIER, summed=summed)
    else:
        model.requires_grad_(settings.method == "full")
        model.classifier.requires_grad_(True)
    if settings.method in ("lora", "head") and trainer.precision_of(settings.precision, base.device) == "bf16":
        adapters.round_frozen(model, torch.bfloat16)
    return model


def parameter_table(model: nn.Module) -> pd.DataFrame:
    """Numbers of trainable and frozen parameters: rows head, adapters and encoder."""
    rows = {"head": [0, 0], "adapters": [0, 0], "encoder": [0, 0]}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # peft keeps the untrained head beside the trained one
            continue
        part = "head" if quantize.CLASSIFIER in name else "adapters" if "lora_" in name else "encoder"
        rows[part][0 if parameter.requires_grad else 1] += quantize.parameter_count(parameter)
    return pd.DataFrame(rows, index=["trainable", "frozen"]).T


def train(study: Study, model: nn.Module, base: Base, decoded: dict[str, Decoded]) -> pd.DataFrame:
    """Fine-tune in place; returns and writes `records/finetune.csv`."""
    names = ("method", "lora_rank", "lora_alpha", "lora_dropout", "base_model", "base_revision", "architecture")
    about = {name: getattr(study.settings, name) for name in names}
    where = {"folder": study.training("finetune"), "device": base.device, "resume": study.settings.resume}
    examples, recipe = {s: Examples.of(decoded[s], base.labels) for s in ("train", "valid")}, Recipe.of(study.settings)
    history = trainer.train(model, examples, pre=base.preprocess, recipe=recipe, about=about, **where)
    return study.write("finetune", history)


def merge(study: Study, model: nn.Module, base: Base) -> nn.Module:
    """The fine-tuned network in FP16 with the adapters added; FinetuneError where random pictures get other logits."""
    method = study.settings.method
    if method != "qlora":
        model = model.float()  # changes no value of frozen bf16 weights, and the sum is rounded once
    draw = torch.Generator().manual_seed(study.settings.seed)
    pixels = torch.randint(0, 256, (8, 3, *base.preprocess.side), generator=draw).to(base.device)
    with torch.no_grad():
        expected = model.eval()(pixel_values=base.preprocess.normalise(pixels)).logits.float()
        merged = adapters.merged(model, quantized=method == "qlora") if method in ("lora", "qlora") else model.half()
        found = merged(pixel_values=base.preprocess.normalise(pixels, torch.float16)).logits.float()
    difference = tuning.relative_error(found, expected)
    if not difference < MERGE_TOLERANCE[method]:
        raise FinetuneError(f"merging changed the logits by {difference:.1%}: the adapters were not merged as trained")
    return merged


def save_checkpoints(study: Study, merged: nn.Module, base: Base, history: pd.DataFrame) -> dict[str, Path]:
    """Write `merged`, `nf4` and `int8`; the quantized ones are made by transformers from the merged one."""
    merged.config.update(checkpoint.label_maps(base.labels))
    about = {"study": study.name, "origin": base.origin, "method": study.settings.method}
    about |= {"parameters": used_by(study.settings, "1_finetune"), "top1": float(history["top1"].iloc[-1])}
    about["versions"] = provenance.environment(parameters={})["versions"]

    def save(model: nn.Module, name: str, **note: object) -> Path:
        made = about | note
        return checkpoint.save(model, study.checkpoint(name), pre=base.preprocess, labels=base.labels, provenance=made)

    paths = {"merged": save(merged, "merged", weights="fp16")}
    # The merged file's checksum links the three: evaluation refuses checkpoints of different trainings.
    about["merged_sha256"] = files.checksum(paths["merged"] / "model.safetensors")
    for weights in ("nf4", "int8"):
        quantized = checkpoint.quantize_checkpoint(paths["merged"], weights, base.device)
        kept = [quantize.CLASSIFIER]
        paths[weights] = save(quantized, weights, weights=weights, quantized_from="merged", kept_in_16_bit=kept)
    return paths


def check_reload(merged: nn.Module, base: Base, paths: dict[str, Path], valid: Decoded) -> pd.DataFrame:
    """Load each saved checkpoint again and compare it with the model in memory; a row each.

    `from_merged`, the cost of quantization, is ‖found − merged‖ / ‖merged‖ of all logits. `reload_difference` compares
    the first 64 with the network that was saved (quantized again); FinetuneError where it exceeds rounding.
    """
    rows, truth = [], base.labels.ids(valid.pictures).numpy()
    memory = checkpoint.Loaded(merged, base.preprocess, base.labels, base.device, torch.float16, paths["merged"], 0.0)
    expected = engine.logits(engine.Engine(memory), valid.pixels, 32)
    for name, path in paths.items():
        loaded = checkpoint.load(path.parent, Variant("fp16" if name == "merged" else name), base.device)
        found = engine.logits(engine.Engine(loaded), valid.pixels, 32)  # in batches that the first 64 fill
        saved_from = expected[:64]
        if name != "merged":
            again = checkpoint.quantize_checkpoint(paths["merged"], name, base.device)
            saved_from = engine.logits(engine.Engine(replace(memory, model=again)), valid.pixels[:64], 32)
        difference = tuning.relative_error(found[:64], saved_from)
        if not difference <= RELOAD_TOLERANCE:
            raise FinetuneError(f"{name} gives other logits than the network it was saved from ({difference:.1%})")
        row = {"checkpoint": name, "disk_mb": checkpoint.disk_mb(path), "model_mb": loaded.weights_mb}
        row |= {"reload_difference": difference, "from_merged": tuning.relative_error(found, expected)}
        row |= {"top1": stats.topk_accuracy(found.numpy(), truth)}
        rows.append(row | {"same_class": (found.argmax(1) == expected.argmax(1)).float().mean().item()})
    return pd.DataFrame(rows).set_index("checkpoint", drop=False)


def headline(history: pd.DataFrame, reloaded: pd.DataFrame, base: Base, decoded: dict[str, Decoded]) -> Markdown:
    """What the records say, in a few sentences."""
    last, best = history.iloc[-1], history.loc[history["top1"].idxmax()]
    merged, device = 100 * reloaded.loc["merged", "top1"], "GPU" if base.device.type == "cuda" else "CPU"
    why = "" if abs(merged - 100 * last["top1"]) < 0.005 else ", because its weights are rounded to FP16"
    lines = [
        f"After {last['epoch']:.0f} epochs on {len(decoded['train'].pictures):,} pictures of {len(base.labels.names)} "
        f"classes, Top-1 is **{100 * last['top1']:.2f} %** and Top-5 {100 * last['top5']:.2f} % of "
        f"{len(decoded['valid'].pictures):,} validation pictures. The best epoch was {best['epoch']:.0f} with "
        f"{100 * best['top1']:.2f} %. The last epoch is saved: choosing the best on the validation pictures would bias "
        "their accuracy upwards." + _overfits(history),
        f"The merged FP16 checkpoint, which the other notebooks start from, has Top-1 **{merged:.2f} %**{why}.",
        _copies(decode.duplicates({split: decoded[split] for split in ("train", "valid")})["kind"]),
        f"Training ran at {history['images_per_s'].median():,.0f} images/s on the {device}.",
        _quantized(reloaded),
    ]
    return Markdown("\n".join(f"- {line}" for line in lines))


def _overfits(history: pd.DataFrame) -> str:
    """A sentence where the validation loss has risen by more than a tenth since its minimum, else ''."""
    loss, epoch = history["valid_loss"], history["epoch"].loc[history["valid_loss"].idxmin()]
    said = f" The network overfits: its validation loss was lowest in epoch {epoch:.0f} and rose afterwards."
    return said if loss.iloc[-1] > 1.1 * loss.min() else ""


def _copies(kinds: pd.Series) -> str:
    if kinds.empty:
        return "No picture appears in both training and validation."
    exact, near = (kinds == "exact").sum(), (kinds == "near").sum()
    said = f"**Training and validation share pictures** ({exact} exact and {near} near copies), so the accuracy may "
    return said + "be too high by up to their share."


def _quantized(reloaded: pd.DataFrame) -> str:
    size, same = reloaded["model_mb"], 100 * reloaded["same_class"]
    nf4, int8 = (size["merged"] / size[name] for name in ("nf4", "int8"))
    return (
        f"After loading, the FP16 checkpoint gives the same logits (relative difference "
        f"{reloaded.loc['merged', 'reload_difference']:.0e}). NF4 takes {nf4:.1f} and INT8 {int8:.1f} times less "
        f"memory; {same['nf4']:.1f} % and {same['int8']:.1f} % of the pictures keep their class."
    )

"""Notebook 1: fine-tune a base network, with LoRA or without, and save it as self-sufficient checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from vitlib.study.variants import FORMATS, Variant
from vitlib.training import adapters, demo, trainer
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
COPIES = {"file": "file", "other_file": "copy of", "correlation": Column("correlation", ".4f"), "kind": "kind"}
RELOADED = {
    "checkpoint": "checkpoint",
    "disk_mb": Column("on disk (MB)", ",.2f"),
    "model_mb": Column("in memory (MB)", ",.2f"),
    "reload_difference": Column("difference after loading", ".1e"),
    "from_merged": Column("difference from FP16", ".1e"),
    "top1": Column("Top-1 (%)", ".2f", 100),
    "same_class": Column("same class (%)", ".2f", 100),
}
TOP = 5
METHODS = {"lora": "LoRA", "qlora": "QLoRA", "full": "Training all weights", "head": "Training the head alone"}
TRAINED = {
    "lora": "LoRA adds to each weight matrix *W* of attention and MLP a product *BA* of rank *r*, scaled by α / r, and "
    "trains these adapters (Hu et al. 2021); *W* stays frozen.",
    "qlora": "QLoRA stores the frozen weights in NF4 and trains LoRA adapters beside them (Dettmers et al. 2023).",
    "full": "All weights are trained; there are no adapters.",
    "head": "The encoder stays frozen, and there are no adapters.",
}
# ‖merged − trained‖ / ‖trained‖ of logits. QLoRA trains in bf16 (8 bits of mantissa), the others in fp32.
MERGE_TOLERANCE = {"lora": 0.02, "full": 0.02, "head": 0.02, "qlora": 0.05}
RELOAD_TOLERANCE = 1e-3
BATCH = 32  # of the comparison with the checkpoints
CHECKED = 64  # pictures whose logits must survive saving; a multiple of BATCH
QUANTIZED = ("nf4", "nf4c", "int8")  # formats that get a checkpoint


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
        folder = demo.base(study, device) if name == "pretrain" else files.resolve(name)
        source, quantized = name if is_hub_id(name) else str(folder), settings.method == "qlora"
        pre = preprocess.load(source, revision or None)
        set_seed(settings.seed)  # the new head's initialisation
        how = {"dtype": torch.bfloat16 if quantized else torch.float32, "quantized": quantized, "device": device}
        model = checkpoint.load_base(source, revision=revision, side=pre.side[0], labels=labels, **how)
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


def preprocessing(base: Base) -> Markdown:
    """What happens to every picture before the network sees it."""
    about, side = base.preprocess.describe(), " × ".join(map(str, base.preprocess.side))
    steps = [f"resized and cropped to {side} pixels" if about.get("do_center_crop") else f"resized to {side} pixels"]
    if about.get("do_rescale"):
        steps.append(f"its values are divided by {1 / about['rescale_factor']:g}")
    if about.get("do_normalize"):
        mean, std = (", ".join(f"{value:.3g}" for value in about[f"image_{name}"]) for name in ("mean", "std"))
        steps.append(f"normalised with means {mean} and standard deviations {std} of red, green and blue")
    return Markdown(f"Every picture is {'; '.join(steps)}.")


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
    """Numbers of trainable and frozen parameters: rows head, adapters (if any) and encoder."""
    rows = {"head": [0, 0], "adapters": [0, 0], "encoder": [0, 0]}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # peft keeps the untrained head beside the trained one
            continue
        part = "head" if quantize.CLASSIFIER in name else "adapters" if "lora_" in name else "encoder"
        rows[part][0 if parameter.requires_grad else 1] += quantize.parameter_count(parameter)
    table = pd.DataFrame(rows, index=["trainable", "frozen"]).T
    return table[table.any(axis=1)]


def trained(study: Study, table: pd.DataFrame) -> Markdown:
    """What `method` trains and how many of the parameters in `parameter_table` these are."""
    count, every = table["trainable"].sum(), table.to_numpy().sum()
    share = f"{100 * count / every:.2g} %" if count < every else "all"
    said = f"{TRAINED[study.settings.method]} The new head starts from random weights and is always trained."
    return Markdown(f"{said} {count:,} parameters are trained, {share} of the network.")


def train(study: Study, model: nn.Module, base: Base, decoded: dict[str, Decoded]) -> pd.DataFrame:
    """Fine-tune in place; returns and writes `records/finetune.csv`, returned without what was not measured.

    Top-5 of at most five classes, which is always 100 %, is left out too.
    """
    names = ("method", "lora_rank", "lora_alpha", "lora_dropout", "base_model", "base_revision", "architecture")
    about = {name: getattr(study.settings, name) for name in names}
    where = {"folder": study.training("finetune"), "device": base.device, "resume": study.settings.resume}
    examples, recipe = {s: Examples.of(decoded[s], base.labels) for s in ("train", "valid")}, Recipe.of(study.settings)
    history = trainer.train(model, examples, pre=base.preprocess, recipe=recipe, about=about, **where)
    shown = study.write("finetune", history).dropna(axis="columns", how="all")
    return shown if len(base.labels.names) > TOP else shown.drop(columns="top5")


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


class Saved(NamedTuple):
    """A checkpoint's folder, and the logits of the network that was saved for the first validation pictures."""

    folder: Path
    logits: torch.Tensor


def save_checkpoints(
    study: Study, merged: nn.Module, base: Base, history: pd.DataFrame, decoded: dict[str, Decoded]
) -> dict[str, Saved]:
    """Write `merged` and, quantized from it, those of `QUANTIZED`; pictures of the training split calibrate."""
    merged.config.update(checkpoint.label_maps(base.labels))
    about = {"study": study.name, "origin": base.origin, "method": study.settings.method}
    about |= {"parameters": used_by(study.settings, "1_finetune"), "top1": float(history["top1"].iloc[-1])}
    about["versions"] = provenance.environment(parameters={})["versions"]
    pixels, made = decoded["valid"].pixels[:CHECKED], {}

    def save(model: nn.Module, name: str, **note: object) -> Path:
        how = {"pre": base.preprocess, "labels": base.labels, "provenance": about | note}
        made[name] = Saved(checkpoint.save(model, study.checkpoint(name), **how), _logits(model, base, pixels))
        return made[name].folder

    folder = save(merged, "merged", weights="fp16")
    # The merged file's checksum links them all: evaluation refuses checkpoints of different trainings.
    about["merged_sha256"] = files.checksum(folder / "model.safetensors")
    about |= {"quantized_from": "merged", "kept_in_16_bit": [quantize.CLASSIFIER]}
    pictures, values = _calibration(decoded["train"], base, study.settings.calibration_pictures)
    for weights in QUANTIZED:
        row = FORMATS[weights]
        quantized = checkpoint.quantize_checkpoint(folder, weights, base.device, values if row.calibrated else None)
        save(quantized, row.checkpoint, weights=weights, **({"calibrated_on": pictures} if row.calibrated else {}))
    return made


def _calibration(train: Decoded, base: Base, count: int) -> tuple[list[str], torch.Tensor]:
    """Names and normalised pixels (n, 3, h, w) of `count` training pictures, spread over the classes."""
    names = {picture.file for picture in sources.evenly(train.pictures, count)}
    rows = [row for row, picture in enumerate(train.pictures) if picture.file in names]
    return sorted(names), base.preprocess.normalise(train.pixels[rows])


def _logits(model: nn.Module, base: Base, pixels: torch.Tensor) -> torch.Tensor:
    """float32 logits (n, classes) of an FP16 or quantized network for uint8 `pixels` (n, 3, h, w)."""
    loaded = checkpoint.Loaded(model.eval(), base.preprocess, base.labels, base.device, torch.float16, Path(), 0.0)
    return engine.logits(engine.Engine(loaded), pixels, BATCH)


def check_reload(merged: nn.Module, base: Base, saved: dict[str, Saved], valid: Decoded) -> pd.DataFrame:
    """Load each saved checkpoint again and compare it with the model in memory; a row each.

    `from_merged`, the cost of quantization, is ‖found − merged‖ / ‖merged‖ of all logits. `reload_difference` compares
    the first with those of the network that was saved; FinetuneError where it exceeds rounding.
    """
    rows, truth, expected = [], base.labels.ids(valid.pictures).numpy(), _logits(merged, base, valid.pixels)
    for weights in ("fp16", *QUANTIZED):
        folder, before = saved[FORMATS[weights].checkpoint]
        loaded = checkpoint.load(folder.parent, Variant(weights), base.device)
        found = engine.logits(engine.Engine(loaded), valid.pixels, BATCH)  # in batches that the first pictures fill
        difference = tuning.relative_error(found[:CHECKED], before)
        if not difference <= RELOAD_TOLERANCE:
            raise FinetuneError(f"{folder.name} gives other logits than the network that was saved ({difference:.1%})")
        row = {"checkpoint": folder.name, "disk_mb": checkpoint.disk_mb(folder), "model_mb": loaded.weights_mb}
        row |= {"reload_difference": difference, "from_merged": tuning.relative_error(found, expected)}
        row |= {"top1": stats.topk_accuracy(found.numpy(), truth)}
        rows.append(row | {"same_class": (found.argmax(1) == expected.argmax(1)).float().mean().item()})
    return pd.DataFrame(rows).set_index("checkpoint", drop=False)


def headline(
    study: Study, history: pd.DataFrame, reloaded: pd.DataFrame, base: Base, decoded: dict[str, Decoded]
) -> Markdown:
    """What the records say, in a few sentences."""
    last, best, valid = history.iloc[-1], history.loc[history["top1"].idxmax()], len(decoded["valid"].pictures)
    merged, device = reloaded.loc["merged", "top1"], "GPU" if base.device.type == "cuda" else "CPU"
    (low, high), rate = stats.wilson(round(merged * valid), valid), history["images_per_s"].median()
    epochs, trained = _count(last["epoch"], "epoch"), _count(len(decoded["train"].pictures), "picture")
    known = 0 if study.settings.limit else base.origin.get("top1", 0)  # of a stand-in, on the whole split
    before = f" (the base reached {100 * known:.1f} % on the same pictures)" if known else ""
    first = (
        f"{METHODS[study.settings.method]} reaches **{100 * merged:.1f} % Top-1** on {valid:,} validation pictures "
        f"of {len(base.labels.names)} classes after {epochs}{before}. The 95 % interval is {100 * low:.1f} … "
        f"{100 * high:.1f} %. Training on {trained} ran at about {float(f'{rate:.2g}'):,g} images/s on the {device}."
    )
    if "top5" in history:
        first += f" Top-5 is {100 * last['top5']:.1f} %."
    if changed := round(valid * abs(merged - last["top1"])):
        first += f" Rounding to FP16 changed Top-1 by {_count(changed, 'picture')}."
    chosen = "The last epoch is saved: to choose the best on the validation pictures would bias their accuracy upwards."
    if best["epoch"] != last["epoch"]:
        chosen = f"The best epoch was {best['epoch']:.0f} with {100 * best['top1']:.1f} %. {chosen}"
    copies = decode.duplicates({split: decoded[split] for split in ("train", "valid")})
    lines = [first, f"{_overfits(history)}{chosen}", _copies(copies, valid), _quantized(reloaded, valid)]
    return Markdown("\n".join(f"- {line}" for line in lines))


def _count(number: float, what: str) -> str:
    return f"{number:,.0f} {what}" if number == 1 else f"{number:,.0f} {what}s"


def overfits_after(history: pd.DataFrame) -> int | None:
    """The epoch of the lowest validation loss where the network overfits from then on, else None.

    It does where that loss has risen by a tenth while the training loss fell, or by a hundredth while it halved.
    """
    curves = history.set_index("epoch")[["valid_loss", "train_loss"]]
    lowest = curves["valid_loss"].idxmin()
    rise, fall = curves.iloc[-1] / curves.loc[lowest]
    return int(lowest) if (rise > 1.1 and fall < 1) or (rise > 1.01 and fall < 0.5) else None


def _overfits(history: pd.DataFrame) -> str:
    """A sentence where the network overfits, else ''."""
    if (epoch := overfits_after(history)) is None:
        return ""
    before, last = history.set_index("epoch").loc[epoch], history.iloc[-1]
    valid, train = (f"{before[loss]:.2f} → {last[loss]:.2f}" for loss in ("valid_loss", "train_loss"))
    risen = f", although Top-1 still rises ({100 * before['top1']:.1f} → {100 * last['top1']:.1f} %)"
    return (
        f"**After epoch {epoch} the validation loss no longer falls** ({valid}) while the training loss goes on "
        f"falling ({train}): the network overfits{risen if last['top1'] > before['top1'] else ''}. "
    )


def _copies(found: pd.DataFrame, valid: int) -> str:
    """What copies between training and validation mean for the accuracy; `valid` pictures were tested."""
    if found.empty:
        return "No picture appears in both training and validation."
    count, exact = found["file"].nunique(), (found["kind"] == "exact").sum()
    return (
        f"**Training and validation share {_count(count, 'picture')}** ({exact} exact and {len(found) - exact} near "
        "copies): the network is tested on what it was trained on, and Top-1 may be too high by at most "
        f"{100 * count / valid:.1f} points."
    )


def _quantized(reloaded: pd.DataFrame, valid: int) -> str:
    """What quantization saves, and how many of the `valid` pictures change class."""
    size, changed = reloaded["model_mb"], (valid * (1 - reloaded["same_class"])).round().astype(int)
    nf4, int8 = (f"{size['merged'] / size[name]:.1f} times" for name in ("nf4", "int8"))
    return (
        f"NF4 takes {nf4} and INT8 {int8} less memory than FP16. Of {valid:,} pictures, INT8 gives {changed['int8']}, "
        f"NF4 {changed['nf4']} and calibrated NF4, which is as small, {changed['nf4-calibrated']} another class than "
        f"the FP16 checkpoint does, in batches of {BATCH} (notebook 2 compares with its own baseline and batch size)."
    )

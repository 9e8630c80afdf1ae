"""Notebook 1: fine-tune a base network, with LoRA or without, and save it as self-sufficient checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitlib.measure import stats
from vitlib.network import checkpoint, engine, quantize, tuning
from vitlib.pictures import decode, sources
from vitlib.pictures.decode import Decoded
from vitlib.pictures.sources import Dataset
from vitlib.report.tables import Column, Markdown, number
from vitlib.study import files, origin, provenance
from vitlib.study.params import used_by
from vitlib.study.study import Study
from vitlib.study.variants import FORMATS, Variant
from vitlib.training import adapters, recipes
from vitlib.training.recipes import Base, FinetuneError

HISTORY = {
    "epoch": "epoch",
    "train_loss": Column("training loss", ".3f"),
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
RECIPES = {
    "way": "trained",
    ("top1", "top1_low", "top1_high"): Column("Top-1 (%), 95 % interval", scale=100),
    "train_loss": Column("training loss", ".3f"),
    "learning_rate": Column("learning rate", ".1e"),
    "trainable": Column("trainable parameters", ",.0f"),
    "images_per_s": Column("images/s", number),
    "peak_mb": Column("peak GPU memory (MB)", ",.0f", bar=True),
    "weights_mb": Column("weights (MB)", number),
    "gradients_mb": Column("gradients (MB)", number),
    "optimizer_mb": Column("optimizer (MB)", number),
    "activations_mb": Column("activations (MB)", ",.0f"),
}
TOP = 5
METHODS = {"lora": "LoRA", "qlora": "QLoRA", "full": "Training all weights", "head": "Training the head alone"}
TRAINED = {
    "lora": "LoRA adds to each weight matrix *W* of attention and MLP a product *BA* of rank *r*, scaled by α / r, and "
    "trains these adapters (Hu et al. 2021); *W* stays frozen.",
    "qlora": "QLoRA stores the frozen weights in NF4 and trains LoRA adapters beside them (Dettmers et al. 2023).",
    "full": "All weights are trained; there are no adapters.",
    "head": "The encoder stays frozen, and there are no adapters. It runs once for each picture, without augmentation, "
    "and the head is trained on the class tokens that it gives.",
}
# ‖merged − trained‖ / ‖trained‖ of logits. QLoRA trains in bf16 (8 bits of mantissa), the others in fp32.
MERGE_TOLERANCE = {"lora": 0.02, "full": 0.02, "head": 0.02, "qlora": 0.05}
RELOAD_TOLERANCE = 1e-3
BATCH = 32  # of the comparison with the checkpoints
CHECKED = 64  # pictures whose logits must survive saving; a multiple of BATCH
QUANTIZED = ("nf4", "nf4c", "int8")  # formats that get a checkpoint


open = Study.open
duplicates = decode.duplicates
load_base, make_trainable, compare = recipes.load_base, recipes.make_trainable, recipes.compare


def dataset(study: Study) -> Dataset:
    """The study's pictures, found but not yet read. DataError where they are missing or do not fit together."""
    return sources.load(study.settings)


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
    study.write_json("base", base.origin)
    return Markdown(origin.sentence(base.origin))


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
    views = "" if study.settings.method == "head" else " Every epoch sees other random crops and flips of the pictures."
    said = f"{TRAINED[study.settings.method]}{views} The new head starts from random weights and is always trained."
    return Markdown(f"{said} {count:,} parameters are trained, {share} of the network.")


def train(study: Study, model: nn.Module, base: Base, decoded: dict[str, Decoded]) -> pd.DataFrame:
    """Fine-tune in place; returns and writes `records/finetune.csv`, returned without what was not measured.

    Top-5 of at most five classes, which is always 100 %, is left out too.
    """
    where = {"folder": study.training("finetune"), "resume": study.settings.resume}
    history = recipes.fit(study, model, base, decoded, **where)
    shown = study.write("finetune", history).dropna(axis="columns", how="all")
    return shown if len(base.labels.names) > TOP else shown.drop(columns="top5")


def answers(compared: pd.DataFrame) -> Markdown:
    """What a comparison of recipes says of a frozen head, of LoRA's speed and of QLoRA's memory."""
    if compared.empty:
        return Markdown(
            "None was compared here. The parameter `recipes` chooses: `[head, lora-frozen-head, lora, qlora, full]`. "
            "Each of them trains as many epochs as the network of this page."
        )
    rows = compared.set_index("recipe")
    needed = {_original: {recipes.FROZEN_HEAD, "lora"}, _speed: {"full", "lora"}, _memory: {"qlora", "lora"}}
    said = [answer(rows) for answer, names in needed.items() if names <= set(rows.index)]
    return Markdown("\n".join(f"- {text}" for text in [*said, "No learning rate was tuned."]))


def _original(rows: pd.DataFrame) -> str:
    frozen, trained = (
        f"{100 * row.top1:.1f} % Top-1 (95 % interval {100 * row.top1_low:.1f} … {100 * row.top1_high:.1f} %)"
        for row in rows.loc[[recipes.FROZEN_HEAD, "lora"]].itertuples()
    )
    return f"The original's recipe, LoRA with a frozen random head, reaches {frozen}; with the head trained {trained}."


def _speed(rows: pd.DataFrame) -> str:
    speed = rows["images_per_s"]
    return (
        f"LoRA trains {speed['lora'] / speed['full']:.2g} times as many images/s as full fine-tuning. More than "
        f"{6 / 4:g} times is impossible: a step of a linear layer has three products of the same size (the output, the "
        "gradient of its input, the gradient of its weights), 6 operations for each weight and token, and LoRA omits "
        "only the third."
    )


def _memory(rows: pd.DataFrame) -> str:
    lora, qlora = rows.loc["lora"], rows.loc["qlora"]
    said = f"QLoRA's weights take {number(qlora['weights_mb'])} MB, LoRA's {number(lora['weights_mb'])} MB. "
    if qlora["peak_mb"] > 0:
        weights, activations = (100 * lora[f"{part}_mb"] / lora["peak_mb"] for part in ("weights", "activations"))
        said += (
            f"The peak goes from {lora['peak_mb']:,.0f} to {qlora['peak_mb']:,.0f} MB, as weights are only "
            f"{weights:.0f} % of LoRA's peak and activations {activations:.0f} %. "
        )
    ratio = qlora["images_per_s"] / lora["images_per_s"]
    return f"{said}QLoRA trains {ratio:.2g} times as many images/s: each product dequantizes its weights first."


def merge(study: Study, model: nn.Module, base: Base) -> nn.Module:
    """The fine-tuned network in FP16 with the adapters added; FinetuneError where random pictures get other logits."""
    method = study.settings.method
    model = model.float()  # changes no value of frozen bf16 weights nor of NF4, and the sum is rounded once
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
    made = provenance.environment(parameters=used_by(study.settings, "1_finetune"))  # without paths of this machine
    about |= {key: made[key] for key in ("parameters", "versions")} | {"top1": float(history["top1"].iloc[-1])}
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
    study: Study, history: pd.DataFrame, reloaded: pd.DataFrame, base: Base, decoded: dict[str, Decoded],
    compared: pd.DataFrame | None = None,
) -> Markdown:  # fmt: skip
    """What the records say, in a few sentences; of `compared` recipes what the original's reaches."""
    last, best, valid = history.iloc[-1], history.loc[history["top1"].idxmax()], len(decoded["valid"].pictures)
    merged, device = reloaded.loc["merged", "top1"], "GPU" if base.device.type == "cuda" else "CPU"
    (low, high), rate = stats.wilson(round(merged * valid), valid), history["images_per_s"].median()
    epochs, trained = _count(last["epoch"], "epoch"), _count(len(decoded["train"].pictures), "picture")
    part = study.settings.limit or study.settings.valid_limit
    known = 0 if part else base.origin.get("top1", 0)  # of a stand-in, on the whole split
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
    lines = [first, chosen, _copies(copies, valid), _quantized(reloaded, valid)]
    if compared is not None and {recipes.FROZEN_HEAD, "lora"} <= set(compared["recipe"]):
        lines.insert(1, _original(compared.set_index("recipe")))
    return Markdown("\n".join(f"- {line}" for line in lines))


def _count(number: float, what: str) -> str:
    return f"{number:,.0f} {what}" if number == 1 else f"{number:,.0f} {what}s"


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

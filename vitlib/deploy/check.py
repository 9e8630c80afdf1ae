"""The deployment checklist as code: is a checkpoint whole, what it says, and as good here as where it was made?

It is the list of the original study: checkpoint verified, quantization config as in training, attention and compute
capability of this card, preprocessing as in training; and with it speed and memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from transformers import AutoConfig

from vitlib.deploy import predictor
from vitlib.measure import timing
from vitlib.network import attention, checkpoint, engine, plan, quantize, samples, tuning, verify
from vitlib.network.engine import Engine
from vitlib.pictures import preprocess
from vitlib.report.tables import number
from vitlib.study import provenance, records
from vitlib.study.variants import ATTENTIONS, FORMATS, Variant

OK, FAILED, NOT = "ok", "failed", "not applicable"
CAN_VERIFY = ("checksums", "sample pictures")  # without one of these the checkpoint is unverified
QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
QUANTIZATION += ("bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_skip_modules")
BUDGET = timing.Budget(rounds=4, samples=20, seconds=0.5)


class Row(NamedTuple):
    """A line of the checklist."""

    check: str
    status: str  # OK, FAILED or NOT
    found: str
    expected: str


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="outputs/<study>, a checkpoint, or an unpacked archive")
    parser.add_argument("--variant", default="auto", help="a variant, such as nf4-sdpa (default: the best that runs)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the list to FILE too")
    parser.epilog = "exit status: 0 all ok; 1 a check failed; 2 unverified: no checksums or no sample pictures"


def run(options: argparse.Namespace) -> int:
    checkpoint.quiet_libraries()
    rows = []
    for row in checklist(options.checkpoint, options.variant, checkpoint.pick_device(options.device)):
        rows.append(row)
        print(f"{row.status:<16}{row.check:<30}{row.found} (expected: {row.expected})", flush=True)
    unverified = any(row.status == NOT and row.check in CAN_VERIFY for row in rows)
    status = 1 if any(row.status == FAILED for row in rows) else 2 if unverified else 0
    if options.json:
        records.write_json({"status": status, "checks": [row._asdict() for row in rows]}, options.json)
    return status


def checklist(path: Path, name: str, device: torch.device) -> Iterator[Row]:
    """A row for each check; the last is the first that failed where the next need what it found missing.

    ValueError for an unknown variant.
    """
    expected = "each file has the SHA-256 that it was saved with"
    try:
        weights = predictor.find(path)
        variant, _ = predictor.choose(weights, name, device, batch_size=1)
        folder = weights.folder(variant)
        listed = checkpoint.whole(folder).get("files")
    except checkpoint.CheckpointError as error:
        yield Row("checksums", FAILED, str(error), expected)
        return
    found = f"{len(listed)} files as they were saved" if listed else "unverified: provenance.json has no checksums"
    yield Row("checksums", OK if listed else NOT, found, expected)
    yield _quantization(folder, variant)
    yield from _attentions(variant, device)
    yield (row := _device(variant, device))
    if row.status == FAILED:
        return
    linears = variant.format.fused if variant.fused else variant.format.stored
    expected = f"{'those of its plan' if variant.format.planned else linears} in {variant.format.dtype}"
    try:
        ready = Engine(checkpoint.load_folder(folder, variant, device), variant.execution, (1,))
    except (ValueError, RuntimeError, OSError) as error:
        yield Row("layers", FAILED, str(error), expected)
        return
    found = verify.evidence(ready.network)
    layers = ", ".join(f"{count} {kind}" for kind, count in found["encoder_linears"].items())
    yield Row("layers", OK, f"{layers} in {' and '.join(found['dtypes'])}", expected)
    yield _preprocessing(ready)
    yield _samples(ready)
    yield from _speed(ready, variant, weights.measured)


def _quantization(folder: Path, variant: Variant) -> Row:
    """What config.json tells transformers and bitsandbytes, against what training chose."""
    row, kept, bits = variant.format, [quantize.CLASSIFIER], FORMATS[variant.format.reference].bits
    if row.planned:
        chosen = records.read_json(folder / plan.FILE)
        kept, bits = plan.kept(chosen), 4 if "nf4" in chosen.values() else 16
    stored = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) or {}
    wanted: dict[str, Any] = quantize.config(bits, torch.float16, kept).to_dict() if bits < 16 else {}
    found, expected = ({key: about.get(key) for key in QUANTIZATION} for about in (stored, wanted))
    said = "NF4 with double quantization" if bits == 4 else "LLM.int8()" if wanted else "not quantized"
    wrong = [f"{key} is {found[key]}, not {expected[key]}" for key in QUANTIZATION if found[key] != expected[key]]
    return Row("quantization config", FAILED if wrong else OK, "; ".join(wrong) or "as expected", said)


def _attentions(variant: Variant, device: torch.device) -> Iterator[Row]:
    """Which attention implementations run here; only the one of `variant` must."""
    for name, words in ATTENTIONS.items():
        reason = attention.not_runnable(Variant(variant.format.reference, name), device)
        used = name == variant.attention
        status, expected = (FAILED, f"needed by {variant.name}") if used else (NOT, f"not used by {variant.name}")
        yield Row(f"attention: {words}", status if reason else OK, reason or "runs here", expected)


def _device(variant: Variant, device: torch.device) -> Row:
    found, reason = "CPU", attention.not_runnable(variant, device)
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found = f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
    return Row("device", FAILED if reason else OK, f"{found}: {reason}" if reason else found, f"runs {variant.label}")


def _preprocessing(ready: Engine) -> Row:
    """Saved and loaded again it must be the same, and what training used where the checkpoint says that."""
    loaded = ready.loaded
    pre, expected = loaded.preprocess, f"{' × '.join(map(str, loaded.preprocess.side))} pixels as in training"
    with tempfile.TemporaryDirectory() as place:
        pre.save(Path(place))
        again = preprocess.load(place)
    used, now = loaded.about.get("preprocessing"), json.loads(json.dumps(pre.describe()))
    if used is not None and used != now:
        wrong = ", ".join(key for key in used.keys() | now.keys() if used.get(key) != now.get(key))
        return Row("preprocessing", FAILED, f"other than in training: {wrong}", expected)
    drawn = (samples.pixels(samples.draw(), each) for each in (pre, again))
    same = again.describe() == pre.describe() and next(drawn).equal(next(drawn))
    return Row("preprocessing", OK if same else FAILED, "the same" if same else "changed by saving it", expected)


def _samples(ready: Engine) -> Row:
    """The stored pictures through preprocessing and network, against the stored logits."""
    loaded, stored = ready.loaded, samples.read(ready.loaded.folder)
    if stored is None:
        return Row("sample pictures", NOT, "none are stored: the checkpoint is of an older version", "12 with logits")
    images, logits, dtype = stored
    limit = samples.tolerance(dtype, loaded.dtype, product=loaded.variant.format.product)
    expected = f"the stored classes, and logits within {limit:.2g}, by rounding in {loaded.variant.format.label}"
    try:
        found = engine.logits(ready, samples.pixels(images, loaded.preprocess), len(images))
    except FloatingPointError as error:
        return Row("sample pictures", FAILED, str(error), expected)
    best = logits.topk(2).values
    sure = best[:, 0] - best[:, 1] > limit * logits.abs().max()  # rounding may exchange two classes nearer than that
    other = ((found.argmax(1) != logits.argmax(1)) & sure).sum().item()
    difference = tuning.relative_error(found, logits)
    said = f"{other} of {len(images)} have another class, logits differ by {difference:.2g}"
    return Row("sample pictures", FAILED if other or not difference <= limit else OK, said, expected)


def _speed(ready: Engine, variant: Variant, measured: pd.DataFrame) -> Iterator[Row]:
    """Memory and latency of a picture, with those of the study; another machine is no failure."""
    device, pre = ready.loaded.device, ready.loaded.preprocess
    pixels = torch.zeros(1, 3, *pre.side, dtype=ready.loaded.dtype, device=device)
    used = timing.peak_memory_mb(lambda _: ready(pixels), device)[0] + ready.pool_mb.get(1, 0.0)
    took = timing.latency({variant.name: lambda _: ready(pixels)}, device, BUDGET)["latency_ms"].median()
    rows = measured[measured["variant"] == variant.name]
    rows = rows[rows["batch"] == 1].dropna(subset="latency_p50_ms") if len(rows) else rows
    memory = ("memory: weights and a call", "MB", ready.loaded.weights_mb + used, "peak_memory_mb")
    for what, unit, value, column in (memory, ("latency at batch size 1", "ms", took, "latency_p50_ms")):
        found = f"{number(value)} {unit}"
        if rows.empty:
            yield Row(what, NOT, found, "informational: the study has not measured this variant")
            continue
        before, where = rows[column].iloc[0], rows["hardware"].fillna("").iloc[0] if "hardware" in rows else ""
        here = provenance.facts(provenance.environment(parameters={})).get("hardware")
        same = "the same hardware" if where == here else f"other hardware: {where}" if where else "unknown hardware"
        found += f", {value / before:.2f} times the study's"
        yield Row(what, OK, found, f"informational: {number(before)} {unit} on {same}")

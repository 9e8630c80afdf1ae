"""The network of a merged checkpoint for other runtimes: ONNX in FP32, or AOTInductor in FP16 on a GPU, FP32 on a CPU.

Both take batches of up to 4096 pictures, have preprocessing and class names in their metadata, and are written only if
their logits for the sample pictures are those of the original.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vitlib.deploy import predictor
from vitlib.measure import benchmark, stats, timing
from vitlib.network import checkpoint, samples, tuning
from vitlib.report.tables import number
from vitlib.study import files, provenance, records
from vitlib.study.variants import DIRECT, Variant

Call = Callable[[torch.Tensor], torch.Tensor]  # pixel_values (n, 3, h, w) -> logits (n, classes)
LATENCY = "latency.json"
BATCHES = (1, 3, 12)  # of the sample pictures, whose logits are compared
BUDGET = timing.Budget(rounds=stats.MINIMUM_ROUNDS, samples=20, seconds=0.3)
ANY_BATCH = {0: torch.export.Dim("batch", min=1, max=4096)}


class _Plain(nn.Module):
    """A transformers network that returns nothing but its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values).logits


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="outputs/<study>, or its checkpoint merged")
    parser.add_argument("--to", required=True, choices=EXPORTERS, help="ONNX, or a package of AOTInductor")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: <study>-<to>")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")


@torch.no_grad()
def run(options: argparse.Namespace) -> int:
    checkpoint.quiet_libraries()
    folders = predictor.find(options.checkpoint).folders
    if "merged" not in folders:
        said = "export takes FP32 and FP16, which are in the checkpoint 'merged'; quantized layers run in bitsandbytes"
        raise ValueError(f"{options.checkpoint} holds {' and '.join(folders)}: {said} and in vitlib only")
    device = checkpoint.pick_device("cpu" if options.to == "onnx" else "auto")
    _require(options.to)
    variant = Variant("fp16" if device.type == "cuda" else "fp32", DIRECT)
    loaded = checkpoint.load_folder(folders["merged"], variant, device)
    output = options.output or Path(Path(f"{loaded.about.get('study', 'vitlib')}-{options.to}").name)
    if output.exists() and not (options.overwrite and (output / LATENCY).is_file()):  # no folder of anything else
        raise FileExistsError(f"{output} exists: name another --output, or replace an older export with --overwrite")
    drawn = samples.pixels(samples.draw(), loaded.preprocess).to(device)
    pixels, plain = loaded.preprocess.normalise(drawn, loaded.dtype), _Plain(loaded.model)
    facts = {"labels": loaded.labels.names, "preprocessing": loaded.preprocess.describe()}
    about = {key: json.dumps(value) for key, value in facts.items()}
    with files.atomic_path(output) as folder:
        loaded.preprocess.save(folder)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
            try:
                call = EXPORTERS[options.to](plain, pixels[:2], about, folder)
            except RuntimeError as error:  # of many lines
                raise RuntimeError(f"the export failed: {files.first_line(error)}") from error
        row = {"variant": variant.name, "to": options.to} | _parity(plain, call, pixels)
        row |= _speed(plain, call, pixels[:1])
        records.write_json(row, folder / LATENCY)
    print(f"wrote {output}; logits differ by at most {row['difference']:.2g} (allowed: {row['tolerance']:.2g})")
    plain_ms, took = number(row["plain_ms"]), number(row["exported_ms"])
    print(f"batch size 1: {took} ms, PyTorch without compilation {plain_ms} ms: {row['in_words']}")
    return 0


def _require(to: str) -> None:
    """ImportError or RuntimeError for what an export needs and is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if to == "onnx" and missing:
        raise ImportError(f"ONNX needs {' and '.join(missing)}: pip install 'vitlib[export]'")
    if to == "aoti" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RuntimeError("AOTInductor needs a C++ compiler: install g++, or name one in the variable CXX")


def _onnx(plain: _Plain, pixels: torch.Tensor, about: dict[str, str], folder: Path) -> Call:
    import onnxruntime
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic_shapes={"pixel_values": ANY_BATCH})
    exported = OnnxExporter().export(plain.network, {"pixel_values": pixels}, config=config)
    exported.program.metadata_props.update(about)
    exported.save_pretrained(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as PyTorch has
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda values: torch.from_numpy(session.run(["logits"], {"pixel_values": values.numpy()})[0])


def _aoti(plain: _Plain, pixels: torch.Tensor, about: dict[str, str], folder: Path) -> Call:
    from torch import _inductor

    program = torch.export.export(plain, (pixels,), dynamic_shapes=(ANY_BATCH,))
    to = {"package_path": str(folder / "model.pt2"), "inductor_configs": {"aot_inductor.metadata": about}}
    return _inductor.aoti_load_package(_inductor.aoti_compile_and_package(program, **to))


EXPORTERS = {"onnx": _onnx, "aoti": _aoti}


def _parity(plain: Call, call: Call, pixels: torch.Tensor) -> dict[str, float]:
    """The largest relative difference of logits at BATCHES; ValueError where it is more than rounding."""
    limit, difference = samples.tolerance(pixels.dtype), 0.0
    for size in BATCHES:
        found, expected = (torch.cat([each(part) for part in pixels.split(size)]) for each in (call, plain))
        difference = max(difference, tuning.relative_error(found, expected))
        if not difference <= limit:  # NaN too
            said = f"its logits differ by {difference:.2g} at batch size {size}, and rounding allows {limit:.2g}"
            raise ValueError(f"nothing was written: the exported network is another one, {said}")
    return {"difference": difference, "tolerance": limit}


def _speed(plain: Call, call: Call, pixels: torch.Tensor) -> dict[str, object]:
    """Latency of one picture in both, measured in turns, and their ratio."""
    calls = {"plain": lambda _: plain(pixels), "exported": lambda _: call(pixels)}
    taken = timing.latency(calls, pixels.device, BUDGET).rename(columns={"candidate": "variant"}).assign(batch=1)
    before, after = (benchmark.rounds_of(taken, name, 1) for name in calls)
    times, verdict = stats.times_faster(before, after), stats.same_or_slower(before, after)
    row = {"plain_ms": stats.median_interval(before).estimate, "exported_ms": stats.median_interval(after).estimate}
    row |= {**stats.columns("times_faster", times), "in_words": benchmark.in_words(times, verdict, len(after))}
    return row | {"batch": 1, "hardware": provenance.facts(provenance.environment(parameters={})).get("hardware")}

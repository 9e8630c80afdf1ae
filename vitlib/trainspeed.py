"""What each step towards fast LoRA training brings: images per second of the bare training step. Level 3.

The steps are cumulative and use the functions that `training.train` uses; the Trainer's own work is not in them.
"""

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import pandas as pd
import peft
import torch
from torch import nn

from vitlib import adapters, files, quantize
from vitlib import trainer as training
from vitlib.preprocess import Preprocess
from vitlib.trainer import Examples, Recipe


@dataclass(frozen=True)
class Step:
    """One row of the table: what is switched on."""

    name: str
    rounded: bool = False
    without_casts: bool = False
    compiled: bool = False
    placed: bool = False
    summed: bool = False
    dropout: bool = True


STEPS = (
    Step("PEFT under autocast"),
    Step("PEFT under autocast, no dropout", dropout=False),
    Step("+ frozen weights in bf16", rounded=True),
    Step("+ no casts of inputs", rounded=True, without_casts=True),
    Step("+ compiled blocks, no mask", rounded=True, without_casts=True, compiled=True),
    Step("+ pixels on the device", rounded=True, without_casts=True, compiled=True, placed=True),
    Step(
        "all of these, adapters added into the weights, no dropout",
        **dict.fromkeys(("rounded", "without_casts", "compiled", "placed", "summed"), True),
        dropout=False,
    ),
)


def step_speed(
    model: nn.Module,
    batch: int,
    *,
    pre: Preprocess,
    device: torch.device,
    rank: int = 8,
    alpha: int = 32,
    dropout: float = 0.1,
    calls: int = 12,
    seconds: float = 6.0,
    backend: str = "inductor",
    steps: tuple[Step, ...] = STEPS,
) -> pd.DataFrame:
    """A row for each of `steps`: step, dropout, images_per_s, peak_vram_mb (NaN on a CPU), compile_s, and why not, as
    reason.

    `model` is a plain ViT in fp32 on any device and stays as it is; the pictures (n, 3, h, w) are random. Forward,
    backward, clipping and AdamW of `batch` pictures, in bf16, are repeated up to `calls` times or for `seconds`. A step
    that fails here (no memory, no compiler) is a row with the reason. Adding adapters into the weights (see `adapters`)
    needs a dropout of 0 and keeps those weights in fp32: compare its row with the second. `compile_s` is what the
    first call took longer than the second; what the compiler finds in its cache on disk is not compiled anew.
    """
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2 * batch, 3, *pre.side), dtype=torch.uint8, generator=draw)
    examples = Examples(pixels, torch.randint(0, model.config.num_labels, (2 * batch,), generator=draw))
    rows = []
    for step in steps:
        try:
            trained = _trainable(model, step, rank, alpha, dropout).to(device).train()
            found = _measured(trained, step, examples, batch, pre, device, calls, seconds, backend)
        except (RuntimeError, ImportError) as error:  # of CUDA's memory, or of the compiler
            found = {"reason": files.first_line(error)[:200]}
        trained = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append({"step": step.name, "dropout": dropout if step.dropout else 0.0, **found})
    columns = ["step", "dropout", "images_per_s", "peak_vram_mb", "compile_s", "reason"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _trainable(model: nn.Module, step: Step, rank: int, alpha: int, dropout: float) -> nn.Module:
    config = adapters.config(
        rank=rank,
        alpha=alpha,
        dropout=dropout if step.dropout else 0.0,
        head=quantize.CLASSIFIER,
        summed=step.summed,
    )
    with warnings.catch_warnings():  # of a name that peft still uses and transformers will drop
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    return adapters.round_frozen(adapted, torch.bfloat16) if step.rounded else adapted


def _measured(
    model: nn.Module,
    step: Step,
    examples: Examples,
    batch: int,
    pre: Preprocess,
    device: torch.device,
    calls: int,
    seconds: float,
    backend: str,
) -> dict[str, float]:
    cuda = device.type == "cuda"
    if step.compiled:
        torch._dynamo.reset()  # else a step would find in memory what the one before had compiled
    with ExitStack() as stack:
        stack.enter_context(adapters.without_casts(model, step.without_casts))
        stack.enter_context(training.compiled_blocks(model, backend if step.compiled else None))
        call = _step_of(model, examples.to(device) if step.placed else examples, batch, pre, device)
        start = time.perf_counter()
        call(0)
        _wait(cuda)
        first = time.perf_counter() - start
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call(1)
        _wait(cuda)
        second = time.perf_counter() - start
        count = max(2, min(calls, int(seconds / second)))
        start = time.perf_counter()
        for number in range(count):
            call(2 + number)
        _wait(cuda)
        took = time.perf_counter() - start
    return {
        "images_per_s": count * batch / took,
        "peak_vram_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan"),
        "compile_s": max(first - second, 0.0) if step.compiled else 0.0,
    }


def _step_of(
    model: nn.Module, examples: Examples, batch: int, pre: Preprocess, device: torch.device
) -> Callable[[int], None]:
    """A call with the step's number that trains on one batch."""
    recipe = Recipe(1, batch, 1e-4, 0.01, 0.0, 0.0, crop_area=0.6, precision="bf16", seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    count = len(examples.labels)

    def call(number: int) -> None:
        pixels, labels = examples.take([(number * 7 + row) % count for row in range(batch)])
        if device.type == "cuda" and not pixels.is_cuda:
            pixels, labels = (part.pin_memory().to(device, non_blocking=True) for part in (pixels, labels))
        pixels = pre.normalise(training.augmented(pixels, recipe, number))
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(pixel_values=pixels).logits
        nn.functional.cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        update.step()
        update.zero_grad(set_to_none=True)

    return call


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()

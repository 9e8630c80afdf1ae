"""What a forward pass must do at least, and what the hardware can do at most. Level 1.

The roofline model (Williams et al. 2009): a part of the network can run no faster than its floating-point operations
at the measured peak rate, nor than its bytes at the measured memory bandwidth. Counted are the operations of the
arithmetic itself and the bytes that must move if every tensor is read and written once; caches can beat the second.
"""

from contextlib import suppress
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import PretrainedConfig

from vitlib import timing
from vitlib.timing import Budget

LINEARS = ("attention", "mlp")  # parts whose products are 8-bit where a variant multiplies in 8 bits


@dataclass(frozen=True)
class Ceilings:
    """Measured peaks of one device: a large matrix product by dtype, and a large copy (bytes read and written).

    `tflops["int8"]` counts integer operations; it and `tflops["fp8"]` are absent where no such product runs.
    """

    tflops: dict[str, float]
    gb_s: float


def ceilings(device: torch.device) -> Ceilings:
    """Measure both peaks on `device` with random data (zeros run faster and prove nothing); under two seconds."""
    cuda = device.type == "cuda"
    side, numbers = (8192, 2**30) if cuda else (1024, 2**25)
    tflops = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _seconds(lambda _, a=a, b=b: a @ b, device)
        tflops[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds / 1e12
    if cuda:
        for name, measure in (("int8", _int8_seconds), ("fp8", _fp8_seconds)):
            with suppress(RuntimeError, AttributeError, TypeError, ValueError):  # not on this card, or in this torch
                tflops[name] = 2 * side**3 / measure(side, device) / 1e12
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copied = _seconds(lambda _: target.copy_(source), device)
    return Ceilings(tflops, 2 * source.nbytes / copied / 1e9)


def _int8_seconds(side: int, device: torch.device) -> float:
    """Seconds of one product of two int8 matrices; the second lies transposed, as weights of a linear layer do."""
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    return _seconds(lambda _: torch._int_mm(a, b.t()), device)


def _fp8_seconds(side: int, device: torch.device) -> float:
    """The same for float8_e4m3fn with a scale a matrix, answered in bfloat16."""
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return _seconds(lambda _: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16), device)


def _seconds(call: timing.Call, device: torch.device) -> float:
    samples = timing.latency({"": call}, device, Budget(rounds=2, samples=8, seconds=0.2))
    return samples["latency_ms"].median() / 1e3


def work(
    config: PretrainedConfig,
    *,
    batch: int,
    bytes_per_weight: float,
    bytes_per_value: int,
    class_token_only: bool = False,
) -> pd.DataFrame:
    """Floating-point operations and least bytes of one pass over `batch` pictures, by part of a ViT.

    Index: the parts of `profile.PARTS` that compute. Columns: gflop, mb (10⁶ bytes). `bytes_per_weight` is that of
    the encoder's linear layers (0.52 for NF4, 1 for int8), `bytes_per_value` that of the activations.
    `class_token_only`: of the last block only keys and values are counted for every patch, as a fused network does it.
    """
    hidden, blocks, mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    rows, pixels = batch * (patches + 1), 3 * config.patch_size**2
    state = rows * hidden * bytes_per_value  # the hidden states once
    scores = 2 * 2 * rows * (patches + 1) * hidden
    # Blocks counted by their rows: with the class token only, the last one's share is that of one row of each picture.
    wide = blocks - (1 - 1 / (patches + 1)) if class_token_only else blocks
    parts = {
        "patch embedding": (
            2 * batch * patches * pixels * hidden,
            batch * patches * pixels * bytes_per_value + 2 * state,
        ),
        "attention": (
            (wide + blocks) * 2 * 2 * rows * hidden**2 + wide * scores,  # query and output; keys and values
            blocks * 4 * hidden**2 * bytes_per_weight + (wide + blocks) * 6 * state,
        ),
        "mlp": (
            wide * 4 * rows * hidden * mlp,
            blocks * 2 * hidden * mlp * bytes_per_weight + wide * 2 * state * (1 + mlp / hidden),
        ),
        "norm": (0, (2 * blocks + 1) * 2 * state),
        "residual": (0, 2 * blocks * 3 * state),
        "head": (2 * batch * hidden * config.num_labels, batch * hidden * bytes_per_value),
    }
    return pd.DataFrame(parts, index=["gflop", "mb"]).T.mul({"gflop": 1e-9, "mb": 1e-6})


def achieved(
    counted: pd.DataFrame, device_time_us: pd.Series, peak: Ceilings, dtype: str, *, linears: str = ""
) -> pd.DataFrame:
    """`counted` with the time each part took, its TFLOP/s and GB/s, the floor that the roofline sets, and their ratio.

    `floor_us` is the larger of operations over peak rate and bytes over bandwidth; `share_of_floor` is floor over time:
    1 is as fast as this hardware allows. Parts that took time and compute nothing of the network's (quantization, copy)
    have their time only. `dtype` names the peak rate, `linears` that of LINEARS where it is measured and another: the
    scores of attention, a small share of its operations, are then held against a rate that is too high for them.
    """
    frame = counted.reindex(device_time_us.index).join(device_time_us.rename("device_time_us"))
    rates = {part: peak.tflops.get(linears if part in LINEARS else dtype, peak.tflops[dtype]) for part in frame.index}
    frame["ceiling_tflop_s"] = pd.Series(rates, dtype=float)
    frame["ceiling_gb_s"] = peak.gb_s
    seconds = frame["device_time_us"] * 1e-6
    frame["tflop_s"] = frame["gflop"] / 1e3 / seconds
    frame["gb_s"] = frame["mb"] / 1e3 / seconds
    by_rate, by_bytes = frame["gflop"] / 1e3 / frame["ceiling_tflop_s"], frame["mb"] / 1e3 / peak.gb_s
    frame["floor_us"] = 1e6 * by_rate.where(by_rate > by_bytes, by_bytes)
    frame["bound"] = [
        "" if a != a else "arithmetic" if a > b else "memory" for a, b in zip(by_rate, by_bytes, strict=True)
    ]
    frame["share_of_floor"] = frame["floor_us"] / frame["device_time_us"]
    return frame

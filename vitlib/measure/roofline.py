"""What a forward pass must do at least, and what the hardware can do at most.

The roofline model (Williams et al. 2009): a part of the network can run no faster than its floating-point operations
at the measured peak rate, nor than its bytes at the measured memory bandwidth. Operations are those of the matrix
products, as PyTorch's counter has them; bytes are those that must move if every tensor is read and written once.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

from vitlib.measure import timing
from vitlib.measure.timing import Budget

LINEARS = ("attention", "mlp")  # parts whose products are 8-bit where a variant multiplies in 8 bits
NOT_MEASURED = "ceiling not measured"
SHARE_LIMIT = 1.05  # of the floor: beyond it, either ceiling is lower than what the hardware can do


class Ceilings(NamedTuple):
    """Measured peaks of one device."""

    tflops: dict[str, float]  # of a large linear layer by dtype; int8 and fp8 are absent where no such product runs
    gb_s: float  # of a large copy, bytes read and written


def ceilings(device: torch.device) -> Ceilings:
    """Measure both peaks on `device` with random data (zeros run faster); takes under two seconds.

    On a CPU the peak is the best of several sizes, since matrices that fit its cache are faster.
    """
    cuda = device.type == "cuda"
    sides, numbers = ((8192,), 2**30) if cuda else ((128, 256, 512, 1024), 2**25)
    tflops = {name: max(_tflops(name, side, device) for side in sides) for name in ("float32", "float16", "bfloat16")}
    for name in ("int8", "fp8") if cuda else ():
        with suppress(RuntimeError, ValueError):  # not on this card
            tflops[name] = _tflops(name, sides[-1], device)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return Ceilings(tflops, 2 * source.nbytes / _seconds(lambda: target.copy_(source), device) / 1e9)


def _tflops(dtype: str, side: int, device: torch.device) -> float:
    return 2 * side**3 / _seconds(product(dtype, side, device), device) / 1e12


def product(dtype: str, side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A call that computes x wᵀ of two square matrices, as a linear layer does, in a dtype of torch, "int8" or "fp8".

    x w in FP16 has another, far slower kernel on a CPU. "fp8" is float8_e4m3fn with one scale a matrix, into BF16.
    """
    if dtype == "int8":
        a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    x, weight = (torch.randn(side, side, device=device) for _ in range(2))
    if dtype == "fp8":
        x, weight, one = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn), torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    x, weight = x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
    return lambda: F.linear(x, weight)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    samples = timing.latency({"": lambda _: call()}, device, Budget(rounds=2, samples=8, seconds=0.2))
    return samples["latency_ms"].median() / 1e3


def work(
    config: PretrainedConfig, batch: int, *, bytes_per_weight: float, bytes_per_value: int, class_token_only: bool
) -> pd.DataFrame:
    """Floating-point operations and least bytes of one pass over `batch` pictures, by part of a ViT.

    Index: the parts of `profile.PARTS` that compute. Columns: gflop, mb (10⁶ bytes). `bytes_per_weight` is that of
    the encoder's linear layers (0.52 for NF4, 1 for int8), `bytes_per_value` that of the activations.
    `class_token_only`: the last block computes only keys and values for every patch, as a fused network does.
    """
    hidden, blocks, mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    patches, pixels = (config.image_size // config.patch_size) ** 2, 3 * config.patch_size**2
    tokens, rows = patches + 1, batch * (patches + 1)
    wide = blocks - (1 - 1 / tokens) if class_token_only else blocks  # blocks, by the share of their rows
    state = rows * hidden * bytes_per_value  # the hidden states once
    products = 4 * rows * hidden * (hidden * (wide + blocks) + tokens * wide)
    between = wide * 2 * state * (1 + mlp / hidden)  # the states before and after the GELU
    parts = {
        "patch embedding": (
            2 * batch * patches * pixels * hidden,
            batch * patches * pixels * bytes_per_value + 2 * state,
        ),
        "attention": (products, blocks * 4 * hidden**2 * bytes_per_weight + (wide + blocks) * 6 * state),
        "mlp": (4 * rows * hidden * mlp * wide, blocks * 2 * hidden * mlp * bytes_per_weight + between),
        "norm": (0, (2 * blocks + 1) * 2 * state),
        "residual": (0, 2 * blocks * 3 * state),
        "head": (2 * batch * hidden * config.num_labels, batch * hidden * bytes_per_value),
    }
    counted = pd.DataFrame.from_dict(parts, orient="index", columns=["gflop", "mb"], dtype=float)
    return counted * [1e-9, 1e-6]


def achieved(
    counted: pd.DataFrame, device_time_us: pd.Series, peak: Ceilings, dtype: str, *, linears: str = ""
) -> pd.DataFrame:
    """`counted` with the time of each part, its TFLOP/s and GB/s, the floor that the roofline sets, and their ratio.

    `floor_us` is the larger of operations over peak rate and bytes over bandwidth; `share_of_floor` is floor over time:
    1 is as fast as this hardware allows. A share over SHARE_LIMIT means that a ceiling was not found (a part may read
    from the cache, which is faster than the copy): `bound` is then NOT_MEASURED and the share NaN. Parts without
    operations or bytes of their own (quantization, copy) have their time only. `dtype` names the peak rate, `linears`
    that of LINEARS where it is another and was measured; attention's scores are then compared with too high a rate.
    """
    frame = counted.reindex(device_time_us.index).join(device_time_us.rename("device_time_us"))
    rates = {part: peak.tflops.get(linears if part in LINEARS else dtype, peak.tflops[dtype]) for part in frame.index}
    computes = frame["gflop"] > 0
    frame["ceiling_tflop_s"] = pd.Series(rates, dtype=float).where(computes)
    frame["ceiling_gb_s"] = frame["mb"].notna().map({True: peak.gb_s, False: float("nan")})
    seconds = frame["device_time_us"] * 1e-6
    frame["tflop_s"] = (frame["gflop"] / 1e3 / seconds).where(computes)
    frame["gb_s"] = frame["mb"] / 1e3 / seconds
    by_rate, by_bytes = frame["gflop"] / 1e3 / pd.Series(rates), frame["mb"] / 1e3 / peak.gb_s
    frame["floor_us"] = 1e6 * by_rate.where(by_rate > by_bytes, by_bytes)
    share = frame["floor_us"] / frame["device_time_us"]
    bound = pd.Series("memory", frame.index).where(by_rate <= by_bytes, "arithmetic").where(by_rate.notna(), "")
    frame["bound"] = bound.where(~(share > SHARE_LIMIT), NOT_MEASURED)
    frame["share_of_floor"] = share.where(share <= SHARE_LIMIT)
    return frame

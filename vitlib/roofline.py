"""What a forward pass must do at least, and what the hardware can do at most.

The roofline model (Williams et al. 2009): a part of the network can run no faster than its floating-point operations
at the measured peak rate, nor than its bytes at the measured memory bandwidth. Operations are counted by PyTorch in a
pass of the plain network; bytes are those that must move if every tensor is read and written once.
"""

import functools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, ViTConfig, ViTForImageClassification

from vitlib import timing
from vitlib.timing import Budget

LINEARS = ("attention", "mlp")  # parts whose products are 8-bit where a variant multiplies in 8 bits
NOT_MEASURED = "ceiling not measured"
SHARE_LIMIT = 1.05  # of the floor: beyond it, either ceiling is lower than what the hardware can do


@dataclass(frozen=True)
class Ceilings:
    """Measured peaks of one device: a large linear layer by dtype, and a large copy (bytes read and written).

    `tflops["int8"]` counts integer operations; it and `tflops["fp8"]` are absent where no such product runs.
    """

    tflops: dict[str, float]
    gb_s: float


def ceilings(device: torch.device) -> Ceilings:
    """Measure both peaks on `device` with random data (zeros run faster); takes under two seconds.

    The product is the one that a linear layer computes, x wᵀ: on a CPU, x w in FP16 takes another kernel, which is many
    times slower. On a CPU the peak is the best of several sizes, since matrices that fit its cache are faster.
    """
    cuda = device.type == "cuda"
    sides, numbers = ((8192,), 2**30) if cuda else ((128, 256, 512, 1024), 2**25)
    side, tflops = sides[-1], {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tflops[str(dtype).removeprefix("torch.")] = max(_linear_tflops(size, dtype, device) for size in sides)
    if cuda:
        for name, product in (("int8", int8_product), ("fp8", fp8_product)):
            with suppress(RuntimeError, AttributeError, TypeError, ValueError):  # not on this card, or in this torch
                tflops[name] = 2 * side**3 / _seconds(product(side, device), device) / 1e12
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source), device)
    return Ceilings(tflops, 2 * source.nbytes / copied / 1e9)


def _linear_tflops(side: int, dtype: torch.dtype, device: torch.device) -> float:
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: F.linear(x, weight), device) / 1e12


def int8_product(side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A call that multiplies two int8 matrices (side, side), the second transposed as in a linear layer."""
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


def fp8_product(side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """The same for float8_e4m3fn with one scale a matrix; the result is in BF16."""
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    samples = timing.latency({"": lambda _: call()}, device, Budget(rounds=2, samples=8, seconds=0.2))
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
    `class_token_only`: the last block computes only keys and values for every patch, as a fused network does.
    """
    hidden, blocks, mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    rows, pixels = batch * (patches + 1), 3 * config.patch_size**2
    state = rows * hidden * bytes_per_value  # the hidden states once
    # Blocks counted by their rows: with the class token only, the last block's share is one row of each picture.
    wide = blocks - (1 - 1 / (patches + 1)) if class_token_only else blocks
    least_bytes = {
        "patch embedding": batch * patches * pixels * bytes_per_value + 2 * state,
        "attention": blocks * 4 * hidden**2 * bytes_per_weight + (wide + blocks) * 6 * state,
        "mlp": blocks * 2 * hidden * mlp * bytes_per_weight + wide * 2 * state * (1 + mlp / hidden),
        "norm": (2 * blocks + 1) * 2 * state,
        "residual": 2 * blocks * 3 * state,
        "head": batch * hidden * bytes_per_value,
    }
    counted = pd.DataFrame({"gflop": operations(config, batch, class_token_only), "mb": least_bytes})
    return counted.loc[list(least_bytes)].fillna(0).mul({"gflop": 1e-9, "mb": 1e-6})


def operations(config: PretrainedConfig, batch: int, class_token_only: bool = False) -> dict[str, float]:
    """Floating-point operations of the matrix products of one pass, by part; no weight is allocated."""
    own, last = _counted(json.dumps(config.to_dict(), default=str), batch), config.num_hidden_layers - 1
    total = {"patch embedding": own["vit.embeddings"], "head": own["classifier"], "attention": 0.0, "mlp": 0.0}
    for number in range(config.num_hidden_layers):
        layer, tokens = f"vit.layers.{number}", (config.image_size // config.patch_size) ** 2 + 1
        left = 1 / tokens if number == last and class_token_only else 1.0
        keys_and_values = own[f"{layer}.attention.k_proj"] + own[f"{layer}.attention.v_proj"]
        total["attention"] += keys_and_values + left * (own[f"{layer}.attention"] - keys_and_values)
        total["mlp"] += left * own[f"{layer}.mlp"]
    return total


@functools.cache  # all variants of a study are one architecture
def _counted(config: str, batch: int) -> dict[str, int]:
    """Operations by module name of the plain network that `config`, a JSON text, describes."""
    plain = ViTConfig.from_dict(json.loads(config))
    with torch.device("meta"):
        network = ViTForImageClassification._from_config(plain, attn_implementation="eager").eval()
        pixel_values = torch.empty(batch, 3, plain.image_size, plain.image_size)
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        network(pixel_values)
    counts = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    return {name.removeprefix("ViTForImageClassification."): count for name, count in counts.items()}


def achieved(
    counted: pd.DataFrame, device_time_us: pd.Series, peak: Ceilings, dtype: str, *, linears: str = ""
) -> pd.DataFrame:
    """`counted` with the time of each part, its TFLOP/s and GB/s, the floor that the roofline sets, and their ratio.

    `floor_us` is the larger of operations over peak rate and bytes over bandwidth; `share_of_floor` is floor over time:
    1 is as fast as this hardware allows. A share over 1.05 means that a ceiling was not found (a part may also read
    from the cache, which is faster than the copy): `bound` is then NOT_MEASURED and the share NaN. Parts that compute
    nothing of the network's (quantization, copy) have their time only. `dtype` names the peak rate, `linears` that of
    LINEARS where it is another and was measured; the scores of attention, a small share of its operations, are then
    compared with a rate that is too high for them.
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

"""Device time of a forward pass by part of the model and by operation, from raw profiler events. Level 1.

Times are sums over kernels, never averages. A kernel belongs to a part of the model because of the module that
launched it (ranges are opened around `forward` while profiling), not because of what its name contains. On a CPU the
"kernels" are the operators, with the time spent in each but not in those it calls.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit import modeling_vit

from vitlib.measure import timing

PARTS = ("patch embedding", "attention", "mlp", "norm", "residual", "head", "quantization", "copy", "other")
ATTENTION_FUNCTION = "scaled dot product"
COLUMNS = ("part", "operation", "kernel", "calls", "device_time_us")

# Which module class opens which range; a module of this project says its `part` itself. The innermost open range owns
# a kernel.
_RANGES = {
    modeling_vit.ViTEmbeddings: "patch embedding",
    modeling_vit.ViTAttention: "attention",
    modeling_vit.ViTMLP: "mlp",
    modeling_vit.ViTLayer: "residual",
    nn.LayerNorm: "norm",
}
# bitsandbytes operators (prefixes) that only convert between number formats; its matrix products stay with their layer.
_QUANTIZATION = tuple(
    f"bitsandbytes::{name}"
    for name in ("dequantize_", "quantize_", "int8_vectorwise_", "int8_double_quant", "int8_mm_dequant")
)
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")  # calls of the driver, not operators
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::clone", "Memcpy")


@contextmanager
def annotated(model: nn.Module) -> Iterator[None]:
    """While open, every module of `model` and its attention function run inside a named profiler range."""
    name_of_attention = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS.get(name_of_attention, modeling_vit.eager_attention_forward)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            part = "head" if name == "classifier" else getattr(module, "part", _RANGES.get(type(module)))
            if part is not None:
                module.forward = _in_range(part, module.forward)
                stack.callback(delattr, module, "forward")
        ALL_ATTENTION_FUNCTIONS[name_of_attention] = _in_range(ATTENTION_FUNCTION, attention)
        stack.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, name_of_attention)
        yield


def _in_range(part: str, function: Callable) -> Callable:
    """`function`, called inside the profiler range of `part`."""

    @functools.wraps(function)
    def called(*args: object, **kwargs: object) -> object:
        with record_function(f"part:{part}"):
            return function(*args, **kwargs)

    return called


def profile(
    call: Callable[[], object], model: nn.Module, device: torch.device, passes: int = 3, trace: Path | None = None
) -> pd.DataFrame:
    """Kernels of one pass of `call`, summed over equal (part, operation, kernel), largest first.

    Columns: part, operation, kernel, calls (a pass), device_time_us (a pass). `frame.attrs` holds `total_us` (all
    device events, whether attributed or not) and `unattributed_share`. `trace` receives a Chrome trace (.json.gz).
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with annotated(model):
        call()
        timing.synchronise(device)  # or the last kernels of this call fall into the profile
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            for _ in range(passes):
                call()
            timing.synchronise(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    rows, total = (_cuda_rows if device.type == "cuda" else _cpu_rows)(profiler)
    frame = pd.DataFrame(rows, columns=["part", "operation", "kernel", "device_time_us"])
    grouped = frame.groupby(["part", "operation", "kernel"], as_index=False, dropna=False)
    summed = grouped.agg(calls=("device_time_us", "size"), device_time_us=("device_time_us", "sum"))
    summed[["calls", "device_time_us"]] /= passes
    summed = summed.sort_values("device_time_us", ascending=False, ignore_index=True)
    other = summed.loc[summed["part"] == "other", "device_time_us"].sum()
    summed.attrs = {"total_us": total / passes, "unattributed_share": other * passes / total}
    return summed[list(COLUMNS)]


def _cuda_rows(profiler: torch.profiler.profile) -> tuple[list[tuple], float]:
    """Every device event once, placed by the operator that its launch is linked to."""
    on_host = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    launches = {e.id: e for e in on_host if e.name.startswith(_LAUNCHES)}
    operators = {e.id: e for e in on_host if not e.name.startswith(_LAUNCHES)}

    def launcher(event: object) -> object | None:  # a kernel launched outside operators is linked to its launch only
        return operators.get(event.linked_correlation_id()) or launches.get(event.correlation_id())

    rows = [
        (*_place(launcher(e), e.name()), e.name(), e.duration_ns() / 1e3)
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()
    ]
    return rows, sum(row[-1] for row in rows)


def _cpu_rows(profiler: torch.profiler.profile) -> tuple[list[tuple], float]:
    named = [event for event in profiler.events() if "::" in event.name and not event.name.startswith("part:")]
    operators = [event for event in named if event.self_cpu_time_total > 0]
    rows = [(*_place(event, event.name), event.name, event.self_cpu_time_total) for event in operators]
    return rows, sum(row[-1] for row in rows)


def _place(event: object | None, kernel: str) -> tuple[str, str]:
    """(part, operation) of what `event` launched: from the operators and ranges it ran in, innermost first."""
    if event is None:
        return "other", "not linked to an operator"
    chain = []
    while event is not None:
        chain.append(event.name)
        event = event.cpu_parent
    ranges = [name.removeprefix("part:") for name in chain if name.startswith("part:")]
    operator = next((name for name in chain if "::" in name), chain[0])
    if ATTENTION_FUNCTION in ranges[:1]:
        return "attention", ATTENTION_FUNCTION
    # The 4-bit product launches its dequantization itself, so only the kernel's name tells the two apart.
    if any(name.startswith(_QUANTIZATION) for name in chain) or kernel.startswith("void kDequantize"):
        return "quantization", operator
    if operator.startswith(_COPIES) or kernel.startswith(_COPIES):
        return "copy", operator
    return (ranges[0] if ranges else "other"), operator


def attention_time_us(frame: pd.DataFrame) -> float:
    """Device time of the attention function (scores, softmax, weighted sum), without the four projections."""
    return float(frame.loc[frame["operation"] == ATTENTION_FUNCTION, "device_time_us"].sum())


def attention_kernel(frame: pd.DataFrame) -> str:
    """The kernel in which the attention function spends most of its time."""
    inside = frame[frame["operation"] == ATTENTION_FUNCTION]
    return str(inside.iloc[0]["kernel"]) if len(inside) else ""


def by_part(frame: pd.DataFrame) -> pd.Series:
    """Device time in microseconds by part of the model, in the order of `PARTS`."""
    return frame.groupby("part")["device_time_us"].sum().reindex(PARTS).dropna()

"""The gate that refuses a variant under a wrong name, and the roofline's arithmetic."""

import pandas as pd
import pytest
import torch

from vitlib import benchmark, checkpoint, plots, profile, provenance, roofline
from vitlib.provenance import Monitor
from vitlib.sources import Labels
from vitlib.variants import Variant

FLASH_2 = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::half_t> >"
TORCH_FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::half_t> >"
EFFICIENT = "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::half_t>::Params)"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"


def profiled(kernel: str = CUDNN, *, attention_us: float = 10.0, missed: float = 0.01, quantized: bool = False):
    rows = [
        ("attention", profile.ATTENTION_FUNCTION, kernel, 4.0, attention_us),
        ("mlp", "bitsandbytes::gemm_4bit" if quantized else "aten::addmm", "gemm", 8.0, 40.0),
    ]
    frame = pd.DataFrame(rows, columns=list(profile.COLUMNS))
    frame.attrs = {"total_us": 50.0, "unattributed_share": missed}
    return frame


@pytest.mark.parametrize(
    ("variant", "frame"),
    [
        (Variant("fp16"), profiled()),
        (Variant("fp16"), profiled(TORCH_FLASH)),
        (Variant("fp16", "flash_attention_2"), profiled(FLASH_2)),
        (Variant("nf4", "flash_attention_2"), profiled(FLASH_2, quantized=True)),
        (Variant("fp16", "direct_cudnn"), profiled(CUDNN)),
        (Variant("fp16", "direct_efficient"), profiled(EFFICIENT)),
        (Variant("fp16", "direct_fa"), profiled(TORCH_FLASH)),
        (Variant("fp16", "direct_fa2", "fused"), profiled(FLASH_2)),
        (Variant("fp16", "direct_math"), profiled("sm90_xmma_gemm_f16f16")),
        (Variant("nf4", "direct", "fused-graph"), profiled(CUDNN)),
        (Variant("nf4", "direct", "fused-graph"), profiled(CUDNN, quantized=True)),
    ],
)
def test_what_ran_under_its_own_name_passes(variant, frame):
    assert benchmark.identity_fault(variant, frame) == ""


@pytest.mark.parametrize(
    ("variant", "frame", "reason"),
    [
        (Variant("fp16", "flash_attention_2"), profiled(CUDNN), "attention ran in cudnn"),
        (Variant("fp16", "flash_attention_2"), profiled(TORCH_FLASH), "attention ran in void pytorch_flash"),
        (Variant("fp16"), profiled(FLASH_2), "attention ran in void flash::"),
        (Variant("fp16", "direct_fa2"), profiled(TORCH_FLASH), "attention ran in void pytorch_flash"),
        (Variant("fp16", "direct_fa"), profiled(CUDNN), "attention ran in cudnn"),
        (Variant("fp16", "direct_cudnn"), profiled(EFFICIENT), "attention ran in fmha_cutlass"),
        (Variant("fp16", "direct_efficient"), profiled(CUDNN), "attention ran in cudnn"),
        (Variant("fp16", "direct_math"), profiled(CUDNN), "attention ran fused"),
        (Variant("fp16", "direct", "fused"), profiled(quantized=True), "was used"),
        (Variant("fp16", "eager"), profiled(CUDNN), "attention ran fused"),
        (Variant("fp16"), profiled(attention_us=0.0), "no attention function"),
        (Variant("fp16"), profiled(missed=0.06), "6.0%"),
        (Variant("nf4"), profiled(), "not used"),
        (Variant("fp16"), profiled(quantized=True), "was used"),
    ],
)
def test_what_ran_under_another_name_is_refused(variant, frame, reason):
    assert reason in benchmark.identity_fault(variant, frame)


@pytest.mark.parametrize("wall_ms", [1.0, 1.015])
def test_clocks_that_agree_need_no_note(wall_ms):
    assert benchmark.clock_note(pd.DataFrame({"latency_ms": [wall_ms], "device_ms": [1.0]})) == ""


def test_clocks_that_differ_are_said():
    assert "+30 µs" in benchmark.clock_note(pd.DataFrame({"latency_ms": [1.03], "device_ms": [1.0]}))


def test_vit_large_does_123_gflop_a_picture():
    with torch.device("meta"):
        config = checkpoint.new("vit-large", image_size=224, labels=Labels(*[tuple(map(str, range(102)))] * 2)).config
    counted = roofline.work(config, batch=1, bytes_per_weight=2, bytes_per_value=2)
    assert counted["gflop"].sum() == pytest.approx(123.1, abs=0.1)
    weights = counted.loc[["attention", "mlp"], "mb"].sum() * 1e6
    assert weights > 24 * 12 * 1024**2 * 2  # every weight moves at least once


def test_a_fused_network_does_less_in_its_last_block():
    """Keys and values of all patches, everything else for the class token."""
    with torch.device("meta"):
        config = checkpoint.new("vit-large", image_size=224, labels=Labels(("a", "b"), ("a", "b"))).config
    sizes = {"batch": 1, "bytes_per_weight": 2, "bytes_per_value": 2}
    full, less = roofline.work(config, **sizes), roofline.work(config, **sizes, class_token_only=True)
    query_and_output, scores, mlp = 2 * 2 * 1024**2, 2 * 2 * 197 * 1024, 2 * 2 * 1024 * 4096
    assert (full - less)["gflop"].sum() == pytest.approx(196 * (query_and_output + scores + mlp) / 1e9)
    assert (full - less).loc["patch embedding"].abs().sum() == 0


def test_floor_is_the_larger_of_arithmetic_and_bytes():
    counted = pd.DataFrame({"gflop": [1000.0, 0.0], "mb": [1.0, 1000.0]}, index=["mlp", "norm"])
    peak = roofline.Ceilings({"float16": 100.0}, gb_s=1000.0)
    times = pd.Series({"mlp": 20000.0, "norm": 2000.0})
    found = roofline.achieved(counted, times, peak, "float16")
    assert found["floor_us"].to_dict() == {"mlp": 10000.0, "norm": 1000.0}
    assert found["bound"].to_dict() == {"mlp": "arithmetic", "norm": "memory"}
    assert found["share_of_floor"].to_dict() == {"mlp": 0.5, "norm": 0.5}
    assert found["tflop_s"]["mlp"] == pytest.approx(50.0)


def test_eight_bit_products_have_their_own_ceiling_and_conversions_only_their_time():
    counted = pd.DataFrame({"gflop": [1000.0, 10.0], "mb": [1.0, 1.0]}, index=["mlp", "head"])
    peak = roofline.Ceilings({"float16": 100.0, "int8": 200.0}, gb_s=1000.0)
    times = pd.Series({"mlp": 20000.0, "head": 1000.0, "quantization": 7000.0})
    found = roofline.achieved(counted, times, peak, "float16", linears="int8")
    assert found["ceiling_tflop_s"].to_dict() == {"mlp": 200.0, "head": 100.0, "quantization": 100.0}
    assert found["floor_us"]["mlp"] == 5000.0
    assert found["device_time_us"].sum() == 28000.0 and found.loc["quantization", "bound"] == ""
    without = roofline.achieved(
        counted, times, roofline.Ceilings({"float16": 100.0}, 1000.0), "float16", linears="int8"
    )
    assert without["ceiling_tflop_s"]["mlp"] == 100.0  # where no 8-bit product runs
    shown = benchmark.readable_roofline(found.rename_axis("part").reset_index().assign(variant="int8-sdpa"), 0.01)
    assert shown["part"].tolist() == ["mlp", "head", "quantization"]
    assert shown[["TFLOP/s", "of at most", "GB/s", "of a copy's"]].iloc[2].isna().all()
    assert shown["of at most"].iloc[0] == 200.0


def test_products_in_8_bit_run_as_the_ceiling_measures_them():
    assert set(benchmark.EIGHT_BIT_PRODUCTS.values()) == {"int8", "fp8"}
    for measure in (roofline._int8_seconds, roofline._fp8_seconds):  # a CPU's are slow, and no ceiling of anything
        assert measure(64, torch.device("cpu")) > 0


def test_fifteen_variants_have_fifteen_colours():
    for count in (3, 10, 15):
        assert len(set(plots._colours([str(number) for number in range(count)]).values())) == count


def test_nearly_equal_ceilings_get_one_label():
    assert plots._near([50.9, 735.0, 741.4, 1200.0]) == [[50.9], [735.0, 741.4], [1200.0]]
    row = {"part": "mlp", "gflop": 1.0, "mb": 1.0, "tflop_s": 10.0, "ceiling_gb_s": 4000.0}
    frame = pd.DataFrame([row | {"variant": f"v{c}", "ceiling_tflop_s": c} for c in (735.0, 741.4)])
    texts = [text.get_text() for text in plots.roofline(frame).axes[0].texts]
    assert texts == ["735 – 741 TFLOP/s"]


def test_what_was_not_reached_is_said():
    checks = pd.DataFrame({"check": ["nothing changed", "2 % slower", "clocks"], "reached": ["no", "no", "yes"]})
    text = benchmark.unreached(checks)
    assert "*nothing changed*; *2 % slower*" in text and "clocks" not in text
    assert benchmark.unreached(checks.tail(1)) == "All of it was reached."


def test_columns_that_say_nothing_are_not_shown():
    frame = pd.DataFrame({"variant": ["a", "b"], "note": ["", ""], "ms": [1.0, float("nan")], "said": ["", "x"]})
    assert list(plots.table(frame).data) == ["variant", "ms", "said"]


def test_calls_of_a_round_are_a_range():
    assert benchmark.calls_of(pd.Series([2, 14, 40])) == "2 to 40 (median 14)"
    assert benchmark.calls_of(pd.Series([7, 7])) == "7"


def test_monitor_reports_ranges_and_every_throttle_reason(monkeypatch):
    states = iter([(1980.0, []), (1200.0, ["SwPowerCap"]), *[(1500.0, [])] * 1000])

    def state():
        clock, reasons = next(states)
        return [{"sm_clock_mhz": clock, "throttle_reasons": reasons}], None

    monkeypatch.setattr(provenance, "gpu_state", state)
    with Monitor(seconds=0.01) as monitor:
        while len(monitor.samples) < 3:
            pass
    summary = monitor.summary()
    assert (summary["sm_clock_mhz"]["min"], summary["sm_clock_mhz"]["max"]) == (1200.0, 1980.0)
    assert summary["throttle_reasons"] == ["SwPowerCap"]


def test_monitor_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(provenance, "gpu_state", lambda: (None, "nvidia-smi was not found"))
    with Monitor() as monitor:
        pass
    assert monitor.summary() == {"samples": 0, "reason": "nvidia-smi was not found"}

"""The gate that refuses a variant under a wrong name."""

import pandas as pd
import pytest

from vitlib.measure import profile
from vitlib.network import verify
from vitlib.study.variants import Variant

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
        (Variant("nf4", "direct", "fused-graph"), profiled(CUDNN)),
        (Variant("nf4", "direct", "fused-graph"), profiled(CUDNN, quantized=True)),
    ],
)
def test_what_ran_under_its_own_name_passes(variant, frame):
    assert verify.identity_fault(variant, frame) == ""


@pytest.mark.parametrize(
    ("variant", "frame", "reason"),
    [
        (Variant("fp16", "flash_attention_2"), profiled(CUDNN), "attention ran in cudnn"),
        (Variant("fp16", "flash_attention_2"), profiled(TORCH_FLASH), "attention ran in void pytorch_flash"),
        (Variant("fp16"), profiled(FLASH_2), "attention ran in void flash::"),
        (Variant("fp16", "direct", "fused"), profiled(quantized=True), "was used"),
        (Variant("fp16", "eager"), profiled(CUDNN), "attention ran fused"),
        (Variant("fp16"), profiled(attention_us=0.0), "no attention function"),
        (Variant("fp16"), profiled(missed=0.06), "6.0%"),
        (Variant("nf4"), profiled(), "not used"),
        (Variant("fp16"), profiled(quantized=True), "was used"),
    ],
)
def test_what_ran_under_another_name_is_refused(variant, frame, reason):
    assert reason in verify.identity_fault(variant, frame)

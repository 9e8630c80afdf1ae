"""What the profiler saw against what a variant is called: nothing is measured under a wrong name."""

import pandas as pd

from vitlib import profile
from vitlib.variants import Variant

ATTRIBUTION_LIMIT = 0.05  # share of the device time that may belong to no part of the model


class GateError(RuntimeError):
    """The baseline is not what its name says; nothing may be compared with it."""


def identity_fault(variant: Variant, frame: pd.DataFrame) -> str:
    """What in the kernels of `profile.profile` contradicts `variant`, '' if nothing does.

    FlashAttention-2's own kernels are in the namespace `flash::`, PyTorch's copy of them in `pytorch_flash::`.
    """
    kernel = profile.attention_kernel(frame)
    if profile.attention_time_us(frame) <= 0:
        return "the profiler saw no attention function"
    if frame.attrs["unattributed_share"] > ATTRIBUTION_LIMIT:
        return f"{frame.attrs['unattributed_share']:.1%} of the device time belongs to no part of the model"
    own_flash = "flash::flash_fwd" in kernel and "pytorch_flash" not in kernel
    if own_flash != variant.own_flash:
        return f"attention ran in {kernel}"
    unfused = variant.attention == "eager"
    if unfused and any(part in kernel for part in ("scaled_dot_product", "fmha", "sdpa", "flash")):
        return f"attention ran fused, in {kernel}"
    if variant.fused and variant.quantized:  # several libraries can compute these; the layers were verified
        return ""
    through_bitsandbytes = frame["operation"].str.startswith("bitsandbytes::").any()
    if through_bitsandbytes != variant.quantized:
        return "bitsandbytes was " + ("not used" if variant.quantized else "used")
    return ""

"""The table of variants: what a study compares, one row each. Level 0: no torch."""

import difflib
from dataclasses import dataclass

# int8 is LLM.int8 with its outliers; w8a16 and w8a8 multiply the same stored rows without them, with activations in 16
# bit or quantized row by row. fp8 is made from the merged weights while they load.
WEIGHTS = ("fp32", "fp16", "bf16", "nf4", "int8", "w8a16", "w8a8", "fp8")
FUSED_ONLY = ("w8a16", "w8a8", "fp8")
# The first three are transformers' own; the others are this project's, which never build a mask (see `attention`).
ATTENTIONS = (
    *("eager", "sdpa", "flash_attention_2"),
    *("direct", "direct_cudnn", "direct_efficient", "direct_math", "direct_fa", "direct_fa2"),
)
EXECUTIONS = ("eager", "graph", "compile", "fused", "fused-graph", "fused-compile", "fused-compile-graph")
_ATTENTION_WORDS = {"sdpa": "SDPA", "flash_attention_2": "FlashAttention-2", "eager": "unfused attention"}
_EXECUTION_WORDS = {"fused": "fused", "graph": "CUDA graph", "compile": "torch.compile"}
_CHECKPOINTS = {"nf4": "nf4", "int8": "int8", "w8a16": "int8", "w8a8": "int8"}


@dataclass(frozen=True)
class Variant:
    """One row: weights × attention × execution; nothing else differs between two rows."""

    weights: str
    attention: str = "sdpa"
    execution: str = "eager"

    def __post_init__(self) -> None:
        for value, allowed in (
            (self.weights, WEIGHTS),
            (self.attention, ATTENTIONS),
            (self.execution, EXECUTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
        if self.weights in FUSED_ONLY and not self.fused:
            raise ValueError(f"{self.weights} weights need a fused execution (fused, fused-graph or fused-compile)")
        if self.weights == "int8" and self.fused:
            raise ValueError("a fused network has no outliers in 16 bit: ask for w8a16 or w8a8 instead of int8")
        if self.fused and not self.attention.startswith("direct"):
            direct = ", ".join(name for name in ATTENTIONS if name.startswith("direct"))
            raise ValueError(f"a fused network takes the attentions {direct}; {self.attention!r} is transformers' own")

    @property
    def name(self) -> str:
        return "-".join((self.weights, self.attention, self.execution)).removesuffix("-eager")

    @property
    def label(self) -> str:
        """The variant in words, as pages and legends name it."""
        kernel = "" if self.fused else _ATTENTION_WORDS.get(self.attention, self.attention)
        parts = self.execution.split("-") if self.execution != "eager" else []
        return " · ".join(filter(None, (self.weights.upper(), kernel, *(_EXECUTION_WORDS[part] for part in parts))))

    @property
    def quantized(self) -> bool:
        return self.weights in (*_CHECKPOINTS, "fp8")

    @property
    def checkpoint(self) -> str:
        """The checkpoint of a study that holds these weights."""
        return _CHECKPOINTS.get(self.weights, "merged")

    @property
    def fused(self) -> bool:
        """Whether the network is transformed into a `fused.FusedViT`."""
        return self.execution.startswith("fused")

    @property
    def graphed(self) -> bool:
        """Whether it is replayed from CUDA graphs."""
        return self.execution.endswith("graph")

    @property
    def own_flash(self) -> bool:
        """Whether attention runs in the package flash-attn."""
        return self.attention in ("flash_attention_2", "direct_fa2")


# The first row is the baseline that every other is compared with. Rows 1, 4, 5, 6 and 7 are the five of the
# original study; the 16-bit rows stand beside fp32 so that precision and quantization are not confounded.
BASELINE = Variant("fp32")
STUDY = (
    BASELINE,
    Variant("fp16"),
    Variant("bf16"),
    Variant("nf4"),
    Variant("int8"),
    Variant("nf4", "flash_attention_2"),
    Variant("int8", "flash_attention_2"),
)
EXTRA = (
    Variant("fp32", "eager"),
    Variant("fp16", "eager"),
    Variant("fp16", "flash_attention_2"),
    Variant("bf16", "flash_attention_2"),
    Variant("fp32", "sdpa", "graph"),
    Variant("fp16", "sdpa", "graph"),
    Variant("fp16", "flash_attention_2", "graph"),
    Variant("nf4", "sdpa", "graph"),
    Variant("nf4", "flash_attention_2", "graph"),
    Variant("int8", "sdpa", "graph"),
    Variant("fp32", "sdpa", "compile"),
    Variant("fp16", "sdpa", "compile"),
    Variant("fp16", "direct", "compile"),
    *(
        Variant(weights, "direct", execution)
        for weights in ("fp32", "fp16", "bf16", "nf4", "w8a16", "w8a8", "fp8")
        for execution in ("fused", "fused-graph")
    ),
    Variant("fp16", "direct", "fused-compile"),
    Variant("fp16", "direct", "fused-compile-graph"),
    Variant("fp16", "direct_fa2", "fused-graph"),
    Variant("nf4", "direct_fa2", "fused-graph"),
)
VARIANTS = {variant.name: variant for variant in (*STUDY, *EXTRA)}


def nearest(name: str, known: list[str]) -> str:
    """A clause that names the known spelling nearest to `name`, or all of them."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def find(name: str) -> Variant:
    """The row called `name`; ValueError with the nearest known name otherwise."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}: {nearest(name, list(VARIANTS))}")
    return VARIANTS[name]


def label(name: str) -> str:
    """The variant called `name` in words; `name` itself where there is no such variant."""
    return VARIANTS[name].label if name in VARIANTS else name

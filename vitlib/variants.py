"""The table of variants: what a study compares, one row each. Level 0: no torch."""

import difflib
from dataclasses import dataclass

WEIGHTS = ("fp32", "fp16", "bf16", "nf4", "int8")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
EXECUTIONS = ("eager", "graph", "compile")


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

    @property
    def name(self) -> str:
        return "-".join((self.weights, self.attention, self.execution)).removesuffix("-eager")

    @property
    def quantized(self) -> bool:
        return self.weights in ("nf4", "int8")


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

"""Weight formats and variants: the two tables that say what a study can compare. Nothing here imports torch."""

import difflib
import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass

DIRECT = "direct"  # this project's attention: PyTorch's, without a mask, see `attention`; the others are transformers'
ATTENTIONS = {"eager": "unfused attention", "sdpa": "SDPA", "flash_attention_2": "FlashAttention-2"}
ATTENTIONS |= {DIRECT: "SDPA without mask"}
EXECUTIONS = ("eager", "graph", "fused", "fused-graph")
GELUS = ("checkpoint", "tanh")


@dataclass(frozen=True)
class Format:
    """How the encoder's linear layers are stored and multiplied; everything else has the dtype `dtype`.

    `checkpoint` is the folder that holds the weights. `stored` is the class of a linear as transformers loads it, and
    `fused` that of a `fused.FusedViT`, '' where there is none; with `fused_only` no other network computes the format.
    Outputs are compared with those of the plain network in the format `reference`. `product` is the dtype of an 8-bit
    product, and `capability` the lowest CUDA compute capability that has it.
    """

    name: str
    bits: int
    checkpoint: str
    stored: str
    fused: str
    reference: str
    colour: str  # of plots; different for colour-blind readers too, the int8 formats share a hue
    dtype: str = "float16"
    words: str = ""  # what pages call it; '' for its name in capitals
    product: str = ""
    capability: tuple[int, int] = (0, 0)  # (8, 9): Ada and Hopper
    capturable: bool = True  # in a CUDA graph
    fused_only: bool = False
    calibrated: bool = False  # from pictures
    planned: bool = False  # another format for each linear, see `network.plan`; `bits`, `stored`, `fused`: the smallest

    @property
    def label(self) -> str:
        """The format as pages name it."""
        return self.words or self.name.upper()


_PLAIN = {"checkpoint": "merged", "stored": "Linear", "fused": "Dense"}
_INT8 = {"bits": 8, "checkpoint": "int8", "stored": "Linear8bitLt", "reference": "int8"}
_NF4 = {"bits": 4, "stored": "Linear4bit", "fused": "NF4"}
_FP8 = {"bits": 8, "checkpoint": "merged", "stored": "Linear", "reference": "fp16", "product": "fp8"}

# int8 is LLM.int8() with its outliers in FP16; w8a16 and w8a8 multiply the same stored rows without outliers, with FP16
# activations or with activations quantized row by row. fp8 is quantized from the merged weights when it is loaded. nf4c
# is NF4 with codes chosen by error compensation (`network.calibrate`); mixed has FP16, int8 and nf4c layers.
_ROWS = (
    Format("fp32", 32, **_PLAIN, reference="fp32", colour="#000000", dtype="float32"),
    Format("fp16", 16, **_PLAIN, reference="fp16", colour="#0072B2"),
    Format("bf16", 16, **_PLAIN, reference="bf16", colour="#56B4E9", dtype="bfloat16"),
    Format("nf4", **_NF4, checkpoint="nf4", reference="nf4", colour="#D55E00"),
    Format(
        "nf4c",
        **_NF4,
        checkpoint="nf4-calibrated",
        reference="nf4c",
        colour="#E69F00",
        words="NF4 calibrated",
        calibrated=True,
    ),
    Format("mixed", **_NF4, checkpoint="mixed", reference="mixed", colour="#6A3D9A", words="Mixed", planned=True),
    Format("int8", **_INT8, fused="", colour="#009E73", product="int8", capturable=False),
    Format("w8a16", **_INT8, fused="Int8WeightOnly", colour="#7FCDBB", fused_only=True),
    Format("w8a8", **_INT8, fused="W8A8", colour="#00543D", product="int8", fused_only=True),
    Format("fp8", **_FP8, fused="FP8", colour="#CC79A7", capability=(8, 9), fused_only=True),
)
FORMATS = {row.name: row for row in _ROWS}
_FACTORS = (FORMATS, ATTENTIONS, EXECUTIONS, GELUS)


@dataclass(frozen=True)
class Variant:
    """Weight format × attention × execution, and the form of GELU; nothing else differs between two variants.

    `gelu` is "checkpoint" for what its config says, or "tanh" for the tanh approximation, which cuBLASLt computes in
    the product's epilogue. ValueError with the reason for a combination that does not exist.
    """

    weights: str
    attention: str = "sdpa"
    execution: str = "eager"
    gelu: str = "checkpoint"

    def __post_init__(self) -> None:
        for value, allowed in zip(astuple(self), _FACTORS, strict=True):
            if value not in allowed:
                raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
        if self.format.fused_only and not self.fused:
            raise ValueError(f"{self.weights} weights need a fused execution (fused or fused-graph)")
        if self.fused and not self.format.fused:
            others = [row.name for row in _ROWS if row.checkpoint == self.checkpoint and row.fused]
            raise ValueError(f"a fused network keeps no outliers in FP16: use {' or '.join(others)} for {self.weights}")
        if self.fused and self.attention != DIRECT:
            raise ValueError(f"a fused network takes the attention {DIRECT!r}; {self.attention!r} is transformers' own")
        if self.gelu != "checkpoint" and not self.fused:
            raise ValueError(f"the {self.gelu} GELU needs a fused execution (fused or fused-graph)")

    @property
    def name(self) -> str:
        """`<weights>-<attention>[-<execution>][-tanh]`; `find` reads it."""
        optional = [part for part in (self.execution, self.gelu) if part not in ("eager", "checkpoint")]
        return "-".join([self.weights, self.attention, *optional])

    @property
    def label(self) -> str:
        """The variant in words, as pages and legends name it."""
        words = [self.format.label, "fused" if self.fused else ATTENTIONS[self.attention]]
        words += ["CUDA graph"] if self.graphed else []
        words += [f"{self.gelu} GELU"] if self.gelu != "checkpoint" else []
        return " · ".join(words)

    @property
    def format(self) -> Format:
        """The row of `FORMATS`."""
        return FORMATS[self.weights]

    @property
    def quantized(self) -> bool:
        """Whether a weight takes less than 16 bits."""
        return self.format.bits < 16

    @property
    def checkpoint(self) -> str:
        """The checkpoint of a study that holds these weights."""
        return self.format.checkpoint

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
        return self.attention == "flash_attention_2"


def _legal() -> Iterator[Variant]:
    for parts in itertools.product(*_FACTORS):
        with suppress(ValueError):
            yield Variant(*parts)


VARIANTS = {variant.name: variant for variant in _legal()}  # all; `attention.not_runnable` says where each can run

# What a study compares unless told otherwise. The first is the baseline that every other is compared with; fp16 and
# bf16 are there so that precision and quantization are not confounded. The other five are those of the original study.
BASELINE = Variant("fp32")
_FLASH = (Variant("nf4", "flash_attention_2"), Variant("int8", "flash_attention_2"))
DEFAULTS = (BASELINE, *(Variant(weights) for weights in ("fp16", "bf16", "nf4", "int8")), *_FLASH)


def nearest(name: str, known: list[str], likeness: float = 0.5) -> str:
    """A clause that names the known spelling nearest to `name`, or all of them."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=likeness)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def find(name: str) -> Variant:
    """The variant called `name`; ValueError with the reason and the nearest name for any other text."""
    if name in VARIANTS:
        return VARIANTS[name]
    reason, hint = "a name is <weights>-<attention>[-<execution>][-tanh]", nearest(name, list(VARIANTS))
    if "-" in str(name):
        weights, attention, *rest = str(name).split("-")
        gelu = rest.pop() if rest and rest[-1] in GELUS else "checkpoint"
        try:
            hint = f"did you mean {Variant(weights, attention, '-'.join(rest) or 'eager', gelu).name!r}?"
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"unknown variant {name!r}: {hint} ({reason})")


def label(name: str) -> str:
    """The variant called `name` in words; `name` itself where there is no such variant."""
    return VARIANTS[name].label if name in VARIANTS else name

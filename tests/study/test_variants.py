"""Formats and variants: the table keeps its promises, names are read back, what does not exist is refused."""

import subprocess
import sys

import pytest

from vitlib.network import layers
from vitlib.study import variants
from vitlib.study.variants import DEFAULTS, FORMATS, VARIANTS, Variant, find


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_a_format_has_what_the_table_promises(row):
    torch = pytest.importorskip("torch")
    assert row.fused in ("", *layers.CLASSES) and isinstance(getattr(torch, row.dtype), torch.dtype)
    assert row.product in ("", "int8", "fp8") and row.fused_only <= bool(row.fused)
    reference = FORMATS[row.reference]
    assert reference.reference == reference.name and not reference.fused_only
    assert Variant(row.name, "direct", "fused" if row.fused else "eager").quantized == (row.bits < 16)


def test_formats_are_told_apart():
    assert len({row.colour for row in FORMATS.values()}) == len(FORMATS)
    assert {row.fused for row in FORMATS.values()} == {"", *layers.CLASSES}


def test_every_name_is_read_back_as_the_variant_it_names():
    assert len(VARIANTS) == 92 and all(find(name) == variant for name, variant in VARIANTS.items())
    five = {"fp32-sdpa", "nf4-sdpa", "int8-sdpa", "nf4-flash_attention_2", "int8-flash_attention_2"}
    assert five <= {variant.name for variant in DEFAULTS} <= set(VARIANTS)  # those of the original study
    assert find("fp16-direct-fused-graph-tanh") == Variant("fp16", "direct", "fused-graph", "tanh")
    assert find("bf16-eager-graph") == Variant("bf16", "eager", "graph")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nf4-spda", r"did you mean 'nf4-sdpa'\? \('spda' is not one of eager, sdpa"),
        ("nf3-sdpa", r"did you mean 'nf4-sdpa'\? \('nf3' is not one of fp32"),
        ("w8a8-direct", r"did you mean 'w8a8-direct-fused'\? \(w8a8 weights need a fused execution"),
        ("int8-direct-fused", "use w8a16 or w8a8 for int8"),
        ("fp16-sdpa-fused", "takes the attention 'direct'"),
        ("fp16-direct-tanh", "the tanh GELU needs a fused execution"),
        ("fp16-direct-fused-compile", r"did you mean 'fp16-direct-fused'\?"),
        ("fp32-sdpa-eager", "did you mean 'fp32-sdpa'"),
        ("nf4", "did you mean .* \\(a name is <weights>-<attention>"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_reason_and_a_hint(name, reason):
    with pytest.raises(ValueError, match=f"^unknown variant {name!r}: .*{reason}"):
        find(name)


def test_labels_are_words():
    expected = {
        "fp32-sdpa": "FP32 · SDPA",
        "int8-flash_attention_2": "INT8 · FlashAttention-2",
        "fp16-sdpa-graph": "FP16 · SDPA · CUDA graph",
        "nf4-direct-fused-graph": "NF4 · fused · CUDA graph",
        "fp16-direct-fused-graph-tanh": "FP16 · fused · CUDA graph · tanh GELU",
        "none of these": "none of these",
    }
    assert {name: variants.label(name) for name in expected} == expected
    labels = [variant.label for variant in VARIANTS.values()]
    assert len(set(labels)) == len(labels)


def test_the_table_is_read_without_torch():
    code = "import sys, vitlib.study.variants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

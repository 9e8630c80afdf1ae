"""What ViT-L/16 must reach on a GPU: ratios within one study's records. Nothing is timed here.

The study is the folder in VITLIB_TARGETS, by default the published one; another machine's numbers are not judged by it.
"""

import os
from pathlib import Path

import pandas as pd
import pytest

from vitlib.study.study import Study

GALLERY = Path(__file__).parents[1] / "outputs" / "gallery" / "h200-vit-l16"


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    """`variants.csv` of a study with a GPU, indexed by variant and batch."""
    study = Study.at(os.environ.get("VITLIB_TARGETS", GALLERY))
    if not study.has("variants"):
        pytest.skip(f"no record in {study.folder.name}: run 2_evaluate there")
    if not study.read_json("environment")["hardware"]["gpus"]:
        pytest.skip("the targets are set for a GPU")
    table = study.read("variants")
    return table[table["status"] == "ok"].astype({"batch": int}).set_index(["variant", "batch"])


def times_faster(measured: pd.DataFrame, variant: str, than: str, batch: int) -> float:
    """Ratio of the two median latencies; skips where a variant did not run."""
    for name in (variant, than):
        if (name, batch) not in measured.index:
            pytest.skip(f"{name} was not measured at batch size {batch}")
    return measured.loc[(than, batch), "latency_p50_ms"] / measured.loc[(variant, batch), "latency_p50_ms"]


@pytest.mark.parametrize(
    ("variant", "than", "batch", "least"),
    [
        ("nf4-direct-fused-graph", "fp32-sdpa", 1, 6),
        ("nf4-direct-fused-graph", "fp32-sdpa", 32, 11),
        ("fp16-direct-fused-graph", "fp16-sdpa-graph", 1, 1.3),
        ("nf4-direct-fused-graph", "fp16-direct-fused-graph", 1, 1 / 1.25),
        ("nf4-direct-fused-graph", "fp16-direct-fused-graph", 32, 1 / 1.05),
        ("w8a16-direct-fused-graph", "fp16-direct-fused-graph", 1, 1 / 1.25),
        ("w8a16-direct-fused-graph", "fp16-direct-fused-graph", 32, 1 / 1.05),
        ("w8a8-direct-fused-graph", "fp16-direct-fused-graph", 1, 1 / 1.25),
        ("w8a8-direct-fused-graph", "fp16-direct-fused-graph", 32, 1 / 1.05),
        ("fp8-direct-fused-graph", "fp16-direct-fused-graph", 32, 1),
    ],
)
def test_speed(measured, variant, than, batch, least):
    assert times_faster(measured, variant, than, batch) >= least


def test_every_variant_of_the_study_agrees_with_the_baseline(measured):
    assert measured["agreement_with_baseline"].min() >= 0.95
    assert not (measured["verdict"] == "different").any()


def test_in_fp16_the_same_function_is_computed(measured):
    """W8A8 and FP8 quantize their inputs and the tanh GELU is another function; the others differ by rounding only."""
    if "relative_error" not in measured:
        pytest.skip("this record was written before outputs were compared with a reference")
    names = measured.index.get_level_values("variant")
    same = measured[~names.str.startswith(("w8a16", "w8a8", "fp8")) & ~names.str.endswith("-tanh")]
    assert same["relative_error"].max() <= 0.01
    assert same["agreement_with_reference"].min() >= 0.995


def test_weights_are_small(measured):
    held = measured.groupby("variant")["model_mb"].first()
    assert held["nf4-direct-fused-graph"] < held["fp32-sdpa"] / 7
    assert held["w8a8-direct-fused-graph"] < held["fp32-sdpa"] / 3.9

"""The claims: a data file without verdicts, and verdicts that follow the records, whichever they are."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitlib import claims
from vitlib.claims import claim as judging
from vitlib.claims import quantities
from vitlib.claims.claim import FAILS, HOLDS, HOLDS_ONLY, UNTESTED, Claim
from vitlib.claims.quantities import Figure, Missing, exact
from vitlib.report import plots
from vitlib.study import records
from vitlib.study.study import Study

GALLERY = Path(__file__).resolve().parents[1] / "outputs" / "gallery" / "h200-vit-l16"
FIVE = ("fp32-sdpa", "nf4-sdpa", "int8-sdpa", "nf4-flash_attention_2", "int8-flash_attention_2")
MS = {"fp32-sdpa": (10, 90), "nf4-sdpa": (20, 30), "int8-sdpa": (80, 100)}  # at batch 1 and 32
MS |= {"nf4-flash_attention_2": (25, 36), "int8-flash_attention_2": (81, 101)}
MB = {"fp32": 1157.4, "nf4": 151.4, "int8": 291.5}
CONFIG = quantities.content()["network"]["config"] | {"id2label": {}}


class Made:
    """A study of made-up records that a test changes before it asks for verdicts."""

    def __init__(self, folder: Path) -> None:
        self.study, self.config, self.base = Study.at(folder), dict(CONFIG), {"base": "x", "kind": "stand-in"}
        self.environment = {"hardware": {"gpus": [{"name": "H200"}]}, "parameters": {"device": "auto"}}
        rows, quality, calls = [], [], []
        for name in FIVE:
            weights, kl = name.split("-")[0], {"fp32": 0.0, "nf4": 1e-2, "int8": 1e-3}[name.split("-")[0]]
            quality.append({"variant": name, "n": 818, "top1": 0.8, "verdict": "non-inferior"})
            quality[-1] |= {"difference": -0.01, "difference_low": -0.015, "difference_high": -0.005}
            for batch, ms in zip((1, 32), MS[name], strict=True):
                row = {"variant": name, "status": "ok", "reason": "", "batch": batch, "model_mb": MB[weights]}
                row |= {"latency_p50_ms": ms, "latency_low_ms": 0.99 * ms, "latency_high_ms": 1.01 * ms, "logit_kl": kl}
                row |= {"peak_vram_mb": MB[weights] + 20, "top1": 0.8, "top5": 0.95, "f1_weighted": 0.8}
                rows.append(row | {"logit_kl_low": 0.9 * kl, "logit_kl_high": 1.1 * kl})
                calls += [{"variant": name, "batch": batch, "round": k, "latency_ms": ms} for k in (0, 0, 1)]
        quality[0] |= {"verdict": "baseline"}
        kept = ["none", "embeddings+classifier", *(f"block {k}" for k in range(24))]
        parts = [{"kept": name, "top1": 0.8, "holm_p": 1.0} for name in kept]
        parts += [{"kept": f"all but block {k}", "logit_kl": 2e-4 if k == 21 else 1e-4} for k in range(24)]
        self.tables = {"variants": pd.DataFrame(rows), "accuracy": pd.DataFrame(quality)}
        self.tables["latency"] = pd.DataFrame(calls).assign(sample=0)
        self.tables["ablation"] = pd.concat([pd.DataFrame(parts).assign(bits=bits) for bits in (4, 8)])

    def set(self, table: str, row: str, **values: float) -> None:
        frame = self.tables[table]
        frame.loc[frame[frame.columns[0]] == row, list(values)] = list(values.values())

    def verdict(self, name: str) -> str:
        for table, frame in self.tables.items():
            self.study.write(table, frame.reindex(columns=[*dict.fromkeys((*records.COLUMNS[table], *frame))]))
        self.study.write_json("environment", self.environment)
        self.study.write_json("base", self.base)
        records.write_json(self.config, self.study.checkpoint("merged") / "config.json")
        frame = claims.verdicts(self.study).set_index("id")
        return frame.loc[name, "verdict"]

    def measured(self, name: str) -> dict[str, Figure]:
        self.verdict(name)
        return claims.load()[name].quantity.measure(self.study)


@pytest.fixture
def made(tmp_path) -> Made:
    return Made(tmp_path / "made")


def claim(original, criterion, tolerance=0.0) -> Claim:
    fields = {"id": "x", "subject": "s", "source": "README, Somewhere", "claim": "A claim.", "shown": "that"}
    fields["quantity"] = {"kind": "own", "compared": "ratio", "pairs": {"": (1, 1)}}
    return Claim(**fields, original=original, criterion=criterion, tolerance=tolerance)


def test_the_claims_are_few_and_valid_and_carry_no_verdict():
    loaded = claims.load()
    assert 40 <= len(loaded) <= 60 and len(loaded) == len(quantities.content()["claims"])  # no id occurs twice
    assert not re.search(r"(?i)does not hold|cannot be tested|verdict:", quantities.CLAIMS.read_text(encoding="utf-8"))
    for one in loaded.values():  # a figure for each variant of a column, and no other
        assert isinstance(one.original, tuple) == (one.criterion == "between"), one.id
        assert (one.tolerance > 0) == (one.criterion == "about"), one.id
        cases = getattr(one.quantity, "variants", None) or getattr(one.quantity, "pairs", None)
        assert not isinstance(one.original, dict) or set(one.original) == set(cases), one.id


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "guess"}, "expected tags"), ({"variants": ["nf5-sdpa"]}, "did you mean"), ({"colour": 1}, "colour")],
)
def test_a_quantity_that_cannot_be_measured_is_refused(change, message):
    whole = claims.load()["objective-size"].model_dump()
    with pytest.raises(ValueError, match=message):
        Claim(**whole | {"quantity": whole["quantity"] | change})


@pytest.mark.parametrize(
    ("original", "criterion", "tolerance", "figures", "verdict"),
    [
        (10, "about", 0.1, [exact(11.0), exact(10 / 1.1)], HOLDS),
        (10, "about", 0.1, [exact(11.01), exact(9.09)], FAILS),
        (10, "at least", 0, [exact(10)], HOLDS),
        (10, "at most", 0, [exact(10.1)], FAILS),
        (1, "more than", 0, [exact(1)], FAILS),
        (1, "more than", 0, [Figure(1.1, 1.01, 1.2)], HOLDS),
        (1, "more than", 0, [Figure(1.1, 1, 1.2), quantities.bounded(3, np.nan, np.nan)], UNTESTED),
        ((4, 8), "between", 0, [Figure(5, 4, 8)], HOLDS),
        ((4, 8), "between", 0, [Figure(5, 3.9, 8)], UNTESTED),
        ((4, 8), "between", 0, [Figure(3, 2, 3.9)], FAILS),
    ],
)
def test_criteria_at_their_boundaries(original, criterion, tolerance, figures, verdict):
    for figure in figures:
        assert judging.kind_of(claim(original, criterion, tolerance).judge({"": figure})) == verdict


def test_verdicts_name_the_cases():
    judge = claim(2, "at least").judge
    assert judge({"batch 1": exact(1), "batch 8": exact(3), "batch 32": exact(4)}) == f"{HOLDS_ONLY} at batch 8 and 32"
    assert judge({"nf4-sdpa": exact(3), "int8-sdpa": Figure(2, 1, 3)}) == (
        f"{HOLDS_ONLY} for NF4 · SDPA; undecided for INT8 · SDPA"
    )
    assert judge({"block 0": exact(1), "block 23": Figure(2, 1, 3)}) == f"{FAILS}; undecided for block 23"


def test_each_kind_gives_the_value_calculated_by_hand(made):
    assert made.measured("objective-size")["nf4-sdpa"].value == pytest.approx(1157.4 / 151.4)
    assert made.measured("slides-memory")["int8-sdpa"].value == pytest.approx(311.5)
    speed = made.measured("objective-speed")
    assert {case: figure.value for case, figure in speed.items()} == {"batch 1": 0.4, "batch 32": 2.5}
    assert made.measured("slides-latency")["int8-sdpa"] == Figure(0.125, 0.125, 0.125)
    assert made.measured("accuracy-nf4")["nf4-sdpa"][:3] == pytest.approx((-1, -1.5, -0.5))
    fastest = made.measured("fastest-readme")
    assert fastest["batch 32"][:3] == pytest.approx((30 / 36, 0.99 * 30 / (1.01 * 36), 1.01 * 30 / (0.99 * 36)))
    assert fastest["batch 1"].note == "closest: FP32 · SDPA"
    assert made.measured("keep-21-23")["block 21"].value == pytest.approx(2 * 24 / 25)
    assert made.measured("sensitive-nf4-21")[""] == exact(2.0, "most sensitive: 21")
    assert made.measured("own-top1")[""].value == pytest.approx(31.06)


def test_verdicts_follow_the_records(made):
    assert made.verdict("objective-size") == HOLDS
    assert made.verdict("objective-speed") == f"{HOLDS_ONLY} at batch 32"
    assert made.verdict("fastest-slides") == f"{HOLDS_ONLY} at batch 1"
    assert made.verdict("balance") == f"{UNTESTED}: the 95 % interval includes the limit"
    assert made.verdict("sensitive-nf4-21") == HOLDS and made.verdict("gain-nf4-21") == FAILS
    made.set("variants", "nf4-sdpa", model_mb=100.0, logit_kl=0.0, logit_kl_low=0.0, logit_kl_high=0.0)
    made.set("accuracy", "nf4-sdpa", difference=-0.04, difference_low=-0.05, difference_high=-0.035)
    made.set("latency", "nf4-flash_attention_2", latency_ms=1.0)
    made.set("ablation", "block 21", holm_p=0.01, top1=0.81)
    made.set("ablation", "all but block 0", logit_kl=1e-2)
    assert made.verdict("objective-size") == FAILS and made.verdict("objective-speed") == HOLDS
    assert made.verdict("balance") == FAILS  # NF4 is now better in everything
    assert made.verdict("accuracy-nf4") == FAILS and made.verdict("gain-nf4-21") == HOLDS
    assert made.verdict("sensitive-nf4-21") == FAILS and made.verdict("ends-nf4") == f"{HOLDS_ONLY} for block 23"


def test_what_is_missing_is_named(made):
    assert "another base (stand-in" in made.verdict("slides-top1")
    made.base = {"base": "google/vit-large-patch16-224", "kind": "hub"}
    assert made.verdict("slides-top1") == FAILS
    made.set("variants", "nf4-flash_attention_2", status="not run", reason="needs an Ampere GPU")
    assert made.verdict("objective-speed").endswith("NF4 · FlashAttention-2 did not run: needs an Ampere GPU")
    made.set("accuracy", "fp32-sdpa", top1=0.3)
    assert "Top-1 is only 30 %" in made.verdict("accuracy-nf4")
    made.environment["parameters"]["device"] = "cpu"
    assert "ran on a CPU" in made.verdict("readme-latency-nf4") and made.verdict("objective-size") == HOLDS


def test_of_another_network_one_row_counts_the_claims(made):
    made.config |= {"num_hidden_layers": 4, "hidden_size": 128}
    made.verdict("objective-size")
    frame = made.study.read("claims")
    assert list(frame.columns) == list(records.COLUMNS["claims"])
    untested = claims.show(frame, UNTESTED).text
    assert untested["claim"].tolist() == ["claims about ViT-L/16: 41"] and untested["why"].item().endswith(
        "(4 blocks of width 128)"
    )
    assert claims.show(frame, HOLDS_ONLY) == "*none*" and claims.counted(frame, HOLDS_ONLY) == "**0 of 55 claims**"
    text = claims.summary(made.study, frame, COSTS)
    assert text.startswith(
        "- **Of 55 claims of the original study, 2 hold, 12 do not hold and 41 cannot be tested here.**"
    )
    assert "41 because the network is not ViT-L/16" in text and " 14 claims only compare" in text
    assert "[Vision Model Optimization with Quantization & Efficient Attention](https://" in text
    with pytest.raises(Missing, match="not ViT-L/16"):
        quantities.require(made.study)


COSTS = pd.DataFrame(
    {"preprocessing": ["its own", "the original's"], "weights": "fp32", "top1": 0.8, "difference": [0.0, -0.1]}
).assign(difference_low=-0.12, difference_high=-0.08)


def test_a_table_has_source_criterion_and_cases_as_small_text(made):
    made.verdict("objective-size")
    frame = made.study.read("claims").set_index("id", drop=False)
    shown = claims.show(frame.loc[["objective-speed", "slides-kernel-time"]], HOLDS_ONLY)
    assert list(shown.text) == ["claim", "original", "measured", "why"] and shown.record == "records/claims.csv"
    html = shown.to_html()
    assert "README, Objectives</small>" in html and "at least 2 times the speed</small>" in html
    assert "batch 1: 0.4, batch 32: 2.5 times the speed<br><small>holds only at batch 32</small>" in html
    kernel = claims.show(frame.loc[["slides-kernel-time"]], FAILS).text["measured"].item()
    assert kernel.startswith("FP32 · SDPA: 0.301 (237.5 / 789.1), ") and kernel.endswith(
        "times the shortest possible time"
    )


def test_a_figure_is_shown_with_its_interval_and_several_with_their_cases():
    one = claim(2, "at least").model_copy(update={"unit": "times"})
    assert one.text({"": Figure(3, 2.5, 3.5, "note")}) == "3 times (2.5 … 3.5) (note)"
    assert one.text({"batch 1": Figure(3, 2.5, 3.5), "nf4-sdpa": exact(4)}) == "batch 1: 3, NF4 · SDPA: 4 times"
    assert claim({"a": 1.0, "b": 2.0}, "at least").text({"a": exact(3), "b": exact(4)}) == "3, 4"  # as in the original


def test_the_gallerys_records_give_verdicts_and_a_summary(tmp_path):
    """Without checkpoints; the original's contradictions are found whatever was measured."""
    shutil.copytree(GALLERY / "records", tmp_path / "records", ignore=shutil.ignore_patterns("traces", "*.npz"))
    study = Study.at(tmp_path)
    frame = claims.verdicts(study).set_index("id", drop=False)
    assert not frame["verdict"].str.contains(quantities.OTHER_NETWORK).any()
    assert frame.loc["objective-speed", "verdict"] == f"{HOLDS_ONLY} at batch 32"
    assert frame.loc["own-top1", "verdict"] == FAILS and "31.1 points" in frame.loc["own-top1", "measured"]
    assert frame.loc["slides-kernel-time", "verdict"] == frame.loc["slides-attention-time", "verdict"] == FAILS
    of = claims.counts(frame)
    assert of.sum() == len(frame) == len(claims.load())
    assert f"{of[FAILS]} of 55 claims" in claims.counted(frame, FAILS)
    assert len(claims.show(frame, FAILS).text) == of[FAILS] and f"does not hold {of[FAILS]}" in repr(
        plots.verdict_bars(of)
    )
    summary = claims.summary(study, frame, study.read("preprocessing"))
    assert f"{of[FAILS]} do not hold" in summary and "**31 points apart**" in summary
    assert len(summary.split("**")[1]) <= 160 and "14 claims only compare the original's README" in summary
    named = summary[summary.index("these do not hold") :].split("\n")[0]
    assert named.count("→") == 4 and "closest" not in named and "read as" not in named
    assert re.search(
        r"fastest\*.*4-bit networks by 20 to 30 %\* .*, block 21 is the most sensitive\* \(block 21 →", named
    )


def test_eight_of_818_pictures_are_not_significant():
    frame = claims.reanalysis()
    first = frame.iloc[0]
    assert len(frame) == 52 and (first["bits"], first["kept"], first["pictures"]) == (4, "layer 21", 8)
    assert (first["least_p"], first["least_holm_p"]) == pytest.approx((2 / 2**8, 50 * 2 / 2**8))
    assert (frame["least_holm_p"].dropna() > 0.05).all() and frame["least_p"].notna().sum() == 50
    assert "**0 can be significant**" in claims.reanalysis_in_words(frame)

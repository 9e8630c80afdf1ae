"""The claims: a data file without verdicts, and verdicts that follow the records whichever way they fall."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from vitlib import claims, records, stats
from vitlib.claims import FAILS, HOLDS, HOLDS_ONLY, UNTESTED, Claim, Measurement

ROOT = Path(__file__).resolve().parents[1]
ALL = {claim.id: claim for claim in claims.load()}
FIVE = ("fp32-sdpa", "nf4-sdpa", "int8-sdpa", "nf4-flash_attention_2", "int8-flash_attention_2")
LATENCY = {  # ms of a call of 1 and of 32 pictures: at 1 Python is what takes time, at 32 the arithmetic
    "fp32-sdpa": (9.0, 98.0),
    "nf4-sdpa": (18.0, 20.0),
    "int8-sdpa": (65.0, 66.0),
    "nf4-flash_attention_2": (21.0, 21.0),
    "int8-flash_attention_2": (66.0, 67.0),
}
SIZE = {"fp32": 1157.4, "nf4": 146.6, "int8": 290.6}
SHAPE = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 16, "image_size": 224}


def variants_frame() -> pd.DataFrame:
    rows = []
    for name in FIVE:
        weights = name.split("-")[0]
        for batch, latency in zip((1, 32), LATENCY[name], strict=True):
            row = dict.fromkeys(records.COLUMNS["variants"], np.nan)
            row |= {"variant": name, "weights": weights, "attention": name.split("-")[1], "execution": "eager"}
            row |= {"status": "ok", "reason": "", "batch": batch, "model_mb": SIZE[weights]}
            row |= {f"latency_{key}_ms": latency for key in ("mean", "p50", "p95", "p99")}
            row |= {"latency_low_ms": 0.995 * latency, "latency_high_ms": 1.005 * latency}
            row |= {"throughput_img_s": 1000 * batch / latency, "peak_vram_mb": SIZE[weights] + 20 * batch}
            row |= {"top1": 0.8, "top5": 0.95, "f1_weighted": 0.8, "device_time_us": 9000.0, "profiled_batch": 32}
            kl = {"fp32": 0.0, "nf4": 1e-2, "int8": 1e-3}[weights]
            row |= {"logit_kl": kl, "logit_kl_low": 0.9 * kl, "logit_kl_high": 1.1 * kl}
            row |= {"attention_device_time_us": 900.0}
            rows.append(row)
    return pd.DataFrame(rows)


def ablation_frame() -> pd.DataFrame:
    """Every block accounts for its share of the error, block 21 for a little more; no p is small.

    Kept alone, block 5 would look like the one that matters: errors of others cancel there.
    """
    kept = ["none", "first+last blocks", "embeddings+classifier", *(f"block {k}" for k in range(24)), "everything"]
    rows = []
    for bits in (4, 8):
        for name in kept:
            row = dict.fromkeys(records.COLUMNS["ablation"], np.nan) | {"bits": bits, "kept": name, "top1": 0.8}
            share = {"none": 0.0, "first+last blocks": 1 / 12, "embeddings+classifier": 0.01, "everything": 1.0}
            row["logit_kl"] = 1e-2 * (1 - share.get(name, 0.5 if name == "block 5" else 0.04))
            row["holm_p"] = np.nan if name == "none" else 1.0
            rows.append(row | ({"top1": 0.81} if name == "block 21" else {}))
        for k in range(24):
            alone = {"kept": f"all but block {k}", "logit_kl": 5e-4 if k == 21 else 4e-4, "top1": 0.8, "holm_p": 1.0}
            rows.append(dict.fromkeys(records.COLUMNS["ablation"], np.nan) | {"bits": bits} | alone)
    return pd.DataFrame(rows)


class Made:
    """A study of made-up records that a test changes before it asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variants, self.ablation = variants_frame(), ablation_frame()
        self.config = SHAPE | {"id2label": {str(k): f"flower {k}" for k in range(102)}}
        self.environment = {"hardware": {"gpus": [{"name": "NVIDIA H200"}]}, "parameters": {"device": "auto"}}
        self.base, self.logits = "stand-in", None

    def study(self) -> claims.Study:
        folder, merged = self.folder / "records", self.folder / "checkpoints" / "merged"
        records.write_table(self.variants, folder / "variants.csv")
        records.write_table(self.ablation, folder / "ablation.csv")
        history = dict.fromkeys(records.COLUMNS["finetune"], 1.0) | {"epoch_s": 30.0, "top1": 0.9}
        records.write_table(pd.DataFrame([history]), folder / "finetune.csv")
        records.write_json(self.environment, folder / "environment.json")
        records.write_json(self.config, merged / "config.json")
        records.write_json({"origin": {"base": self.base}, "parameters": {"lora_rank": 8}}, merged / "provenance.json")
        if self.logits is not None:
            np.savez(folder / "logits.npz", **self.logits)
        return claims.Study(self.folder)

    def verdict(self, name: str) -> str:
        return claims.judge(ALL[name], claims.measured(ALL[name], self.study(), ALL))


@pytest.fixture
def made(tmp_path) -> Made:
    return Made(tmp_path / "made")


# The data file


def test_every_claim_has_a_sentence_a_source_and_a_figure():
    assert len(ALL) > 150
    for claim in ALL.values():
        assert claim.claim.endswith(".") and claim.source.section and claim.said, claim.id


def test_no_verdict_is_typed_into_the_data_file():
    content = yaml.safe_load(claims.SOURCE.read_text(encoding="utf-8"))
    fields = {key for entry in content["claims"] for key in entry}
    assert fields <= set(Claim.model_fields)
    assert not {"verdict", "measured", "result"} & fields
    assert not re.search(r"(?i)does not hold|cannot be tested", claims.SOURCE.read_text(encoding="utf-8"))


def test_every_cell_of_the_tables_is_a_claim():
    cells = [claim for claim in ALL.values() if claim.subject == "slides table"]
    assert len(cells) == 5 * 13 - 4  # CPU latency was given for the baseline alone
    assert ALL["slides-nf4-sdpa-latency_p50_ms-relative"].original == pytest.approx(55.99 / 15.83, abs=1e-4)


def test_the_ablation_is_the_original_table():
    frame = pd.read_csv(claims.ABLATION, keep_default_na=False)
    assert len(frame) == 52
    assert (frame["correct_of_818"] / 818).round(4).tolist() == frame["top1"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "unknown kind"),
        ({"variant": "nf5-sdpa"}, "did you mean"),
        ({"column": ""}, "needs column"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_quantity_that_cannot_be_looked_up_is_refused(change, message):
    whole = ALL["size-nf4-8x"].model_dump()
    with pytest.raises(ValueError, match=message):
        Claim(**whole | {"quantity": whole["quantity"] | change})


def test_an_id_given_twice_is_refused(tmp_path):
    content = yaml.safe_load(claims.SOURCE.read_text(encoding="utf-8"))
    content["claims"].append(content["claims"][0])
    file = tmp_path / "twice.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="twice: size-nf4-8x"):
        claims.load(file)


# Verdicts follow the records


def test_size_ratios_hold_or_do_not(made):
    assert made.verdict("size-nf4-8x") == HOLDS
    assert made.verdict("size-nf4-4x") == FAILS
    made.variants["model_mb"] = made.variants["model_mb"].where(made.variants["weights"] != "nf4", 290.0)
    assert made.verdict("size-nf4-8x") == FAILS
    assert made.verdict("size-nf4-4x") == HOLDS


def test_a_ratio_that_depends_on_the_batch_says_where_it_holds(made):
    assert made.verdict("speed-nf4-fa2-40") == f"{HOLDS_ONLY} at batch 32"
    made.variants["latency_p50_ms"] = made.variants["model_mb"]
    assert made.verdict("speed-nf4-fa2-40") == HOLDS
    made.variants["latency_p50_ms"] = 1.0
    assert made.verdict("speed-nf4-fa2-40") == FAILS


def test_contradicting_recommendations_are_told_apart(made):
    assert made.verdict("speed-fastest-slides") == f"{HOLDS_ONLY} at batch 1"
    assert made.verdict("speed-fastest-readme") == FAILS  # NF4 with SDPA is faster at batch 32
    fastest = (made.variants["variant"] == "nf4-flash_attention_2") & (made.variants["batch"] == 32)
    made.variants.loc[fastest, ["latency_p50_ms", "latency_low_ms", "latency_high_ms"]] = (1.0, 0.9, 1.1)
    assert made.verdict("speed-fastest-readme") == f"{HOLDS_ONLY} at batch 32"


def test_balance_is_lost_to_a_variant_that_is_better_in_everything(made):
    assert made.verdict("balance-int8") == HOLDS
    columns = ["logit_kl", "logit_kl_low", "logit_kl_high"]
    made.variants.loc[made.variants["variant"] == "nf4-sdpa", columns] = 0.0
    assert made.verdict("balance-int8") == FAILS


def test_noise_decides_no_comparison(made):
    """Overlapping intervals: 65 and 66 ms, with bounds of ±0.5 ms and then of ±1 ms."""
    int8 = made.variants["weights"] == "int8"
    for batch, ms in ((1, 65.5), (32, 66.5)):
        rows = int8 & (made.variants["batch"] == batch)
        made.variants.loc[rows, ["latency_low_ms", "latency_high_ms"]] = (ms - 1, ms + 1)
    assert made.verdict("balance-int8") == f"{UNTESTED}: too noisy, 95 % intervals overlap"
    made.variants.loc[int8 & (made.variants["batch"] == 32), "latency_low_ms"] = np.nan  # a single round has no bounds
    assert made.verdict("balance-int8").startswith(UNTESTED)
    made.variants.loc[int8 & (made.variants["batch"] == 32), "latency_low_ms"] = 65.0
    nf4 = made.variants["weights"] == "nf4"
    made.variants.loc[nf4 & (made.variants["batch"] == 32), ["latency_low_ms", "latency_high_ms"]] = (19.0, 22.0)
    assert made.verdict("speed-fastest-readme") == f"{FAILS}; cannot be told at batch 32"
    assert (
        "nf4-sdpa or nf4-flash_attention_2: intervals overlap (batch 32)"
        in claims.measured(ALL["speed-fastest-readme"], made.study(), ALL).text()
    )


def test_a_ratio_and_its_inverse_get_one_verdict(made):
    """8-bit weights: latency 6.85 times the baseline's said and 8.76 found; both are a factor of 1.28 away."""
    names = [f"slides-int8-sdpa-{column}-relative" for column in ("latency_p50_ms", "throughput_img_s")]
    for factor, verdict in ((1.28, FAILS), (1.24, HOLDS), (1 / 1.24, HOLDS), (1 / 1.28, FAILS)):
        for name in names:
            exponent = 1 if "latency" in name else -1
            found = Measurement({1: ALL[name].original * factor**exponent})
            assert claims.judge(ALL[name], found) == verdict, (name, factor)


def test_a_negative_percentage_has_a_word(made):
    claim = ALL["speed-nf4-fa2-40"]
    text = claims.measured(claim, made.study(), ALL).text(claim.unit)
    assert text == "133.3 % slower, 78.57 % faster (batch 1 and 32)"
    own = claims.measured(ALL["own-40-slides"], made.study(), ALL)
    assert own.text("%") == "279.3 % slower"


def test_every_claim_says_what_counts():
    assert ALL["speed-nf4-fa2-40"].counts_as == "≥ 38.48 %"
    assert ALL["sensitivity-nf4-21"].counts_as == "≤ 0.05 (Holm p)"
    assert ALL["size-nf4-8x"].counts_as == "within a factor 1.1"
    assert ALL["slides-nf4-sdpa-model_mb"].counts_as == "±1 %"
    assert ALL["readme-fp32-sdpa-top1"].counts_as == "89.69 … 91.51 %"
    assert ALL["size-objective"].counts_as == "4 … 8 times"
    assert ALL["training-adapters"].counts_as == "exactly"
    assert ALL["balance-int8"].counts_as == "no variant is better"
    assert all(claim.counts_as and "inf" not in claim.counts_as for claim in ALL.values())


def test_milliseconds_need_the_same_card_and_ratios_do_not(made):
    assert "A100 and NVIDIA H200 do not compare" in made.verdict("slides-fp32-sdpa-latency_mean_ms")
    assert made.verdict("slides-nf4-sdpa-latency_p50_ms-relative") == FAILS
    made.environment["hardware"]["gpus"][0]["name"] = "NVIDIA A100-SXM4-40GB"
    assert made.verdict("slides-fp32-sdpa-latency_mean_ms") == FAILS
    made.variants.loc[made.variants["variant"] == "fp32-sdpa", "latency_mean_ms"] = 16.0
    assert made.verdict("slides-fp32-sdpa-latency_mean_ms") == HOLDS


def test_accuracies_need_the_same_weights_and_differences_do_not(made):
    labels = np.arange(818) % 102
    right = np.eye(102)[labels]
    made.logits = {"labels": labels, "fp32-sdpa": right, "nf4-sdpa": right.copy()}
    assert "fine-tuned from 'stand-in'" in made.verdict("readme-fp32-sdpa-top1")
    assert made.verdict("accuracy-nf4-2") == HOLDS
    made.logits["nf4-sdpa"][:100] = np.roll(right[:100], 1, axis=1)
    assert made.verdict("accuracy-nf4-2") == FAILS
    made.logits["nf4-sdpa"][14:] = right[14:]  # 14 of 818 lost: between 1 and 3 points, so 2 cannot be told
    assert made.verdict("accuracy-nf4-2").startswith(f"{UNTESTED}: too few pictures")
    made.base = "google/vit-large-patch16-224"
    assert made.verdict("readme-fp32-sdpa-top1") == FAILS


def test_what_is_missing_is_named(made):
    made.variants.loc[made.variants["variant"] == "nf4-flash_attention_2", ["status", "reason"]] = ("not run", "no GPU")
    assert made.verdict("speed-nf4-fa2-40") == f"{UNTESTED}: nf4-flash_attention_2 did not run: no GPU"
    made.environment["hardware"]["gpus"] = None
    assert "none took part" in made.verdict("speed-nf4-28")
    made.config |= {"num_hidden_layers": 4}
    assert "blocks 4, not 24" in made.verdict("size-nf4-8x")
    made.variants["top1"] = 0.02
    made.config |= {"num_hidden_layers": 24}
    assert "little to lose" in made.verdict("sensitivity-nf4-21")


def test_a_study_without_records_names_the_notebook(tmp_path):
    empty = claims.measured(ALL["size-nf4-8x"], tmp_path / "empty", ALL)
    assert empty.obstacle and not empty.values
    assert claims.judge(ALL["own-40"], claims.measured(ALL["own-40"], tmp_path / "empty", ALL)) == HOLDS


def test_sensitivity_follows_kl_and_p(made):
    assert made.verdict("sensitivity-nf4-21-most") == HOLDS
    assert made.verdict("sensitivity-nf4-21") == FAILS
    assert made.verdict("sensitivity-nf4-middle") == HOLDS
    block = (made.ablation["bits"] == 4) & (made.ablation["kept"] == "block 21")
    made.ablation.loc[block, "holm_p"] = 0.01
    assert made.verdict("sensitivity-nf4-21") == HOLDS
    made.ablation.loc[made.ablation["kept"] == "block 9", ["holm_p", "top1"]] = (0.01, 0.9)
    made.ablation.loc[made.ablation["kept"] == "all but block 9", "logit_kl"] = 1e-3
    assert made.verdict("sensitivity-nf4-middle") == FAILS
    assert made.verdict("sensitivity-nf4-21-most") == FAILS


def test_the_first_and_the_last_block_are_judged_apart(made):
    names = [f"sensitivity-{bits}-{end}" for bits in ("nf4", "int8") for end in ("first", "last")]
    assert [made.verdict(name) for name in names] == [HOLDS] * 4
    first = (made.ablation["kept"] == "all but block 0") & (made.ablation["bits"] == 4)
    made.ablation.loc[first, "logit_kl"] = 4e-3
    assert [made.verdict(name) for name in names] == [FAILS, HOLDS, HOLDS, HOLDS]


def test_adapters_are_counted_from_the_network(made):
    assert made.verdict("training-adapters") == HOLDS
    assert made.verdict("training-adapters-attention") == FAILS


def test_a_kernel_time_below_its_arithmetic_does_not_hold_on_any_hardware(made):
    claim = ALL["slides-fp32-sdpa-device_time_us"]
    assert made.verdict(claim.id).startswith(f"{FAILS}: the arithmetic alone takes")
    assert claims.least_time_us("device_time_us", "nf4", "A100") == pytest.approx(123.1e9 / 312e12 * 1e6, rel=2e-3)
    longer = claim.model_copy(update={"original": 5000.0})
    assert claims.judge(longer, claims.measured(longer, made.study(), ALL)).startswith(UNTESTED)


@pytest.mark.parametrize(
    ("criterion", "original", "value", "verdict"),
    [
        ("about", 10, 10.9, HOLDS),
        ("about", 10, 11.1, FAILS),
        ("at least", 10, 9.1, HOLDS),
        ("at most", 10, 11.1, FAILS),
        ("between", [4, 8], 3.5, FAILS),
        ("between", [4, 8], (4.5, 5.0, 7.0), HOLDS),
        ("about", -10, -10.9, HOLDS),
        ("within factor", 10, 9.05, FAILS),
        ("within factor", 10, 9.1, HOLDS),
        ("within factor", 10, 11.0, HOLDS),
    ],
)
def test_criteria(criterion, original, value, verdict):
    claim = ALL["size-nf4-8x"].model_copy(update={"criterion": criterion, "original": original, "tolerance": 0.1})
    assert claims.judge(claim, Measurement({0: value})) == verdict


def test_the_table_is_written_and_counted(made):
    made.study()
    frame = claims.table(made.folder)
    again = records.read_table(made.folder / "records" / "claims.csv")
    assert list(again.columns) == list(records.COLUMNS["claims"]) and len(again) == len(ALL)
    assert claims.counts(frame).loc["all"].sum() == len(ALL)
    # The source under the sentence, and the rule under what was said.
    assert claims.readable(frame, "speed").to_html().count("<em>") == 2 * (frame["subject"] == "speed").sum()
    assert "✗" in claims.grid(frame, "slides table").to_html()
    assert f"Of {len(ALL)} claims" in claims.headline(frame)


# The original's own ablation


def test_eight_pictures_of_818_prove_nothing_after_holm():
    frame = claims.reanalysis()
    first = frame.iloc[0]
    assert (first["bits"], first["kept"], first["pictures"]) == (4, "layer 21", 8)
    assert first["least_p"] == pytest.approx(0.0078, abs=1e-4)
    assert first["least_holm_p"] == pytest.approx(0.39, abs=5e-3)
    assert (frame["least_holm_p"].dropna() > stats.SIGNIFICANCE).all()
    assert "11 pictures or more" in claims.reanalysis_headline(frame)

"""Notebook 5: the claims of the original study, tested on the records of this one.

`claims.yaml` holds the claims without verdicts, `quantities` what they compare, `claim` how they are judged, and
`mismatch` repeats the original's preprocessing mistake.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitlib.claims.claim import FAILS, HOLDS, HOLDS_ONLY, UNTESTED, VERDICTS, kind_of, load, text
from vitlib.claims.mismatch import MISTAKE, looks, mistake, mistake_in_words
from vitlib.claims.quantities import OTHER_NETWORK, Missing
from vitlib.measure import stats
from vitlib.pictures import sources
from vitlib.report.tables import Column, Markdown, Table, table
from vitlib.study import origin
from vitlib.study.records import MissingRecord
from vitlib.study.study import Study

__all__ = ["MISTAKE", "looks", "mistake", "mistake_in_words"]
open = Study.open

REANALYSIS = {
    **{"bits": "bits", "kept": "kept in FP16", "right": "right", "n": "of", "top1": Column("Top-1 (%)", ".1f", 100)},
    ("top1_low", "top1_high"): Column("95 % interval", ".1f", 100),
    "pictures": Column("pictures gained", "+.0f"),
    "least_p": Column("smallest possible p", ".4f"),
    "least_holm_p": Column("after Holm's adjustment", ".2f"),
}


def pictures(study: Study) -> sources.Dataset:
    """The pictures of the study."""
    return sources.load(study.settings)


def verdicts(study: Study) -> pd.DataFrame:
    """A row a claim with the original's figure, the measurement and the verdict; written to `records/claims.csv`."""
    rows = []
    for claim in load().values():
        try:
            measured = claim.quantity.measure(study)
            found, verdict = text(measured, claim.unit), claim.judge(measured)
        except (Missing, MissingRecord) as why:
            found, verdict = "–", f"{UNTESTED}: {why}"
        row = claim.model_dump(include={"id", "subject", "claim", "source"}) | {"original": claim.shown}
        row |= {"counts_as": claim.counts_as, "measured": found, "verdict": verdict}
        rows.append(row | {"cause": "" if verdict == HOLDS else claim.cause})
    return study.write("claims", pd.DataFrame(rows))


def show(frame: pd.DataFrame, *subjects: str) -> Table:
    """The claims of some subjects. Where the network is not the original's, one row counts those that need it."""
    chosen = frame[frame["subject"].isin(subjects)].fillna("")
    other = chosen["verdict"].str.contains(OTHER_NETWORK, regex=False)
    shown = chosen[~other]
    columns = {"claim (source)": shown["claim"] + " (" + shown["source"] + ")"}
    columns["original (criterion)"] = shown["original"] + " (" + shown["counts_as"] + ")"
    rows = pd.DataFrame(columns).join(shown[["measured", "verdict", "cause"]])
    if other.any():
        rows.loc[-1, ["claim (source)", "verdict"]] = f"{other.sum()} claims", chosen.loc[other, "verdict"].iloc[0]
    return table(rows.fillna(""))


def counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Number of claims by subject and verdict, with totals."""
    crossed = pd.crosstab(frame["subject"], frame["verdict"].map(kind_of)).reindex(columns=VERDICTS, fill_value=0)
    crossed = crossed.reindex(frame["subject"].unique())
    crossed.loc["all"] = crossed.sum()
    return crossed.rename_axis(index=None, columns=None)


def reanalysis() -> pd.DataFrame:
    """The original's ablation with the uncertainty that it left out, the largest difference first.

    The original gives counts of right predictions, not the pictures that changed. `least_p` is the smallest p that
    McNemar's exact test could give for a difference of `pictures` (none lost where some were gained); `least_holm_p`
    adjusts it for all configurations of both bit widths. The real p values are larger.
    """
    frame = pd.read_csv(Path(__file__).with_name("ablation.csv"), keep_default_na=False)
    frame = frame.rename(columns={"kept_in_fp16": "kept", "correct_of_818": "right"}).assign(n=818)
    frame["top1"] = frame["right"] / frame["n"]
    frame["top1_low"], frame["top1_high"] = zip(*map(stats.wilson, frame["right"], frame["n"]), strict=True)
    nothing = frame["kept"] == "none"
    frame["pictures"] = frame["right"] - frame["bits"].map(frame[nothing].set_index("bits")["right"])
    frame["least_p"] = (2.0 ** (1 - frame["pictures"].abs())).clip(upper=1).mask(nothing)  # all on one side
    frame["least_holm_p"] = stats.holm(frame["least_p"])
    return frame.sort_values(["least_p", "bits"], kind="stable", ignore_index=True)


def reanalysis_in_words(frame: pd.DataFrame) -> Markdown:
    """Whether differences in the original's ablation can be significant."""
    first, tests = frame.iloc[0], int(frame["least_p"].notna().sum())
    significant = int((frame["least_holm_p"] < stats.SIGNIFICANCE).sum())
    return Markdown(
        f"Of {tests} comparisons **{significant} can be significant**. The largest difference, {first['kept']} kept at "
        f"{first['bits']} bits, is {first['pictures']:+.0f} of {first['n']} pictures, with p = "
        f"{first['least_holm_p']:.2f} or more after Holm's adjustment. A significant difference would need at least "
        f"{stats.fewest_significant(tests)} pictures."
    )


def summary(study: Study, frame: pd.DataFrame, costs: pd.DataFrame) -> Markdown:
    """The page in a few sentences: counts, the two baselines, and what the base is."""
    of = counts(frame).loc["all"]
    sentences = [
        f"Of {len(frame)} claims of the original study **{of[HOLDS]} hold**, {of[HOLDS_ONLY]} hold only in some cases, "
        f"**{of[FAILS]} do not hold**, and {of[UNTESTED]} cannot be tested by this study."
    ]
    reasons = frame.loc[frame["verdict"].map(kind_of) == UNTESTED, "verdict"].str.partition(": ")[2].value_counts()
    if len(reasons):
        sentences.append(f"The most frequent reason ({reasons.iloc[0]} claims): {reasons.index[0]}.")
    sentences.append("The original's largest error is in preprocessing. " + mistake_in_words(costs).splitlines()[-1])
    return Markdown(" ".join(sentences) + f"\n\n{origin.sentence(study.folder)}")

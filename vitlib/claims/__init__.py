"""The claims of the original study, tested on the records of this one: the functions of notebook 5.

`claims.yaml` holds the claims without verdicts, `quantities` what each is about, `claim` how they are judged, and
`mismatch` makes the original's preprocessing mistake again.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from vitlib import origin, sources, stats
from vitlib.claims.claim import FAILS, HOLDS, HOLDS_ONLY, UNTESTED, VERDICTS, find, kind_of, load, text
from vitlib.claims.mismatch import MISTAKE, looks, mistake, mistake_in_words
from vitlib.claims.quantities import OTHER_NETWORK, Missing
from vitlib.records import MissingRecord
from vitlib.sources import Dataset
from vitlib.study import Study
from vitlib.tables import Column, Markdown, table

__all__ = ["MISTAKE", "find", "looks", "mistake", "mistake_in_words"]
open = Study.open

REANALYSIS = {
    "bits": "bits",
    "kept": "kept in FP16",
    "right": "right",
    "n": "of",
    "top1": Column("Top-1 (%)", ".1f", 100),
    ("top1_low", "top1_high"): Column("95 % interval", ".1f", 100),
    "pictures": Column("pictures gained", "+.0f"),
    "least_p": Column("smallest possible p", ".4f"),
    "least_holm_p": Column("after Holm", ".2f"),
}
_COLUMNS = {name: name for name in ("claim", "original", "measured", "verdict", "cause")}
_COLOURS = {HOLDS: "#1c7c4a", HOLDS_ONLY: "#8a6100", FAILS: "#b3261e", UNTESTED: "#5b6475"}


def pictures(study: Study) -> Dataset:
    """The pictures of the study."""
    return sources.load(study.settings)


def verdicts(study: Study) -> pd.DataFrame:
    """A row a claim: what was said, what was measured, the verdict; written to `records/claims.csv`."""
    rows = []
    for claim in load():
        try:
            measured = claim.quantity.measure(study)
            found, verdict = text(measured, claim.unit), claim.judge(measured)
        except (Missing, MissingRecord) as why:
            found, verdict = "–", f"{UNTESTED}: {why}"
        said = {"id": claim.id, "subject": claim.subject, "claim": claim.claim, "source": claim.source}
        said |= {"original": claim.shown, "counts_as": claim.counts_as, "measured": found, "verdict": verdict}
        rows.append(said | {"cause": "" if verdict == HOLDS else claim.cause})
    return study.write("claims", pd.DataFrame(rows))


def show(frame: pd.DataFrame, *subjects: str) -> Styler | Markdown:
    """The claims of some subjects; those that need the original's network, where this one is another, as one count."""
    chosen = frame[frame["subject"].isin(subjects)]
    other = chosen["verdict"].str.startswith(f"{UNTESTED}: {OTHER_NETWORK}")
    reason = "".join(chosen.loc[other, "verdict"].head(1)).removeprefix(f"{UNTESTED}: ")
    note = f"{other.sum()} of {len(chosen)} claims are not tested: {reason}." if reason else ""
    if other.all():
        return Markdown(f"*{note}*")
    shown = chosen[~other].fillna("").replace("; ", "\n", regex=True)
    shown["claim"] += "\n(" + shown["source"] + ")"
    shown["original"] += "\nholds if " + shown["counts_as"]
    styled = table(shown, _COLUMNS).set_properties(**{"white-space": "pre-line", "text-align": "left"})
    styled = styled.map(lambda verdict: f"color: {_COLOURS[kind_of(verdict)]}", subset="verdict")
    return styled.set_caption(note) if note else styled


def counts(frame: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each subject got each verdict, with totals."""
    crossed = pd.crosstab(frame["subject"], frame["verdict"].map(kind_of)).reindex(columns=VERDICTS, fill_value=0)
    crossed = crossed.reindex(frame["subject"].unique())
    crossed.loc["all"] = crossed.sum()
    return crossed.rename_axis(index=None, columns=None)


def reanalysis() -> pd.DataFrame:
    """The original's ablation with the uncertainty that it left out, the largest difference first.

    Only counts of right answers are known, not which pictures changed. So `least_p` is the smallest p that McNemar's
    exact test could give for a difference of `pictures` (none lost where some were gained), and `least_holm_p` adjusts
    it for all configurations of both bit widths; the real p values are larger.
    """
    frame = pd.read_csv(Path(__file__).with_name("ablation.csv"), keep_default_na=False)
    frame = frame.rename(columns={"kept_in_fp16": "kept", "correct_of_818": "right"}).assign(n=818)
    frame["top1"] = frame["right"] / frame["n"]
    frame["top1_low"], frame["top1_high"] = zip(*map(stats.wilson, frame["right"], frame["n"]), strict=True)
    nothing = frame["kept"] == "none"
    frame["pictures"] = frame["right"] - frame["bits"].map(frame[nothing].set_index("bits")["right"])
    # McNemar's exact p where all discordant pairs are on one side.
    frame["least_p"] = [stats.mcnemar([False] * abs(k), [True] * abs(k)).p for k in frame["pictures"]]
    frame.loc[nothing, "least_p"] = float("nan")
    frame["least_holm_p"] = stats.holm(frame["least_p"])
    return frame.sort_values(["least_p", "bits"], kind="stable", ignore_index=True)


def reanalysis_in_words(frame: pd.DataFrame) -> Markdown:
    """What the original's ablation can show."""
    first, tests = frame.iloc[0], int(frame["least_p"].notna().sum())
    significant = int((frame["least_holm_p"] < stats.SIGNIFICANCE).sum())
    return Markdown(
        f"Of {tests} comparisons **{significant} can be significant**: the largest difference, {first['kept']} kept at "
        f"{first['bits']} bits, is {first['pictures']:+.0f} of {first['n']} pictures, with p = "
        f"{first['least_holm_p']:.2f} or more after Holm's correction. It would take "
        f"{stats.fewest_significant(tests)} pictures."
    )


def summary(study: Study, frame: pd.DataFrame, costs: pd.DataFrame) -> Markdown:
    """The page in a few sentences: counts, the two baselines, speed and sensitivity, and what the base is."""
    of = counts(frame).loc["all"]
    sentences = [
        f"Of {len(frame)} claims of the original study **{of[HOLDS]} hold**, {of[HOLDS_ONLY]} hold only in some cases, "
        f"**{of[FAILS]} do not hold**, and {of[UNTESTED]} cannot be tested by this study."
    ]
    reasons = frame.loc[frame["verdict"].map(kind_of) == UNTESTED, "verdict"].str.partition(": ")[2].value_counts()
    if len(reasons):
        sentences.append(f"The most frequent reason ({reasons.iloc[0]} claims): {reasons.index[0]}.")
    sentences.append("Its largest error is in preprocessing. " + mistake_in_words(costs).splitlines()[-1])
    return Markdown(" ".join(sentences) + f"\n\n{origin.sentence(study.folder)}")

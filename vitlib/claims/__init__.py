"""Notebook 5: the claims of the original study, tested on the records of this one.

`claims.yaml` holds the claims without verdicts, `quantities` what they compare, `claim` how they are judged, and
`mismatch` repeats the original's preprocessing mistake.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from vitlib.claims.claim import FAILS, HOLDS, HOLDS_ONLY, UNTESTED, VERDICTS, kind_of, load
from vitlib.claims.mismatch import MISTAKE, baselines, looks, mistake
from vitlib.claims.quantities import OTHER_NETWORK, Missing, content
from vitlib.measure import stats
from vitlib.pictures import sources
from vitlib.report.tables import Column, Markdown, Table, table
from vitlib.study.records import MissingRecord
from vitlib.study.study import Study

__all__ = ["FAILS", "HOLDS", "HOLDS_ONLY", "MISTAKE", "UNTESTED", "looks", "mistake"]
open = Study.open

MAIN = ("objectives", "recommendations", "speed and accuracy", "sensitivity")  # subjects that the answer names first
BASELINES = "own-top1"  # the claim that `baselines` is about

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
            found, verdict = claim.text(measured), claim.judge(measured)
        except (Missing, MissingRecord) as why:
            found, verdict = "–", f"{UNTESTED}: {why}"
        row = claim.model_dump(include={"id", "subject", "claim", "source"}) | {"original": claim.shown}
        row |= {"counts_as": claim.counts_as, "measured": found, "verdict": verdict}
        rows.append(row | {"cause": "" if verdict == HOLDS else claim.cause})
    return study.write("claims", pd.DataFrame(rows))


def show(frame: pd.DataFrame, kind: str) -> Table | Markdown:
    """The claims with one kind of verdict. Where the network is not the original's, one row counts those that need it.

    Small text has the source, the criterion, and the cases of a verdict that does not apply to all.
    """
    chosen = frame[frame["verdict"].map(kind_of) == kind].fillna("")
    other = chosen["verdict"].str.contains(OTHER_NETWORK, regex=False)
    said = chosen["verdict"].str.extract("([^:]*):? ?(.*)")
    columns = {"claim": chosen["claim"] + "\n" + chosen["source"]}
    columns |= {"original": chosen["original"] + "\n" + chosen["counts_as"]}
    columns |= {"measured": (chosen["measured"] + "\n" + said[0].mask(said[0] == kind, "")).str.strip()}
    rows = pd.DataFrame(columns | {"why": said[1].mask(said[1] == "", chosen["cause"])})[~other]
    if other.any():
        rows.loc[-1] = [f"claims about ViT-L/16: {other.sum()}", "", "", said[1][other].iloc[0]]
    rows.attrs = frame.attrs
    return table(rows)


def counts(frame: pd.DataFrame) -> pd.Series:
    """Number of claims by kind of verdict."""
    return frame["verdict"].map(kind_of).value_counts().reindex(VERDICTS, fill_value=0)


def counted(frame: pd.DataFrame, kind: str) -> Markdown:
    """How many claims have one kind of verdict, by subject."""
    subjects = frame.loc[frame["verdict"].map(kind_of) == kind, "subject"].value_counts(sort=False)
    listed = ", ".join(f"{subject} {count}" for subject, count in subjects.items())
    return Markdown(f"**{subjects.sum()} of {len(frame)} claims**{f' ({listed})' if listed else ''}")


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
    """The page in a few sentences: counts, what could not be tested and why, failed claims, and the two baselines."""
    of, original = counts(frame), content()["study"]
    kinds = of[of > 0].rename({HOLDS_ONLY: f"{HOLDS_ONLY} in some cases"}).items()
    said = [f"{n} {kind if n == 1 else kind.replace('holds', 'hold').replace('does', 'do')}" for kind, n in kinds]
    lines = [
        f"**Of {len(frame)} claims of the original study, {_and(said)}.** The original is the student project "
        f"[{original['title']}]({original['address']})."
    ]
    untested = frame.loc[frame["verdict"].map(kind_of) == UNTESTED, "verdict"]
    reasons = untested.str.extract(": (.*)", expand=False).value_counts()
    if len(reasons):
        lines.append(f"Not tested: {_and([f'{count} because {reason}' for reason, count in reasons.items()])}.")
    own = sum(claim.quantity.kind == "own" for claim in load().values())
    lines[-1] += f" {own} claims only compare the original's README, slides and notebooks with each other."
    return Markdown("\n".join(f"- {line}" for line in [*lines, *_examples(frame), baselines(costs)]))


def _examples(frame: pd.DataFrame, count: int = 3) -> list[str]:
    """A sentence with `count` claims that do not hold: the first of each subject, those of MAIN before others."""
    failed = frame[(frame["verdict"].map(kind_of) == FAILS) & (frame["id"] != BASELINES)].drop_duplicates("subject")
    rank = {subject: place for place, subject in enumerate(MAIN)}
    chosen = failed.iloc[failed["subject"].map(rank).fillna(len(rank)).argsort(kind="stable")].head(count)
    said = [
        f"*{re.sub(r' [(]read as.*', '', row.claim).rstrip('.')}* "
        f"({row.original} → {re.sub(r' [(](closest: |[0-9.,]+ [/−] )[^)]*[)]', '', row.measured)})"
        for row in chosen.itertuples()
    ]
    return [f"For example, these do not hold (the original → measured): {'; '.join(said)}."] * bool(said)


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

"""Where a study's base network comes from, and what that means for its numbers. No torch.

`records/base.json` holds what is known of the base; every page whose accuracies depend on it shows the same sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitlib import files, records
from vitlib.params import is_hub_id

KINDS = ("random", "generator", "stand-in", "hub", "folder")
"""Random weights; trained by notebook 1 on other synthetic flowers; trained on the study's own pictures; a repository
of the Hub; a folder whose training is not recorded."""

_ONLY_ACCURACY = (
    "Size, speed and memory do not depend on what a network has learnt, and agreement and KL compare variants of the "
    "same weights."
)


def describe(base: str, *, revision: str = "", architecture: str = "") -> dict[str, Any]:
    """What a checkpoint records of the base that `base_model` names: base, kind (one of KINDS), and details.

    `base` is `random`, `pretrain`, a folder (looked for from the project's root) or a Hub id. A folder's own
    `provenance.json` tells a stand-in (`vitlib/standin.py`) from a network that somebody else trained.
    """
    if base == "random":
        return {"base": base, "kind": "random", "architecture": architecture}
    if base == "pretrain":
        return {"base": base, "kind": "generator", "revision": revision}
    if is_hub_id(base) and revision:  # a missing folder has no commit and is not a repository
        return {"base": base, "kind": "hub", "revision": revision}
    said = _read(files.resolve(base) / "provenance.json")
    found = {"base": base, "kind": "folder", "revision": revision}
    if said.get("pretrained") is False:
        found |= {"kind": "stand-in", "origin": said.get("origin", "")}
        found |= {key: said[key] for key in ("training pictures", "top1") if key in said}
    return found


def of_study(folder: Path | str) -> dict[str, Any]:
    """What is recorded of the base of the study in `folder`; {} where nothing is.

    The merged checkpoint is read first because it was evaluated; a published study has only `records/base.json`.
    """
    folder = Path(folder)
    found = _read(folder / "checkpoints" / "merged" / "provenance.json").get("origin")
    if not isinstance(found, Mapping) or "base" not in found:
        found = _read(folder / "records" / "base.json")
    if "base" not in found or found.get("kind") in KINDS:
        return dict(found)
    keys = {key: str(found.get(key) or "") for key in ("revision", "architecture")}
    return describe(str(found["base"]), **keys)  # of a checkpoint from before the kind was recorded


def sentence(about: Mapping[str, Any] | Path | str) -> str:
    """What the base is and what that means for the accuracies beside it (Markdown); '' where nothing is recorded.

    `about` is what `describe` gives, a study's folder, or a study's name.
    """
    fact, meaning = _parts(about)
    return f"**{fact}** {meaning}" if fact else ""


def plain_sentence(about: Mapping[str, Any] | Path | str) -> str:
    """`sentence` as text without markup."""
    return " ".join(_parts(about)).replace("`", "").strip()


def _parts(about: Mapping[str, Any] | Path | str) -> tuple[str, str]:
    """What the base is, and what follows for accuracies."""
    if not isinstance(about, Mapping):
        about = of_study(about if isinstance(about, Path) else files.study_folder(about))
    base, kind = str(about.get("base", "")), about.get("kind")
    if kind == "random":
        shape = f" ({about['architecture']})" if about.get("architecture") else ""
        return f"The base has random weights{shape}.", (
            "It had learnt nothing before this study trained it, so accuracies here say nothing about fine-tuning a "
            f"pretrained network. {_ONLY_ACCURACY}"
        )
    if kind == "generator":
        return (
            "The base is a small network that notebook 1 trained on other synthetic flowers from the generator.",
            "Accuracies here show that the parts work together and say nothing about photographs. " + _ONLY_ACCURACY,
        )
    if kind == "stand-in":
        return "The base is a stand-in and no pretrained network.", f"{_stand_in(about)} {_ONLY_ACCURACY}"
    if kind == "hub":
        commit = f" at commit {str(about['revision'])[:10]}" if about.get("revision") else ""
        return f"The base is `{base}` from the Hub{commit}.", (
            "Its authors trained it on other pictures. Accuracies here are those of fine-tuning it."
        )
    if kind == "folder":
        return f"The base is the checkpoint `{Path(base).name}`; what it was trained on is not recorded.", (
            f"If it has seen the validation pictures, accuracies here are too high. {_ONLY_ACCURACY}"
        )
    return "", ""


def _stand_in(about: Mapping[str, Any]) -> str:
    # The clause before the colon of `standin.ORIGIN`, without what Markdown would interpret.
    origin = re.sub(r"[^\w\s.,()-]", "", str(about.get("origin", "")).partition(":")[0].strip())
    count, top1 = about.get("training pictures"), about.get("top1")
    pictures = f", {count:,} pictures" if isinstance(count, int) else ""
    reached = f" Before fine-tuning it reached {100 * top1:.2f} % Top-1 on its validation split." if top1 else ""
    return (
        f"It was {origin or 'trained on the pictures of this study'}{pictures}.{reached} Fine-tuning shows it no new "
        "picture, so accuracies here are those of this network and do not predict what a pretrained one would reach."
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON mapping; {} where the file is missing or holds none: an unknown base must not stop a page."""
    try:
        found = records.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""Where a study's base network comes from, and what that means for its numbers. No torch.

`records/base.json` holds what is known of the base; every page whose accuracies depend on it shows the same sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitlib.study import files, records
from vitlib.study.params import is_hub_id

_SAID = {  # what the base is, and what follows for accuracies
    "random": (
        "The base has random weights{shape}.",
        "It had learnt nothing before this study trained it, so accuracies here say nothing about fine-tuning a "
        "pretrained network.",
    ),
    "generator": (
        "The base is a small network that notebook 1 trained on other synthetic flowers from the generator.",
        "Accuracies here show that the parts work together and say nothing about photographs.",
    ),
    "stand-in": (
        "The base is a stand-in, not a pretrained network.",
        "It was {origin}{pictures}.{reached} Fine-tuning shows it no new picture, so accuracies here are those of this "
        "network and do not predict what a pretrained one would reach.",
    ),
    "package": (
        "The base is {origin}.",
        "{licence} Accuracies here are those of fine-tuning it; what it was pretrained on is not recorded.",
    ),
    "hub": (
        "The base is `{base}` from the Hub at commit {commit}.",
        "Its authors trained it on other pictures. Accuracies here are those of fine-tuning it.",
    ),
    "folder": (
        "The base is the checkpoint `{name}`; what it was trained on is not recorded.",
        "If it has seen the validation pictures, accuracies here are too high.",
    ),
}
_ONLY_ACCURACY = (
    "Size, speed and memory do not depend on what a network has learnt, and agreement and KL compare variants of the "
    "same weights."
)


def describe(base: str, *, revision: str = "", architecture: str = "") -> dict[str, Any]:
    """What a checkpoint records of the base that `base_model` names: base, kind, and details.

    Kinds: `random` (weights); `generator` (trained by notebook 1 on other synthetic flowers); `stand-in` (trained on
    the study's own pictures by `standin`, as the folder's `provenance.json` says); `hub` (a repository); `folder`
    (what it was trained on is not recorded). Folders are looked for from the project's root.
    """
    if base == "random":
        return {"base": base, "kind": "random", "architecture": architecture}
    if base == "pretrain":
        return {"base": base, "kind": "generator", "revision": revision}
    if is_hub_id(base) and revision:  # a missing folder has no commit and is not a repository
        return {"base": base, "kind": "hub", "revision": revision}
    name = Path(base).name if base.startswith(("/", "~")) else base  # what a reader needs of a folder of this machine
    found, said = {"base": name, "kind": "folder", "revision": revision}, _read(files.resolve(base) / "provenance.json")
    if said.get("pretrained") is True:
        found |= {"kind": "package", "origin": said.get("origin", ""), "licence": said.get("licence", "")}
    if said.get("pretrained") is False:
        found |= {"kind": "stand-in", "origin": said.get("origin", "")}
        found |= {key: said[key] for key in ("training pictures", "top1") if key in said}
    return found


def of_study(folder: Path | str) -> dict[str, Any]:
    """What is recorded of the base of the study in `folder`; {} where nothing is.

    The merged checkpoint is read first because it was evaluated; a published study has only `records/base.json`.
    """
    evaluated = _read(Path(folder) / "checkpoints" / "merged" / "provenance.json").get("origin")
    return evaluated or _read(Path(folder) / "records" / "base.json")


def sentence(about: Mapping[str, Any] | Path) -> str:
    """What the base is and what that means for the accuracies beside it (Markdown); '' where nothing is recorded.

    `about` is what `describe` gives, or a study's folder.
    """
    about = about if isinstance(about, Mapping) else of_study(about)
    kind, count, top1 = about.get("kind"), about.get("training pictures"), about.get("top1")
    fact, meaning = _SAID.get(kind, ("", ""))
    details = {
        "base": about.get("base"),
        "name": " ".join(Path(about.get("base", "")).name.replace("`", "'").split()),  # it stands between backticks
        "commit": about.get("revision", "")[:10],
        "shape": f" ({about['architecture']})" if about.get("architecture") else "",
        # The clause before the colon of `standin.ORIGIN`, without what Markdown would interpret.
        "origin": re.sub(r"[^\w\s.,()/-]", "", about.get("origin", "").partition(":")[0].strip()),
        "pictures": f", {count:,} pictures" if count else "",
        "licence": f"Its licence is {about['licence']}." if about.get("licence") else "",
        "reached": f" Before fine-tuning it reached {100 * top1:.2f} % Top-1 on its validation split." if top1 else "",
    }
    only_accuracy = _ONLY_ACCURACY if kind not in ("hub", "package") else ""
    return f"**{fact}** {meaning} {only_accuracy}".format(**details).strip() if fact else ""


def _read(path: Path) -> dict[str, Any]:
    return records.read_json(path) if path.is_file() else {}

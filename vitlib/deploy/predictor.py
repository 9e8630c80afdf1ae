"""Find the weights in a folder, choose a variant of them, and prepare it to classify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from vitlib.measure import recommend
from vitlib.network import attention, checkpoint, verify
from vitlib.network.checkpoint import Loaded
from vitlib.network.engine import Engine
from vitlib.study import origin, provenance, records, variants
from vitlib.study.study import Study
from vitlib.study.variants import FORMATS, Variant

MEASURED = "variants.csv"  # of notebook 2; a packed checkpoint has the rows of its own variants
MARGIN = 0.02  # fraction of pictures that a variant may lose


@dataclass(frozen=True)
class Weights:
    """Checkpoints by the name of their kind (`merged`, `nf4`, …), and what notebook 2 measured with them."""

    folders: Mapping[str, Path]
    measured: pd.DataFrame  # columns of the record `variants`, and `hardware` where it is known; empty without it
    hardware: str = ""  # that was measured, with the name of the GPU or CPU; '' where it is not known

    def folder(self, variant: Variant) -> Path:
        """The checkpoint that holds the weights of `variant`. CheckpointError where it is missing."""
        if variant.checkpoint not in self.folders:
            own = ", ".join(self.folders)
            raise checkpoint.CheckpointError(f"{variant.name} needs the checkpoint {variant.checkpoint!r}; here: {own}")
        folder = self.folders[variant.checkpoint]
        found = (folder / "config.json").is_file()
        return folder if found else checkpoint.checkpoint_folder(folder.parent, variant)  # which says what to run


def find(path: Path) -> Weights:
    """The weights at `path`: a study's folder, its folder `checkpoints`, or one checkpoint, packed or not.

    CheckpointError where there is none.
    """
    if (path / "config.json").is_file():
        kind = checkpoint.whole(path).get("weights", path.name)
        folders = {FORMATS[kind].checkpoint if kind in FORMATS else kind: path}
        places = [path, path.parent.parent / "records"]
    else:
        below = sorted((path / "checkpoints" if (path / "checkpoints").is_dir() else path).glob("*/config.json"))
        folders, places = {file.parent.name: file.parent for file in below}, [path / "records", path.parent / "records"]
    known = {row.checkpoint for row in FORMATS.values()}
    folders = {kind: folder for kind, folder in folders.items() if kind in known}
    if not folders:
        raise checkpoint.CheckpointError(
            f"there is no checkpoint in {str(path)!r}: name a study's folder (outputs/<study>) or one of its "
            "checkpoints"
        )
    return Weights(folders, *_measured(places, folders))


def weights_of(study: Study) -> Weights:
    """The weights of a study; variants of checkpoints that it lacks are named when they are loaded."""
    kinds = {row.checkpoint for row in FORMATS.values()}
    return Weights({kind: study.checkpoint(kind) for kind in kinds}, *_measured([study.record(MEASURED).parent], kinds))


def _measured(places: list[Path], kinds: Mapping[str, Path] | set[str]) -> tuple[pd.DataFrame, str]:
    file = next((place / MEASURED for place in places if (place / MEASURED).is_file()), None)
    if file is None:
        return pd.DataFrame(columns=["variant", "why"]), ""
    rows = records.read_table(file)
    if "hardware" not in rows and (environment := file.with_name("environment.json")).is_file():
        rows["hardware"] = provenance.facts(records.read_json(environment)).get("hardware", "")
    found = (variants.VARIANTS.get(name) for name in rows["variant"])  # None: of another version of this project
    rows = rows[[variant is not None and variant.checkpoint in kinds for variant in found]]
    return rows, "".join(rows.get("hardware", pd.Series(dtype=object)).fillna("").head(1))


@dataclass
class Predictor:
    """A verified variant, ready to classify, and the reason why it was chosen."""

    variant: Variant
    engine: Engine
    why: str

    @property
    def said(self) -> str:
        """What follows its name in a sentence: that it is used, and why."""
        unknown = " Its checkpoint is unverified (no checksums)." * ("files" not in self.engine.loaded.about)
        return f"is used: {self.why}.{unknown}"

    def describe(self) -> pd.DataFrame:
        """What was loaded: variant, device, classes, size of the pictures, and the weights."""
        loaded = self.engine.loaded
        found = verify.evidence(loaded.model)
        row = {"variant": self.variant.name, "device": loaded.device.type, "classes": len(loaded.labels.names)}
        row |= {"pixels": " × ".join(map(str, loaded.preprocess.side)), "weights (MB)": loaded.weights_mb}
        row["encoder linears"] = ", ".join(f"{count} {kind}" for kind, count in found["encoder_linears"].items())
        return pd.DataFrame([row | {"attention": found["attention"]}])


def drawn_only(loaded: Loaded) -> str:
    """A warning (Markdown) where a network, or its base, was trained on drawn flowers only, else ''."""
    learned = loaded.about.get("parameters", {}).get("data_source")
    base = origin.of_study(loaded.folder.parents[1]).get("kind")
    which = "network" if learned == "synthetic" else "base network" if base == "generator" else ""
    said = f"**The {which} was trained on drawn flowers only**: its predictions of photographs are not reliable."
    return said if which else ""


def load(
    weights: Weights,
    name: str = "auto",
    *,
    device: str = "auto",
    batch_size: int,
    limits: Mapping[str, float] | None = None,
) -> Predictor:
    """The variant `name`, prepared for `batch_size`; see `choose`. The errors of `checkpoint.load_folder`."""
    checkpoint.quiet_libraries()
    target = checkpoint.pick_device(device)
    variant, why = choose(weights, name, target, batch_size, limits)
    loaded = checkpoint.load_folder(weights.folder(variant), variant, target)
    return Predictor(variant, Engine(loaded, variant.execution, (batch_size,)), why)


def choose(
    weights: Weights, name: str, device: torch.device, batch_size: int, limits: Mapping[str, float] | None = None
) -> tuple[Variant, str]:
    """The variant to use, and why.

    `auto` is the first of `recommended`; without one it is FP16 with SDPA on a GPU and FP32 with SDPA on a CPU, or the
    plain network of the only checkpoint. It is said where another device was measured.
    """
    if name != "auto":
        return variants.find(name), "the parameter `variant` names it"
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.cpu_model()
    other = own not in weights.hardware and weights.hardware
    elsewhere = f" (measured on {weights.hardware}, not on this device)" if other else ""
    rows = recommended(weights.measured, device, batch_size, limits)
    if rows.empty:
        plain = [row.name for row in FORMATS.values() if row.checkpoint in weights.folders and not row.fused_only]
        default = "fp16" if device.type == "cuda" else "fp32"
        chosen = Variant(default if default in plain else plain[0])
        none = f"notebook 2 has measured no variant that runs here{elsewhere}"
        return chosen, f"{none}, and it is the default on {device.type}"
    if limit := rows["why"].iloc[0]:
        return variants.find(rows["variant"].iloc[0]), f"no variant is within the limits, and it {limit}{elsewhere}"
    why = f"of those measured that run here it is the best within the limits{elsewhere}"
    return variants.find(rows["variant"].iloc[0]), why


def recommended(
    measured: pd.DataFrame, device: torch.device, batch_size: int, limits: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """`recommend.ranked` of the measured variants that run here, within the limits; empty where none was measured.

    Measurements on a GPU say nothing of a CPU, nor those on a CPU of a GPU.
    """
    if measured.empty:
        return measured
    known = (variants.VARIANTS.get(name) for name in measured["variant"])
    runs = pd.Series([bool(found) and not attention.not_runnable(found, device) for found in known], measured.index)
    rows = measured[runs & (measured["peak_vram_mb"].notna() == (device.type == "cuda"))]
    return recommend.ranked(rows, batch_size, **({"margin": MARGIN} | dict(limits or {})))

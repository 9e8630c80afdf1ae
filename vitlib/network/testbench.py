"""The variants of one study side by side as engines, with the pictures that all of them see."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from vitlib.network import checkpoint, verify
from vitlib.network.engine import Engine
from vitlib.pictures import decode, sources
from vitlib.pictures.decode import Decoded
from vitlib.pictures.sources import Dataset, Labels
from vitlib.study import files
from vitlib.study.study import Study
from vitlib.study.variants import Variant, find

ROTATING = 4  # different batches that a timed call cycles through, so that its input is not always in the cache


@dataclasses.dataclass
class Bench:
    """The variants of a study, as far as they run here, and the pictures that all of them see."""

    variants: list[Variant]
    engines: dict[str, Engine]  # by the name of the variant, in the order of the study
    reasons: dict[str, str]  # of the variants that do not run
    labels: Labels
    device: torch.device
    valid: Decoded
    checkpoints: Path
    evidence: dict[str, dict]  # `verify.evidence` of each network, and whether its files are `verified`

    @property
    def baseline(self) -> str:
        """The name of the first variant; it must run."""
        return self.variants[0].name

    def batch(self, engine: Engine, size: int, first: int = 0) -> torch.Tensor:
        """`size` validation pictures as an engine takes them: normalised (size, 3, h, w), on its device."""
        chosen = self.valid.pixels[torch.arange(first, first + size) % len(self.valid.pixels)]
        return engine.loaded.preprocess.normalise(chosen.to(engine.loaded.device), engine.loaded.dtype)

    def calls(self, engine: Engine, size: int) -> Callable[[int], torch.Tensor]:
        """`call(number)` of one batch of `size` that cycles through different pictures."""
        batches = [self.batch(engine, size, number * size) for number in range(ROTATING)]
        return lambda number: engine(batches[number % ROTATING])

    def ran(self) -> list[Variant]:
        """The variants that have an engine, in the order of the study."""
        return [variant for variant in self.variants if variant.name in self.engines]

    def data_checksum(self) -> str:
        """sha256 of the decoded pictures with their names and labels."""
        return decode.checksum(self.valid)

    def without(self, refused: Mapping[str, str]) -> "Bench":
        """A bench without the variants that `refused` names, each with the reason. The baseline must remain."""
        if self.baseline in refused:
            raise verify.GateError(f"the baseline {self.baseline} is not what it is called: {refused[self.baseline]}")
        engines = {name: engine for name, engine in self.engines.items() if name not in refused}
        return dataclasses.replace(self, engines=engines, reasons={**self.reasons, **refused})


def prepare(study: Study, dataset: Dataset | None = None) -> Bench:
    """Load every variant of the study once and decode the validation split with the checkpoint's preprocessing.

    `dataset` is that of the study unless given. Raises the baseline's error if that does not run, and CheckpointError
    where checkpoints do not come from one training.
    """
    checkpoint.quiet_libraries()
    settings, dataset = study.settings, dataset or sources.load(study.settings)
    device, variants = checkpoint.pick_device(settings.device), [find(name) for name in settings.variants]
    sizes = {*settings.batch_sizes, settings.eval_batch_size, settings.profile_batch_size}
    engines, reasons = engines_of(variants, study.checkpoints, device, sizes)
    first = engines[variants[0].name].loaded
    first.labels.check(dataset, "valid")
    _one_training(engines, study)
    valid = sources.decode_splits(dataset, ["valid"], first.preprocess, settings.workers)["valid"]
    found = {n: verify.evidence(run.network) | {"verified": "files" in run.loaded.about} for n, run in engines.items()}
    return Bench(variants, engines, reasons, first.labels, device, valid, study.checkpoints, found)


def engines_of(
    variants: list[Variant], checkpoints: Path, device: torch.device, sizes: Iterable[int]
) -> tuple[dict[str, Engine], dict[str, str]]:
    """By name, the variants that run on `device` as engines for these batch sizes, and why the others do not.

    Raises NotRun or OutOfMemoryError where the first one, the baseline, does not run.
    """
    engines, reasons = {}, {}
    for variant in variants:
        try:
            loaded = checkpoint.load(checkpoints, variant, device)
            engines[variant.name] = Engine(loaded, variant.execution, tuple(sizes))
        except (checkpoint.NotRun, torch.OutOfMemoryError) as reason:
            if variant is variants[0]:
                raise
            reasons[variant.name] = files.first_line(reason)
    return engines, reasons


def _one_training(engines: Mapping[str, Engine], study: Study) -> None:
    """CheckpointError unless all engines have one preprocessing and the weights and labels of the merged checkpoint."""
    labels = checkpoint.read_labels(study.checkpoint("merged"))
    checksum = files.checksum(study.checkpoint("merged") / "model.safetensors")
    expected = next(iter(engines.values())).loaded.preprocess.describe()
    for name, loaded in ((name, engine.loaded) for name, engine in engines.items()):
        described, fault = loaded.preprocess.describe(), ""
        if described != expected:
            fault = f"{name} has different preprocessing from the baseline ({described}, not {expected})"
        elif loaded.labels != labels or loaded.about.get("merged_sha256", checksum) != checksum:
            fault = f"{name} was quantized from other weights or labels than those in merged/"
        if fault:
            raise checkpoint.CheckpointError(f"{fault}: run 1_finetune again, which makes all checkpoints")

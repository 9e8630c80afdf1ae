"""Notebook 3: which blocks of the network are sensitive to quantization.

The network is loaded once. Each block has a quantized twin beside it, and a configuration is a choice between the two.
What runs before the first block in which two configurations differ is computed once for both: "only block k kept"
starts from the activations that the fully quantized network has before block k, which saves half of all block
evaluations. Configurations that have diverged but reach the same block again are batched into one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from vitlib import checkpoint, origin, quantize, sources, stats
from vitlib.sources import Dataset
from vitlib.study import Study
from vitlib.tables import Column, Markdown
from vitlib.variants import Variant

TOGETHER = 256  # pictures in one call of a block at most, where configurations are batched
NONE, ENDS, HEADS, ALL = "none", "first+last blocks", "embeddings+classifier", "everything"
REPEATS = 0.5  # rank correlation between halves of the pictures from which a ranking is said to repeat
TABLE = {
    "bits": "bits",
    "kept": "kept in FP16",
    "top1": Column("Top-1 (%)", ".2f", 100),
    "top5": Column("Top-5 (%)", ".2f", 100),
    "logit_kl": Column("KL (nats)", ".2e"),
    ("logit_kl_low", "logit_kl_high"): Column("KL, 95 % interval", ".1e"),
    "flips": "flips",
    "discordant_pairs": "discordant",
    "mcnemar_p": Column("McNemar p", ".3f"),
    "holm_p": Column("Holm p", ".3f"),
}
RELIABILITY = {
    "bits": "bits",
    "pictures": "pictures",
    "split_half_kl_only_quantized": Column("rank correlation by KL, one quantized", ".2f"),
    "split_half_kl_only_kept": Column("by KL, one kept", ".2f"),
    "split_half_top1_only_kept": Column("by accuracy, one kept", ".2f"),
    "top1_splits_undefined": "splits without a ranking by accuracy",
    "top1_splits": "of splits",
    "fewest_pictures": "smallest significant difference (pictures)",
    "smallest_points": Column("in points", ".2f"),
}


@dataclass
class Subject:
    """The 16-bit network, its validation pictures and their class ids."""

    loaded: checkpoint.Loaded
    pixels: torch.Tensor
    labels: torch.Tensor

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder blocks."""
        return self.loaded.model.vit.layers


@dataclass(frozen=True)
class Configuration:
    """Which blocks and whether the classifier stay in FP16; the patch embedding, a convolution, always does."""

    kept: str
    blocks: frozenset[int]
    classifier: bool


def open(namespace: Mapping[str, Any]) -> Study:
    """The study of the notebook's parameters (call it with `globals()`). DataError where its data folder is missing."""
    study = Study.open(namespace)
    sources.check_source(study.settings)
    return study


def prepare(study: Study, dataset: Dataset | None = None) -> Subject:
    """The merged checkpoint in fp16, the format that bitsandbytes' int8 product takes, and the validation pictures.

    These are of `dataset`, by default of the study's own.
    """
    checkpoint.quiet_libraries()
    settings = study.settings
    dataset = sources.load(settings) if dataset is None else dataset
    loaded = checkpoint.load(study.checkpoints, Variant("fp16"), checkpoint.pick_device(settings.device))
    loaded.labels.check(dataset, "valid")
    dataset.splits["valid"] = sources.evenly(dataset.splits["valid"], settings.ablation_pictures)
    valid = sources.decode_splits(dataset, ["valid"], loaded.preprocess, settings.workers)["valid"]
    return Subject(loaded, valid.pixels, loaded.labels.ids(valid.pictures))


def introduce(study: Study) -> Markdown:
    """What the base is and what that means for the accuracies here."""
    return Markdown(origin.sentence(study.folder))


def configurations(blocks: int) -> list[Configuration]:
    """Nothing kept, first and last block, classifier, each block alone kept or alone quantized, and everything kept."""
    everything = frozenset(range(blocks))
    single = [Configuration(f"block {k}", frozenset({k}), False) for k in range(blocks)]
    single += [Configuration(f"all but block {k}", everything - {k}, True) for k in range(blocks)]
    ends = Configuration(ENDS, frozenset({0, blocks - 1}), False)
    plain = [Configuration(NONE, frozenset(), False), ends, Configuration(HEADS, frozenset(), True)]
    return [*plain, *single, Configuration(ALL, everything, True)]


def twin(subject: Subject, number: int, bits: int) -> nn.Module:
    """The quantized twin of block `number`."""
    return quantize.quantized_copy(subject.blocks[number], bits)


State = tuple[torch.Tensor, list[Configuration]]  # activations (n, tokens, hidden), and who agreed so far


class Exchange:
    """The blocks and classifier of a network with a quantized twin of each, and passes that choose between them.

    `together` is the largest number of pictures in one call of a block: the activations of several configurations are
    concatenated up to it (0: never). LLM.int8() finds its outliers in the whole batch, so an int8 block would give
    other outputs on a concatenated one: these run one by one. `block_runs` counts evaluations of a block for a batch of
    pictures, `block_calls` the calls that they took.
    """

    def __init__(self, model: nn.Module, bits: int, together: int = TOGETHER) -> None:
        self.model, self.together = model, together
        self.pairs = [(block, quantize.quantized_copy(block, bits)) for block in model.vit.layers]
        self.classifiers = (model.classifier, quantize.quantized_copy(model.classifier, bits))
        self.joins = (True, bits != 8)  # the block as it was, its quantized twin
        self.block_runs = self.block_calls = 0

    def logits(self, pixel_values: torch.Tensor, wanted: list[Configuration]) -> dict[str, torch.Tensor]:
        """Logits (n, classes) of one batch for every configuration.

        As many activations are held at a time as there are configurations that differ, at most `len(wanted)`.
        """
        states = [(self.model.vit.embeddings(pixel_values), wanted)]
        for number in range(len(self.pairs)):
            states = [state for quantized in (False, True) for state in self._step(states, number, quantized)]
        found = {}
        for hidden, group in states:
            tokens = self.model.vit.layernorm(hidden)[:, 0, :]
            found |= {c.kept: self.classifiers[not c.classifier](tokens) for c in group}
        return found

    def _step(self, states: list[State], number: int, quantized: bool) -> list[State]:
        """States after block `number` or its quantized twin, of the configurations that take this one of the two."""
        block, size = self.pairs[number][quantized], len(states[0][0])
        parted = [(hidden, [c for c in group if (number in c.blocks) != quantized]) for hidden, group in states]
        going = [(hidden, group) for hidden, group in parted if group]
        after = []
        most = max(1, self.together // size if self.joins[quantized] else 1)
        for part in (going[first : first + most] for first in range(0, len(going), most)):
            hidden = [hidden for hidden, _ in part]
            outputs = block(hidden[0] if len(part) == 1 else torch.cat(hidden)).split(size)
            after += [(output, group) for output, (_, group) in zip(outputs, part, strict=True)]
            self.block_runs += len(part)
            self.block_calls += 1
        return after


def evaluate(
    loaded: checkpoint.Loaded,
    pixels: torch.Tensor,
    wanted: list[Configuration],
    bits: int,
    *,
    batch_size: int,
    together: int = TOGETHER,
) -> tuple[dict[str, torch.Tensor], Exchange]:
    """float32 logits (n, classes) on the CPU of every configuration, and the exchange with its counts.

    On a GPU a product over more rows may round differently in its last bit; on a CPU `together` only changes the time.
    """
    exchange = Exchange(loaded.model, bits, together)
    parts: dict[str, list[torch.Tensor]] = {configuration.kept: [] for configuration in wanted}
    with torch.inference_mode():
        for chunk in tqdm(pixels.split(batch_size), f"{bits} bits, {len(wanted)} configurations", unit="batch"):
            pixel_values = loaded.preprocess.normalise(chunk.to(loaded.device), loaded.dtype)
            found = exchange.logits(pixel_values, wanted)
            stacked = torch.stack([found[kept] for kept in parts]).float().cpu()  # one copy, so one wait
            for kept, logits in zip(parts, stacked, strict=True):
                parts[kept].append(logits)
    return {kept: torch.cat(logits) for kept, logits in parts.items()}, exchange


def measure(study: Study, subject: Subject) -> tuple[dict[tuple[int, str], torch.Tensor], float]:
    """float32 logits of every (bits, kept), and the share of block evaluations that were needed.

    1 would be a full pass for every configuration.
    """
    wanted, batch = configurations(len(subject.blocks)), study.settings.eval_batch_size
    found, needed = {}, 0
    for bits in study.settings.ablation_bits:
        logits, exchange = evaluate(subject.loaded, subject.pixels, wanted, bits, batch_size=batch)
        found |= {(bits, kept): values for kept, values in logits.items()}
        needed += exchange.block_runs
    batches = -(-len(subject.pixels) // batch)
    return found, needed / (batches * len(found) * len(subject.blocks))


def table(study: Study, logits: dict[tuple[int, str], torch.Tensor], subject: Subject) -> pd.DataFrame:
    """A row a configuration, written to `records/ablation.csv`.

    `logit_kl` is the mean KL divergence of the probabilities from "everything kept", with a bootstrap interval over
    pictures. Discordant pairs, flips and McNemar's p compare with "nothing kept" of the same bits; Holm's p adjusts for
    all configurations of these bits.
    """
    labels, rows = subject.labels.numpy(), []
    for (bits, kept), values in logits.items():
        found, nothing = values.numpy(), logits[bits, NONE].numpy()
        right, right_nothing = (stats.topk_right(part, labels, 1) for part in (found, nothing))
        test = stats.mcnemar(right_nothing, right)
        kl = stats.paired_bootstrap(stats.kl_divergence(logits[bits, ALL].numpy(), found), seed=study.settings.seed)
        rows.append(
            {
                "bits": bits,
                "kept": kept,
                "top1": right.mean(),
                "top5": stats.topk_accuracy(found, labels, 5),
                "loss": nn.functional.cross_entropy(values, subject.labels).item(),
                "logit_kl": kl.estimate,
                "logit_kl_low": kl.low,
                "logit_kl_high": kl.high,
                "flips": stats.flips(nothing.argmax(1), found.argmax(1)),
                "discordant_pairs": test.lost + test.gained,
                "mcnemar_p": np.nan if kept == NONE else test.p,
            }
        )
    frame = pd.DataFrame(rows)
    frame["holm_p"] = frame.groupby("bits")["mcnemar_p"].transform(lambda p: stats.holm(p.to_numpy()))
    return study.write("ablation", frame)


def sensitivity(frame: pd.DataFrame) -> pd.DataFrame:
    """By block: the share of the KL that is removed when it alone is kept, and the KL when it alone is quantized."""
    by_name, rows = frame.set_index(["bits", "kept"]), []
    for bits, kept in by_name.index:
        if kept.startswith("block "):
            only_kept, nothing = by_name.loc[(bits, kept)], by_name.loc[(bits, NONE)]
            alone = by_name.loc[(bits, f"all but {kept}")]
            rows.append(
                {
                    "bits": bits,
                    "block": int(kept.removeprefix("block ")),
                    "kl_removed": 1 - only_kept["logit_kl"] / nothing["logit_kl"],
                    "kl_alone": alone["logit_kl"],
                    "kl_alone_low": alone["logit_kl_low"],
                    "kl_alone_high": alone["logit_kl_high"],
                }
            )
    return pd.DataFrame(rows)


def reliability(
    study: Study, logits: dict[tuple[int, str], torch.Tensor], frame: pd.DataFrame, subject: Subject
) -> pd.DataFrame:
    """Whether another set of pictures would rank the blocks alike, by KL and by accuracy; `records/reliability.csv`.

    Split-half rank correlations over random halves of the pictures, with the number of splits that rank nothing by
    accuracy. `fewest_pictures` must all change in one direction for a difference of accuracy to be significant after
    Holm's adjustment for all configurations; `smallest_points` is their share, NaN where there are fewer pictures.
    `detectable_points` is the true difference that is found with a power of 80 % at the share of discordant pairs that
    single blocks had, before any adjustment; NaN where these are too few.
    """
    labels, rows, blocks = subject.labels.numpy(), [], range(len(subject.blocks))
    for bits in study.settings.ablation_bits:
        reference = logits[bits, ALL].numpy()
        alone = [logits[bits, f"all but block {k}"].numpy() for k in blocks]
        kept = [logits[bits, f"block {k}"].numpy() for k in blocks]
        by_kl = stats.split_half_correlation([stats.kl_divergence(reference, values) for values in alone])
        by_kl_kept = stats.split_half_correlation([stats.kl_divergence(reference, values) for values in kept])
        by_top1 = stats.split_half_correlation([stats.topk_right(values, labels, 1) for values in kept])
        single = frame[(frame["bits"] == bits) & frame["kept"].str.startswith("block ")]
        rate = float(single["discordant_pairs"].mean()) / len(labels)
        needed = stats.fewest_significant(int(frame.loc[frame["bits"] == bits, "mcnemar_p"].notna().sum()))
        rows.append(
            {
                "bits": bits,
                "pictures": len(labels),
                "split_half_kl_only_quantized": by_kl.correlation,
                "split_half_kl_only_kept": by_kl_kept.correlation,
                "split_half_top1_only_kept": by_top1.correlation,
                "top1_splits": by_top1.splits,
                "top1_splits_undefined": by_top1.undefined,
                "discordant_rate": rate,
                "fewest_pictures": needed,
                "smallest_points": 100 * needed / len(labels) if needed <= len(labels) else np.nan,
                "detectable_points": 100 * stats.smallest_detectable_difference(len(labels), rate),
            }
        )
    return study.write("reliability", pd.DataFrame(rows))


def headline(frame: pd.DataFrame, blocks: pd.DataFrame, reliable: pd.DataFrame) -> Markdown:
    """What the records say, in a few sentences."""
    lines = []
    for bits, rows in frame.groupby("bits"):
        nothing = rows.set_index("kept").loc[NONE]
        own = blocks[blocks["bits"] == bits]
        worst, best = own.loc[own["kl_alone"].idxmax()], own.loc[own["kl_removed"].idxmax()]
        most = "most of it" if best["kl_removed"] > 0.5 else "the largest share"
        surviving = int((rows["holm_p"] < stats.SIGNIFICANCE).sum())
        trust = reliable.set_index("bits").loc[bits]
        lines.append(
            f"- **{bits} bits**: quantizing everything changes the probabilities by {nothing['logit_kl']:.1e} nats on "
            f"average (KL; Top-1 {100 * nothing['top1']:.2f} %). Keeping block {best['block']:.0f} removes {most} "
            f"({100 * best['kl_removed']:.0f} %). Block {worst['block']:.0f} changes them most when quantized alone "
            f"({worst['kl_alone']:.1e}). "
            f"{_repeats('one quantized block', trust['split_half_kl_only_quantized'])} "
            f"{_repeats('one kept block', trust['split_half_kl_only_kept'])} {_by_accuracy(trust)} By accuracy "
            f"{surviving} of {len(rows) - 1} configurations differ from quantizing everything after Holm's adjustment. "
            f"{_smallest(trust)}"
        )
    return Markdown("\n".join(lines))


def _repeats(what: str, correlation: float) -> str:
    """Whether a ranking of the blocks repeats on other pictures."""
    verb = "repeats" if correlation >= REPEATS else "does not repeat"
    return f"The ranking by the KL of {what} {verb} on other pictures (rank correlation {correlation:.2f})."


def _by_accuracy(trust: pd.Series) -> str:
    """How far accuracy ranks the blocks, and in how many splits it ranks them at all."""
    splits, undefined = int(trust["top1_splits"]), int(trust["top1_splits_undefined"])
    if undefined == splits:
        return f"Accuracy cannot rank the blocks: in each of {splits} splits all blocks tie in a half."
    ties = f", over the {splits - undefined} of {splits} splits in which no half ties" if undefined else ""
    return f"By accuracy the rank correlation is {trust['split_half_top1_only_kept']:.2f}{ties}."


def _smallest(trust: pd.Series) -> str:
    """The smallest difference of accuracy that could have been significant."""
    needed, pictures = int(trust["fewest_pictures"]), int(trust["pictures"])
    if np.isnan(trust["smallest_points"]):
        return f"No difference of accuracy could be significant: that takes {needed} pictures and there are {pictures}."
    return (
        f"The smallest difference that could be significant is {needed} pictures that all change in one direction, "
        f"{trust['smallest_points']:.2f} points of {pictures:,} pictures."
    )

"""Notebook 3: which blocks of the network are sensitive to quantization.

The network is loaded once, every block gets a quantized twin, and a configuration chooses between the two. The blocks
before the first one in which two configurations differ are evaluated once for both, which saves half of all block
evaluations. Configurations that have diverged but reach the same block again are batched into one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from vitlib.measure import stats
from vitlib.network import checkpoint, quantize
from vitlib.pictures import sources
from vitlib.pictures.sources import Dataset
from vitlib.report.tables import Column, Markdown
from vitlib.study import origin
from vitlib.study.study import Study
from vitlib.study.variants import Variant

TOGETHER = 256  # most pictures in one call of a block, where configurations are batched
NONE, ENDS, HEADS, ALL = "none", "first+last blocks", "embeddings+classifier", "everything"
REPEATS = 0.5  # lowest rank correlation between halves of the pictures at which a ranking is said to repeat
PARTS = {NONE: "nothing", ENDS: "first and last block", HEADS: "classifier"}  # the patch embedding always is in FP16
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
    """The FP16 network, its validation pictures (n, 3, h, w) in uint8, and their class ids (n,)."""

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


open = Study.open


def prepare(study: Study, dataset: Dataset | None = None) -> Subject:
    """The merged checkpoint in FP16, for bitsandbytes' int8 product, and the pictures (default: the study's)."""
    checkpoint.quiet_libraries()
    settings, dataset = study.settings, dataset or sources.load(study.settings)
    loaded = checkpoint.load(study.checkpoints, Variant("fp16"), checkpoint.pick_device(settings.device))
    loaded.labels.check(dataset, "valid")
    dataset.splits["valid"] = sources.evenly(dataset.splits["valid"], settings.ablation_pictures)
    valid = sources.decode_splits(dataset, ["valid"], loaded.preprocess, settings.workers)["valid"]
    return Subject(loaded, valid.pixels, loaded.labels.ids(valid.pictures))


def introduce(study: Study) -> Markdown:
    """What the base is, and what follows for the accuracies of this page."""
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


State = tuple[torch.Tensor, list[Configuration]]  # activations (n, tokens, hidden), and the configurations with them


class Exchange:
    """The blocks and the classifier of a network, a quantized twin of each, and passes that choose between them.

    Several configurations run in calls of at most TOGETHER pictures, but one by one in int8 blocks, as LLM.int8() finds
    its outliers in the whole batch. `block_runs` counts the evaluations of a block for a batch of pictures.
    """

    def __init__(self, model: nn.Module, bits: int) -> None:
        self.model = model
        self.pairs = [(block, quantize.quantized_copy(block, bits)) for block in model.vit.layers]
        self.classifiers = (model.classifier, quantize.quantized_copy(model.classifier, bits))
        self.joins = (True, bits != 8)  # the block itself, its quantized twin
        self.block_runs = 0

    def logits(self, pixel_values: torch.Tensor, wanted: list[Configuration]) -> dict[str, torch.Tensor]:
        """Logits (n, classes) of one batch by what is kept; holds at most `len(wanted)` activations at once."""
        states = [(self.model.vit.embeddings(pixel_values), wanted)]
        for number in range(len(self.pairs)):
            states = [state for quantized in (False, True) for state in self._step(states, number, quantized)]
        found = {}
        for hidden, group in states:
            tokens = self.model.vit.layernorm(hidden)[:, 0, :]
            found |= {c.kept: self.classifiers[not c.classifier](tokens) for c in group}
        return found

    def _step(self, states: list[State], number: int, quantized: bool) -> list[State]:
        """States after block `number` or its quantized twin, of the configurations that use this one of the two."""
        block, size = self.pairs[number][quantized], len(states[0][0])
        parted = [(hidden, [c for c in group if (number in c.blocks) != quantized]) for hidden, group in states]
        going = [(hidden, group) for hidden, group in parted if group]
        self.block_runs += len(going)
        after, most = [], max(1, TOGETHER // size if self.joins[quantized] else 1)
        for first in range(0, len(going), most):
            hidden, groups = zip(*going[first : first + most], strict=True)
            outputs = block(hidden[0] if len(hidden) == 1 else torch.cat(hidden)).split(size)
            after += zip(outputs, groups, strict=True)
        return after


def measure(study: Study, subject: Subject) -> tuple[dict[tuple[int, str], torch.Tensor], float]:
    """float32 logits (n, classes) on the CPU by (bits, kept), and the share of all block evaluations that it took."""
    loaded, wanted = subject.loaded, configurations(len(subject.blocks))
    found, needed, full = {}, 0, 0
    for bits in study.settings.ablation_bits:
        exchange, parts = Exchange(loaded.model, bits), []
        batches = subject.pixels.split(study.settings.eval_batch_size)
        with torch.inference_mode():
            for batch in tqdm(batches, f"{bits} bits, {len(wanted)} configurations", unit="batch"):
                logits = exchange.logits(loaded.preprocess.normalise(batch.to(loaded.device), loaded.dtype), wanted)
                parts.append(torch.stack([logits[one.kept] for one in wanted]).float().cpu())  # one copy, so one wait
        found |= {(bits, one.kept): values for one, values in zip(wanted, torch.cat(parts, dim=1), strict=True)}
        needed, full = needed + exchange.block_runs, full + len(batches) * len(wanted) * len(subject.blocks)
    return found, needed / full


def table(study: Study, logits: dict[tuple[int, str], torch.Tensor], subject: Subject) -> pd.DataFrame:
    """A row a configuration, written to `records/ablation.csv`.

    `logit_kl` is the mean KL divergence from everything kept, in nats, with a bootstrap interval over pictures. Flips,
    discordant pairs and McNemar's p compare with nothing kept; Holm's p adjusts for all configurations of these bits.
    """
    labels, rows = subject.labels.numpy(), []
    for (bits, kept), values in logits.items():
        found, nothing = values.numpy(), logits[bits, NONE].numpy()
        right = stats.topk_right(found, labels)
        test = stats.mcnemar(stats.topk_right(nothing, labels), right)
        kl = stats.paired_bootstrap(stats.kl_divergence(logits[bits, ALL].numpy(), found), seed=study.settings.seed)
        row = {"bits": bits, "kept": kept, "top1": right.mean(), "top5": stats.topk_accuracy(found, labels, 5)}
        row["loss"] = nn.functional.cross_entropy(values, subject.labels).item()
        row |= {"logit_kl": kl.estimate, "logit_kl_low": kl.low, "logit_kl_high": kl.high}
        row |= {"flips": stats.flips(nothing.argmax(1), found.argmax(1)), "discordant_pairs": test.lost + test.gained}
        rows.append(row | {"mcnemar_p": np.nan if kept == NONE else test.p})
    frame = pd.DataFrame(rows)
    frame["holm_p"] = frame.groupby("bits")["mcnemar_p"].transform(lambda p: stats.holm(p.to_numpy()))
    return study.write("ablation", frame)


def sensitivity(frame: pd.DataFrame) -> pd.DataFrame:
    """By block: the share of the KL that is removed when it alone is kept, and the KL when it alone is quantized."""
    nothing = frame[frame["kept"] == NONE].set_index("bits")["logit_kl"]
    only_kept = frame[frame["kept"].str.startswith("block ")]
    alone = frame[frame["kept"].str.startswith("all but ")]
    alone = alone.assign(kept=alone["kept"].str.removeprefix("all but "))
    both = only_kept.merge(alone, on=["bits", "kept"], suffixes=("", "_alone"))
    both["block"] = both["kept"].str.removeprefix("block ").astype(int)
    both["kl_removed"] = 1 - both["logit_kl"] / both["bits"].map(nothing)
    names = {f"logit_kl{end}_alone": f"kl_alone{end}" for end in ("", "_low", "_high")}
    return both.rename(columns=names)[["bits", "block", "kl_removed", *names.values()]]


def reliability(study: Study, logits: dict[tuple[int, str], torch.Tensor], subject: Subject) -> pd.DataFrame:
    """Whether other pictures would rank the blocks in the same order, by KL and by accuracy; `records/reliability.csv`.

    `fewest_pictures` must all change in one direction for a difference of accuracy to be significant after Holm's
    adjustment for all configurations; `smallest_points` is their share in percent, NaN if there are fewer.
    """
    labels, rows, blocks = subject.labels.numpy(), [], range(len(subject.blocks))
    needed = stats.fewest_significant(len(configurations(len(blocks))) - 1)
    for bits in study.settings.ablation_bits:
        reference = logits[bits, ALL].numpy()
        alone = [stats.kl_divergence(reference, logits[bits, f"all but block {k}"].numpy()) for k in blocks]
        kept = [logits[bits, f"block {k}"].numpy() for k in blocks]
        by_top1 = stats.split_half_correlation([stats.topk_right(values, labels) for values in kept])
        by_kl_kept = stats.split_half_correlation([stats.kl_divergence(reference, values) for values in kept])
        row = {"bits": bits, "pictures": len(labels)}
        row["split_half_kl_only_quantized"] = stats.split_half_correlation(alone).correlation
        row |= {"split_half_kl_only_kept": by_kl_kept.correlation, "split_half_top1_only_kept": by_top1.correlation}
        row |= {"top1_splits": by_top1.splits, "top1_splits_undefined": by_top1.undefined, "fewest_pictures": needed}
        rows.append(row | {"smallest_points": 100 * needed / len(labels) if needed <= len(labels) else np.nan})
    return study.write("reliability", pd.DataFrame(rows))


def headline(study: Study, frame: pd.DataFrame, blocks: pd.DataFrame, reliable: pd.DataFrame) -> Markdown:
    """The block that matters most, the size of the error, whether the order repeats, and differences of accuracy."""
    removed, errors, first, trusted = [], [], {}, reliable.set_index("bits")
    used = "of the {:,.0f} validation pictures used here" if study.settings.ablation_pictures else "of {:,.0f} pictures"
    for bits, rows in frame.groupby("bits", sort=False):
        by_name, own = rows.set_index("kept"), blocks[blocks["bits"] == bits].set_index("block")
        classifier = 1 - by_name["logit_kl"].get(HEADS, np.nan) / by_name.loc[NONE, "logit_kl"]
        removed.append(_removed(bits, own["kl_removed"], classifier))
        changed = f"{by_name.loc[ALL, 'flips']:.0f} {used.format(trusted.loc[bits, 'pictures'])} change class"
        errors.append(f"at {bits} bits it is {by_name.loc[NONE, 'logit_kl']:.1e} nats, and {changed}")
        kept = own["kl_removed"].idxmax() if own["kl_removed"].max() > 0 else None
        first[bits] = (kept, own["kl_alone"].idxmax())
    alone = _ranking(trusted["split_half_kl_only_quantized"], " on other pictures", "rank correlation ")
    tested, different = frame["holm_p"].notna().sum(), (frame["holm_p"] < stats.SIGNIFICANCE).sum()
    accuracy = "No configuration's accuracy differs significantly from that of the fully quantized network: 0"
    if different:
        accuracy = f"Accuracy differs significantly from that of the fully quantized network in {different}"
    lines = [
        f"**{removed[0]}** {' '.join(removed[1:])}",
        "The error is the KL divergence: how far the class probabilities are from those of the FP16 network (0: the "
        "same). With everything quantized, the classifier too (page 2 keeps it in FP16), "
        f"{'; '.join(errors)}.",
        f"{_alone(first)}, and that ranking {alone}; the ranking by kept blocks "
        f"{_ranking(trusted['split_half_kl_only_kept'])}.",
        f"{accuracy} of the {tested} configurations tested.",
    ]
    return Markdown("\n".join(f"- {line.strip()}" for line in lines))


def _alone(first: dict[int, tuple[int | None, int]]) -> str:
    """The block with the largest error when quantized alone; `first` has, by bits, the first when kept and this one."""
    if len({block for pair in first.values() for block in pair}) == 1:
        return f"Block {next(iter(first.values()))[1]} also has the largest error when it alone is quantized"
    worst = " and ".join(f"block {alone} at {bits} bits" for bits, (_, alone) in first.items())
    return f"If one block alone is quantized, the error is largest for {worst}"


def _ranking(correlations: pd.Series, where: str = "", what: str = "") -> str:
    """Whether a ranking repeats, with its rank correlations by bits."""
    said = []
    for word, chosen in (("repeats", correlations >= REPEATS), ("does not repeat", ~(correlations >= REPEATS))):
        figures = " and ".join(f"{value:.2f} at {bits} bits" for bits, value in correlations[chosen].items())
        said += [f"{word}{where} ({what}{figures})"] * bool(figures)
    return " and ".join(said)


def _removed(bits: int, shares: pd.Series, classifier: float) -> str:
    """The block that removes most of the error, the classifier if it removes more than the second, and the second."""
    best, others = shares.idxmax(), shares.drop(shares.idxmax())
    if shares[best] <= 0:
        return f"Keeping a single block in FP16 does not reduce the {bits}-bit error."
    said = f"Keeping block {best} in FP16 removes {100 * shares[best]:.0f} % of the {bits}-bit error"
    if classifier > max([0, *others]):
        said += f", keeping the classifier {100 * classifier:.0f} %"
    if len(others):
        said += f"; the next block removes {100 * others.max():.0f} %" if others.max() > 0 else "; no other block helps"
    return f"{said}."


def reliability_in_words(reliable: pd.DataFrame) -> Markdown:
    """Whether the rankings repeat on other pictures, and which difference of accuracy could be significant."""
    lines = [
        f"- **{trust['bits']} bits**: {_repeats('one quantized block', trust['split_half_kl_only_quantized'])} "
        f"{_repeats('one kept block', trust['split_half_kl_only_kept'])} {_by_accuracy(trust)} {_smallest(trust)}"
        for trust in reliable.to_dict("records")
    ]
    return Markdown("\n".join(lines))


def _repeats(what: str, correlation: float) -> str:
    repeats = "repeats" if correlation >= REPEATS else "does not repeat"
    return f"The ranking by the KL of {what} {repeats} on other pictures (rank correlation {correlation:.2f})."


def _by_accuracy(trust: dict[str, float]) -> str:
    splits, undefined = int(trust["top1_splits"]), int(trust["top1_splits_undefined"])
    if undefined == splits:
        return f"Accuracy cannot rank the blocks: in each of {splits} splits all blocks tie in a half."
    ties = f", over the {splits - undefined} of {splits} splits in which no half ties" if undefined else ""
    return f"By accuracy the rank correlation is {trust['split_half_top1_only_kept']:.2f}{ties}."


def _smallest(trust: dict[str, float]) -> str:
    needed, pictures = int(trust["fewest_pictures"]), int(trust["pictures"])
    if np.isnan(trust["smallest_points"]):
        return f"No difference of accuracy could be significant: that takes {needed} pictures and there are {pictures}."
    points = f"{trust['smallest_points']:.2f} points of {pictures:,} pictures"
    return f"The smallest difference that could be significant is {needed} pictures in one direction ({points})."

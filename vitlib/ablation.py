"""The sections of notebook 3: which parts of the network pay for being quantized. Level 3.

The network is loaded once. Each block has a quantized twin beside it, and a configuration is a choice between the
two. What runs before the first block in which two configurations differ is the same for both and is computed once:
"only block k kept" starts from the activations that the fully quantized network has before block k, which saves
half of all block evaluations. Configurations that have parted meet again in the same blocks later on, with other
activations: there they go through a block together, in one call.
"""

import itertools
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from vitlib import checkpoint, data, engine, files, quantize, records, stats
from vitlib.data import Dataset
from vitlib.params import Parameters
from vitlib.variants import Variant

TOGETHER = 256  # pictures of one call of a block at most, where configurations go through it together
NONE, ENDS, HEADS, ALL = "none", "first+last blocks", "embeddings+classifier", "everything"


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
    """Which blocks, and whether the classifier, stay in 16 bit; the patch embedding, a convolution, always does."""

    kept: str
    blocks: frozenset[int]
    classifier: bool


def prepare(settings: Parameters, dataset: Dataset) -> Subject:
    """The merged checkpoint in fp16, the format that bitsandbytes' int8 product takes, and the validation pictures."""
    checkpoint.quiet_libraries()
    device = checkpoint.pick_device(settings.device)
    checkpoints = files.study_folder(settings.study) / "checkpoints"
    loaded = checkpoint.load(checkpoints, Variant("fp16"), device)
    loaded.labels.check(dataset, "valid")
    dataset.splits["valid"] = data.evenly(dataset.splits["valid"], settings.ablation_pictures)
    valid = data.decode_splits(dataset, ["valid"], loaded.preprocess, settings.workers)["valid"]
    return Subject(loaded, valid.pixels, loaded.labels.ids(valid.pictures))


def configurations(blocks: int) -> list[Configuration]:
    """Nothing kept, first and last block, classifier, each block alone kept or alone quantized, and everything kept."""
    everything = frozenset(range(blocks))
    single = [Configuration(f"block {k}", frozenset({k}), False) for k in range(blocks)]
    single += [Configuration(f"all but block {k}", everything - {k}, True) for k in range(blocks)]
    ends = Configuration(ENDS, frozenset({0, blocks - 1}), False)
    plain = [Configuration(NONE, frozenset(), False), ends, Configuration(HEADS, frozenset(), True)]
    return [*plain, *single, Configuration(ALL, everything, True)]


State = tuple[torch.Tensor, list[Configuration]]  # activations (n, tokens, hidden), and who agreed so far


class Exchange:
    """The blocks and classifier of a network with a quantized twin of each, and passes that choose between them.

    `together` is the number of pictures that a block may get in one call: the activations of several configurations
    are concatenated up to it (0: never). LLM.int8() finds its outliers in the whole batch, so that an int8 block would
    give other outputs on a concatenated one: these run one by one. `block_runs` counts evaluations of a block for a
    batch of pictures, `block_calls` the calls that they took.
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
        for part in _in_parts(going, max(1, self.together // size if self.joins[quantized] else 1)):
            hidden = [hidden for hidden, _ in part]
            outputs = block(hidden[0] if len(part) == 1 else torch.cat(hidden)).split(size)
            after += [(output, group) for output, (_, group) in zip(outputs, part, strict=True)]
            self.block_runs += len(part)
            self.block_calls += 1
        return after


def _in_parts(states: list[State], size: int) -> list[list[State]]:
    return [states[first : first + size] for first in range(0, len(states), size)]


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

    On a GPU a product over more rows may round differently in its last bit; on a CPU `together` changes nothing but
    the time.
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


def measure(subject: Subject, settings: Parameters) -> tuple[dict[tuple[int, str], torch.Tensor], float]:
    """float32 logits of every (bits, kept), and the share of block evaluations that were needed.

    The share is against a full pass for every configuration.
    """
    wanted, batch = configurations(len(subject.blocks)), settings.eval_batch_size
    found, needed = {}, 0
    for bits in settings.ablation_bits:
        logits, exchange = evaluate(subject.loaded, subject.pixels, wanted, bits, batch_size=batch)
        found |= {(bits, kept): values for kept, values in logits.items()}
        needed += exchange.block_runs
    return found, needed / (_full_passes(subject, settings) * len(subject.blocks))


def _full_passes(subject: Subject, settings: Parameters) -> int:
    """Batches that run through the whole network where every configuration has passes of its own."""
    batches = -(-len(subject.pixels) // settings.eval_batch_size)
    return batches * len(configurations(len(subject.blocks))) * len(settings.ablation_bits)


def speed(subject: Subject, settings: Parameters, sample: int = 6) -> pd.DataFrame:
    """Wall time of the whole ablation against loading the checkpoint anew for a full pass of each configuration.

    A row a way: `shared` (one load, everything of `measure`) and `reload`, of which `sample` configurations of each
    format, evenly over the list, are run and the time is scaled up to all. Both times hold loading and quantizing,
    neither holds decoding. Columns: configurations, timed (of them), loads, block_evaluations, block_calls, share (of
    the block evaluations of `reload`), wall_s, times_faster, and largest_difference of a logit between the two ways.
    """
    wanted, every = configurations(len(subject.blocks)), len(settings.ablation_bits)
    chosen = [
        wanted[i] for i in np.unique(np.linspace(0, len(wanted) - 1, min(sample, len(wanted))).round().astype(int))
    ]
    found, shared = _timed_shared(subject, settings, wanted)
    apart, naive_s = {}, 0.0
    for bits, configuration in itertools.product(settings.ablation_bits, chosen):
        start = time.perf_counter()
        apart[bits, configuration.kept] = _reloaded(subject, settings, bits, configuration)
        naive_s += time.perf_counter() - start
    total, passes = len(wanted) * every, _full_passes(subject, settings) * len(subject.blocks)
    timed = len(chosen) * every
    reload = {"way": "reload", "configurations": total, "timed": timed, "loads": total, "block_evaluations": passes}
    reload |= {"block_calls": passes, "wall_s": naive_s * total / timed}
    frame = pd.DataFrame([{"way": "shared", "configurations": total, "timed": total, **shared}, reload])
    frame["share"] = frame["block_evaluations"] / passes
    frame["times_faster"] = reload["wall_s"] / frame["wall_s"]
    differences = [(found[key] - logits).abs().max().item() for key, logits in apart.items()]
    return frame.assign(largest_difference=[max(differences), 0.0])


def _timed_shared(
    subject: Subject, settings: Parameters, wanted: list[Configuration]
) -> tuple[dict[tuple[int, str], torch.Tensor], dict[str, float]]:
    start = time.perf_counter()
    loaded, batch = _load_again(subject), settings.eval_batch_size
    found, runs, calls = {}, 0, 0
    for bits in settings.ablation_bits:
        logits, exchange = evaluate(loaded, subject.pixels, wanted, bits, batch_size=batch)
        found |= {(bits, kept): values for kept, values in logits.items()}
        runs, calls = runs + exchange.block_runs, calls + exchange.block_calls
    wall = time.perf_counter() - start  # the logits are on the host, so the device is done
    return found, {"loads": 1, "block_evaluations": runs, "block_calls": calls, "wall_s": wall}


def _load_again(subject: Subject) -> checkpoint.Loaded:
    return checkpoint.load(subject.loaded.folder.parent, Variant("fp16"), subject.loaded.device)


def _reloaded(subject: Subject, settings: Parameters, bits: int, configuration: Configuration) -> torch.Tensor:
    """float32 logits (n, classes) of one configuration the plain way: load, quantize its parts, run every picture."""
    loaded = _load_again(subject)
    layers = loaded.model.vit.layers
    for number in set(range(len(layers))) - configuration.blocks:
        layers[number] = quantize.quantized_copy(layers[number], bits)
    if not configuration.classifier:
        loaded.model.classifier = quantize.quantized_copy(loaded.model.classifier, bits)
    return engine.logits(engine.Engine(loaded), subject.pixels, settings.eval_batch_size)


def table(logits: dict[tuple[int, str], torch.Tensor], subject: Subject, settings: Parameters) -> pd.DataFrame:
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
        kl = stats.paired_bootstrap(stats.kl_divergence(logits[bits, ALL].numpy(), found), seed=settings.seed)
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
    records.write_table(frame, files.study_folder(settings.study) / "records" / "ablation.csv")
    return frame


def sensitivity(frame: pd.DataFrame) -> pd.DataFrame:
    """By bits and block, from both sides: what goes away when the block is kept, what comes when it alone is quantized.

    `kl_removed` is the share of the KL of quantizing everything that goes away when only this block is kept,
    `kl_alone` the KL when only this block is quantized.
    """
    by_name = frame.set_index(["bits", "kept"])
    rows = []
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
                    "top1": only_kept["top1"],
                    "holm_p": only_kept["holm_p"],
                }
            )
    return pd.DataFrame(rows)


def reliability(
    logits: dict[tuple[int, str], torch.Tensor], frame: pd.DataFrame, subject: Subject, settings: Parameters
) -> pd.DataFrame:
    """Whether another set of pictures would rank the blocks alike, by KL and by accuracy; `records/reliability.csv`.

    Split-half rank correlations over random halves of the pictures, with the number of splits that rank nothing by
    accuracy. `fewest_pictures` must all change to one side for a difference of accuracy to be significant after Holm's
    adjustment for all configurations; `smallest_points` is their share, NaN where there are not so many pictures.
    `detectable_points` is the true difference that is found with a power of 80 % at the share of discordant pairs that
    single blocks had, before any adjustment; NaN where these are too few.
    """
    labels, rows = subject.labels.numpy(), []
    blocks = range(len(subject.blocks))
    for bits in settings.ablation_bits:
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
    table_ = pd.DataFrame(rows)
    records.write_table(table_, files.study_folder(settings.study) / "records" / "reliability.csv")
    return table_


def readable_reliability(reliable: pd.DataFrame) -> pd.DataFrame:
    """The table of `reliability` for a report: a row a number of bits, what was asked as headings."""
    ties = zip(reliable["top1_splits_undefined"], reliable["top1_splits"], strict=True)
    return pd.DataFrame(
        {
            "bits": reliable["bits"],
            "pictures": reliable["pictures"],
            "by KL, one quantized": reliable["split_half_kl_only_quantized"],
            "by KL, one kept": reliable["split_half_kl_only_kept"],
            "by accuracy, one kept": reliable["split_half_top1_only_kept"],
            "splits that tie": [f"{undefined} of {splits}" for undefined, splits in ties],
            "smallest difference (pictures)": reliable["fewest_pictures"],
            "in points": reliable["smallest_points"],
        }
    )


def readable(frame: pd.DataFrame) -> "pd.io.formats.style.Styler":
    """The table for a report: KL with its interval in one column, percentages, no index."""
    shown = pd.DataFrame(
        {
            "bits": frame["bits"],
            "kept in 16 bit": frame["kept"],
            "Top-1 (%)": 100 * frame["top1"],
            "Top-5 (%)": 100 * frame["top5"],
            "KL (nats)": frame["logit_kl"],
            "KL, 95 % interval": [
                f"{low:.1e} … {high:.1e}"
                for low, high in zip(frame["logit_kl_low"], frame["logit_kl_high"], strict=True)
            ],
            "flips": frame["flips"],
            "discordant": frame["discordant_pairs"],
            "McNemar p": frame["mcnemar_p"],
            "Holm p": frame["holm_p"],
        }
    )
    formats = {
        "Top-1 (%)": "{:.2f}",
        "Top-5 (%)": "{:.2f}",
        "KL (nats)": "{:.2e}",
        "McNemar p": "{:.3f}",
        "Holm p": "{:.3f}",
    }
    styled = shown.style.format(formats, na_rep="–").hide(axis="index")
    return styled.set_properties(subset=["KL, 95 % interval", "kept in 16 bit"], **{"white-space": "nowrap"})


def headline(frame: pd.DataFrame, blocks: pd.DataFrame, reliable: pd.DataFrame) -> str:
    """What the records say, in a few sentences (Markdown)."""
    lines = []
    for bits, rows in frame.groupby("bits"):
        nothing = rows.set_index("kept").loc[NONE]
        own = blocks[blocks["bits"] == bits]
        worst, best = own.loc[own["kl_alone"].idxmax()], own.loc[own["kl_removed"].idxmax()]
        surviving = int((rows["holm_p"] < stats.SIGNIFICANCE).sum())
        trust = reliable.set_index("bits").loc[bits]
        lines.append(
            f"- **{bits} bits**: quantizing everything moves the probabilities by {nothing['logit_kl']:.1e} nats on "
            f"average (Top-1 {100 * nothing['top1']:.2f} %). Block {worst['block']:.0f} moves them most when it alone "
            f"is quantized ({worst['kl_alone']:.1e}); keeping block {best['block']:.0f} removes most of the total "
            f"({100 * best['kl_removed']:.0f} %). Two halves of the pictures rank the blocks alike with a correlation "
            f"of {trust['split_half_kl_only_quantized']:.2f} by the KL of one quantized block, and of "
            f"{trust['split_half_kl_only_kept']:.2f} by that of one kept block. {_by_accuracy(trust)} By accuracy "
            f"{surviving} of {len(rows) - 1} configurations differ from quantizing everything after Holm's adjustment. "
            f"{_smallest(trust)}"
        )
    return "\n".join(lines)


def _by_accuracy(trust: pd.Series) -> str:
    """How far accuracy ranks the blocks, and in how many splits it ranks them at all."""
    splits, undefined = (int(trust[key]) for key in ("top1_splits", "top1_splits_undefined"))
    if undefined == splits:
        return f"By accuracy they cannot be ranked: in each of {splits} splits all blocks tie in a half."
    ties = f", over the {splits - undefined} of {splits} splits in which no half ties" if undefined else ""
    return f"By accuracy it is {trust['split_half_top1_only_kept']:.2f}{ties}."


def _smallest(trust: pd.Series) -> str:
    """The smallest difference of accuracy that could have been significant, and what is needed to find one."""
    needed, pictures = int(trust["fewest_pictures"]), int(trust["pictures"])
    if np.isnan(trust["smallest_points"]):
        return (
            f"The smallest difference that could be significant cannot be given, because {needed} pictures would have "
            f"to change sides and there are {pictures}."
        )
    return (
        f"The smallest difference that could be significant is {needed} pictures that all change to one side, "
        f"{trust['smallest_points']:.2f} points of {pictures:,} pictures."
    )

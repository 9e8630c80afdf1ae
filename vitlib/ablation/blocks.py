"""The ablation of whole blocks: what is left of the error where one is kept in FP16, or what one alone causes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitlib.ablation.exchange import FULL, LINEARS, Configuration, Exchange, Subject
from vitlib.measure import stats
from vitlib.network import quantize
from vitlib.report.tables import Column
from vitlib.study.study import Study

FORMATS = {4: "nf4", 8: "int8"}  # what `ablation_bits` stands for
NONE, ENDS, HEADS, ALL = "none", "first+last blocks", "embeddings+classifier", "everything"
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


def configurations(blocks: int, kind: str) -> list[Configuration]:
    """By what is kept in FP16 (all else is of the format `kind`): nothing, ends, classifier, blocks, everything."""
    everything = set(range(blocks))
    kept = {NONE: (set(), kind), ENDS: ({0, blocks - 1}, kind), HEADS: (set(), FULL)}
    kept |= {f"block {k}": ({k}, kind) for k in everything}
    kept |= {f"all but block {k}": (everything - {k}, FULL) for k in everything} | {ALL: (everything, FULL)}
    uniform = {is_kept: (FULL if is_kept else kind,) * len(LINEARS) for is_kept in (True, False)}
    return [
        Configuration(name, tuple(uniform[k in own] for k in range(blocks)), classifier)
        for name, (own, classifier) in kept.items()
    ]


def exchange(subject: Subject, bits: int) -> Exchange:
    """The network with bitsandbytes' layers as twins: NF4, or LLM.int8(), which finds outliers in the whole batch."""
    kind = FORMATS[bits]
    twins = {kind: lambda _, linear: quantize.quantize_linear(linear, bits)}
    return Exchange(subject.loaded.model, twins, alone=["int8"])


def measure(study: Study, subject: Subject) -> tuple[dict[tuple[int, str], torch.Tensor], float]:
    """float32 logits (n, classes) on the CPU by (bits, kept), and the share of all block evaluations that it took."""
    size, blocks = study.settings.eval_batch_size, len(subject.blocks)
    found, needed, full = {}, 0, 0
    for bits in study.settings.ablation_bits:
        own, wanted = exchange(subject, bits), configurations(blocks, FORMATS[bits])
        logits = own.outputs(subject.pixels, wanted, subject.loaded.preprocess, size, f"{bits} bits")
        found |= {(bits, kept): values for kept, values in logits.items()}
        needed, full = needed + own.block_runs, full + len(subject.pixels.split(size)) * len(wanted) * blocks
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
    """By bits and block: the share of the KL that is removed when it alone is kept."""
    kept = frame[frame["kept"].str.startswith("block ")]
    nothing = frame[frame["kept"] == NONE].set_index("bits")["logit_kl"]
    removed = 1 - kept["logit_kl"] / kept["bits"].map(nothing)
    return pd.DataFrame({"bits": kept["bits"], "block": kept["kept"].str[6:].astype(int), "kl_removed": removed})


def reliability(study: Study, logits: dict[tuple[int, str], torch.Tensor], subject: Subject) -> pd.DataFrame:
    """Whether other pictures would rank the blocks in the same order, by KL and by accuracy; `records/reliability.csv`.

    `fewest_pictures` must all change in one direction for a difference of accuracy to be significant after Holm's
    adjustment for all configurations; `smallest_points` is their share in percent, NaN if there are fewer.
    """
    labels, rows, blocks = subject.labels.numpy(), [], range(len(subject.blocks))
    needed = stats.fewest_significant(len(configurations(len(blocks), FULL)) - 1)
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

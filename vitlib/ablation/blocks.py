"""The ablation of whole blocks: what is left of the error where one is kept in FP16, or what one alone causes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitlib.ablation.exchange import FULL, LINEARS, Configuration, Exchange, Subject
from vitlib.ablation.linears import nats
from vitlib.measure import stats
from vitlib.network import quantize
from vitlib.report.tables import Column
from vitlib.study.study import Study

FORMATS = {4: "nf4", 8: "int8"}  # what `ablation_bits` stands for
NONE, ENDS, HEADS, ALL = "none", "first+last blocks", "embeddings+classifier", "everything"
TABLE = {
    **{"bits": "bits", "kept": "kept in FP16"},
    **{"top1": Column("Top-1 (%)", ".2f", 100), "top5": Column("Top-5 (%)", ".2f", 100)},
    "logit_kl": Column("KL (nats)", nats, bar=True),
    ("logit_kl_low", "logit_kl_high"): Column("95 % interval", nats),
    **{"flips": "flips", "discordant_pairs": "discordant"},
    **{"mcnemar_p": Column("McNemar p", ".3f"), "holm_p": Column("Holm p", ".3f")},
}
RELIABILITY = {
    **{"bits": "bits", "ranking": "blocks ranked by"},
    ("correlation", "low", "high"): Column("rank correlation on other pictures (95 % interval)", ","),
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
    return Exchange(subject.loaded.model, twins)


def measure(study: Study, subject: Subject) -> tuple[dict[tuple[int, str], torch.Tensor], float]:
    """float32 logits (n, classes) on the CPU by (bits, kept), and the share of all block evaluations that it took."""
    size, blocks = study.settings.eval_batch_size, len(subject.blocks)
    found, needed, full = {}, 0, 0
    for bits in study.settings.ablation_bits:
        own, wanted = exchange(subject, bits), configurations(blocks, FORMATS[bits])
        logits = own.outputs(subject.pixels, wanted, subject.loaded, size, f"{bits} bits")
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
        lost, gained, p = stats.mcnemar(stats.topk_right(nothing, labels), right)
        kl = stats.paired_bootstrap(stats.kl_divergence(logits[bits, ALL].numpy(), found), seed=study.settings.seed)
        row = {"bits": bits, "kept": kept, "top1": right.mean(), "top5": stats.topk_accuracy(found, labels, 5)}
        row["loss"] = nn.functional.cross_entropy(values, subject.labels).item()
        row |= stats.columns("logit_kl", kl) | {"flips": stats.flips(nothing.argmax(1), found.argmax(1))}
        row["discordant_pairs"] = lost + gained
        rows.append(row | {"mcnemar_p": np.nan if kept == NONE else p})
    frame = pd.DataFrame(rows)
    frame["holm_p"] = frame.groupby("bits")["mcnemar_p"].transform(lambda p: stats.holm(p.to_numpy()))
    return study.write("ablation", frame)


def reliability(study: Study, logits: dict[tuple[int, str], torch.Tensor], subject: Subject) -> pd.DataFrame:
    """Whether other pictures rank the blocks in the same order, by KL and by accuracy; `records/reliability.csv`.

    The mean Spearman correlation between random halves of the pictures, without halves in which all blocks tie; the
    interval resamples blocks.
    """
    rows, labels = [], subject.labels.numpy()
    for bits in study.settings.ablation_bits:
        found = {
            which: [logits[bits, f"{name} {k}"].numpy() for k in range(len(subject.blocks))]
            for which, name in (("quantized", "all but block"), ("kept", "block"))
        }
        full = logits[bits, ALL].numpy()
        scores = {f"KL, one {which}": [stats.kl_divergence(full, one) for one in own] for which, own in found.items()}
        scores["Top-1, one kept"] = [stats.topk_right(one, labels) for one in found["kept"]]
        for ranking, values in scores.items():
            interval = stats.rank_correlation(*stats.random_halves(values))
            rows.append(
                {"bits": bits, "ranking": ranking} | dict(zip(("correlation", "low", "high"), interval, strict=True))
            )
    return study.write("reliability", pd.DataFrame(rows))

"""Notebook 6: what each technique adds in speed, from the records of the study. Nothing is measured here."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from vitlib.measure import benchmark, stats
from vitlib.report import columns
from vitlib.report.tables import MISSING, NO_BREAK, Markdown
from vitlib.study import provenance
from vitlib.study.study import Study
from vitlib.study.variants import find, label

open = Study.open


def variants(study: Study) -> pd.DataFrame:
    """The rows of `records/variants.csv` that ran. A record of an earlier version has the checkpoint's GELU only."""
    table = study.read("variants").query("status == 'ok'").astype({"batch": int})
    return table if "gelu" in table else table.assign(gelu="checkpoint")


def conditions(study: Study) -> pd.DataFrame:
    """Hardware, software and commit of the measurement."""
    made = study.read_json("environment")
    facts = provenance.facts(made) | {"rounds": f"{made['parameters']['rounds']}, variants in random order"}
    return pd.DataFrame(facts.items(), columns=["what", "this run"])


def overview(study: Study) -> pd.DataFrame:
    """The results as the README shows them, a row a variant, all text; weights with their buffers are "164.7 + 48"."""
    rows = []
    for name, own in variants(study).groupby("variant", sort=False):
        first, last = own.sort_values("batch").iloc[[0, -1]].to_dict("records")
        buffers = first.get("held_mb", np.nan) - first["model_mb"]
        more = f" + {buffers:.0f}" if buffers >= 0.5 else ""  # none for NaN
        row = {"variant": label(name), "weights (MB)": f"{first['model_mb']:,.1f}{more}"}
        row |= {f"batch size {b} (ms)": _three(ms) for b, ms in zip(own["batch"], own["latency_p50_ms"], strict=True)}
        row[f"batch size {last['batch']} (images/s)"] = f"{last['throughput_img_s']:,.0f}"
        row |= {"Top-1 (%)": f"{100 * first['top1']:.2f}", "class changed": f"{first['flips']:.0f}"}
        rows.append(row)
    return pd.DataFrame(rows).fillna(MISSING)


def readme_table(study: Study) -> str:
    """`overview` as a Markdown table for GitHub, numbers aligned to the right."""
    table = overview(study)
    rows = [list(table), ["---", *["---:"] * (table.shape[1] - 1)], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _three(value: float) -> str:
    """A number with three digits."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def ladder(study: Study) -> pd.DataFrame:
    """A row a variant, below the one to which it adds a technique, and how many times faster the technique makes it."""
    table, latencies = variants(study), study.read("latency")
    rows = []
    for name, technique, before in _climbed(table):
        row = {"variant": name, "technique": technique, "added to": label(before)}
        for batch in sorted(table["batch"].unique()):
            own = table[(table["variant"] == name) & (table["batch"] == batch)]["latency_p50_ms"]
            row[f"batch size {batch} (ms)"] = _three(own.iloc[0]) if len(own) else MISSING
            row[f"times faster, batch size {batch}"] = _factor(latencies, before, name, batch) if before else ""
        rows.append(row)
    return pd.DataFrame(rows)


def steps(study: Study) -> pd.DataFrame:
    """The latencies of the ladder, in its order, for `plots.ladder`."""
    names = {"latency_p50_ms": "ms", "latency_low_ms": "ms_low", "latency_high_ms": "ms_high"}
    table, order = variants(study), [name for name, *_ in _climbed(variants(study))]
    table = table.sort_values("variant", key=lambda names: names.map(order.index), kind="stable")
    return table.assign(label=table["variant"].map(label)).rename(columns=names)


def _climbed(table: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """(variant, technique, the variant it is added to), each after the one it is added to."""
    parts = ["weights", "attention", "execution", "gelu"]
    keys = {tuple(row[parts]): row["variant"] for _, row in table.drop_duplicates("variant").iterrows()}
    baseline = next(iter(keys))
    below: dict[str, list[tuple[str, str]]] = {}
    for key, name in keys.items():
        added = ((words, keys[other]) for words, other in _before(key) if other in keys and other != key)
        technique, before = ("out of the box", "") if key == baseline else next(added, ("several", keys[baseline]))
        below.setdefault(before, []).append((name, technique))

    def above(before: str) -> Iterator[tuple[str, str, str]]:
        for name, technique in below.get(before, []):
            yield name, technique, before
            yield from above(name)

    return above("")


def _before(key: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What may be one technique less than `key` = (weights, attention, execution, GELU), most specific first."""
    weights, attention, execution, gelu = key
    if gelu != "checkpoint":
        yield f"GELU in its {gelu} form", (weights, attention, execution, "checkpoint")
    if plain := {"fused-graph": "graph", "fused": "eager"}.get(execution):
        yield "fused kernels", (weights, "sdpa", plain, "checkpoint")
    elif attention != "sdpa":
        name = "FlashAttention-2" if attention == "flash_attention_2" else "attention"
        yield name, (weights, "sdpa", execution, gelu)
    if execution == "graph":
        yield "CUDA graph", (weights, attention, "eager", gelu)
    for wider in {"fp32": (), "fp16": ("fp32",)}.get(weights, ("fp16", "fp32")):
        yield f"{weights.upper()} weights", (wider, attention, execution, gelu)


def _factor(latencies: pd.DataFrame, before: str, after: str, batch: int) -> str:
    """How many times faster `after` is than `before`, with its interval: "1.49 (1.47 … 1.50)"."""
    rounds = [benchmark.rounds_of(latencies, name, batch) for name in (before, after)]
    if not all(rounds):
        return MISSING
    times = stats.times_faster(*rounds)
    interval = "" if np.isnan(times.low) else f" ({times.low:.2f} … {times.high:.2f})"
    return f"{times.estimate:.2f}{interval}".replace(" ", NO_BREAK)


def against_fp16(study: Study) -> pd.DataFrame:
    """How many times faster each quantized variant is than FP16 with the same attention, execution and GELU."""
    table, latencies = variants(study), study.read("latency")
    rows = []
    for name in dict.fromkeys(table["variant"]):
        other = "-".join(["fp16", *name.split("-")[1:]])
        if find(name).quantized and other in set(table["variant"]):
            batches = sorted(table["batch"].unique())
            found = {f"times faster, batch size {batch}": _factor(latencies, other, name, batch) for batch in batches}
            rows.append({"variant": name, "compared with": label(other), **found})
    return pd.DataFrame(rows)


def chosen(study: Study) -> pd.DataFrame:
    """The implementations that fused variants use (`benchmark.chosen`); empty where the study has none."""
    return benchmark.chosen(study.read("tuning")) if study.has("tuning") else pd.DataFrame()


def agreement(study: Study) -> pd.DataFrame:
    """Worst outputs of each variant against the eager network with the same weights; empty for records without them."""
    table = variants(study)
    if "relative_error" not in table:
        return pd.DataFrame()
    rows = columns.with_reference(table).groupby(["variant", "reference"], sort=False)
    return rows.agg({"relative_error": "max", "agreement_with_reference": "min"}).reset_index()


def memory(study: Study) -> pd.DataFrame:
    """Megabytes of weights, and with the buffers for dequantized weights; a row a variant."""
    table = variants(study).drop_duplicates("variant")
    return table.assign(times_smaller=table["model_mb"].iloc[0] / table.get("held_mb", table["model_mb"]))


def rates(study: Study) -> pd.DataFrame:
    """Images per second: training (median over epochs), the fastest network, and from files to predictions."""
    best = variants(study).sort_values("throughput_img_s").iloc[-1]
    found = {f"classification, {label(best['variant'])}, batch size {best['batch']}": best["throughput_img_s"]}
    if study.has("finetune"):
        found = {"training": study.read("finetune")["images_per_s"].median()} | found
    if study.has("inference.json"):
        made = study.read_json("inference")
        found[f"from files to predictions, {label(made['variant'])}"] = made["images_per_s"]
    return pd.DataFrame(found.items(), columns=["work", "images/s"])


def headline(study: Study) -> Markdown:
    """For the smallest and the largest batch size, the fastest variant, what led to it, and the fastest quantized."""
    table, latencies, lines = variants(study), study.read("latency"), []
    climbed = {name: (technique, before) for name, technique, before in _climbed(table)}
    baseline, quantized = next(iter(climbed)), [name for name in climbed if find(name).quantized]
    for batch in sorted({table["batch"].min(), table["batch"].max()}):
        times = table[table["batch"] == batch].set_index("variant")["latency_p50_ms"]
        small = times.reindex(quantized).dropna()
        fastest = {"the fastest": times.idxmin()}
        if len(small) and small.idxmin() != times.idxmin():
            fastest["the fastest quantized one"] = small.idxmin()
        for words, name in fastest.items():
            rounds = [benchmark.rounds_of(latencies, each, batch) for each in (baseline, name)]
            said = benchmark.in_words(stats.times_faster(*rounds), stats.same_or_slower(*rounds), len(rounds[1]))
            path = _path(latencies, climbed, name, batch)
            lines.append(f"**Batch size {batch}**: {words} is {label(name)}, {_three(times[name])} ms, {said}.{path}")
    return Markdown("\n".join(f"- {line}" for line in lines))


def _path(latencies: pd.DataFrame, climbed: dict[str, tuple[str, str]], name: str, batch: int) -> str:
    """The techniques that lead from the baseline to `name`, each with its factor; '' for the baseline."""
    steps, (technique, before) = [], climbed[name]
    while before:
        factor = _factor(latencies, before, name, batch).split(NO_BREAK)[0]
        steps.insert(0, technique if factor == MISSING else f"{technique} {factor}×")
        name, (technique, before) = before, climbed[before]
    return f" Step by step: {', '.join(steps)}." if steps else ""

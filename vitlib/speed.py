"""Notebook 6: what each technique adds in speed, from the records of the study. Nothing is measured here."""

from collections.abc import Iterator

import pandas as pd

from vitlib.measure import benchmark, stats
from vitlib.report import tables
from vitlib.report.tables import MISSING, NO_BREAK, Markdown, estimate
from vitlib.study.study import Study
from vitlib.study.variants import find, label

open = Study.open


def variants(study: Study) -> pd.DataFrame:
    """The rows of `records/variants.csv` that ran."""
    return study.read("variants").query("status == 'ok'").astype({"batch": int})


def ladder(study: Study) -> pd.DataFrame:
    """A row a variant, below the one to which it adds a technique, and how many times faster the technique makes it."""
    table, latencies = variants(study), study.read("latency")
    rows = []
    for name, technique, before in _climbed(table):
        row = {"variant": name, "technique": technique, "added to": label(before)}
        for batch in sorted(table["batch"].unique()):
            row[f"batch size {batch}"] = _factor(latencies, before, name, batch) if before else ""
        rows.append(row)
    return pd.DataFrame(rows)


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
    return estimate(*stats.times_faster(*rounds))


def against_fp16(study: Study) -> pd.DataFrame:
    """How many times faster each quantized variant is than FP16 with the same attention, execution and GELU."""
    table, latencies = variants(study), study.read("latency")
    rows = []
    for name in dict.fromkeys(table["variant"]):
        other = "-".join(["fp16", *name.split("-")[1:]])
        if find(name).quantized and other in set(table["variant"]):
            batches = sorted(table["batch"].unique())
            found = {f"batch size {batch}": _factor(latencies, other, name, batch) for batch in batches}
            rows.append({"variant": name, "compared with": other, **found})
    return pd.DataFrame(rows)


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
            said = "the baseline itself" if name == baseline else f"against {label(baseline)} {said}"
            path = _path(latencies, climbed, name, batch)
            lines.append(
                f"**Batch size {batch}**: {words} is {label(name)}, {tables.number(times[name])} ms, {said}.{path}"
            )
    return Markdown("\n".join(f"- {line}" for line in [*lines, _quantized(study)] if line))


def _quantized(study: Study) -> str:
    """The range of factors of quantized variants against FP16, for the smallest and the largest batch size."""
    said, frame = [], against_fp16(study)
    for column in dict.fromkeys([*frame.columns[2:3], *frame.columns[-1:]]):
        factors = pd.to_numeric(frame[column].str.split(NO_BREAK).str[0], errors="coerce").dropna()
        if len(factors):
            ends = " to ".join(
                f"{factors[at]:g} ({label(frame['variant'][at])})" for at in (factors.idxmin(), factors.idxmax())
            )
            said.append(f"at {column} {ends}")
    return f"**Quantized weights against FP16 in the same execution**, times faster: {'; '.join(said)}." if said else ""


def _path(latencies: pd.DataFrame, climbed: dict[str, tuple[str, str]], name: str, batch: int) -> str:
    """The techniques that lead from the baseline to `name`, each with its factor; '' for the baseline."""
    steps, (technique, before) = [], climbed[name]
    while before:
        factor = _factor(latencies, before, name, batch).split(NO_BREAK)[0]
        steps.insert(0, technique if factor == MISSING else f"{technique} {factor}×")
        name, (technique, before) = before, climbed[before]
    return f" Step by step: {', '.join(steps)}." if steps else ""

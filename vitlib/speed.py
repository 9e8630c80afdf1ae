"""The sections of notebook 6: what makes it fast, from the records that `make bench` leaves. Level 3, no torch."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitlib import files, origin, records
from vitlib.records import NO_BREAK

NAMES = {
    "fp32, fp16": "weights in 32 or 16 bit",
    "nf4": "weights in 4 bits, 64 to a scale, computed in 16 bit",
    "int8": "LLM.int8(): weights and inputs in 8 bits, outliers in 16, as bitsandbytes computes it",
    "w8a16": "the same weights in 8 bits, inputs and computation in 16",
    "w8a8": "the same weights in 8 bits, inputs too, without outliers",
    "fp8": "weights and inputs in 8-bit floating point",
    "sdpa": "attention as transformers calls PyTorch's",
    "direct": "this project's attention: without a mask, by PyTorch or, in a fused network, by this project's kernel "
    "where that is faster; _fa (flash), _efficient, _cudnn and _math fix which of PyTorch's, _fa2 is FlashAttention-2 "
    "from its package",
    "graph": "a CUDA graph: the kernels of a pass are recorded once and replayed, so that the host, the processor "
    "beside the GPU, has nothing to launch",
    "fused": "the same network with fewer and larger kernels: one product for query, key and value, the patch "
    "embedding as a product, bias and (where its form allows) GELU computed by a product's kernel before it stores its "
    "result (its epilogue), residual and norm in one kernel, after the last attention the class token alone",
    "compile": "through torch.compile",
    "tanh GELU": "the activation in its tanh form, another function than the checkpoint's",
    "int8 rows, dequantized": "the weights of int8 turned back into 16 bit, in the plain network",
}
"""The words of which the name of a step is made, weights-attention-execution; an eager execution is not written."""

FAMILIES = {"nf4": ("nf4",), "int8": ("int8", "w8a16", "w8a8"), "fp16": ("fp16",), "fp8": ("fp8",)}


@dataclass(frozen=True)
class Bench:
    """What `make bench` measured: a row a step and batch size, the targets, the paths timed, and the conditions."""

    frame: pd.DataFrame
    targets: pd.DataFrame
    tuning: pd.DataFrame
    about: dict[str, Any]

    def part(self, name: str) -> pd.DataFrame:
        """Rows of one part: engine, training, ablation or pipeline; empty where it was not measured."""
        return self.frame[self.frame["part"] == name].reset_index(drop=True)

    @property
    def engine(self) -> pd.DataFrame:
        """Rows of the engine that ran, with their weight format, formats in the order of their first row."""
        rows = self.part("engine")
        rows = rows[rows["ms"].notna()].assign(weights=rows["step"].str.split("-").str[0])
        order = {weights: number for number, weights in enumerate(dict.fromkeys(rows["weights"]))}
        return rows.assign(batch=rows["batch"].astype(int)).sort_values(
            "weights", key=lambda c: c.map(order), kind="stable"
        )


def load(study: str) -> Bench:
    """The records of `make bench` for `study`. MissingRecord says how to make them."""
    folder = files.study_folder(study) / "records"
    tuning = folder / "bench_tuning.csv"  # a machine without fused rows leaves none
    frame, targets = (records.read_table(folder / name) for name in ("bench.csv", "targets.csv"))
    # Without bounds the column holds numbers alone, which a table would round to two digits.
    found = [f"{value:.4g}" if isinstance(value, (int, float)) else value for value in targets["found"]]
    targets["found"] = [text.replace(" ", NO_BREAK) for text in found]
    return Bench(
        frame,
        targets,
        records.read_table(tuning) if tuning.is_file() else pd.DataFrame(),
        records.read_json(folder / "bench.json"),
    )


def names() -> pd.DataFrame:
    """What the parts of a step's name mean."""
    return pd.DataFrame(list(NAMES.items()), columns=["name", "meaning"])


def conditions(bench: Bench) -> pd.DataFrame:
    """On what, with what and from which commit it was measured."""
    about, settings = bench.about, bench.about["parameters"]
    hardware, git = about["hardware"], about.get("git") or {}
    precision = about.get("float32_products")
    gpus = [gpu["name"] for gpu in hardware.get("gpus") or ()]
    clocks = _clocks((hardware.get("gpus") or [{}])[0].get("state") or {})
    shown = ("torch", "triton", "transformers", "bitsandbytes", "flash-attn")
    versions = [f"{name} {about['versions'][name]}" for name in shown if about["versions"].get(name)]
    weights = " and ".join(bench.frame["weights"].dropna().unique())
    rows = {
        "hardware": gpus[0] if gpus else f"{hardware['cpu']}, {hardware['cores_usable']} cores",
        "clocks afterwards": clocks,
        "software": ", ".join([f"Python {about['python']}", *versions]),
        "products of fp32": {"highest": "in fp32, TF32 is off"}.get(precision, precision or ""),
        "weights": weights,
        "base": origin.sentence(about.get("base", {})).replace("**", "").replace("`", ""),
        "pictures": settings["data_source"],
        "rounds": f"{settings['rounds']}, in shuffled order; bounds are those of the median over rounds",
        "date and commit": f"{about['date_utc'][:10]}, {str(git.get('commit') or 'unknown')[:10]}"
        + (" with changes" if git.get("dirty") else ""),
    }
    return pd.DataFrame([(name, text) for name, text in rows.items() if text], columns=["what", "this run"])


def _clocks(state: dict[str, Any]) -> str:
    """What the driver said of a GPU's clock; '' where it said nothing."""
    now, most, reasons = (state.get(name) for name in ("sm_clock_mhz", "sm_clock_max_mhz", "throttle_reasons"))
    if now is None or most is None:
        return ""
    slowed = "unknown" if reasons is None else ", ".join(reasons) or "nothing"
    return f"SM {now:,.0f} of {most:,.0f} MHz, slowed by: {slowed}"


def ladder(bench: Bench) -> pd.DataFrame:
    """A row a step, by weight format: median latency, and the factor over the first step with its bounds.

    Factors are medians over rounds of the rounds' own ratios, so they need not be the ratios of the medians.
    """
    table: dict[str, dict[str, object]] = {}
    for row in bench.engine.to_dict("records"):
        shown = table.setdefault(row["step"], {"step": row["step"]})
        shown[f"batch {row['batch']} (ms)"] = row["ms"]
        shown[f"times as fast, batch {row['batch']}"] = _bounds(row, "times_baseline")
    return pd.DataFrame(list(table.values()))


def not_run(bench: Bench) -> pd.DataFrame:
    """The steps that this machine could not run, with the reason."""
    rows = bench.part("engine")
    return rows.loc[rows["ms"].isna(), ["step", "note"]].rename(columns={"note": "reason"})


def against_fp16(bench: Bench) -> pd.DataFrame:
    """Share of the fastest fp16 latency with the same GELU that each fused row takes: at most 1 is as fast."""
    rows = bench.engine
    rows = rows[rows["step"].str.contains("fused")]
    # Without a fused fp16 row the comparison would be with another execution.
    equals = rows.loc[rows["weights"] == "fp16", ["gelu", "batch"]].drop_duplicates()
    rows = rows.merge(equals, on=["gelu", "batch"])
    rows = rows[rows["of_best_fp16"].notna() & ~rows["weights"].isin(("fp32", "fp16"))]
    table = {}
    for row in rows.to_dict("records"):
        table.setdefault(row["step"], {"step": row["step"]})[f"batch {row['batch']}"] = _bounds(row, "of_best_fp16")
    return pd.DataFrame(list(table.values()))


def agreement(bench: Bench) -> pd.DataFrame:
    """How far logits lie from those of the plain eager form of the same weights, at a step's worst batch size."""
    rows = bench.engine[bench.engine["step"] != bench.engine["reference"]]
    # Each batch size has a graph and kernels of its own: the worst of them.
    rows = rows.groupby(["step", "reference"], sort=False).agg({"relative_error": "max", "agreement": "min"})
    rows = rows.reset_index()
    return pd.DataFrame(
        {
            "step": rows["step"],
            "compared with": rows["reference"],
            "relative error of logits": [f"{value:.1e}" if value == value else "–" for value in rows["relative_error"]],
            "same class (%)": 100 * rows["agreement"],
        }
    )


def sizes(bench: Bench) -> pd.DataFrame:
    """Megabytes of weights, and with the buffers of weights dequantized before they are used; equal rows once."""
    rows = bench.engine.drop_duplicates(["weights", "model_mb", "held_mb"])
    if rows.empty:
        return pd.DataFrame()
    shown = {"step": rows["step"], "weights (MB)": rows["model_mb"], "with buffers (MB)": rows["held_mb"]}
    return pd.DataFrame(shown | {"times smaller": rows["model_mb"].iloc[0] / rows["held_mb"]})


def blocks(bench: Bench) -> pd.DataFrame:
    """Milliseconds of the captured pass with the weights dequantized layer by layer, by block, or ahead; chosen or not.

    Without the copies in and out and the host's call, which the latencies above hold.
    """
    tried = _tuned(bench, "all blocks")
    if tried.empty:
        return pd.DataFrame()
    before = tried["path"].str.startswith("until then")  # the first such row of a size stands for layer by layer
    first = before & ~tried[before].duplicated(["step", "batch"]).reindex(tried.index, fill_value=True)
    tried, first = tried[first | ~before], first[first | ~before]
    shown = tried.assign(ms=tried["us"] / 1e3, path=tried["path"].where(~first, "layer by layer"))
    table = shown.pivot_table("ms", ["step", "batch"], "path", sort=False).reset_index()
    taken = shown[shown["chosen"]].set_index(["step", "batch"])["path"]
    table["taken"] = [taken.get(key, "layer by layer") for key in zip(table["step"], table["batch"], strict=True)]
    return table.sort_values(["step", "batch"], ignore_index=True)


def layers(bench: Bench) -> pd.DataFrame:
    """How single products were computed where no whole block was dequantized: layer shapes a way, µs of one product."""
    tuned = _tuned(bench, "")
    if tuned.empty:
        return pd.DataFrame()
    taken = tuned[tuned["chosen"] & ~tuned["layer"].isin(("Dense", "ScaledDotProduct", "all blocks"))]
    ways = {
        "fused": "this project's kernel",
        "library": "PyTorch's product of 8-bit numbers",
        "bitsandbytes": "bitsandbytes' product",
        "dequantize": "dequantized, then PyTorch's product",
    }
    counts = taken.assign(path=taken["path"].replace(ways))
    counts = counts.groupby(["step", "batch", "path"])["us"].agg(["size", "median"]).reset_index()
    return counts.rename(columns={"path": "way taken", "size": "layer shapes", "median": "one product, median (µs)"})


def attention(bench: Bench) -> pd.DataFrame:
    """µs of one attention over all tokens, by PyTorch and by this project's kernel, of the rows that leave it open."""
    tuned = _tuned(bench, "ScaledDotProduct")
    if tuned.empty:
        return tuned
    tuned = tuned[tuned["rows"] > tuned["batch"]]  # not that of the last block, which has one row a picture
    tuned = tuned[tuned.groupby(["step", "batch"])["path"].transform("nunique") > 1]
    if tuned.empty:  # attention that is named, or a card without kernels
        return tuned
    ways = tuned.assign(path=tuned["path"].replace({"library": "PyTorch (µs)", "fused": "this project's kernel (µs)"}))
    best = ways.groupby(["step", "batch", "path"])["us"].min().groupby(["batch", "path"]).median().unstack()
    taken = tuned[tuned["chosen"]].groupby("batch")["path"]  # one a step
    taken = taken.agg(lambda paths: f"{(paths == 'fused').sum()} of {len(paths)}")
    return best.assign(**{"rows that took the kernel": taken}).reset_index()


def _tuned(bench: Bench, layer: str) -> pd.DataFrame:
    """Rows of the tuning table with a time, of one kind of layer or ('') of all."""
    if bench.tuning.empty:
        return bench.tuning
    timed = bench.tuning[bench.tuning["us"].notna()]
    return timed[timed["layer"] == layer] if layer else timed


def training(bench: Bench) -> pd.DataFrame:
    """Images per second of a bare training step, from PEFT as it comes; what failed here has its reason.

    Steps without adapter dropout stand last: factors are over PEFT as it comes with the same dropout.
    """
    rows = bench.part("training")
    rows = rows.sort_values("step", key=lambda steps: steps.str.contains("no dropout"), kind="stable")
    shown = {"step": rows["step"], "batch": rows["batch"], "images/s": rows["images_per_s"]}
    shown |= {"times as fast": rows["times_baseline"], "peak memory (MB)": rows["peak_mb"]}
    shown |= {"compilation (s)": rows["prepare_s"], "note": rows["note"].fillna("")}
    return _without_empty(pd.DataFrame(shown))


def ablation(bench: Bench) -> pd.DataFrame:
    """The whole ablation in one load, against loading and running every configuration anew."""
    rows = bench.part("ablation")
    shown = {"way": rows["step"], "wall time (s)": rows["seconds"], "times as fast": rows["times_baseline"]}
    return pd.DataFrame(shown | {"block evaluations (%)": 100 * rows["share"], "what was run": rows["note"]})


def pipeline(bench: Bench) -> pd.DataFrame:
    """Files to predictions: the decoder alone, the network alone, both at once."""
    rows = bench.part("pipeline")
    shares = [_bounds(row, "share", 100) if row["share"] == row["share"] else "" for row in rows.to_dict("records")]
    shown = {"stage": rows["step"], "images/s": rows["images_per_s"], "of the slower alone (%)": shares}
    return pd.DataFrame(shown | {"note": rows["note"].fillna("")})


def headline(bench: Bench) -> str:
    """What the records say, in a few sentences (Markdown)."""
    rows = bench.engine
    sizes_ = sorted(rows["batch"].unique())
    lines = [line for batch in dict.fromkeys([*sizes_[:1], *sizes_[-1:]]) if (line := _fastest(rows, batch))]
    reached = bench.targets["reached"]
    judged = bench.targets[reached != "–"]
    missed = judged.loc[judged["reached"] == "no", "target"]
    open_ = judged.loc[judged["reached"] == "undecided", "target"]
    counted = f"{(reached == 'yes').sum()} of {len(judged)} that this run can judge are reached"
    lines.append(f"- **Targets**: {counted if len(judged) else 'none could be judged by what was measured'}.")
    lines += [f"- Undecided, as the limit lies within the bounds: {'; '.join(open_)}."] if len(open_) else []
    lines += [f"- Not reached: {'; '.join(missed)}."] if len(missed) else []
    return "\n".join(lines)


def _fastest(rows: pd.DataFrame, batch: int) -> str:
    """The fastest fused row of each family of formats at one batch size, beside the first step; '' without any."""
    own = rows[rows["batch"] == batch]
    same = own[own["step"].str.contains("fused") & (own["gelu"] == "checkpoint")]
    base, found = own[own["step"] == rows["step"].iloc[0]], []
    for name, weights in FAMILIES.items():
        fused = same[same["weights"].isin(weights)]
        if len(fused):
            best = fused.loc[fused["ms"].idxmin()]
            found.append(f"{name} {best['ms']:.3g} ms, {best['times_baseline']:.3g} times as fast (`{best['step']}`)")
    if not found or base.empty:
        return ""
    first = f"`{base['step'].iloc[0]}` takes {base['ms'].iloc[0]:.3g} ms"
    return f"- **Batch {batch}**: {first}. Fused, with the checkpoint's GELU: {'; '.join(found)}."


def _bounds(row: dict[str, Any], name: str, times: float = 1) -> str:
    value, low, high = (times * row[name + side] for side in ("", "_low", "_high"))
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2  # the same for all three
    text = f"{value:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"
    return text.replace(" ", NO_BREAK)


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` without columns in which no row says anything."""
    return frame[[name for name in frame if frame[name].notna().any() and (frame[name] != "").any()]]

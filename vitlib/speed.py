"""The sections of notebook 6: what makes it fast, from the records that `make bench` leaves. Level 3, no torch."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitlib import records

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
    folder = records.study_folder(study) / "records"
    tuning = folder / "bench_tuning.csv"  # a machine without fused rows leaves none
    frame, targets = (records.read_table(folder / name) for name in ("bench.csv", "targets.csv"))
    # Without bounds the column holds numbers alone, which a table would round to two digits.
    targets["found"] = [f"{value:.4g}" if isinstance(value, float) else value for value in targets["found"]]
    return Bench(
        frame,
        targets,
        records.read_table(tuning) if tuning.is_file() else pd.DataFrame(),
        records.read_json(folder / "bench.json"),
    )


def conditions(bench: Bench) -> pd.DataFrame:
    """On what, with what and from which commit it was measured."""
    about, settings = bench.about, bench.about["parameters"]
    hardware, git = about["hardware"], about.get("git") or {}
    gpus = [gpu["name"] for gpu in hardware.get("gpus") or ()]
    state = (hardware.get("gpus") or [{}])[0].get("state") or {}
    shown = ("torch", "triton", "transformers", "bitsandbytes", "flash-attn")
    versions = [f"{name} {about['versions'][name]}" for name in shown if about["versions"].get(name)]
    weights = " and ".join(bench.frame["weights"].dropna().unique())
    rows = {
        "hardware": gpus[0] if gpus else f"{hardware['cpu']}, {hardware['cores_usable']} cores",
        "clocks afterwards": f"SM {state['sm_clock_mhz']:,.0f} of {state['sm_clock_max_mhz']:,.0f} MHz, "
        f"slowed by: {', '.join(state.get('throttle_reasons') or ['nothing'])}"
        if "sm_clock_mhz" in state
        else "",
        "software": ", ".join([f"Python {about['python']}", *versions]),
        "weights": weights,
        "pictures": settings["data_source"],
        "rounds": f"{settings['rounds']}, in shuffled order; bounds are those of the median over rounds",
        "date and commit": f"{about['date_utc'][:10]}, {str(git.get('commit') or 'unknown')[:10]}"
        + (" with changes" if git.get("dirty") else ""),
    }
    return pd.DataFrame([(name, text) for name, text in rows.items() if text], columns=["what", "this run"])


def ladder(bench: Bench) -> pd.DataFrame:
    """A row a step, by weight format: median latency, and the median of the rounds' factors over the first step."""
    table: dict[str, dict[str, object]] = {}
    for row in bench.engine.to_dict("records"):
        shown = table.setdefault(row["step"], {"step": row["step"]})
        shown[f"batch {row['batch']} (ms)"] = row["ms"]
        shown[f"times as fast, batch {row['batch']}"] = row["times_baseline"]
    return pd.DataFrame(list(table.values()))


def not_run(bench: Bench) -> pd.DataFrame:
    """The steps that this machine could not run, with the reason."""
    rows = bench.part("engine")
    return rows.loc[rows["ms"].isna(), ["step", "note"]].rename(columns={"note": "reason"})


def against_fp16(bench: Bench) -> pd.DataFrame:
    """Share of the fastest fp16 latency with the same GELU that each fused row takes: at most 1 is as fast."""
    rows = bench.engine
    if "of_best_fp16" not in rows:
        return pd.DataFrame()
    rows = rows[
        rows["of_best_fp16"].notna() & ~rows["weights"].isin(("fp32", "fp16")) & rows["step"].str.contains("fused")
    ]
    table = {}
    for row in rows.to_dict("records"):
        table.setdefault(row["step"], {"step": row["step"]})[f"batch {row['batch']}"] = _bounds(row, "of_best_fp16")
    return pd.DataFrame(list(table.values()))


def agreement(bench: Bench) -> pd.DataFrame:
    """How far the logits of each step lie from those of the plain eager form of its weights."""
    rows = bench.engine.drop_duplicates("step")
    rows = rows[rows["step"] != rows["reference"]]
    return pd.DataFrame(
        {
            "step": rows["step"],
            "compared with": rows["reference"],
            "relative error of logits": [f"{value:.1e}" for value in rows["relative_error"]],
            "same class (%)": 100 * rows["agreement"],
        }
    )


def sizes(bench: Bench) -> pd.DataFrame:
    """Megabytes of weights, and with the buffers of weights dequantized before they are used; equal rows once."""
    rows = bench.engine.drop_duplicates(["weights", "model_mb", "held_mb"])
    shown = {"step": rows["step"], "weights (MB)": rows["model_mb"], "with buffers (MB)": rows["held_mb"]}
    return pd.DataFrame(shown | {"times smaller": rows["model_mb"].iloc[0] / rows["held_mb"]})


def paths(bench: Bench) -> pd.DataFrame:
    """Which way each format was computed at each batch size: for whole blocks, else by number of layer shapes."""
    if bench.tuning.empty:
        return pd.DataFrame()
    taken = bench.tuning[bench.tuning["chosen"] & (bench.tuning["layer"] != "Dense")]
    counts = taken.groupby(["step", "batch", "layer", "path"])["us"].agg(["size", "median"]).reset_index()
    counts["median"] /= 1e3
    names = {"layer": "layers", "path": "way taken", "size": "shapes", "median": "median (ms)"}
    return counts.rename(columns=names)


def training(bench: Bench) -> pd.DataFrame:
    """Images per second of a bare training step, from PEFT as it comes; what failed here has its reason."""
    rows = bench.part("training")
    shown = {"step": rows["step"], "images/s": rows["images_per_s"], "times as fast": rows["times_baseline"]}
    shown |= {
        "peak memory (MB)": rows["peak_mb"],
        "compilation (s)": rows["prepare_s"],
        "note": rows["note"].fillna(""),
    }
    return _without_empty(pd.DataFrame(shown))


def ablation(bench: Bench) -> pd.DataFrame:
    """The whole ablation in one load, against loading and running every configuration anew."""
    rows = bench.part("ablation")
    shown = {"way": rows["step"], "wall time (s)": rows["seconds"], "times as fast": rows["times_baseline"]}
    return pd.DataFrame(shown | {"block evaluations (%)": 100 * rows["share"], "what was run": rows["note"]})


def pipeline(bench: Bench) -> pd.DataFrame:
    """Files to predictions: the decoder alone, the network alone, both at once."""
    rows = bench.part("pipeline")
    shown = {"stage": rows["step"], "images/s": rows["images_per_s"], "of the slower half (%)": 100 * rows["share"]}
    return pd.DataFrame(shown | {"note": rows["note"].fillna("")})


def headline(bench: Bench) -> str:
    """What the records say, in a few sentences (Markdown)."""
    rows, lines = bench.engine, []
    first = rows["step"].iloc[0]
    for batch in sorted(rows["batch"].unique())[:: max(1, rows["batch"].nunique() - 1)]:
        own = rows[rows["batch"] == batch]
        found = []
        for name, weights in FAMILIES.items():
            fused = own[
                own["weights"].isin(weights) & own["step"].str.contains("fused") & (own["gelu"] == "checkpoint")
            ]
            if len(fused):
                best = fused.loc[fused["ms"].idxmin()]
                found.append(
                    f"{name} {best['ms']:.3g} ms, {best['times_baseline']:.3g} times as fast (`{best['step']}`)"
                )
        if found:
            base = own.loc[own["step"] == first, "ms"].iloc[0]
            form = "Fused, with the checkpoint's GELU"
            lines.append(f"- **Batch {batch}**: `{first}` takes {base:.3g} ms. {form}: {'; '.join(found)}.")
    reached = bench.targets["reached"]
    judged = bench.targets[reached != "–"]
    missed = judged.loc[judged["reached"] == "no", "target"]
    open_ = judged.loc[judged["reached"] == "undecided", "target"]
    lines.append(f"- **Targets**: {(reached == 'yes').sum()} of {len(judged)} that this run can judge are reached.")
    lines += [f"- Undecided, as the limit lies within the bounds: {'; '.join(open_)}."] if len(open_) else []
    lines += [f"- Not reached: {'; '.join(missed)}."] if len(missed) else []
    return "\n".join(lines)


def _bounds(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3g} ({row[name + '_low']:.3g} … {row[name + '_high']:.3g})"


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` without columns in which no row says anything."""
    return frame[[name for name in frame if frame[name].notna().any() and (frame[name] != "").any()]]

"""Records of a study: where they lie, their columns, how they are written, and what they were made with.

A record is a tidy table or a JSON file beside each report, from which every plot and every sentence with a
number is made. It is written to a temporary name and renamed, so that a killed run leaves the old record or
the new one and never half of one. Nothing written here names the machine or a folder of it. Level 0: no
torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

NO_BREAK = "\u00a0"  # in a page's table a figure and its bounds stay on one line

COLUMNS: dict[str, tuple[str, ...]] = {
    "bench": (
        *("part", "step", "batch", "gelu", "ms", "ms_low", "ms_high", "images_per_s", "seconds"),
        *("times_baseline", "times_baseline_low", "times_baseline_high"),
        *("of_best_fp16", "of_best_fp16_low", "of_best_fp16_high"),
        *("share", "share_low", "share_high", "reference", "relative_error"),
        *("agreement", "model_mb", "held_mb", "peak_mb", "prepare_s", "note"),
    ),
    "finetune": (
        *("epoch", "train_loss", "valid_loss", "top1", "top5"),
        *("epoch_s", "images_per_s", "peak_vram_mb"),
    ),
    "variants": (
        *("variant", "weights", "attention", "execution", "status", "reason", "model_mb", "disk_mb", "batch"),
        *("latency_mean_ms", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "throughput_img_s"),
        *("peak_vram_mb", "cpu_latency_ms", "top1", "top5", "f1_weighted", "agreement_with_baseline"),
        *("logit_kl", "device_time_us", "attention_device_time_us", "attention_kernel", "kernels_per_pass"),
    ),
    "accuracy": (
        *("variant", "n", "right", "top1", "top1_low", "top1_high", "top5", "f1_weighted", "agreement_with_baseline"),
        *("flips", "lost", "gained", "mcnemar_p", "holm_p", "difference", "difference_low", "difference_high"),
        *("bootstrap_low", "bootstrap_high", "logit_kl", "logit_kl_low", "logit_kl_high", "verdict"),
    ),
    "latency": ("variant", "batch", "round", "sample", "latency_ms", "device_ms"),
    "throughput": ("variant", "batch", "round", "throughput_img_s"),
    "roofline": ("variant", "part", "gflop", "mb", "device_time_us", "tflop_s", "gb_s", "floor_us", "share_of_floor"),
    "validity": ("check", "found", "required", "reached"),
    "kernels": ("variant", "batch", "part", "operation", "kernel", "calls", "device_time_us"),
    "ablation": (
        *("bits", "kept", "top1", "top5", "loss", "logit_kl", "logit_kl_low", "logit_kl_high"),
        *("flips", "discordant_pairs", "mcnemar_p", "holm_p"),
    ),
    "predictions": (
        *("file", "status", "reason", "label", "label_name"),
        *(f"{column}_{rank}" for rank in range(1, 6) for column in ("id", "name", "probability")),
    ),
    "claims": ("id", "subject", "claim", "source", "original", "counts_as", "measured", "verdict", "cause"),
}
"""Columns that each record has at least, in this order; units are in the names."""

NOTEBOOKS: dict[str, str] = {
    "finetune": "1_finetune",
    "base": "1_finetune",
    "variants": "2_evaluate",
    "kernels": "2_evaluate",
    "ablation": "3_ablation",
    "predictions": "4_inference",
    "claims": "5_claims",
    "environment": "2_evaluate",
    **dict.fromkeys(("accuracy", "latency", "throughput", "roofline", "validity"), "2_evaluate"),
    **dict.fromkeys(("bench", "targets"), "`make bench` with this STUDY"),
}
"""The notebook, or the command, that writes a record, for the message when it is missing."""

PACKAGES = (
    *(
        "torch",
        "torchvision",
        "transformers",
        "tokenizers",
        "safetensors",
        "accelerate",
        "peft",
        "bitsandbytes",
    ),
    *("flash-attn", "triton", "datasets", "numpy", "scipy", "pandas", "scikit-learn", "pillow", "matplotlib"),
    *("papermill", "jupytext", "nbconvert"),
)

# Columns read back as text, so that a class folder "01" or a label "1e3" does not come back as a number.
_TEXT_COLUMNS = frozenset(
    {
        *("variant", "weights", "attention", "execution", "status", "reason", "attention_kernel"),
        *("part", "operation", "kernel", "kept", "file", "label_name"),
        *(f"name_{rank}" for rank in range(1, 6)),
        *("id", "subject", "claim", "source", "original", "counts_as", "measured", "verdict", "cause"),
    }
)

_STALE_SECONDS = 3600  # a temporary sibling untouched this long belongs to a run that was killed

# Bits of clocks_event_reasons.active (NVML's nvmlClocksEventReasons).
_CLOCK_REASONS = {
    0x001: "gpu idle",
    0x002: "application clocks setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
}

_GPU_FIELDS = {  # key in the record: field of nvidia-smi
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
}


class MissingRecord(FileNotFoundError):
    """A record that no notebook has written yet; the message names the notebook."""


# ---------------------------------------------------------------------------------------- where it lies


def project_root() -> Path:
    """Folder of the project: the nearest of the working directory and its parents with vitlib/ and params/.

    Notebooks start in different folders (JupyterLab in notebooks/, papermill where it was called). Else the
    checkout this file lies in, if it has `params/`; else the working directory, as on Colab with vitlib
    installed.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "vitlib").is_dir() and (folder / "params").is_dir():
            return folder
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "params").is_dir() else here


def study_folder(study: str, *, root: Path | str | None = None) -> Path:
    """Folder of a study, `<root>/outputs/<study>`; it is not created. `root` defaults to the project's.

    Raises ValueError unless the name is plain (letters, digits, `.`, `_`, `-`, not first a dot): it becomes
    a folder and a link in the index, and must not lead out of outputs/.
    """
    if not isinstance(study, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", study):
        raise ValueError(
            f"{study!r} cannot name a study: use letters, digits, '.', '_' or '-', not starting with '.', "
            "such as the name of a file in params/ without .yaml"
        )
    return Path(root if root is not None else project_root()) / "outputs" / study


def resolve(path: Path | str) -> Path:
    """The path that a user means: `~` is their home, and a relative path is looked for from the project's root.

    Not from the working directory: a parameter file must mean the same to JupyterLab, which starts in notebooks/.
    """
    return project_root() / Path(path).expanduser()  # joined to an absolute path, the root falls away


# ---------------------------------------------------------------------------------------- atomic writes


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary sibling to write a file or a folder to; it takes the place of `path` if the block succeeds.

    On an error in the block it is removed and `path` is as before. A killed process leaves `path` as before
    and a hidden sibling, which a later call removes an hour on. Contents are flushed to the disk before the
    rename. A file is replaced in one step. A folder needs two (aside, then in place): killed just between
    them, the next call for that path puts the old folder back. Parents are created; the suffix is kept, for
    writers that look at it.

    Raises FileNotFoundError if the block wrote nothing there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_leftovers(target)
    temporary = _sibling(target, "tmp")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {target.name}: write to the path that was given")
        for written in (temporary, *(temporary.rglob("*") if temporary.is_dir() else ())):
            _flush(written)
        _replace(temporary, target)
    except BaseException:  # a KeyboardInterrupt too must leave nothing behind
        _remove(temporary)
        raise


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{kind}-{uuid.uuid4().hex[:12]}-{target.name}")


def _replace(temporary: Path, target: Path) -> None:
    """Rename onto target; a folder cannot be renamed onto, so the old one first steps aside."""
    if not (temporary.is_dir() or target.is_dir()):
        os.replace(temporary, target)
        _flush(target.parent)
        return
    aside = _sibling(target, "old")
    existed = target.exists() or target.is_symlink()
    if existed:
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except BaseException:
        if existed:
            os.replace(aside, target)
        raise
    _flush(target.parent)
    _remove(aside)


def _clean_leftovers(target: Path) -> None:
    """Put back a folder that stepped aside for a run killed in that moment; remove what killed runs left."""
    pattern = re.compile(r"\.(tmp|old)-[0-9a-f]{12}-" + re.escape(target.name))
    found = [target.with_name(name) for name in os.listdir(target.parent) if pattern.fullmatch(name)]
    for leftover in sorted(found):
        with suppress(FileNotFoundError):  # another process may clean up at the same time
            if time.time() - leftover.lstat().st_mtime < _STALE_SECONDS and leftover.name.startswith(".tmp"):
                continue
            if leftover.name.startswith(".old") and not target.exists():
                os.replace(leftover, target)
            else:
                _remove(leftover)


def _flush(path: Path) -> None:
    """fsync of a file or folder; a file system that cannot do that for folders is left alone."""
    posix = hasattr(os, "O_DIRECTORY")
    if path.is_symlink() or not (path.is_file() or posix):
        return
    # Windows flushes only what is open for writing; elsewhere a copied file may be read-only and still be flushed.
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- tables and JSON


def write_table(frame: pd.DataFrame, path: Path | str) -> Path:
    """Write a record as CSV, atomically: schema columns first and in order, then any others.

    Returns the path. The schema is COLUMNS[name of the file]; another name has none. Floats keep 9
    significant digits, which brings a float32 back exactly and leaves counts whole; NaN is an empty field.
    A carriage return, and text that is not Unicode (a file name may be any bytes), become backslash escapes.

    Raises ValueError that names the schema columns that are missing, or columns that occur twice.
    """
    path = Path(path)
    schema = COLUMNS.get(path.stem, ())
    missing = [column for column in schema if column not in frame.columns]
    if missing:
        raise ValueError(f"{path.name} lacks the columns {', '.join(missing)}; give NaN for what was not measured")
    if not frame.columns.is_unique:
        twice = sorted(set(frame.columns[frame.columns.duplicated()]))
        raise ValueError(f"{path.name} has columns twice: {', '.join(map(str, twice))}")
    ordered = frame[[*schema, *(column for column in frame.columns if column not in schema)]]
    ordered = ordered.replace("\r", r"\\r", regex=True)  # the csv module leaves it unquoted, and readers end the row
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        ordered.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")
    return path


def read_table(path: Path | str) -> pd.DataFrame:
    """Read a record; an empty field is NaN, names and reasons stay text ("01", "None" and "NA" too).

    Raises MissingRecord with the notebook to run, and ValueError for a file that is empty or of another
    version.
    """
    path = _existing(path)
    try:
        frame = pd.read_csv(
            path,
            keep_default_na=False,
            na_values=[""],
            dtype=dict.fromkeys(_TEXT_COLUMNS, "str"),
            encoding="utf-8",
        )
    except pd.errors.EmptyDataError:
        raise ValueError(f"{_short(path)} is empty: {_advice(path, 'again')}") from None
    missing = [column for column in COLUMNS.get(path.stem, ()) if column not in frame.columns]
    if missing:
        raise ValueError(f"{_short(path)} lacks the columns {', '.join(missing)}: {_advice(path, 'again')}")
    return frame


def write_json(obj: Any, path: Path | str) -> Path:
    """Write JSON, atomically, keys in the order given and NaN or infinity as null; returns the path.

    Dataclasses, named tuples, numpy and pandas values, dates and sets are written as their plain
    equivalents; a path is written as its last name only. Raises TypeError for any other object.
    """
    text = json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return Path(path)


def read_json(path: Path | str) -> Any:
    """Read a JSON record. Raises MissingRecord with the notebook to run, ValueError for what is not JSON."""
    path = _existing(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_short(path)} is not JSON ({error}): {_advice(path, 'again')}") from None


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise MissingRecord(f"{_short(path)} is missing: {_advice(path, 'first')}")
    return path


def _short(path: Path) -> str:
    """Folder and file, `records/variants.csv`: enough to find it, and no path of the machine."""
    return "/".join(path.parts[-2:])


def _advice(path: Path, when: str) -> str:
    return f"run {NOTEBOOKS.get(path.stem, 'the notebook that writes it')} {when}"


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, np.ndarray | np.generic | pd.Series):
        return _plain(value.tolist())
    if isinstance(value, set | frozenset):
        return [_plain(entry) for entry in sorted(value)]
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> Any:
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return Path(value).name
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: convert it to text or numbers first")


# ------------------------------------------------------------------------------------------- provenance


def first_line(error: BaseException) -> str:
    """What a note of a table says of an error: the first line of its message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def environment(
    *,
    parameters: Mapping[str, Any],
    seeds: Mapping[str, int] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a result was made with, for records/environment.json; no host name, no user name, no folder.

    `checksums` are those of data manifest and weights (`checksum`). Absolute paths among the parameters are
    cut to what lies below the project, or to `.../<last name>`. What could not be found out is None, with a
    reason for the GPU. torch is asked only if it is already imported; clocks are those at the moment of the
    call.
    """
    return {
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(),
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "python": platform.python_version(),
        "versions": versions(),
        "float32_products": _float32_products(),
        "git": _git(project_root()),
        "parameters": _without_machine_paths(dict(parameters), root=project_root()),
        "seeds": dict(seeds or {}),
        "checksums": dict(checksums or {}),
    }


def _float32_products() -> str | None:
    """What PyTorch computes products of fp32 in: "highest" is fp32, anything else may be TF32. None without torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    forced = os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == "1"
    return "TF32, forced by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" if forced else torch.get_float32_matmul_precision()


def versions() -> dict[str, str | None]:
    """Installed version of each of PACKAGES, None if not installed, and torch's CUDA if torch is imported."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    torch = sys.modules.get("torch")
    found["cuda"] = torch.version.cuda if torch is not None else None
    return found


def usable_cores() -> int | None:
    """Cores that this process may use; None where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _hardware() -> dict[str, Any]:
    gpus, reason = _gpus()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "gpus_reason": reason,
    }


def _cpu_model() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def _gpus() -> tuple[list[dict[str, Any]] | None, str | None]:
    """The GPUs that torch sees, each with its state, or None and the reason."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None, "torch is not imported"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    states, reason = gpu_state()
    reason = reason or "nvidia-smi does not list this device (a MIG slice?)"
    by_uuid = {state["uuid"]: state for state in states or []}
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        state = by_uuid.get(f"GPU-{getattr(properties, 'uuid', '')}", {})
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                # The uuid finds the card among those of the host, but it names the machine: not recorded.
                "state": {key: value for key, value in state.items() if key != "uuid"} or None,
            }
        )
    return gpus, None if all(gpu["state"] for gpu in gpus) else reason


def gpu_state() -> tuple[list[dict[str, Any]] | None, str | None]:
    """Driver, clocks, temperature, power and throttle reasons of each GPU of the host now; or None and why.

    Units are in the keys, `uuid` tells the cards apart (do not publish it), and `throttle_reasons` is a
    list of text, empty when nothing holds the clocks back. Taken from nvidia-smi; takes about 50 ms and no
    CUDA context.
    """
    for active in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # newer, older drivers
        fields = ",".join(["uuid", active, *_GPU_FIELDS.values()])
        output, reason = _command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
        if output:
            return [_gpu_row(line) for line in output.splitlines() if line.strip()], None
    return None, reason


def _gpu_row(line: str) -> dict[str, Any]:
    """One line of nvidia-smi as a dictionary; a value such as [N/A] is None."""
    cells = [None if cell.strip().startswith("[") else cell.strip() for cell in line.split(",")]
    card, active, *values = cells
    row: dict[str, Any] = {"uuid": card}
    for key, value in zip(_GPU_FIELDS, values, strict=True):
        number = value is not None and key not in ("name", "driver")
        row[key] = float(value) if number else value
    bits = int(active, 16) if active else None
    row["throttle_reasons"] = None if bits is None else [t for bit, t in _CLOCK_REASONS.items() if bits & bit]
    return row


def _git(root: Path) -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it; None outside git."""
    commit, _ = _command("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if not commit:
        return {"commit": None, "dirty": None}
    changes, reason = _command("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if reason else bool(changes)}


def _command(*words: str, timeout_s: float = 20.0) -> tuple[str | None, str | None]:
    """Output of a command, or None and the reason why there is none."""
    program = shutil.which(words[0])
    if program is None:
        return None, f"{words[0]} is not installed"
    try:
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{words[0]}: {type(error).__name__}"
    if done.returncode:
        return None, f"{words[0]} ended with code {done.returncode}"
    return done.stdout.strip(), None


def _without_machine_paths(value: Any, *, root: Path) -> Any:
    """The value with absolute paths cut to what lies below `root`, else to their last name."""
    if isinstance(value, Mapping):
        return {key: _without_machine_paths(entry, root=root) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_machine_paths(entry, root=root) for entry in value]
    if not isinstance(value, str | os.PathLike) or not (Path(value).is_absolute() or str(value).startswith("~")):
        return value
    path = Path(value)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else f".../{path.name}"


def checksum(path: Path | str) -> str:
    """SHA-256 of a file, or of a folder's manifest (each file's digest and relative name, sorted), as hex.

    Files are read in pieces. A folder's checksum does not depend on where it lies, on dates, or on what
    interrupted writes left hidden in it. Raises FileNotFoundError if there is nothing.
    """
    path = Path(path)
    if path.is_dir():
        manifest = hashlib.sha256()
        files = (file for file in path.rglob("*") if file.is_file() and not _is_leftover(file))
        for name, file in sorted((file.relative_to(path).as_posix(), file) for file in files):
            manifest.update(f"{checksum(file)}  {name}\0".encode("utf-8", errors="surrogateescape"))
        return manifest.hexdigest()
    if not path.is_file():
        raise FileNotFoundError(f"{_short(path)} is missing: there is nothing to take a checksum of")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_leftover(file: Path) -> bool:
    return re.match(r"\.(tmp|old)-[0-9a-f]{12}-", file.name) is not None

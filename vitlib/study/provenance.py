"""Provenance of a result: hardware, driver, clocks, versions, commit. No torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from vitlib.study import files

PACKAGES = (
    *("torch", "torchvision", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "bitsandbytes"),
    *("flash-attn", "triton", "datasets", "numpy", "scipy", "pandas", "scikit-learn", "pillow", "matplotlib"),
    *("papermill", "jupytext", "nbconvert"),
)

_FORCE = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"  # a variable that overrules PyTorch's own setting
# From the lowest bit of NVML's nvmlClocksEventReasons.
_CLOCK_REASONS = (
    *("gpu idle", "application clocks setting", "software power cap", "hardware slowdown", "sync boost"),
    *("software thermal slowdown", "hardware thermal slowdown", "hardware power brake", "display clock setting"),
)
_WATCHED = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")  # while something is measured


def environment(
    *,
    parameters: Mapping[str, Any],
    seeds: Mapping[str, int] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a result was made with, for records/environment.json; no host name, no user name, no folder.

    `checksums` are those of the data manifest and the weights (`files.checksum`). Absolute paths among the parameters
    are cut to the part below the project, or to `.../<last name>`. Unknown values are None, with a reason for the GPU.
    torch is asked only if it is already imported; clocks are those at the moment of the call.
    """
    torch, installed = sys.modules.get("torch"), dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    forced = os.environ.get(_FORCE) == "1"
    with warnings.catch_warnings(action="ignore"):  # torch 2.9 warns of this question
        precision = torch and torch.get_float32_matmul_precision()
    return {
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(),
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "python": platform.python_version(),
        "versions": installed | {"cuda": torch and torch.version.cuda},
        # Precision of FP32 matrix products: "highest" is FP32, any other allows TF32.
        "float32_products": f"TF32, forced by {_FORCE}" if forced else precision,
        "git": _git(files.project_root()),
        "parameters": {name: _without_machine_paths(value) for name, value in parameters.items()},
        "seeds": dict(seeds or {}),
        "checksums": dict(checksums or {}),
    }


def facts(made: Mapping[str, Any]) -> dict[str, str]:
    """Hardware, software and commit of an `environment` record, a line of text each; unknown ones are left out."""
    hardware, versions, git = (made.get(key, {}) for key in ("hardware", "versions", "git"))
    gpus = [gpu["name"] for gpu in hardware.get("gpus") or ()]
    parts = [
        f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else "".join(gpus) or hardware.get("gpus_reason"),
        hardware.get("cpu"),
        f"{hardware['cores_usable']} cores" if hardware.get("cores_usable") else "",
        f"{hardware['memory_gib']} GiB memory" if hardware.get("memory_gib") else "",
    ]
    named = {"Python": made["python"], **versions} if versions else {}
    software = ("Python", "torch", "cuda", "triton", "transformers", "bitsandbytes", "flash-attn")
    found = {
        "hardware": ", ".join(filter(None, parts)),
        "software": ", ".join(f"{name} {named[name]}" for name in software if named.get(name)),
        "commit": (git.get("commit") or "")[:10] + (" with changes" if git.get("dirty") else ""),
    }
    return {name: text for name, text in found.items() if text}


def _hardware() -> dict[str, Any]:
    gpus, reason = _gpus()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),  # macOS
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "gpus_reason": reason,
    }


def cpu_model() -> str | None:
    """The name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def _gpus() -> tuple[list[dict[str, Any]] | None, str | None]:
    """The GPUs that torch sees, each with its state, or None and the reason; without torch those that NVML sees."""
    torch = sys.modules.get("torch")
    if torch is None:
        names = [{"name": state["name"]} for state in gpu_state()[0] or ()]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # indices, or names of cards and slices
            names = names[: len(visible.split(","))]
        return (names, None) if names else (None, "no CUDA device")
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    states, reason = gpu_state()
    by_uuid = {state.pop("uuid"): state for state in states or []}  # it identifies the machine: not recorded
    gpus = []
    for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        about = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
        gpus.append(about | {"state": by_uuid.get(f"GPU-{properties.uuid}")})
    known = all(gpu["state"] for gpu in gpus)
    return gpus, None if known else reason or "NVML does not list this device (a MIG slice?)"


def gpu_state() -> tuple[list[dict[str, Any]] | None, str | None]:
    """Driver, clocks, temperature, power and throttle reasons of each GPU of the host now; or None and the reason.

    Read through NVML, without a CUDA context. Units are in the keys; a value that a card does not report is None.
    `uuid` tells the cards apart (do not publish it).
    """
    try:
        import pynvml as nvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()  # counted by NVML: only the first call opens the driver, which stays open
        cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [_card(nvml, card) for card in cards], None
    except nvml.NVMLError as error:
        return None, files.first_line(error)


def _card(nvml: ModuleType, card: Any) -> dict[str, Any]:
    def ask(function: str, *arguments: Any, scale: float = 1.0) -> Any:
        try:
            value = getattr(nvml, function)(card, *arguments)
        except nvml.NVMLError:  # not supported by this card, in MIG mode, or by its driver
            return None
        return scale * value if isinstance(value, int) else value

    memory = ask("nvmlDeviceGetMemoryInfo")
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
    reasons = None if bits is None else [text for at, text in enumerate(_CLOCK_REASONS) if int(bits) >> at & 1]
    return {
        "uuid": ask("nvmlDeviceGetUUID"),
        "name": ask("nvmlDeviceGetName"),
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "memory_mib": None if memory is None else memory.total / 2**20,
        "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "power_w": ask("nvmlDeviceGetPowerUsage", scale=1e-3),
        "power_limit_w": ask("nvmlDeviceGetPowerManagementLimit", scale=1e-3),
        "throttle_reasons": reasons,
    }


@contextmanager
def monitored(seconds: float) -> Iterator[dict[str, Any]]:
    """Sample `gpu_state` every `seconds` in a thread; after the block, the mapping sums up what was seen.

    It has the number of samples; minimum, median and maximum of each field over all cards; and every throttle reason.
    Without NVML it has no sample and the reason.
    """
    found, states, ended = {"samples": 0}, [], threading.Event()

    def sample() -> None:
        while not ended.is_set():
            now, reason = gpu_state()
            if now is None:
                found["reason"] = reason
                return
            states.extend(now)
            found["samples"] += 1
            ended.wait(seconds)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
    if states:
        rows = pd.DataFrame(states)
        measured = rows[list(_WATCHED)].dropna(axis="columns", how="all").astype(float)
        reasons = sorted(rows["throttle_reasons"].explode().dropna().unique())
        found |= measured.agg(["min", "median", "max"]).to_dict() | {"throttle_reasons": reasons}


def _git(root: Path) -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it; None outside git."""
    words = ["git", "-C", root, "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return {"commit": None, "dirty": None}
    first, *others = done.stdout.splitlines()  # "# branch.oid <commit>", more of the branch, then a line a change
    return {"commit": first.split()[-1], "dirty": any(not line.startswith("#") for line in others)}


def _without_machine_paths(value: Any) -> Any:
    """The value with absolute paths cut to the part below the project, else to their last name."""
    if isinstance(value, list | tuple):
        return [_without_machine_paths(entry) for entry in value]
    if not isinstance(value, str | os.PathLike) or not (Path(value).is_absolute() or str(value).startswith("~")):
        return value
    path, root = Path(value), files.project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else f".../{path.name}"

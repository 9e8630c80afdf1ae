"""What a result was made with: hardware, driver, versions, commit. Level 0: no torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitlib.files import project_root

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

"""Provenance of a result: hardware, driver, clocks, versions, commit. No torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from vitlib import files

PACKAGES = (
    *("torch", "torchvision", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "bitsandbytes"),
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
        "git": _git(files.project_root()),
        "parameters": _without_machine_paths(dict(parameters), root=files.project_root()),
        "seeds": dict(seeds or {}),
        "checksums": dict(checksums or {}),
    }


def facts(made: Any) -> dict[str, str]:
    """Hardware, software and commit of an `environment` record, a line of text each; unknown ones are left out."""
    hardware, versions, git = (part(made, key) for key in ("hardware", "versions", "git"))
    gpus = [str(part({"gpu": gpu}, "gpu").get("name", gpu)) for gpu in hardware.get("gpus") or ()]
    parts = [
        f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else "".join(gpus) or str(hardware.get("gpus_reason") or ""),
        str(hardware.get("cpu") or ""),
        f"{hardware['cores_usable']} cores" if hardware.get("cores_usable") else "",
        f"{hardware['memory_gib']} GiB memory" if hardware.get("memory_gib") else "",
    ]
    named = {"Python": made.get("python") if isinstance(made, Mapping) else None, **versions}
    software = ("Python", "torch", "cuda", "triton", "transformers", "bitsandbytes", "flash-attn")
    found = {
        "hardware": ", ".join(filter(None, parts)),
        "software": ", ".join(f"{name} {named[name]}" for name in software if named.get(name)),
        "commit": str(git.get("commit") or "")[:10] + (" with changes" if git.get("dirty") else ""),
    }
    return {name: text for name, text in found.items() if text}


def part(record: Any, key: str) -> Mapping[str, Any]:
    """The mapping under `key`, empty if there is none: a record of another version must not stop a page."""
    part = record.get(key) if isinstance(record, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _float32_products() -> str | None:
    """Precision of FP32 matrix products in PyTorch: "highest" is FP32, else TF32 is allowed. None without torch."""
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
    """Cores that this process may use; None where the system does not report it."""
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
    reason = reason or "NVML does not list this device (a MIG slice?)"
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
                # The uuid finds the card among those of the host, but it identifies the machine: not recorded.
                "state": {key: value for key, value in state.items() if key != "uuid"} or None,
            }
        )
    return gpus, None if all(gpu["state"] for gpu in gpus) else reason


def gpu_state() -> tuple[list[dict[str, Any]] | None, str | None]:
    """Driver, clocks, temperature, power and throttle reasons of each GPU of the host now; or None and the reason.

    Units are in the keys. `uuid` tells the cards apart (do not publish it). `throttle_reasons` is a list of text,
    empty when nothing limits the clocks. A value that a card does not report is None. Read through NVML, without a
    CUDA context.
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
    """The state of one GPU."""

    def ask(function: str, *arguments: Any, scale: float = 1.0) -> Any:
        try:
            value = getattr(nvml, function)(card, *arguments)
        except nvml.NVMLError:  # not supported by this card, in MIG mode, or by its driver
            return None
        return scale * value if isinstance(value, int) else value

    memory = ask("nvmlDeviceGetMemoryInfo")
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # drivers before 535
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
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
        "throttle_reasons": None if reasons is None else [t for bit, t in _CLOCK_REASONS.items() if int(reasons) & bit],
    }


class Monitor:
    """Samples `gpu_state` every `seconds` in a thread, between entering and leaving a `with` block.

    Without NVML it samples nothing and `summary` gives the reason.
    """

    FIELDS = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds, self.samples, self.reason = seconds, [], None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            states, self.reason = gpu_state()
            if states is None:
                return
            self.samples.append(states)
            self._stop.wait(self.seconds)

    def summary(self) -> dict[str, Any]:
        """Number of samples; minimum, median and maximum of each field over all cards; every throttle reason seen."""
        rows = [state for states in self.samples for state in states]
        if not rows:
            return {"samples": 0, "reason": self.reason or "nothing was sampled"}
        found: dict[str, Any] = {"samples": len(self.samples)}
        for field in self.FIELDS:
            values = [row[field] for row in rows if row.get(field) is not None]
            if values:
                found[field] = {"min": min(values), "median": float(statistics.median(values)), "max": max(values)}
        found["throttle_reasons"] = sorted({reason for row in rows for reason in row.get("throttle_reasons") or []})
        return found


def _git(root: Path) -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it; None outside git."""
    commit, _ = _command("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if not commit:
        return {"commit": None, "dirty": None}
    changes, reason = _command("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if reason else bool(changes)}


def _command(*words: str, timeout_s: float = 20.0) -> tuple[str | None, str | None]:
    """Output of a command, or None and the reason."""
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
    """The value with absolute paths cut to the part below `root`, else to their last name."""
    if isinstance(value, Mapping):
        return {key: _without_machine_paths(entry, root=root) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_machine_paths(entry, root=root) for entry in value]
    if not isinstance(value, str | os.PathLike) or not (Path(value).is_absolute() or str(value).startswith("~")):
        return value
    path = Path(value)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else f".../{path.name}"

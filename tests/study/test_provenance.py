"""Provenance: complete, without the name or the folders of the machine, and with a reason where there is no GPU."""

import getpass
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from vitlib.study import files, provenance, records


def test_environment_is_complete_and_names_no_machine(tmp_path: Path) -> None:
    root = files.project_root()
    parameters = {"data": "/home/alice/flowers", "set": str(root / "params" / "demo.yaml"), "rate": 1e-3}
    found = provenance.environment(parameters=parameters, seeds={"numpy": 0}, checksums={"data": "ab"})
    text = records.write_json(found, tmp_path / "environment.json").read_text(encoding="utf-8")
    assert found["parameters"] == {"data": ".../flowers", "set": "params/demo.yaml", "rate": 1e-3}
    assert found["seeds"] == {"numpy": 0} and found["checksums"] == {"data": "ab"}
    assert found["versions"]["numpy"] == np.__version__
    assert found["hardware"]["cores"] >= 1 and found["date_utc"].endswith("+00:00")
    for secret in (socket.gethostname(), str(root), str(Path.home()), f"/{getpass.getuser()}/", "alice"):
        assert secret not in text


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys; from vitlib.measure import stats; from vitlib.study import provenance;"
        "assert 'torch' not in sys.modules;"
        "found = provenance.environment(parameters={}); assert 'torch' not in sys.modules;"
        "assert found['hardware']['gpus'] or found['hardware']['gpus_reason'] == 'no CUDA device'"
    )
    home = {**os.environ, "PYTHONPATH": str(Path(records.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=home, check=True)


class Refused(Exception):
    """NVML's error."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **changed: object) -> None:
    """A driver with one H200; `changed` replaces functions, None makes one unsupported."""

    def unsupported(*_: object) -> None:
        raise Refused("Not Supported")

    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlSystemGetDriverVersion": lambda: "550.90.07",
        "nvmlDeviceGetUUID": lambda card: "GPU-1234",
        "nvmlDeviceGetName": lambda card: "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": lambda card: types.SimpleNamespace(total=143771 * 2**20),
        "nvmlDeviceGetClockInfo": lambda card, kind: {1: 1980, 2: 3201}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda card, kind: {1: 1980}[kind],
        "nvmlDeviceGetTemperature": lambda card, sensor: 41,
        "nvmlDeviceGetPowerUsage": None,
        "nvmlDeviceGetPowerManagementLimit": lambda card: 700_000,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda card: 0x24,
        **changed,
    }
    constants = {"NVMLError": Refused, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0}
    functions = {name: function or unsupported for name, function in functions.items()}
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(**constants, **functions))


def test_gpu_state_has_units_and_reasons_and_none_where_a_card_reports_nothing(monkeypatch):
    fake_nvml(monkeypatch)
    expected = {
        **{"uuid": "GPU-1234", "name": "NVIDIA H200", "driver": "550.90.07", "memory_mib": 143771.0},
        **{"sm_clock_mhz": 1980.0, "sm_clock_max_mhz": 1980.0, "memory_clock_mhz": 3201.0},
        **{"temperature_c": 41.0, "power_w": None, "power_limit_w": 700.0},
        "throttle_reasons": ["software power cap", "software thermal slowdown"],
    }
    assert provenance.gpu_state() == ([expected], None)
    fake_nvml(monkeypatch, nvmlDeviceGetCurrentClocksEventReasons=lambda card: 0, nvmlDeviceGetMemoryInfo=None)
    (state,), _ = provenance.gpu_state()
    assert state["throttle_reasons"] == [] and state["memory_mib"] is None


def test_the_monitor_sums_up_what_it_sampled(monkeypatch):
    clocks = itertools.cycle([1980, 1200])
    fake_nvml(monkeypatch, nvmlDeviceGetClockInfo=lambda card, kind: next(clocks) if kind == 1 else None)
    with provenance.monitored(seconds=0.001) as found:
        while found["samples"] < 3:
            time.sleep(0.001)
    assert found.pop("samples") >= 3 and found.pop("sm_clock_mhz").items() >= {"min": 1200.0, "max": 1980.0}.items()
    temperature = {"temperature_c": {"min": 41.0, "median": 41.0, "max": 41.0}}
    assert found == {**temperature, "throttle_reasons": ["software power cap", "software thermal slowdown"]}


def test_a_gpu_is_matched_by_uuid_which_is_not_recorded(monkeypatch):
    about = {"name": "NVIDIA H200", "major": 9, "minor": 0, "total_memory": 2**37, "multi_processor_count": 132}
    properties = types.SimpleNamespace(**about, uuid="1234")
    seen = {"is_available": True, "device_count": 1}
    cuda = types.SimpleNamespace(**{name: lambda value=value: value for name, value in seen.items()})
    cuda.get_device_properties = lambda index: properties
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    fake_nvml(monkeypatch)
    (gpu,), reason = provenance._gpus()
    assert gpu["compute_capability"] == "9.0" and gpu["state"]["memory_mib"] == 143771 and reason is None
    assert "1234" not in json.dumps(gpu)
    fake_nvml(monkeypatch, nvmlDeviceGetUUID=lambda card: "GPU-other")
    (gpu,), reason = provenance._gpus()
    assert gpu["state"] is None and "does not list this device" in reason


def test_without_a_driver_there_is_a_reason_of_one_line(monkeypatch):
    fake_nvml(monkeypatch, nvmlInit=None)
    assert provenance.gpu_state() == (None, "Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert provenance.gpu_state() == (None, "nvidia-ml-py is not installed")
    with provenance.monitored(seconds=0.001) as found:
        while "reason" not in found:  # it gives up by itself
            time.sleep(0.001)
    assert found == {"samples": 0, "reason": "nvidia-ml-py is not installed"}


def test_facts_are_lines_of_text():
    made = {
        "hardware": {"gpus": [{"name": "NVIDIA H100"}] * 2, "cpu": "CPU", "cores_usable": 16},
        "python": "3.12.1",
        "versions": {"torch": "2.11.0", "triton": None},
        "git": {"commit": "0123456789abcdef", "dirty": True},
    }
    assert provenance.facts(made) == {
        "hardware": "2 × NVIDIA H100, CPU, 16 cores",
        "software": "Python 3.12.1, torch 2.11.0",
        "commit": "0123456789 with changes",
    }
    assert provenance.facts({}) == {}


def test_git_commit_and_dirty_flag(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert provenance._git(tmp_path) == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = provenance._git(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert provenance._git(tmp_path) == {**clean, "dirty": True}

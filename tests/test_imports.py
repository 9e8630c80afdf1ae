"""Importing vitlib touches no device and no network, and loads torch only where it is needed."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import vitlib

ROOT = Path(__file__).resolve().parents[1]
MODULES = [module.name for module in pkgutil.walk_packages(vitlib.__path__, "vitlib.") if "__main__" not in module.name]
WITHOUT_TORCH = [name for name in MODULES if name.startswith(("vitlib.study", "vitlib.report", "vitlib.speed"))]
HEAVY = {"torch", "transformers", "bitsandbytes", "peft", "accelerate", "torchvision"}

SCRIPT = """
import importlib, json, sys

connections = []
sys.addaudithook(lambda event, args: connections.append(event) if event in EVENTS else None)
import vitlib

heavy = {"vitlib": HEAVY & set(sys.modules)}
for module in WITHOUT_TORCH:
    importlib.import_module(module)
    heavy[module] = HEAVY & set(sys.modules)
import bitsandbytes, torch

theirs = torch.cuda.is_initialized()  # on a machine with a GPU bitsandbytes opens it while it is imported
for module in MODULES:
    importlib.import_module(module)

heavy = {module: sorted(names) for module, names in heavy.items() if names}
print(json.dumps({"heavy": heavy, "cuda": torch.cuda.is_initialized() and not theirs, "connections": connections}))
"""


def test_importing_loads_no_torch_where_none_is_needed_and_touches_no_device_and_no_network():
    """One fresh process for all three, because importing everything takes long."""
    assert len(WITHOUT_TORCH) > 12
    names = {
        **{"HEAVY": HEAVY, "WITHOUT_TORCH": WITHOUT_TORCH, "MODULES": MODULES},
        "EVENTS": {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"},
    }
    code = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + SCRIPT
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"heavy": {}, "cuda": False, "connections": []}


def test_the_module_lists_what_can_be_called():
    done = subprocess.run([sys.executable, "-m", "vitlib"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("  python -m")]
    assert {"vitlib.report", "vitlib.study.params", "vitlib.pretrained"} <= set(commands) <= set(MODULES)

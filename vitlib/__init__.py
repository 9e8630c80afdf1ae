"""How small and how fast a Vision Transformer can be made: the module behind the notebooks.

Importing it loads no torch, touches no CUDA device and no network; each notebook imports the parts it calls.
"""

import logging
import os
import warnings

# OpenMP's waiting threads must sleep: spinning, they slow a small network down ten times as soon as another process
# wants a core, and cost nothing less on a quiet machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Said by libraries while they load, in every report, about nothing that a reader can or should act on:
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler announces its start and stop on standard error
# bitsandbytes misses an optional CPU kernel of the Hub; which kernels did run is in the records.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())
warnings.filterwarnings("ignore", message="IProgress not found")  # progress is shown as text, without widgets

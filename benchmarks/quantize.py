"""The time of `quantize`, proof and digests included, over `llama_model_quantize` alone.

python benchmarks/quantize.py [FILE-F16.gguf] [TYPE[,TYPE…] …]

Each argument of types is one call; libllama's own time is that of the calls inside a process that
has already started, one after the other, all with the same number of threads. Beside the wall's
clock, seconds of CPU are compared: on a machine that others use they are the steadier measure.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.llama.quantizer import resolve_type
from so8tqc.services.builtin import DEMO_MODEL, resolve_model
from so8tqc.services.export import export
from so8tqc.services.quantize import quantize

REPEATS = 5
THREADS = os.cpu_count() or 1
CALLS = ("Q8_0", "Q4_K_M", "Q4_K_M,Q5_K_M,Q6_K")

ALONE = """
import ctypes, os, sys, time
from llama_cpp import llama_cpp as lib
lib.llama_log_set(lib.llama_log_callback(), ctypes.c_void_p(0))
lib.llama_backend_init()
seconds, cpu = 0.0, time.process_time()
for number in sys.argv[4:]:
    parameters = lib.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = int(sys.argv[3]), int(number)
    started = time.perf_counter()
    status = lib.llama_model_quantize(
        sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters))
    seconds += time.perf_counter() - started
    assert status == 0
print(seconds, time.process_time() - cpu)
"""


class Cost(NamedTuple):
    """Seconds by the wall's clock, and of CPU."""

    wall: float
    cpu: float


def alone(source: Path, types: list[str], folder: Path) -> Cost:
    """Inside ``llama_model_quantize``."""
    numbers = [str(resolve_type(name)[1]) for name in types]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(source), str(folder / "alone.gguf"), str(THREADS),
         *numbers],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    wall, cpu = done.stdout.split()[-2:]
    return Cost(float(wall), float(cpu))


def ours(source: Path, types: list[str], folder: Path) -> Cost:
    """The whole service and its child processes."""
    started, cpu = time.perf_counter(), cpu_seconds()
    quantize(QuantizeConfig(gguf=source, out=folder / "ours", types=tuple(types), threads=THREADS))
    return Cost(time.perf_counter() - started, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    given = [Path(a) for a in sys.argv[1:] if a.endswith(".gguf")]
    calls = [a for a in sys.argv[1:] if not a.endswith(".gguf")] or CALLS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = given[0] if given else folder / "demo-F16.gguf"
        if not given:
            export(ExportConfig(model=resolve_model(DEMO_MODEL), out=source))
        for call in calls:
            types = call.split(",")
            pairs = []
            for _ in range(REPEATS):
                pairs.append((alone(source, types, folder), ours(source, types, folder)))
            for clock in Cost._fields:
                ratios = sorted(getattr(b, clock) / getattr(a, clock) for a, b in pairs)
                spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"{call}, {THREADS} threads, {clock}: median ratio "
                      f"{np.median(ratios):.2f} (of {spread})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

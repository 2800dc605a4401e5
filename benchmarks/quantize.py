"""The time of `quantize` over `llama_model_quantize` alone: until written, and until proven.

python benchmarks/quantize.py [FILE-F16.gguf] [TYPE[,TYPE…] …]

Each argument of types is one call; libllama's own time is that of the calls inside a process that
has already started, one after the other, all with the same number of threads. "Written" is the time
until libllama has written the last file, the process and the plan included, with the proof at work
beside it; "wall" and "cpu" (seconds of CPU, the steadier measure on a machine that others use) are
the whole call, digests and the flush to the disk included. "Start" is a process that loads libllama
and plans, alone: what a small model cannot hide.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from process_time import cpu_seconds
from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.llama.quantizer import Job, Quantizer, Recipe, resolve_type
from so8tqc.services.export.service import export
from so8tqc.services.quantize.service import quantize
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model

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
    """Seconds until the last file is written and of the whole, by the wall's clock, and of CPU."""

    written: float
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
    return Cost(float(wall), float(wall), float(cpu))


def ours(source: Path, types: list[str], folder: Path) -> Cost:
    """The whole service and its child processes."""

    class Stopped(Quantizer):
        def write(self, job: Job, on_tensor: Callable[[str], None]) -> None:
            super().write(job, on_tensor)
            written.append(time.perf_counter())

    written: list[float] = []
    started, cpu = time.perf_counter(), cpu_seconds()
    with patch("so8tqc.services.quantize.service.Quantizer", Stopped):
        quantize(
            QuantizeConfig(gguf=source, out=folder / "ours", types=tuple(types), threads=THREADS)
        )
    ended = time.perf_counter()
    return Cost(max(written) - started, ended - started, cpu_seconds() - cpu)


def start(source: Path, types: list[str]) -> float:
    """Seconds in which a process loads libllama and plans."""
    began = time.perf_counter()
    quantizer = Quantizer()
    for name in types:
        quantizer.plan(source, Recipe(resolve_type(name)[1]))
    took = time.perf_counter() - began
    quantizer.close()
    return took


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
            seconds = Cost(*map(np.median, zip(*(a for a, _ in pairs), strict=True)))
            starts = [start(source, types) for _ in range(REPEATS)]
            print(f"{call}, {THREADS} threads: libllama alone {seconds.wall:.2f} s, "
                  f"{seconds.cpu:.2f} s of CPU; start {np.median(starts):.2f} s",
                  flush=True)  # fmt: skip
            for clock in Cost._fields:
                ratios = sorted(getattr(b, clock) / getattr(a, clock) for a, b in pairs)
                spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"{call}, {THREADS} threads, {clock}: median ratio "
                      f"{np.median(ratios):.2f} (of {spread})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

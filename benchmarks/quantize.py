"""The time of `quantize`, proof and digests included, over libllama's alone, in one run.

python benchmarks/quantize.py [FILE-F16.gguf] [TYPE[,TYPE…] …]

Each argument of types is one call; libllama's own time is that of the calls inside a process that
has already started, one after the other, all with the same number of threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
seconds = 0.0
for number in sys.argv[4:]:
    parameters = lib.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = int(sys.argv[3]), int(number)
    started = time.perf_counter()
    status = lib.llama_model_quantize(
        sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters))
    seconds += time.perf_counter() - started
    assert status == 0
print(seconds)
"""


def alone(source: Path, types: list[str], folder: Path) -> float:
    """Seconds inside ``llama_model_quantize``."""
    numbers = [str(resolve_type(name)[1]) for name in types]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(source), str(folder / "alone.gguf"), str(THREADS),
         *numbers],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def ours(source: Path, types: list[str], folder: Path) -> float:
    """Seconds of the whole service."""
    started = time.perf_counter()
    quantize(QuantizeConfig(gguf=source, out=folder / "ours", types=tuple(types), threads=THREADS))
    return time.perf_counter() - started


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
            ratios = sorted(b / a for a, b in pairs)
            seconds = [float(np.median(column)) for column in zip(*pairs, strict=True)]
            spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{call}, {THREADS} threads: {seconds[1]:.2f} s over {seconds[0]:.2f} s alone, "
                  f"median ratio {np.median(ratios):.2f} (of {spread})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

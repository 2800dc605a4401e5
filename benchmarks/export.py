"""The cost of proving an export, over the converter's own time, in one run on SmolLM2-135M.

python benchmarks/export.py [REPEATS]

The proof is everything but the converter: names and values of all tensors, the file run by libllama
and by transformers (in part while the converter works), and the digests of the record. The rewrite
that writes provenance and puts unrounded tensors back is in it, too.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from so8tqc.config import BakeConfig, ExportConfig
from so8tqc.llama.converter import convert
from so8tqc.llama.vendor import find_converter
from so8tqc.services.bake import bake
from so8tqc.services.export.service import export
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model, resolve_rotations


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    base, rotations = resolve_model(DEMO_MODEL), resolve_rotations("builtin:smollm2-135m-pet")
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as scratch:
        baked, out, log = (Path(scratch) / name for name in ("baked", "model.gguf", "log"))
        bake(BakeConfig(base=base, rotations=rotations, out=baked, baked_dtype="float32"))
        for keep in ((), ("baked",)):
            config = ExportConfig(model=baked, out=out, keep_f32=keep)
            proved, ratios = partial(export, config), []
            for _ in range(repeats):
                alone = seconds(lambda: convert(find_converter(), baked, out, "f16", log))
                whole = seconds(proved)
                ratios.append(whole / alone - 1)
            print(f"proof {'with' if keep else 'without'} --keep-f32 baked: "
                  f"{statistics.median(ratios):.2f} × the converter alone, {alone:.1f} s "
                  f"(of {', '.join(f'{r:.2f}' for r in sorted(ratios))})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""Do ggml's quantizers give the same bytes, whatever compiles them?

python benchmarks/ggml_rounding.py GGML_DIRECTORY WORK [COMPILER …]

GGML_DIRECTORY is ``vendor/llama.cpp/ggml`` of llama-cpp-python's source package; a compiler is a
command, e.g. ``gcc``, ``clang`` or ``"python -m ziglang cc"``. The quantizers alone are compiled,
for plain x86-64 and for AVX2 with fused multiply-add, as a stock build has it and with
``-ffp-contract=off``; rows of random weights are then stored in twelve types, with and without
importance. Told are, for each build, the blocks that differ from the first build's with the flag,
and the processor time relative to the same build without it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from so8tqc.llama.pin import UNFUSED
from so8tqc.quantizers.grids import GRIDS

ROWS, COLUMNS = 1024, 1536
ROUNDS = 3
MACHINES = {"x86-64": "-march=x86-64", "avx2": "-march=haswell"}
ZIGS = {"x86-64": "-mcpu=x86_64", "avx2": "-mcpu=x86_64_v3"}
SOURCES = ("src/ggml.c", "src/ggml-quants.c")
ABSENT = (
    "ggml_critical_section_start",
    "ggml_critical_section_end",
    "ggml_backend_buffer_get_usage",
    "ggml_backend_tensor_memset",
    "ggml_backend_tensor_set",
)
"""What ggml.c names and quantizers never call, but for the lock of their tables."""


class Build(NamedTuple):
    compiler: str
    machine: str
    flag: str

    @property
    def name(self) -> str:
        return f"{self.compiler}, {self.machine}, {self.flag or 'stock'}"


def compiled(build: Build, ggml: Path, work: Path) -> Any:
    """The quantizers as a library, loaded."""
    made = work / f"{abs(hash(build.name))}.so"
    (work / "ggml-version.h").write_text('#define GGML_VERSION ""\n#define GGML_COMMIT ""\n')
    stubs = work / "absent.c"
    stubs.write_text("".join(f"void {name}(void) {{}}\n" for name in ABSENT))
    zig = "zig" in build.compiler
    how = [(ZIGS if zig else MACHINES)[build.machine], *([build.flag] if build.flag else [])]
    how += ["-target", "x86_64-linux-gnu", "-fno-sanitize=undefined"] if zig else []
    sources = [*(str(ggml / source) for source in SOURCES), str(stubs)]
    includes = [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", f"-I{work}"]
    options = ["-O3", "-DNDEBUG", "-D_GNU_SOURCE", "-w", "-shared", "-fPIC", *includes]
    command = [*shlex.split(build.compiler), *options, *how, *sources, "-o", str(made), "-lm"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(made))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
    ]  # fmt: skip
    return library


def stored(
    library: Any,
    type_: str,
    weights: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.uint8]:
    """[blocks, bytes of a block]."""
    kind = GGMLQuantizationType[type_]
    block, size = GGML_QUANT_SIZES[kind]
    out = np.zeros((weights.size // block, size), np.uint8)
    weighed = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(
        int(kind), weights.ctypes.data, out.ctypes.data, 0, *weights.shape, weighed
    )
    return out


def main() -> None:
    ggml, work = Path(sys.argv[1]), Path(sys.argv[2])
    compilers = sys.argv[3:] or ["gcc"]
    work.mkdir(parents=True, exist_ok=True)
    builds = [Build(*parts) for parts in itertools.product(compilers, MACHINES, (UNFUSED, ""))]
    libraries = {build: compiled(build, ggml, work) for build in builds}
    draw = np.random.default_rng(0)
    weights = (draw.standard_normal((ROWS, COLUMNS)) * 0.05).astype(np.float32)
    importance = np.exp(draw.standard_normal(COLUMNS)).astype(np.float32)
    seconds = dict.fromkeys(builds, 0.0)
    print(f"Blocks that differ from those of {builds[0].name}:")
    for type_, weighed in itertools.product(GRIDS, (None, importance)):
        found = {}
        for _, build in itertools.product(range(ROUNDS), builds):
            start = time.process_time()
            found[build] = stored(libraries[build], type_, weights, weighed)
            seconds[build] += time.process_time() - start
        differ = {
            build.name: int((blocks != found[builds[0]]).any(axis=1).sum())
            for build, blocks in found.items()
        }
        some = {name: count for name, count in differ.items() if count}
        print(f"{type_}{', importance' if weighed is not None else ''}: {some or 'none'}")
    for build in builds:
        if build.flag:
            stock = seconds[build._replace(flag="")]
            print(f"{build.name}: {stock / seconds[build]:.3f} × the speed of stock")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

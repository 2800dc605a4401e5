"""The time of `so8tqc --help` over that of `python -c pass`, and under the limit of 0.25 s; and of
`so8tqc check` of a GGUF file of 145 MB with nothing beside it, under that of 3 s.

python benchmarks/startup.py

Each command is a process of its own, and the commands take turns, so that a busy moment strikes
all of them. `import typer` is what any command line made with it costs; `so8tqc config show` is
the fastest command that reads options, so pydantic is in it. "cpu" is the seconds of CPU of the
process, the steadier measure on a machine that others use.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

LIMIT_SECONDS = 0.25
CHECK_LIMIT_SECONDS = 3.0
REPEATS = 20
CHECKS = 5
MATRICES, ROWS, COLUMNS = 34, 2000, 2000
"""In Q8_0 (34 bytes for 32 weights) 145 MB, about SmolLM2-135M's."""

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import typer": ["-c", "import typer"],
    "so8tqc --help": ["-m", "so8tqc", "--help"],
    "so8tqc --version": ["-m", "so8tqc", "--version"],
    "so8tqc run --help": ["-m", "so8tqc", "run", "--help"],
    "so8tqc config show": ["-m", "so8tqc", "config", "show", str(ROOT / "configs" / "demo.yaml")],
}


def cost(arguments: list[str]) -> tuple[float, float]:
    """Wall time and CPU time of one process, seconds, its output thrown away."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SO8TQC_")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, env=environment
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_gguf(path: Path) -> None:
    """A Q8_0 file of 145 MB whose weights are finite; no runtime would run it."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(COLUMNS)
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, size=(ROWS, COLUMNS // 32, 34), dtype=np.uint8)
    blocks[:, :, :2] = np.array([0.01], np.float16).view(np.uint8)  # the scale of each block
    rows = blocks.reshape(ROWS, -1)
    for i in range(MATRICES):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def time_check() -> None:
    """The whole command, from the shell to the answer."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model-Q8_0.gguf"
        write_gguf(path)
        arguments = ["-m", "so8tqc", "check", str(path)]
        cost(arguments)
        walls, cpus = zip(*(cost(arguments) for _ in range(CHECKS)), strict=True)
        size = path.stat().st_size / 1e6
    wall, cpu = np.median(walls), np.median(cpus)
    share = wall / CHECK_LIMIT_SECONDS
    print(
        f"so8tqc check, {size:.0f} MB: median {wall:.2f} s (cpu {cpu:.2f} s), "
        f"{share:.2f} × the limit"
    )


def main() -> None:
    for arguments in COMMANDS.values():  # compiled and read from disk once, before it counts
        cost(arguments)
    rounds = [[cost(arguments) for arguments in COMMANDS.values()] for _ in range(REPEATS)]
    for i, clock in enumerate(("wall", "cpu")):
        times = np.array(rounds)[:, :, i]
        ratios = np.median(times / times[:, [0]], axis=0)
        for name, own, ratio in zip(COMMANDS, times.T, ratios, strict=True):
            share = (
                f", {np.median(own) / LIMIT_SECONDS:.2f} × the limit" if "so8tqc" in name else ""
            )
            print(f"{clock}, {name}: median {np.median(own):.3f} s (fastest {own.min():.3f}), "
                  f"{ratio:.1f} × python -c pass{share}")  # fmt: skip
    time_check()


if __name__ == "__main__":
    main()

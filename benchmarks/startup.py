"""The time of `so8tqc --help` over that of `python -c pass`, and under the limit of 0.3 s.

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
import time
from pathlib import Path

import numpy as np

LIMIT_SECONDS = 0.3
REPEATS = 15
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


if __name__ == "__main__":
    main()

"""What the benchmarks know of a process's memory. Linux only (/proc)."""

from __future__ import annotations

import re
from pathlib import Path


def peak_bytes(pid: int | str = "self") -> int:
    """Largest resident size of a process so far (getrusage would include its parent's)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

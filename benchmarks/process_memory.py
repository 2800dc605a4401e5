"""What the benchmarks know of a process's memory. Linux only (/proc)."""

from __future__ import annotations

import re
from pathlib import Path


def peak_bytes(pid: int | str = "self") -> int:
    """Largest resident size of a process so far (getrusage would include its parent's)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def resident_bytes(pid: int | str = "self") -> int:
    """Resident size of a process now."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def forget_peak(pid: int | str = "self") -> None:
    """Let :func:`peak_bytes` count from now on (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")

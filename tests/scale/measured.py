"""What a command costs in a process of its own: CPU seconds and the most memory it held."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

_INTERVAL_SECONDS = 0.01


class Cost(NamedTuple):
    """CPU seconds, peak resident bytes, exit status and standard output."""

    seconds: float
    peak: int
    status: int
    said: str


def measured(arguments: list[str]) -> Cost:
    """Run ``python ARGUMENTS`` to its end.

    The peak is the kernel's VmHWM, read until the end: ``ru_maxrss`` would begin with the size of
    this process, from which the other is forked.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(process.stdout.read()))
        reader.start()
        peak = 0
        while reader.is_alive():
            peak = max(peak, _peak(process.pid))
            reader.join(_INTERVAL_SECONDS)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(usage.ru_utime + usage.ru_stime, peak, process.returncode, said[0])


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else 0  # one that has ended has no memory

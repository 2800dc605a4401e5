"""What a command costs in a process of its own: CPU seconds and the most memory it held."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple


class Cost(NamedTuple):
    """CPU seconds, peak resident bytes, exit status and standard output."""

    seconds: float
    peak: int
    status: int
    said: str


def measured(arguments: list[str]) -> Cost:
    """Run ``python ARGUMENTS`` to its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, process.returncode, said)

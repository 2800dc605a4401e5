"""Child processes, read line by line, which do not outlive their parent's interest in them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

QUIET_ABORT = {"GGML_NO_BACKTRACE": "1"}
"""Environment of a process that runs libllama: ggml would start a debugger on itself before it
aborts."""

KEPT_LINES = 60
"""How many of a child's last lines are kept to find the cause of its end in."""

_TELLING = (
    re.compile(r"^(\w+\.)*\w*(Error|Exception)\b|\berror\b", re.IGNORECASE),
    re.compile(r"\bfail", re.IGNORECASE),
)
"""What a line that names a cause looks like; "failed to load model" names none, so it is second."""


def spawn(
    command: Sequence[str], stdin: int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command; both its outputs come as one stream of lines, on ``stdout``.

    A carriage return ends a line, too, so that progress bars can be followed.

    Args:
        command: program and arguments.
        stdin: ``subprocess.PIPE`` (written line by line) or ``subprocess.DEVNULL``.
        environment: variables to add to this process's.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        bufsize=1,
    )


_BARE = ("AssertionError", "NotImplementedError", "ValueError", "RuntimeError")
"""Exceptions whose line says nothing when nothing follows it."""


def follow(
    command: Sequence[str],
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> tuple[int, list[str]]:
    """Run a command to its end, line by line (see :func:`spawn`).

    On any exception, interruption included, the child is killed.

    Args:
        command: program and arguments.
        on_line: told every line, without its end.
        environment: variables to add to this process's.

    Returns:
        Exit status (negative: the number of the signal that killed it), and the last lines.
    """
    last: deque[str] = deque(maxlen=KEPT_LINES)
    with spawn(command, subprocess.DEVNULL, environment) as process:
        try:
            for line in process.stdout or ():
                last.append(line.rstrip())
                on_line(line.rstrip("\n"))
        except BaseException:
            process.kill()
            raise
    return process.returncode, [line for line in last if line.strip()]


def ending(status: int) -> str:
    """``exit 1``, or the name of the signal that ended a child."""
    if status >= 0:
        return f"exit {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def reason(lines: Iterable[str]) -> str:
    """The last line that names a cause, else the last one."""
    said = list(lines) or ["no output"]
    for pattern in _TELLING:
        if telling := [line for line in said if pattern.search(line)]:
            last = telling[-1].strip()
            return last if last not in _BARE else f"{last}: {_asserted(said)}"
    return said[-1].strip()


def _asserted(said: list[str]) -> str:
    """The statement of a traceback that failed without a word."""
    statements = [line.strip() for line in said if line.lstrip().startswith(("assert", "raise"))]
    return f"`{statements[-1]}` does not hold" if statements else "it does not say why"


def remedy(status: int) -> str | None:
    """What to do about a child that ended so, where its end alone says it."""
    if -status != getattr(signal, "SIGILL", None):
        return None
    return (
        "libllama was built with instructions that do not work on this CPU (the AMX kernels "
        "of ggml, built by GCC 12, are one such case). Build it without: "
        "CMAKE_ARGS='-DGGML_NATIVE=OFF' python -m pip install --force-reinstall --no-deps "
        "--no-cache-dir --no-binary llama-cpp-python llama-cpp-python."
    )

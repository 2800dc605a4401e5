"""Commands whose requests of the disk are counted, and one of them made to kill or to fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_CONTROL = struct.Struct("<qqiiii")
_ACTIONS = {"signal": 1, "tear": 2, "fail": 3}


@dataclass(frozen=True)
class Fault:
    """What happens at the ``at``-th operation.

    Attributes:
        action: ``signal`` (before it, to all processes of the command), ``tear`` (as SIGKILL, with
            half of the bytes written), ``fail`` (with an errno).
        value: the signal, or the errno.
        lasting: whether later operations fail as well, as on a full disk.
    """

    action: str
    at: int
    value: int = signal.SIGKILL
    lasting: bool = False


@dataclass(frozen=True)
class Operation:
    """One request: ``write``, ``fsync``, ``open`` (that creates or empties), ``rename``, …"""

    what: str
    path: Path
    other: str


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: exit code, or minus the signal that killed it.
        said: what it wrote to the terminal.
        count: its operations.
        hit: how many of them were disturbed.
        trace: the operations.
    """

    status: int
    said: str
    count: int
    hit: int
    trace: tuple[Operation, ...]


class Bench:
    """A server of forks with the counting library loaded.

    Args:
        folder: where to work.
        environment: variables to add.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.root = folder / "root"
        self.root.mkdir(parents=True)
        self._control, self._trace = folder / "control", folder / "trace"
        self._said = folder / "said"
        self._control.write_bytes(bytes(_CONTROL.size))
        self._trace.touch()
        library = build_library(folder)
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "disk_server.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "LD_PRELOAD": str(library),
                "FAULTS_ROOT": str(self.root),
                "FAULTS_CONTROL": str(self._control),
                "FAULTS_TRACE": str(self._trace),
                "OMP_NUM_THREADS": "1",
                **(environment or {}),
            },
        )
        assert self._line() == "ready"

    def run(
        self,
        arguments: Sequence[str],
        fault: Fault | None = None,
        *,
        after: tuple[float, int] | None = None,
        afresh: bool = False,
    ) -> Outcome:
        """Run a command.

        Args:
            arguments: of ``so8tqc``.
            fault: what to disturb.
            after: seconds, and the signal that its processes then get.
            afresh: run models even if what they say is known.
        """
        at, action, value, lasting = 0, 0, 0, 0
        if fault is not None:
            at, action = fault.at, _ACTIONS[fault.action]
            value, lasting = int(fault.value), int(fault.lasting)
        with self._control.open("r+b") as stream:  # the same file: the server has mapped it
            stream.write(_CONTROL.pack(0, at, action, value, lasting, 0))
        os.truncate(self._trace, 0)
        job: dict[str, object] = {"arguments": list(arguments), "said": str(self._said)}
        job["afresh"] = afresh
        if after is not None:
            job |= {"limit": after[0], "signal": int(after[1])}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        status = int(self._line())
        count, *_, hit = _CONTROL.unpack(self._control.read_bytes())
        return Outcome(status, self._said.read_text(), count, hit, self._operations())

    def warm(self, arguments: Sequence[str]) -> None:
        """Run a command without torch in the server: its forks then have what it imports."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"arguments": list(arguments), "here": True}) + "\n")
        self._server.stdin.flush()
        assert self._line() == "0"

    def _operations(self) -> tuple[Operation, ...]:
        lines = [line.split("\t") for line in self._trace.read_text().splitlines()]
        lines.sort(key=lambda line: int(line[0]))
        return tuple(Operation(what, Path(path), other) for _, what, path, other in lines)

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        """End the server."""
        with self._server:
            assert self._server.stdin is not None
            self._server.stdin.close()

    def clear(self, start: Path | None = None) -> None:
        """Empty the root, or fill it with a copy of a directory."""
        shutil.rmtree(self.root)
        if start is None:
            self.root.mkdir()
        else:
            shutil.copytree(start, self.root)


def build_library(folder: Path) -> Path:
    """Compile ``disk_faults.c``."""
    library = folder / "faults.so"
    subprocess.run(
        [
            "cc",
            "-O1",
            "-Wall",
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            str(HERE / "disk_faults.c"),
            "-ldl",
        ],
        check=True,
    )
    return library

"""What a reader does beside reading, seen from outside: writes, processes, sockets, memory, time.

Python's audit events (PEP 578) tell of everything that Python code opens, starts or connects;
the files of the directory are compared for what native code does; memory is the kernel's count.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 1 << 30
"""Bytes of resident memory that reading one input may add."""

ADDRESS_SPACE = 6 << 30
"""Bytes of address space that reading may add before the kernel refuses: a net below the limit."""

SECONDS_LIMIT = 10.0
"""CPU seconds that one input may take."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
}
_STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
}
_REACHES = {
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "socket.bind",
}
_DEVICES = ("/dev/null", "/dev/shm/so8tqc-logits-")


@dataclass
class Watch:
    """What happened while one input was read."""

    folder: Path
    writes: bool
    spawns: bool
    found: list[str] = field(default_factory=list)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and isinstance(path, str | bytes):
                self._changed(event, os.fsdecode(path))
        elif event in _CHANGES:
            if (
                event != "os.mkdir" or not Path(os.fsdecode(arguments[0])).is_dir()
            ):  # exist_ok asks, too
                named = arguments[:1] if event == "os.truncate" else arguments  # its last: a length
                self._changed(event, _within(named))
        elif event in _STARTS and not self.spawns:
            self.found.append(f"{event} {arguments[0]!r}")
        elif event in _REACHES:
            self.found.append(f"{event} {arguments[-1]!r}")
        elif event == "pickle.find_class":
            self.found.append(f"{event} {arguments[-2:]!r}")
        elif event == "exec" and str(self.folder) in getattr(arguments[0], "co_filename", ""):
            self.found.append(f"code was run: {arguments[0].co_filename}")

    def _changed(self, event: str, path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.path.realpath(os.fsdecode(path))
        out = str(self.folder / "out")
        if self.writes and (place == out or place.startswith(out + os.sep)):
            return
        if place.startswith(_DEVICES):
            return
        if self.spawns and "/tmp" in place and str(self.folder) not in place:  # the worker's words
            return
        self.found.append(f"{event} {place}")


def _within(arguments: tuple[Any, ...]) -> object:
    """The path of an event, in the directory whose descriptor it may name last."""
    path, descriptor = arguments[0], arguments[-1]
    if isinstance(path, str | bytes) and isinstance(descriptor, int) and descriptor >= 0:
        return Path(f"/proc/self/fd/{descriptor}") / os.fsdecode(path)
    return path


_watch: Watch | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None:
        _watch.see(event, arguments)


@contextmanager
def watching(folder: Path, *, writes: bool = False, spawns: bool = False) -> Iterator[Watch]:
    """Collect what happens inside; ``found`` has what may not happen."""
    global _watch, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    reset_peak()
    watch = Watch(folder.resolve(), writes, spawns)
    before, memory, started = listing(folder), resident(), time.process_time()
    _watch = watch
    try:
        yield watch
    finally:
        _watch = None
        if (grown := peak() - memory) > MEMORY_LIMIT:
            watch.found.append(f"memory grew by {grown >> 20} MiB")
        if (seconds := time.process_time() - started) > SECONDS_LIMIT:
            watch.found.append(f"took {seconds:.0f} s")
        if changed := set(before.items()) ^ set(listing(folder).items()):
            watch.found.append(f"files changed: {sorted(name for name, _ in changed)}")


def listing(folder: Path) -> dict[str, int]:
    """Path → size of what lies in a folder, but for ``out``."""
    found = {}
    for root, folders, files in os.walk(folder):
        if Path(root) == folder and "out" in folders:
            folders.remove("out")
        for name in (*folders, *files):
            path = Path(root) / name
            found[str(path.relative_to(folder))] = path.lstat().st_size if name in files else 0
    return found


def resident() -> int:
    """Bytes of resident memory now."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes of resident memory since :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begin to count the peak anew (proc(5), clear_refs)."""
    descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    try:
        os.write(descriptor, b"5")
    finally:
        os.close(descriptor)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(key)


def limit_address_space() -> None:
    """Let the kernel refuse what would be far beyond the limit, before the machine suffers."""
    most = _status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

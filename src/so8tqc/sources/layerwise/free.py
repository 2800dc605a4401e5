"""How much memory this process may still take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """Names of a control group's files, and what its statistics call cache that can be dropped."""

    limit: str
    used: str
    droppable: str


_SECOND = _Files("memory.max", "memory.current", "inactive_file")
_FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory() -> int:
    """Bytes that are free: of the machine, in every control group around, below its own limit."""
    import psutil

    found = [int(psutil.virtual_memory().available)]
    for folder, files in _groups():
        with suppress(OSError, ValueError):  # "max", or no such controller here
            limit = int((folder / files.limit).read_text())
            used = int((folder / files.used).read_text())
            statistics = (folder / "memory.stat").read_text()
            dropped = re.search(rf"^{files.droppable} (\d+)$", statistics, re.MULTILINE)
            found.append(limit - used + (int(dropped[1]) if dropped else 0))
    with suppress(ImportError):  # systems without such limits
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            found.append(soft - int(psutil.Process().memory_info().vms))
    return max(0, min(found))


def _groups() -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's control groups, and of those around them."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", maxsplit=2)
        roots: tuple[Path, ...]
        if controllers == "":
            roots, files = (_ROOT, _ROOT / "unified"), _SECOND
        elif "memory" in controllers.split(","):
            roots, files = (_ROOT / "memory",), _FIRST
        else:
            continue
        path = Path(inside.lstrip("/"))
        for root in roots:
            yield root / path, files
            yield from ((root / parent, files) for parent in path.parents)

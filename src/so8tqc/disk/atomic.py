"""Files that are either absent or complete.

A file or directory is built in a temporary sibling, flushed to disk, and renamed into place: a
process killed at any moment leaves nothing that looks finished.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from so8tqc.disk.locks import LOCK_NAME, hold, is_at, lock_descriptor
from so8tqc.disk.system import disk_errors, fsync, fsync_tree, make_folder, publish, remove, umask
from so8tqc.errors import ToolError

TEMPORARY_SUFFIX = ".so8tqc-partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success it is fsynced and renamed to it.

    On any exception, interruption included, the temporary is removed and
    ``path`` is as it was.

    Raises:
        ToolError: the disk refuses.
    """
    with disk_errors(path):
        make_folder(path.parent)
        with temporary_file(path) as temporary:
            yield temporary
            fsync(temporary)
            temporary.chmod(0o666 & ~umask())
            publish(temporary, path)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success it replaces ``path``.

    An existing ``path`` is moved aside first and deleted after the rename, so
    at no moment is a half-written directory found under its name.

    Raises:
        ToolError: the disk refuses.
    """
    with disk_errors(path):
        make_folder(path.parent)
        with temporary_directory(path) as folder:
            made = folder / path.name
            made.mkdir()
            yield made
            fsync_tree(made)
            if path.exists():
                path.replace(folder / f"{path.name}.replaced")
            publish(made, path)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path`` that :func:`remove_leftovers` leaves alone.

    It is locked for as long as it is in use, so that it outlives no process, and no process
    deletes another's. It is deleted in the end, unless it was renamed. Its name is known before it
    is made: an interruption in between leaves nothing.
    """
    _sweep(path)
    descriptor = -1
    temporary = _random_sibling(path)
    try:
        while True:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            if lock_descriptor(descriptor) and is_at(descriptor, temporary):
                break
            os.close(descriptor)  # a sweeper was faster than the lock
            descriptor, temporary = -1, _random_sibling(path)
        yield temporary
    finally:
        remove(temporary)
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """As :func:`temporary_file`, for a directory; the file ``LOCK_NAME`` in it is its lock."""
    _sweep(path)
    descriptor = None
    temporary = _random_sibling(path)
    try:
        while True:
            temporary.mkdir(mode=0o700)
            descriptor = _hold_directory(temporary)
            if descriptor is not None:
                break
            temporary = _random_sibling(path)
        yield temporary
    finally:
        remove(temporary)
        if descriptor is not None:
            os.close(descriptor)


def _sweep(path: Path) -> None:
    """Delete what killed processes left of earlier tries at ``path``."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        _removed(leftover)


def _random_sibling(path: Path) -> Path:
    """A hidden name beside ``path``, one of 2⁶⁴, so that no other process has it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def _hold_directory(directory: Path) -> int | None:
    """Lock a temporary directory; None if another process has it, or has deleted it."""
    try:
        return hold(directory / LOCK_NAME)
    except FileNotFoundError:
        return None


def require_space(directory: Path, need: float, sentence: str) -> None:
    """Make a directory and see that its disk has room, before the first expensive byte.

    Args:
        directory: where will be written.
        need: bytes.
        sentence: what needs them, "{}" standing for "1.23 GB".

    Raises:
        ToolError: it cannot be made, or the disk has no room.
    """
    make_folder(directory)
    free = shutil.disk_usage(directory).free
    if free < need:
        wanted = sentence.format(f"{need / 1e9:.2f} GB")
        raise ToolError(f"{wanted}, {free / 1e9:.2f} GB are free", where=str(directory))


def remove_leftovers(directory: Path) -> list[Path]:
    """Delete temporaries that a killed run left in ``directory``; return what was deleted.

    Those of a process that lives are locked, and stay; so does what this user may not delete.
    """
    found = set(directory.glob(f"*{TEMPORARY_SUFFIX}")) | set(
        directory.glob(f".*{TEMPORARY_SUFFIX}")
    )
    return [leftover for leftover in sorted(found) if _removed(leftover)]


def _removed(leftover: Path) -> bool:
    """Delete a temporary unless a process holds it; whether it is gone."""
    try:
        descriptor = (
            _hold_directory(leftover) if leftover.is_dir() else hold(leftover, create=False)
        )
    except OSError:
        return False
    if descriptor is None:
        return False
    try:
        remove(leftover)
    finally:
        os.close(descriptor)
    return not leftover.exists()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

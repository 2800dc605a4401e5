"""What the disk is asked for: to keep what was written, and to say why when it will not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from so8tqc.errors import ToolError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what the system refuses in here (a full disk, no permission) as a ToolError.

    Args:
        path: named where the system names none.

    Raises:
        ToolError: in place of an OSError that has a number; libraries' own have none.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        named = [os.fsdecode(n) for n in (error.filename, error.filename2) if _is_path(n)]
        raise ToolError(
            f"cannot read or write: {error.strerror}", where=", ".join(named) or str(path)
        ) from error


def _is_path(name: object) -> bool:
    """An OSError may also name a descriptor, or nothing."""
    return isinstance(name, (str, bytes)) and bool(name)


def fsync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """:func:`fsync` of all files and directories in a directory, and of itself."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def publish(temporary: Path, path: Path) -> None:
    """Rename what is complete and on the disk to its name, in place of a file of that name."""
    temporary.replace(path)
    fsync(path.parent)


def remove(path: Path) -> None:
    """Delete a file or directory as far as that is possible; what stays is swept up later.

    An interruption waits for it.
    """
    try:
        _remove(path)
    except KeyboardInterrupt:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> list[Path]:
    """Make a directory and its parents; those that were not there, the innermost first.

    Raises:
        ToolError: it cannot be made.
    """
    made: list[Path] = []
    missing = folder
    try:
        while not missing.exists():
            made.append(missing)
            missing = missing.parent
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"cannot write here: {error.strerror}", where=str(folder)) from error
    return made


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

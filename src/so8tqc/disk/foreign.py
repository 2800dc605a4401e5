"""Files that others made, before anything is built from them: plain, and no larger than is needed.

A JSON value takes up to 25 times its text in memory, so that these limits bound that, too.
"""

from __future__ import annotations

import struct
from pathlib import Path

from so8tqc.errors import InputError

MAX_JSON_BYTES = 32 << 20
"""An index of 140,000 tensors takes half of it."""

MAX_HEADER_BYTES = 16 << 20
"""Bytes of a safetensors header at most: 100,000 tensors. The format allows 100 MB, which would be
gigabytes of objects."""


def require_plain_file(path: Path, error: type[InputError] = InputError) -> int:
    """The size of a file that is neither a directory, nor a pipe, nor a device, bytes.

    Raises:
        error: it is one of these, or cannot be looked at.
    """
    try:
        if path.is_file():
            return path.stat().st_size
        what = "not a plain file" if path.exists() or path.is_symlink() else "no such file"
    except (OSError, ValueError) as problem:  # a link to itself; a NUL in the name
        what = f"cannot be opened: {getattr(problem, 'strerror', None) or problem}"
    raise error(what, where=str(path)) from None


def read_whole(
    path: Path, error: type[InputError] = InputError, limit: int = MAX_JSON_BYTES
) -> bytes:
    """The content of a plain file of at most ``limit`` bytes.

    Raises:
        error: no plain file, larger, or unreadable.
    """
    if require_plain_file(path, error) > limit:
        raise error(f"larger than {limit >> 20} MiB", where=str(path))
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror}", where=str(path)) from None
    if len(content) > limit:  # it grew, or its size was no size
        raise error(f"larger than {limit >> 20} MiB", where=str(path))
    return content


def require_safetensors_header(path: Path, error: type[InputError]) -> None:
    """See that a file is a plain one whose safetensors header is not absurdly long.

    Raises:
        error: no plain file, or one with a header larger than 16 MiB.
    """
    size = require_plain_file(path, error)
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror}", where=str(path)) from None
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if MAX_HEADER_BYTES < length <= size:  # a longer one is refused by the library unread
        raise error(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB", where=str(path))

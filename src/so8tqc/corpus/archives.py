"""Members of package files, read in memory: nothing is unpacked to disk, nothing is run."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from lzma import LZMAError
from pathlib import PurePosixPath

from so8tqc.errors import DataError

MAX_PACKAGE_BYTES = 64 * 2**20
MAX_MEMBER_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 512 * 2**20
"""Unpacked bytes of one package: the largest that is used needs a third of it."""

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_ZIP_MAGIC = b"PK\x03\x04"
_ZIP_ERRORS = (zipfile.BadZipFile, RuntimeError, ValueError, IndexError)
"""What zipfile raises: besides its own, for encryption and unknown methods (RuntimeError and its
NotImplementedError), a name that is not UTF-8 or an offset before the file, an empty name."""


def members(content: bytes, patterns: tuple[str, ...], name: str) -> Iterator[tuple[str, bytes]]:
    """The members whose names match, sorted by name.

    Wheels and other zips, npm's ``.tgz`` and Debian's ``.deb`` are told apart by their content.
    ``OUTER!/INNER`` looks for INNER inside those zips whose names match OUTER.

    Args:
        content: bytes of the package file.
        patterns: shell patterns.
        name: of the package file, for errors.

    Raises:
        DataError: not such an archive, a member's path leads out of it, or it is too large.
    """
    if len(content) > MAX_PACKAGE_BYTES:
        raise DataError(f"larger than {MAX_PACKAGE_BYTES} bytes", where=name)
    outer = tuple(pattern.partition("!/")[0] for pattern in patterns)
    found: dict[str, bytes] = {}
    try:
        for member, data in _matching(content, outer, name):
            for pattern in patterns:
                first, nested, second = pattern.partition("!/")
                if not fnmatchcase(member, first):
                    continue
                if nested:
                    found |= {
                        f"{member}!/{inner}": text
                        for inner, text in _from_zip(data, (second,), f"{name}: {member}")
                    }
                else:
                    found[member] = data
    except (tarfile.TarError, zlib.error, LZMAError, EOFError, OSError, *_ZIP_ERRORS) as error:
        raise DataError(f"not a readable archive: {error}", where=name) from None
    yield from sorted(found.items())


def _matching(content: bytes, patterns: tuple[str, ...], name: str) -> Iterator[tuple[str, bytes]]:
    if content.startswith(_ZIP_MAGIC):
        yield from _from_zip(content, patterns, name)
    elif content.startswith(_AR_MAGIC):
        yield from _from_tar(_debian_data(content, name), patterns, name)
    else:
        yield from _from_tar(content, patterns, name)


def _from_zip(content: bytes, patterns: tuple[str, ...], name: str) -> Iterator[tuple[str, bytes]]:
    budget = _Budget(name)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            member = _safe(info.filename, name)
            # the declared size is what the reader stops at, so a lie cannot exceed it
            budget.spend(member, info.file_size)
            plain = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
            if plain and matches(member, patterns):
                yield member, archive.read(info)


def _from_tar(content: bytes, patterns: tuple[str, ...], name: str) -> Iterator[tuple[str, bytes]]:
    budget = _Budget(name)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
        for info in archive:
            member = _safe(info.name, name)
            budget.spend(member, info.size)
            if info.isfile() and matches(member, patterns):
                stream = archive.extractfile(info)
                yield member, stream.read() if stream else b""


def _debian_data(content: bytes, name: str) -> bytes:
    """The member ``data.tar.*`` of a Debian package, an ``ar`` archive."""
    position = len(_AR_MAGIC)
    while position + _AR_HEADER <= len(content):
        header = content[position : position + _AR_HEADER]
        title = header[:16].decode("ascii", "replace").strip().rstrip("/")
        try:
            size = int(header[48:58])
        except ValueError:
            break
        position += _AR_HEADER
        if title.startswith("data.tar"):
            return content[position : position + size]
        position += size + size % 2
    raise DataError("no data in this Debian package", where=name)


def matches(member: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the shell patterns is the member's."""
    return any(fnmatchcase(member, pattern) for pattern in patterns)


def _safe(member: str, name: str) -> str:
    """The member's path without a leading ``./``."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or "\0" in member:
        raise DataError(f"a member's path leads out of the archive: {member!r}", where=name)
    return str(path)


class _Budget:
    """Counts declared sizes and refuses what is too large to be text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left = MAX_TOTAL_BYTES

    def spend(self, member: str, size: int) -> None:
        self.left -= size
        if size > MAX_MEMBER_BYTES or self.left < 0:
            raise DataError(
                f"unpacks to more than is allowed ({MAX_MEMBER_BYTES} bytes a member, "
                f"{MAX_TOTAL_BYTES} in all)",
                where=f"{self.name}: {member}",
            )

"""Digests of files and directories, and the names by which they are told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from so8tqc.disk.parts import parts_here
from so8tqc.errors import InputError
from so8tqc.records import FileRef


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_model(path: Path) -> str:
    """SHA-256 of a file; of the first part of a model in several files, that of all of them.

    As of a directory: of the names and digests of its files.
    """
    parts = parts_here(path)
    if len(parts) == 1:
        return sha256_file(path)
    return sha256_json({part.name: sha256_file(part) for part in parts})


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces), hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hub_source(path: Path) -> str | None:
    """``org/name@commit`` of what lies in huggingface_hub's cache, None elsewhere.

    The cache keeps a commit's files in ``models--ORG--NAME/snapshots/COMMIT``.
    """
    parts = path.parts
    for i, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[i + 1] == "snapshots":
            return f"{part.removeprefix('models--').replace('--', '/', 1)}@{parts[i + 2]}"
    return None


def short_name(path: Path) -> str:
    """A path's last part; of a snapshot in a hub's cache, which is a commit, the repository's."""
    source = hub_source(path)
    inside = source is not None and path.parent.name == "snapshots"
    return source.partition("@")[0].rpartition("/")[2] if source and inside else path.name


def file_ref(path: Path) -> FileRef:
    """Digest of a file or directory outside any run directory (nothing cached).

    The first part of a model in several files stands for all of them.
    """
    if path.is_dir():
        return directory_ref(path, file_ref)
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    if len(parts := parts_here(path)) > 1:
        return parts_ref(path, [_one_file_ref(part) for part in parts])
    return _one_file_ref(path)


def _one_file_ref(path: Path) -> FileRef:
    return FileRef(
        path=str(path),
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        source=hub_source(path),
    )


def parts_ref(path: Path, parts: Sequence[FileRef]) -> FileRef:
    """Digest of a model in several files, under the path of the first; see :func:`sha256_model`."""
    return FileRef(
        path=str(path),
        sha256=sha256_json({Path(part.path).name: part.sha256 for part in parts}),
        bytes=sum(part.bytes for part in parts),
        source=hub_source(path),
    )


def directory_ref(path: Path, ref: Callable[[Path], FileRef]) -> FileRef:
    """Digest of a directory: that of its files' names and digests."""
    parts = {
        file.relative_to(path).as_posix(): ref(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    return FileRef(
        path=str(path),
        sha256=sha256_json({name: part.sha256 for name, part in parts.items()}),
        bytes=sum(part.bytes for part in parts.values()),
        source=hub_source(path),
    )

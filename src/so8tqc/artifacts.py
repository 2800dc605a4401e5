"""Files that are either absent or complete, and fingerprints that decide reuse.

A file or directory is built in a temporary sibling, flushed to disk, and
renamed into place: a process killed at any moment leaves nothing that looks
finished. The manifest remembers, for every stage, the fingerprint of what it
was made from; a stage whose fingerprint is unchanged is reused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from so8tqc.errors import InputError, ToolError
from so8tqc.files import read_whole
from so8tqc.records import FileRef, Record

TEMPORARY_SUFFIX = ".so8tqc-partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success it is fsynced and renamed to it.

    On any exception, interruption included, the temporary is removed and
    ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _fsync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it replaces ``path``.

    An existing ``path`` is moved aside first and deleted after the rename, so
    at no moment is a half-written directory found under its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    )
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(suffix=TEMPORARY_SUFFIX, dir=path.parent))
            path.replace(old / path.name)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory(directory: Path) -> None:
    """Make a directory to write to.

    Raises:
        ToolError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"cannot write here: {error.strerror}", where=str(directory)) from None


def require_space(directory: Path, need: float, sentence: str) -> None:
    """Make a directory and see that its disk has room, before the first expensive byte.

    Args:
        directory: where will be written.
        need: bytes.
        sentence: what needs them, "{}" standing for "1.23 GB".

    Raises:
        ToolError: it cannot be made, or the disk has no room.
    """
    make_directory(directory)
    free = shutil.disk_usage(directory).free
    if free < need:
        wanted = sentence.format(f"{need / 1e9:.2f} GB")
        raise ToolError(f"{wanted}, {free / 1e9:.2f} GB are free", where=str(directory))


def remove_leftovers(directory: Path) -> list[Path]:
    """Delete temporaries that a killed run left in ``directory``; return what was deleted."""
    if not directory.is_dir():
        return []
    leftovers = sorted(directory.glob(f"*{TEMPORARY_SUFFIX}")) + sorted(
        directory.glob(f".*{TEMPORARY_SUFFIX}")
    )
    for leftover in dict.fromkeys(leftovers):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return list(dict.fromkeys(leftovers))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_record(path: Path, record: Record) -> None:
    """Write a record as indented JSON, atomically."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def read_record(path: Path) -> Record:
    """Read a record written by :func:`write_record`.

    Raises:
        InputError: the file is missing or is not a record of this schema.
    """
    if not path.exists():
        raise InputError("no record here", where=str(path))
    content = read_whole(path)
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        raise InputError(
            f"not a record of this version: {error.errors()[0]['msg']}", where=str(path)
        ) from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces), hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_fingerprint() -> str:
    """SHA-256 over the package's own sources, except what only parses or renders.

    A stage made by other code is not reused.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if relative.parts[0] not in ("cli", "reports"):
            digest.update(relative.as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class _CachedDigest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int
    mtime_ns: int
    inode: int
    sha256: str


class _StageEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    fingerprint: str
    outputs: dict[str, FileRef]


class Manifest(BaseModel):
    """``manifest.json`` of a run directory: stages made, digests of files seen."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = 1
    stages: dict[str, _StageEntry] = Field(default_factory=dict)
    digests: dict[str, _CachedDigest] = Field(default_factory=dict)


class RunDirectory:
    """A run's directory: where stages put their outputs, and what may be reused.

    Args:
        root: the directory; made if missing.

    Raises:
        InputError: ``manifest.json`` is there but unreadable.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._path = root / "manifest.json"
        self.manifest = self._load()

    def _load(self) -> Manifest:
        if not self._path.exists():
            return Manifest()
        content = read_whole(self._path)
        try:
            return Manifest.model_validate_json(content)
        except ValidationError as error:
            raise InputError(
                f"unreadable manifest: {error.errors()[0]['msg']}",
                where=str(self._path),
                remedy="Delete it to run every stage again.",
            ) from None

    def save(self) -> None:
        """Write the manifest, atomically."""
        write_text(self._path, self.manifest.model_dump_json(indent=2) + "\n")

    def ref(self, path: Path) -> FileRef:
        """Digest of a file or directory, cached by size, modification time and inode."""
        if path.is_dir():
            return _directory_ref(path, self.ref)
        try:
            stat = path.stat()
        except (OSError, ValueError):  # absent, or a name in the manifest that no file can have
            raise InputError("no such file", where=str(path)) from None
        key = str(path.resolve())
        known = self.manifest.digests.get(key)
        if known is None or (known.size, known.mtime_ns, known.inode) != (
            stat.st_size,
            stat.st_mtime_ns,
            stat.st_ino,
        ):
            known = _CachedDigest(
                size=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                inode=stat.st_ino,
                sha256=sha256_file(path),
            )
            self.manifest.digests[key] = known
        return FileRef(path=str(path), sha256=known.sha256, bytes=stat.st_size)

    def reusable(self, stage: str, fingerprint: str) -> bool:
        """Whether ``stage`` was made from the same things and its outputs are unchanged."""
        entry = self.manifest.stages.get(stage)
        if entry is None or entry.fingerprint != fingerprint:
            return False
        with suppress(InputError):
            return all(
                self.ref(Path(ref.path)).sha256 == ref.sha256 for ref in entry.outputs.values()
            )
        return False

    def commit(self, stage: str, fingerprint: str, outputs: Sequence[Path]) -> None:
        """Remember that ``stage`` is done and what it wrote."""
        self.manifest.stages[stage] = _StageEntry(
            fingerprint=fingerprint, outputs={str(path): self.ref(path) for path in outputs}
        )
        self.save()

    def forget(self, stage: str) -> None:
        """Mark ``stage`` as not done, before it is run again."""
        if self.manifest.stages.pop(stage, None) is not None:
            self.save()


def file_ref(path: Path) -> FileRef:
    """Digest of a file or directory outside any run directory (nothing cached)."""
    if path.is_dir():
        return _directory_ref(path, file_ref)
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    return FileRef(path=str(path), sha256=sha256_file(path), bytes=path.stat().st_size)


def _directory_ref(path: Path, ref: Callable[[Path], FileRef]) -> FileRef:
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
    )


def _fsync(path: Path) -> None:
    flags = os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

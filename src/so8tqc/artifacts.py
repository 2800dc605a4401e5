"""Files that are either absent or complete, and fingerprints that decide reuse.

A file or directory is built in a temporary sibling, flushed to disk, and
renamed into place: a process killed at any moment leaves nothing that looks
finished. The manifest remembers, for every stage, the fingerprint of what it
was made from; a stage whose fingerprint is unchanged is reused.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from so8tqc.errors import InputError, ToolError
from so8tqc.files import read_whole
from so8tqc.filesystem import disk_errors, fsync, fsync_tree, make_folder, publish, remove, umask
from so8tqc.locks import LOCK_NAME, hold, is_at, lock_descriptor
from so8tqc.records import FileRef, Record

TEMPORARY_SUFFIX = ".so8tqc-partial"
MANIFEST_NAME = "manifest.json"


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
    """A hidden name beside ``path`` that nobody has: of 2⁶⁴."""
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


def record_beside(out: Path) -> Path:
    """Where the record of what is one file, or one directory as a whole, goes."""
    return out.with_name(f"{out.name}.record.json")


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


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a run directory.

    Raises:
        InputError: there is none, or it is unreadable.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        raise InputError(
            "no manifest here", where=str(directory), remedy="Give the run directory of so8tqc run."
        )
    content = read_whole(path)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise InputError(
            f"unreadable manifest: {error.errors()[0]['msg']}",
            where=str(path),
            remedy="Delete it to run every stage again.",
        ) from None


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
        self._path = root / MANIFEST_NAME
        self.manifest = self._load()

    def _load(self) -> Manifest:
        return read_manifest(self.root) if self._path.exists() else Manifest()

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
        return FileRef(
            path=str(path), sha256=known.sha256, bytes=stat.st_size, source=hub_source(path)
        )

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
    """Digest of a file or directory outside any run directory (nothing cached)."""
    if path.is_dir():
        return _directory_ref(path, file_ref)
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    return FileRef(
        path=str(path),
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        source=hub_source(path),
    )


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
        source=hub_source(path),
    )

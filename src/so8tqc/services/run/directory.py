"""A run's directory: where stages put their outputs, and what may be reused.

The manifest remembers, for every stage, the fingerprint of what it was made from; a stage whose
fingerprint is unchanged is reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from so8tqc.disk.atomic import write_text
from so8tqc.disk.digests import directory_ref, hub_source, parts_ref, sha256_file
from so8tqc.disk.foreign import read_whole
from so8tqc.disk.parts import parts_here
from so8tqc.errors import InputError
from so8tqc.records import FileRef

MANIFEST_NAME = "manifest.json"


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
    """``manifest.json`` of a run directory: stages made, their pages, digests of files seen."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = 1
    stages: dict[str, _StageEntry] = Field(default_factory=dict)
    pages: dict[str, _StageEntry] = Field(default_factory=dict)
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
            return directory_ref(path, self.ref)
        if len(parts := parts_here(path)) > 1:
            return parts_ref(path, [self._file_ref(part) for part in parts])
        return self._file_ref(path)

    def _file_ref(self, path: Path) -> FileRef:
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
        return self._unchanged(self.manifest.stages.get(stage), fingerprint)

    def told(self, stage: str, fingerprint: str) -> bool:
        """Whether the pages of ``stage`` were made from the same things and are unchanged."""
        return self._unchanged(self.manifest.pages.get(stage), fingerprint)

    def _unchanged(self, entry: _StageEntry | None, fingerprint: str) -> bool:
        if entry is None or entry.fingerprint != fingerprint:
            return False
        with suppress(InputError):
            return all(
                self.ref(Path(ref.path)).sha256 == ref.sha256 for ref in entry.outputs.values()
            )
        return False

    def commit(self, stage: str, fingerprint: str, outputs: Sequence[Path]) -> None:
        """Remember that ``stage`` is done and what it wrote."""
        self.manifest.stages[stage] = self._entry(fingerprint, outputs)
        self.save()

    def commit_pages(self, stage: str, fingerprint: str, pages: Sequence[Path]) -> None:
        """Remember the pages that tell of ``stage``."""
        self.manifest.pages[stage] = self._entry(fingerprint, pages)
        self.save()

    def _entry(self, fingerprint: str, outputs: Sequence[Path]) -> _StageEntry:
        return _StageEntry(
            fingerprint=fingerprint, outputs={str(path): self.ref(path) for path in outputs}
        )

    def forget(self, stage: str) -> None:
        """Mark ``stage`` as not done, before it is run again."""
        known = [self.manifest.pages.pop(stage, None), self.manifest.stages.pop(stage, None)]
        if any(known):
            self.save()

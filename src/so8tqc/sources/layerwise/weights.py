"""Stored tensors, read when they are asked for: counted, from files that do not change."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry, any_dtype, read_into
from so8tqc.disk.digests import sha256_json
from so8tqc.errors import ModelError

if TYPE_CHECKING:
    import torch


class Weights(Protocol):
    """Where a model's stored tensors come from.

    Attributes:
        where: for messages.
        names: the tensors that can be read, as the model directory calls them.
        files: what they are read from.
    """

    where: str
    names: frozenset[str]
    files: tuple[Path, ...]

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The tensors' values, in any dtype, in the directory's shapes.

        Raises:
            ModelError: one cannot be read, or a file was changed since the first was.
        """

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""

    def identity(self) -> str:
        """What the files are, by path, size, time and inode."""


class _Stat(NamedTuple):
    size: int
    mtime_ns: int
    inode: int


def _stat(path: Path) -> _Stat:
    found = path.stat()
    return _Stat(found.st_size, found.st_mtime_ns, found.st_ino)


class Watched:
    """Files that must not change while they are read."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stats = {path: _stat(path) for path in files}

    def require_same(self) -> None:
        """See that every file is the one that was opened.

        Raises:
            ModelError: one was changed, replaced or removed.
        """
        for path, known in self._stats.items():
            try:
                same = _stat(path) == known
            except OSError:
                same = False
            if not same:
                raise ModelError(
                    "the file was changed while the model was run a layer at a time: what was read "
                    "of it and what was not belong to different weights",
                    where=str(path),
                    remedy="Run it again, and leave the file alone meanwhile.",
                )

    def identity(self) -> str:
        """By path, size, time and inode."""
        return sha256_json({str(path.resolve()): list(s) for path, s in self._stats.items()})


class CheckpointWeights:
    """The tensors of a model directory, in the dtypes in which they are stored."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.where = str(checkpoint.directory)
        self.names = frozenset(checkpoint.tensors)
        self.files = checkpoint.files
        self._watched = Watched(checkpoint.files)
        self._bytes = 0

    @property
    def bytes_read(self) -> int:
        """See :class:`Weights`."""
        return self._bytes

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See :class:`Weights`."""
        self._watched.require_same()
        entries = sorted(
            (self.checkpoint.tensors[name] for name in names), key=lambda e: (e.file, e.start)
        )
        found = {entry.name: self._tensor(entry) for entry in entries}
        self._watched.require_same()
        return found

    def _tensor(self, entry: TensorEntry) -> torch.Tensor:
        import torch

        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        read_into(entry, raw.numpy().data)
        self._bytes += raw.numel()
        return raw.view(any_dtype(entry.dtype)).reshape(entry.shape)

    def identity(self) -> str:
        """See :class:`Weights`."""
        return self._watched.identity()

"""Folding planned tensors chunk by chunk, and hashing what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from so8tqc.checkpoints.plan import CHUNK_ELEMENTS, PlannedTensor
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry
from so8tqc.errors import ModelError, So8tqcError
from so8tqc.progress import Task
from so8tqc.rotations.fold import fold, orient
from so8tqc.rotations.rotation_set import RotationSet

if TYPE_CHECKING:
    import torch

_READ_BYTES = 1 << 20  # fits the cache, so that what is read is hashed from it


class TensorFold:
    """The new value of one planned tensor; a ``patch.Patch``."""

    def __init__(self, planned: PlannedTensor, rotations: RotationSet, task: Task) -> None:
        self.dtype = planned.dtype
        self._planned = planned
        self._rotations = rotations
        self._task = task

    def fill(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        """Fold ``stored`` into ``target``, a chunk of rows at a time.

        Raises:
            ModelError: the base tensor holds a NaN or an infinity.
            RotationError: a product overflows the storage dtype.
        """
        name = self._planned.entry.name
        blocks = self._rotations.column_blocks(self._planned.site.target)
        transposed = self._planned.site.transposed
        matrix, oriented = orient(stored, blocks, self._rotations.site, transposed=transposed)
        result, _ = orient(target, blocks, self._rotations.site, transposed=transposed)
        step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
        for start in range(0, matrix.shape[0], step):
            chunk = matrix[start : start + step]
            try:
                result[start : start + step].copy_(fold(chunk, oriented, target.dtype))
            except So8tqcError as error:
                raise type(error)(error.what, where=name, remedy=error.remedy) from None
            self._task.advance(chunk.numel() * target.element_size(), item=name)


def sha256_tensor(entry: TensorEntry) -> str:
    """SHA-256 of the tensor's stored bytes, hex. Releases the GIL while it reads and hashes."""
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    for count in _read(entry, view):
        digest.update(view[:count])
    return digest.hexdigest()


def differing(a: Checkpoint, b: Checkpoint, names: Sequence[str]) -> list[str]:
    """Those of ``names``, tensors of both, whose dtype, shape or bytes differ; on all cores."""

    def same(name: str) -> bool:
        return same_bytes(a.tensors[name], b.tensors[name])

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [n for n, equal in zip(names, pool.map(same, names), strict=True) if not equal]


def same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two stored tensors have equal dtype, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = bytearray(_READ_BYTES), bytearray(_READ_BYTES)
    pairs = zip(_read(a, memoryview(left)), _read(b, memoryview(right)), strict=True)
    # after the last, shorter piece the buffers' ends still hold the equal pieces before it
    return all(n == m and left == right for n, m in pairs)


def _read(entry: TensorEntry, view: memoryview) -> Iterator[int]:
    """Fill ``view`` with the tensor's bytes, piece by piece; yields how many.

    Plain reads rather than a memory map: mapped pages would count as this process's memory.
    """
    left = entry.end - entry.start
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        while left:
            count = stream.readinto(view[: min(left, len(view))])
            if not count:
                raise ModelError("the file ended early", where=str(entry.file))
            left -= count
            yield count

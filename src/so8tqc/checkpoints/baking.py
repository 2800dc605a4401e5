"""Folding planned tensors chunk by chunk, and hashing what was written."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.checkpoints.safetensors_index import TensorEntry, mapped
from so8tqc.errors import ModelError, So8tqcError
from so8tqc.progress import Task
from so8tqc.rotations.fold import fold, orient
from so8tqc.rotations.rotation_set import RotationSet

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 1 << 21
_HASH_CHUNK = 16 << 20


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
        import torch

        name = self._planned.entry.name
        blocks = self._rotations.column_blocks(self._planned.site.target)
        transposed = self._planned.site.transposed
        matrix, oriented = orient(stored, blocks, self._rotations.site, transposed=transposed)
        result, _ = orient(target, blocks, self._rotations.site, transposed=transposed)
        step = max(1, _CHUNK_ELEMENTS // matrix.shape[1])
        for start in range(0, matrix.shape[0], step):
            chunk = matrix[start : start + step]
            if not bool(torch.isfinite(chunk).all()):
                raise ModelError("the base weights hold a NaN or an infinity", where=name)
            try:
                result[start : start + step].copy_(fold(chunk, oriented, target.dtype))
            except So8tqcError as error:
                raise type(error)(error.what, where=name, remedy=error.remedy) from None
            self._task.advance(chunk.numel() * target.element_size(), item=name)


def sha256_tensor(entry: TensorEntry) -> str:
    """SHA-256 of the tensor's stored bytes, hex."""
    digest = hashlib.sha256()
    with mapped(entry) as raw:
        for start in range(0, raw.shape[0], _HASH_CHUNK):
            digest.update(raw[start : start + _HASH_CHUNK].data)
    return digest.hexdigest()


def same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two stored tensors have equal dtype, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with mapped(a) as x, mapped(b) as y:
        return all(
            np.array_equal(x[i : i + _HASH_CHUNK], y[i : i + _HASH_CHUNK])
            for i in range(0, x.shape[0], _HASH_CHUNK)
        )

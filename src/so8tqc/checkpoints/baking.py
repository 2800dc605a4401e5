"""Folding planned tensors chunk by chunk, and hashing what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from so8tqc.checkpoints.plan import CHUNK_ELEMENTS, PlannedTensor
from so8tqc.checkpoints.safetensors_index import (
    READ_BYTES,
    TensorEntry,
    read_pieces,
    torch_dtype,
)
from so8tqc.errors import So8tqcError
from so8tqc.progress import Progress, Task
from so8tqc.rotations.fold import blocks_along_rows, fold, orient
from so8tqc.rotations.rotation_set import FloatArray, RotationSet

if TYPE_CHECKING:
    import torch


class TensorFold:
    """The new value of one planned tensor; a ``patch.Patch``.

    Args:
        planned: which tensor.
        rotations: waits for the rotations, which may still be computed.
        task: told about bytes.
    """

    def __init__(
        self, planned: PlannedTensor, rotations: Callable[[], RotationSet], task: Task
    ) -> None:
        self.dtype = planned.dtype
        self._name = planned.entry.name
        self._planned = planned
        self._rotations = rotations
        self._task = task

    def pieces(self, stored: torch.Tensor) -> Iterator[torch.Tensor]:
        """The fold of ``stored``, some of its rows at a time.

        Where the blocks lie along the rows, a piece holds the rows of some blocks, else some rows
        of all blocks: the fold of neither needs the others.

        Raises:
            ModelError: the base tensor holds a NaN or an infinity.
            RotationError: a product overflows the storage dtype; or the rotations are none.
        """
        rotations = self._rotations()
        site, transposed = rotations.site, self._planned.site.transposed
        blocks = rotations.column_blocks(self._planned.site.target)
        along_rows = stored.ndim == 2 and blocks_along_rows(site, transposed=transposed)
        size = blocks.shape[1] if along_rows else 1
        length = stored.shape[0] if stored.ndim == 2 else 1
        pieces = -(-stored.numel() // CHUNK_ELEMENTS)  # of about the same size
        step = size * max(1, -(-length // (size * pieces)))
        for start in range(0, length, step):
            rows = stored[start : start + step] if stored.ndim == 2 else stored
            its_blocks = blocks[start // size : (start + step) // size] if along_rows else blocks
            chunk, oriented = orient(rows, its_blocks, site, transposed=transposed)

            def element(row: int, column: int, start: int = start) -> str:
                row, column = (column, row) if along_rows else (row, column)
                return f"element [{start + row}, {column}]"

            folded = self._fold(chunk, oriented, element)
            self._task.advance(folded.numel() * folded.element_size(), item=self._name)
            yield (folded.T if along_rows else folded).contiguous()

    def _fold(
        self, chunk: torch.Tensor, blocks: FloatArray, element: Callable[[int, int], str]
    ) -> torch.Tensor:
        try:
            return fold(chunk, blocks, torch_dtype(self.dtype), element=element)
        except So8tqcError as error:
            where = f"{self._planned.entry.file}, {self._name}"
            raise type(error)(error.what, where=where, remedy=error.remedy) from None


def sha256_tensor(entry: TensorEntry) -> str:
    """SHA-256 of the tensor's stored bytes, hex. Releases the GIL while it reads and hashes."""
    digest = hashlib.sha256()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    for count in read_pieces(entry, view):
        digest.update(view[:count])
    return digest.hexdigest()


def hash_tensors(entries: list[TensorEntry], progress: Progress) -> dict[str, str]:
    """SHA-256 of each tensor as it is on the disk, on all cores."""
    total = sum(entry.end - entry.start for entry in entries)
    with (
        progress.task("hashing", total=total, unit="bytes") as task,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):

        def digest(entry: TensorEntry) -> str:
            value = sha256_tensor(entry)
            task.advance(entry.end - entry.start, item=entry.name)
            return value

        return dict(zip((e.name for e in entries), pool.map(digest, entries), strict=True))

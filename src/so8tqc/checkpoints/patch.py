"""Writing new values for some tensors of a safetensors file, all others untouched."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from so8tqc.checkpoints.copy import copy_file
from so8tqc.checkpoints.safetensors_index import (
    ITEM_BYTES,
    TensorEntry,
    read_header,
    read_metadata,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

    Fill = Callable[[torch.Tensor, torch.Tensor], None]
else:
    Fill = object

_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 8  # safetensors pads its header with spaces so that the data starts aligned


class Patch(Protocol):
    """Computes one tensor's new value."""

    dtype: str
    """safetensors name of the dtype to store it in."""

    def fill(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        """Read ``stored`` (old value, old dtype) and write ``target`` (same shape, new dtype)."""


def patch_file(source: Path, destination: Path, patches: Mapping[str, Patch]) -> None:
    """Write ``source`` to ``destination`` with new values for the tensors in ``patches``.

    If no dtype changes, the file is copied and the byte ranges are overwritten in place.
    Otherwise the header is written anew (same order, same file metadata) and every other
    tensor is streamed. Memory is bounded by what ``fill`` uses and one chunk.
    """
    entries = read_header(source)
    if all(patches[e.name].dtype == e.dtype for e in entries if e.name in patches):
        copy_file(source, destination)
        placed = {entry.name: entry.start for entry in entries}
    else:
        placed = _rewrite(source, destination, entries, patches)
    for entry in entries:
        if entry.name in patches:
            patch = patches[entry.name]
            patch.fill(
                tensor_view(entry), _view(destination, placed[entry.name], entry.shape, patch.dtype)
            )


def tensor_view(entry: TensorEntry) -> torch.Tensor:
    """The stored tensor as a read-only view of the mapped file; do not write to it."""
    return _view(entry.file, entry.start, entry.shape, entry.dtype, mode="c")


def _view(
    path: Path, start: int, shape: tuple[int, ...], dtype: str, mode: str = "r+"
) -> torch.Tensor:
    import torch

    count = int(np.prod(shape, dtype=np.int64))
    raw: np.memmap[tuple[int, ...], np.dtype[np.uint8]] = np.memmap(
        path,
        dtype=np.uint8,
        mode=mode,
        offset=start,
        shape=(count * ITEM_BYTES[dtype],),  # type: ignore[call-overload]
    )
    return torch.from_numpy(raw).view(torch_dtype(dtype)).reshape(shape)


def _rewrite(
    source: Path, destination: Path, entries: tuple[TensorEntry, ...], patches: Mapping[str, Patch]
) -> dict[str, int]:
    """Write header and untouched tensors; return where each tensor's data starts."""
    header: dict[str, object] = {}
    if metadata := read_metadata(source):
        header["__metadata__"] = metadata
    sizes: dict[str, int] = {}
    offset = 0
    for entry in entries:
        patch = patches.get(entry.name)
        dtype = patch.dtype if patch else entry.dtype
        size = entry.end - entry.start
        if patch:
            size = size // ITEM_BYTES[entry.dtype] * ITEM_BYTES[dtype]
        sizes[entry.name] = size
        header[entry.name] = {
            "dtype": dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    placed: dict[str, int] = {}
    with source.open("rb") as reader, destination.open("wb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            placed[entry.name] = writer.tell()
            if entry.name in patches:
                writer.truncate(writer.tell() + sizes[entry.name])
                writer.seek(sizes[entry.name], 1)
            else:
                reader.seek(entry.start)
                for chunk in _chunks(entry.end - entry.start):
                    writer.write(reader.read(chunk))
    return placed


def _chunks(total: int) -> Iterator[int]:
    while total > 0:
        yield min(total, _CHUNK_BYTES)
        total -= _CHUNK_BYTES

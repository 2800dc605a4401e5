"""Writing a safetensors file anew with other values for some tensors, all others untouched.

The new file's size, and where each tensor lies in it, are known before the first byte is written.
So the untouched bytes are copied in the background, by the cheapest means the file system offers,
while the new values are computed straight into their own ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Protocol

import numpy as np

from so8tqc.checkpoints.copy import Run, copy_runs, create
from so8tqc.checkpoints.safetensors_index import (
    ITEM_BYTES,
    TensorEntry,
    encode_header,
    read_header,
    read_metadata,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

_COPIES = 2  # files copied at a time: more do not make a disk faster


class Patch(Protocol):
    """Computes one tensor's new value."""

    dtype: str
    """safetensors name of the dtype to store it in."""

    def fill(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        """Read ``stored`` (old value, old dtype) and write ``target`` (same shape, new dtype)."""


@dataclass(frozen=True)
class _Layout:
    """What the new file will look like.

    Attributes:
        source: the old file.
        destination: the new file.
        header: the new header, b"" if it is the old one (then it is part of the runs).
        size: bytes of the new file.
        runs: ranges that are copied.
        targets: the tensors that are not, and where each will start.
    """

    source: Path
    destination: Path
    header: bytes
    size: int
    runs: tuple[Run, ...]
    targets: tuple[tuple[TensorEntry, int], ...]


def patch_files(files: Sequence[tuple[Path, Path]], patches: Mapping[str, Patch]) -> None:
    """Write each (source, destination), with new values for the tensors in ``patches``.

    Where no dtype changes, the header and the bytes between the targets are those of the
    source. Otherwise the header is written anew: same order, same file metadata. Memory is bounded
    by what ``fill`` uses.

    Raises:
        ModelError: a source is malformed or ends early.
        Whatever ``fill`` raises; copies under way are then given up.
    """
    layouts = [_lay_out(source, destination, patches) for source, destination in files]
    stop = Event()
    with ThreadPoolExecutor(max_workers=_COPIES) as pool:
        try:
            copies = [
                pool.submit(copy_runs, layout.source, layout.destination, layout.runs, stop)
                for layout in layouts
                if not _create(layout)
            ]
            for layout in layouts:
                for entry, start in layout.targets:
                    patch = patches[entry.name]
                    target = _view(layout.destination, start, entry.shape, patch.dtype)
                    patch.fill(tensor_view(entry), target)
            for copy in copies:
                copy.result()
        finally:
            stop.set()


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


def _create(layout: _Layout) -> bool:
    """Create the new file; whether it already holds all its runs."""
    if create(layout.destination, layout.size, clone=None if layout.header else layout.source):
        return True
    with layout.destination.open("r+b") as stream:
        stream.write(layout.header)
    return False


def _lay_out(source: Path, destination: Path, patches: Mapping[str, Patch]) -> _Layout:
    entries = read_header(source)
    targets = [entry for entry in entries if entry.name in patches]
    if all(patches[entry.name].dtype == entry.dtype for entry in targets):
        size = source.stat().st_size
        return _Layout(
            source,
            destination,
            header=b"",
            size=size,
            runs=tuple(_between(targets, size)),
            targets=tuple((entry, entry.start) for entry in targets),
        )
    return _lay_out_anew(source, destination, entries, patches)


def _between(targets: Sequence[TensorEntry], size: int) -> Iterator[Run]:
    """The ranges before, between and after the targets."""
    start = 0
    for entry in targets:
        if entry.start > start:
            yield Run(start, start, entry.start - start)
        start = max(start, entry.end)
    if size > start:
        yield Run(start, start, size - start)


def _lay_out_anew(
    source: Path, destination: Path, entries: Sequence[TensorEntry], patches: Mapping[str, Patch]
) -> _Layout:
    """The layout with a new header, tensors in the order of their old places."""
    dtypes = {e.name: patches[e.name].dtype if e.name in patches else e.dtype for e in entries}
    places: dict[str, int] = {}
    header: dict[str, object] = {}
    if metadata := read_metadata(source):
        header["__metadata__"] = metadata
    offset = 0
    for entry in entries:
        places[entry.name] = offset
        size = (entry.end - entry.start) * ITEM_BYTES[dtypes[entry.name]] // ITEM_BYTES[entry.dtype]
        header[entry.name] = {
            "dtype": dtypes[entry.name],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = encode_header(header)
    start = len(encoded)
    return _Layout(
        source,
        destination,
        header=encoded,
        size=start + offset,
        runs=tuple(
            Run(entry.start, start + places[entry.name], entry.end - entry.start)
            for entry in entries
            if entry.name not in patches
        ),
        targets=tuple((e, start + places[e.name]) for e in entries if e.name in patches),
    )

"""Writing a safetensors file anew with other values for some tensors, all others untouched.

The new file's size, and where each tensor lies in it, are known before the first byte is written.
So the untouched bytes are copied in the background, by the cheapest means the file system offers,
while the new values are computed and written into their own ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Protocol

import numpy as np

from so8tqc.checkpoints.copy import Run, copy_runs, create, start_writing
from so8tqc.checkpoints.safetensors_index import (
    ITEM_BYTES,
    TensorEntry,
    encode_header,
    read_header,
    read_metadata,
    torch_dtype,
)
from so8tqc.threads import WORKERS, one_torch_thread

if TYPE_CHECKING:
    import torch

_COPIES = 2  # files copied at a time: more do not make a disk faster
_KEPT_BYTES = 31 << 20  # just below the largest block (32 MiB) that glibc learns from


class Patch(Protocol):
    """Computes one tensor's new value."""

    dtype: str
    """safetensors name of the dtype to store it in."""

    def pieces(self, stored: torch.Tensor) -> Iterator[torch.Tensor]:
        """The new value of ``stored``, in the new dtype: contiguous pieces, whole rows, in order.

        Pieces rather than one tensor, so that memory is bounded.
        """


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


def patch_files(
    files: Sequence[tuple[Path, Path]],
    patches: Mapping[str, Patch],
    written: Callable[[TensorEntry, str], None] | None = None,
) -> None:
    """Write each (source, destination), with new values for the tensors in ``patches``.

    Where no dtype changes, the header and the bytes between the targets are those of the
    source. Otherwise the header is written anew: same order, same file metadata. Several tensors
    are computed at a time, each by one thread; memory is bounded by their pieces.

    Args:
        files: which.
        patches: tensor → its new value.
        written: given each new tensor as soon as it is whole, by the thread that wrote it, and the
            SHA-256 of what was to be written: a file that holds something else is found by it.

    Raises:
        ModelError: a source is malformed or ends early.
        Whatever ``pieces`` raises; copies under way are then given up.
    """
    import torch

    _keep_freed_memory()
    layouts = [_lay_out(source, destination, patches) for source, destination in files]
    stop = Event()

    def fill(layout: _Layout, entry: TensorEntry, start: int) -> None:
        digest = hashlib.sha256()
        with layout.destination.open("r+b") as stream:
            stream.seek(start)
            for piece in patches[entry.name].pieces(tensor_view(entry)):
                if stop.is_set():
                    return
                stored = piece.view(torch.uint8).numpy().data
                if written is not None:
                    digest.update(stored)
                stream.write(stored)
            stream.flush()
            end = stream.tell()
            if written is not None:
                dtype = patches[entry.name].dtype
                new = replace(entry, file=layout.destination, dtype=dtype, start=start, end=end)
                written(new, digest.hexdigest())
            start_writing(stream.fileno(), start, end - start)

    with (
        one_torch_thread(),
        ThreadPoolExecutor(max_workers=_COPIES) as copying,
        ThreadPoolExecutor(max_workers=WORKERS) as filling,
    ):
        try:
            copies = [
                copying.submit(copy_runs, layout.source, layout.destination, layout.runs, stop)
                for layout in layouts
                if not _create(layout)
            ]
            fills = [
                filling.submit(fill, layout, entry, start)
                for layout in layouts
                for entry, start in layout.targets
            ]
            for work in (*fills, *copies):
                work.result()
        finally:
            stop.set()


def _keep_freed_memory() -> None:
    """Let freed memory stay with the process, at most 62 MiB of it.

    glibc gives the top of its heap back to the system at once, and gets it again page by page,
    which takes as long here as the arithmetic. It keeps up to twice the largest block that was
    ever freed (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD); this one is never touched.
    """
    np.empty(_KEPT_BYTES, np.uint8)


def tensor_view(entry: TensorEntry) -> torch.Tensor:
    """The stored tensor as a read-only view of the mapped file; do not write to it."""
    import torch

    raw: np.memmap[tuple[int, ...], np.dtype[np.uint8]] = np.memmap(
        entry.file,
        dtype=np.uint8,
        mode="c",
        offset=entry.start,
        shape=(entry.end - entry.start,),
    )
    return torch.from_numpy(raw).view(torch_dtype(entry.dtype)).reshape(entry.shape)


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

"""A GGUF file with some tensors of one quantization and the rest of another, by copying.

A tensor's quantized bytes depend on its weights, its type and its importance, not on the other
tensors. So the file that libllama would write for a mixture of two recipes consists of tensors
that are already there, in the files of the two recipes.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from so8tqc.errors import ModelError
from so8tqc.gguf.file import GGUFFile, GGUFTensor, aligned, open_gguf

_HEADER_BYTES = 24


def mix(low: GGUFFile, high: GGUFFile, raised: Collection[str], destination: Path) -> None:
    """Write ``low`` with the tensors ``raised`` taken from ``high``.

    Key-values and the order of the tensors are those of ``low``.

    Args:
        low, high: two files of one model, with the same tensor names and shapes.
        raised: names of tensors to take from ``high``.
        destination: the file to write (not atomic: give a temporary path).

    Raises:
        ModelError: the files are not of one model.
    """
    _require_same_tensors(low, high)
    chosen = [high.tensors[n] if n in raised else low.tensors[n] for n in low.tensors]
    start, alignment = _layout(low.path)
    with low.path.open("rb") as original, destination.open("wb") as copy:
        copy.write(original.read(start))
        offset = 0
        for tensor in chosen:
            copy.write(_info(tensor, offset))
            offset += aligned(tensor.bytes, alignment)
        _pad(copy, alignment)
        for tensor in chosen:
            copy.write(tensor.raw.data)
            _pad(copy, alignment)


def mixture_bytes(low: GGUFFile, high: GGUFFile, raised: Collection[str]) -> int:
    """Size of the file that :func:`mix` writes, up to the padding of tensors."""
    return low.size + sum(high.tensors[n].bytes - low.tensors[n].bytes for n in raised)


def differing_tensors(first: Path, second: Path) -> Iterator[str]:
    """Names of tensors that two files do not store with the same type and bytes."""
    ours, theirs = open_gguf(first).tensors, open_gguf(second).tensors
    for name in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.type != b.type or not np.array_equal(a.raw, b.raw):
            yield name


def _require_same_tensors(low: GGUFFile, high: GGUFFile) -> None:
    for name in dict.fromkeys((*low.tensors, *high.tensors)):
        a, b = low.tensors.get(name), high.tensors.get(name)
        if a is None or b is None or a.shape != b.shape:
            raise ModelError(
                f"{name} is not the same tensor in {low.path.name} and {high.path.name}",
                where=str(high.path),
            )


def _layout(path: Path) -> tuple[int, int]:
    """Where the tensor infos begin, bytes, and the alignment of the data."""
    from gguf import GGUFEndian

    from so8tqc.gguf.reader import HeaderReader

    reader = HeaderReader(str(path), "r")
    if reader.endianess != GGUFEndian.LITTLE:
        raise ModelError("a big-endian GGUF file", where=str(path))
    start = int(reader.tensors[0].field.offset)
    if start < _HEADER_BYTES:
        raise ModelError("the tensor infos lie in the header", where=str(path))
    return start, int(reader.alignment)


def _info(tensor: GGUFTensor, offset: int) -> bytes:
    from gguf import GGMLQuantizationType

    name = tensor.name.encode()
    count = len(tensor.shape)
    return struct.pack(
        f"<Q{len(name)}sI{count}QIQ",
        len(name),
        name,
        count,
        *reversed(tensor.shape),
        GGMLQuantizationType[tensor.type].value,
        offset,
    )


def _pad(stream: BinaryIO, alignment: int) -> None:
    stream.write(bytes(-stream.tell() % alignment))

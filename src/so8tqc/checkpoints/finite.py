"""Where a stored tensor holds a NaN or an infinity; read in pieces, whatever its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from so8tqc.checkpoints.safetensors_index import READ_BYTES, TensorEntry, read_pieces

if TYPE_CHECKING:
    import numpy.typing as npt

_EXPONENT: dict[str, tuple[npt.DTypeLike, int]] = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Bits of the exponent: all set, they make an infinity or a NaN (IEEE 754)."""


class Compared(NamedTuple):
    """A stored tensor beside another of its dtype and shape.

    Attributes:
        equal: whether all bytes are.
        non_finite: index of its first element that is no number, None if there is none.
    """

    equal: bool
    non_finite: tuple[int, ...] | None


def first_non_finite(entry: TensorEntry) -> tuple[int, ...] | None:
    """The index of the first element that is no number, None if there is none.

    Integers, and dtypes that this tool does not read, have none.
    """
    if entry.dtype not in _EXPONENT:
        return None
    buffer, done = bytearray(READ_BYTES), 0
    for count in read_pieces(entry, memoryview(buffer)):
        if (place := _search(entry, buffer, count, done)) is not None:
            return place
        done += count
    return None


def compare(a: TensorEntry, b: TensorEntry) -> Compared:
    """b beside a, a tensor of equal dtype and shape; each is read once."""
    left, right = bytearray(READ_BYTES), bytearray(READ_BYTES)
    equal, place, done = True, None, 0
    pairs = zip(read_pieces(a, memoryview(left)), read_pieces(b, memoryview(right)), strict=True)
    for expected, count in pairs:
        # after the last, shorter piece the buffers' ends still hold the pieces before it
        equal = equal and expected == count and left == right
        if place is None:
            place = _search(b, right, count, done)
        done += count
    return Compared(equal, place)


def _search(entry: TensorEntry, buffer: bytearray, count: int, done: int) -> tuple[int, ...] | None:
    """First non-finite element of ``count`` bytes in the buffer, ``done`` bytes into the tensor."""
    if entry.dtype not in _EXPONENT:
        return None
    kind, exponent = _EXPONENT[entry.dtype]
    bits = np.frombuffer(buffer, kind, count // np.dtype(kind).itemsize) & exponent
    if bits.max(initial=0) < exponent:
        return None
    at = done // bits.itemsize + int(np.argmax(bits == exponent))
    return tuple(int(i) for i in np.unravel_index(at, entry.shape or (1,)))

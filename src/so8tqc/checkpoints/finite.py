"""Where a stored tensor holds a NaN or an infinity; read in pieces, whatever its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def first_non_finite(entry: TensorEntry) -> tuple[int, ...] | None:
    """The index of the first element that is no number, None if there is none.

    Integers, and dtypes that this tool does not read, have none.
    """
    if entry.dtype not in _EXPONENT:
        return None
    kind, exponent = _EXPONENT[entry.dtype]
    buffer = bytearray(READ_BYTES)
    values = np.frombuffer(buffer, kind)
    done = 0
    for count in read_pieces(entry, memoryview(buffer)):
        bits = values[: count // values.itemsize] & exponent
        if bits.max(initial=0) == exponent:
            at = done + int(np.argmax(bits == exponent))
            return tuple(int(i) for i in np.unravel_index(at, entry.shape or (1,)))
        done += bits.size
    return None

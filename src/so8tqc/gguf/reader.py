"""gguf-py's reader without the vocabulary: opening a file takes milliseconds, not seconds.

gguf-py makes several numpy arrays for every string of an array, and a vocabulary with its merges
has hundreds of thousands. Nothing here reads them, so they are only stepped over.
"""

from __future__ import annotations

import struct
from typing import Any

from gguf import GGUFEndian, GGUFReader, GGUFValueType


class HeaderReader(GGUFReader):  # type: ignore[misc]
    """A ``GGUFReader`` whose array fields have a type and a length, but no elements."""

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[Any]]:
        if GGUFValueType(raw_type) is not GGUFValueType.ARRAY:
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(
                orig_offs, raw_type
            )
            return found
        order = ">" if self.endianess == GGUFEndian.BIG else "<"
        try:
            kind, length = struct.unpack_from(f"{order}IQ", self.data, orig_offs)
            start = orig_offs + struct.calcsize("<IQ")
            end = self._skip(start, GGUFValueType(kind), length, order)
        except struct.error:
            raise ValueError("an array ends beyond the file") from None
        return end - orig_offs, [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]

    def _skip(self, start: int, kind: GGUFValueType, length: int, order: str) -> int:
        """Position behind the last element of an array."""
        if kind is GGUFValueType.STRING:
            size = struct.Struct(f"{order}Q")
            data = memoryview(self.data)
            for _ in range(length):
                start += size.size + size.unpack_from(data, start)[0]
            return start
        if kind is GGUFValueType.ARRAY:
            raise ValueError("an array of arrays, which GGUF files do not have")
        width: int = self.gguf_scalar_to_np[kind]().itemsize
        return start + length * width

"""Single entries of a GGUF file's vocabulary, without reading the others."""

from __future__ import annotations

import struct
from collections.abc import Collection
from pathlib import Path

from so8tqc.errors import ModelError
from so8tqc.gguf.reader import HeaderReader

_TOKENS = "tokenizer.ggml.tokens"


def token_texts(path: Path, ids: Collection[int]) -> dict[int, str]:
    """What some tokens are written as: id → text as the file stores it.

    Raises:
        ModelError: no vocabulary, an id outside of it, or a text that is no UTF-8.
    """
    from gguf import GGUFEndian

    reader = HeaderReader(path, "r")
    field = reader.fields.get(_TOKENS)
    if field is None:
        raise ModelError(f"the file has no vocabulary ({_TOKENS})", where=str(path))
    order = ">" if reader.endianess == GGUFEndian.BIG else "<"
    # the key's length and text, the types of the value and of its elements, how many
    at = field.offset + 8 + len(_TOKENS) + 4
    _, count = struct.unpack_from(f"{order}IQ", reader.data, at)
    if outside := [number for number in ids if not 0 <= number < count]:
        raise ModelError(f"token {outside[0]} is not among its {count}", where=str(path))
    at += struct.calcsize("<IQ")
    found: dict[int, str] = {}
    size = struct.Struct(f"{order}Q")
    data = memoryview(reader.data)
    for number in range(max(ids, default=-1) + 1):
        (length,) = size.unpack_from(data, at)
        if number in ids:
            raw = bytes(data[at + size.size : at + size.size + length])
            try:
                found[number] = raw.decode("utf-8")
            except UnicodeDecodeError:
                raise ModelError(f"token {number} is no UTF-8", where=str(path)) from None
        at += size.size + length
    return found

"""How a valid file is spoilt: strategies of hypothesis over bytes, and over what the bytes mean.

Every format gets the blind changes (bits, numbers, cuts, splices, rubbish); where the structure is
known it gets edits of it, too, since a blind change seldom leaves a file that is read to its end.
All choices are small integers, so that hypothesis shrinks a failure to its cause.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

NUMBERS = (
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x7FFFFFFFFFFFFFFF,
    0x8000000000000000,
    0xFFFFFFFFFFFFFFFF,
    1 << 40,
)
"""Ends of the integer types, and sizes that no file has."""

TEXTS = (
    "",
    "..",
    "/",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "C:\\x",
    "\x00",
    "x" * 100_000,
    "model.layers.0.self_attn.o_proj.theta",
    "__metadata__",
    "F32",
    "I64",
    "BF16",
    "F8_E4M3",
    "auto_map",
    "https://example.org/x",
    "\u202e",
    "NaN",
    "none",
    "exp",
)

VALUES: tuple[str, ...] = (
    "null", "true", "[]", "{}", '""', "-1", "0", "1e308", "-1e400", "NaN", "Infinity", "1.5",
    "9223372036854775808", "1" + "0" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 2000, "[[1,2],[3]]",
    '"\\ud800"', "[0,18446744073709551615]", "[4294967296,4294967296]", "[-1]", "[1.5]", "[[]]",
    *(json.dumps(text) for text in TEXTS),
)  # fmt: skip
"""JSON texts to put in place of a value."""

YAML_PIECES = (
    "&a [*a]", "*b", "!!python/object/apply:os.system ['touch pwned']", "!!binary x", "? [1]\n: 2",
    "\t", "{", "[", "'", '"', "- ", ": ", "1e999", ".nan", "0x" + "f" * 9000, "2001-13-45", "~",
    "<<: *a", "\x00", "%YAML 9.9\n---\n", "---\n", "extends: .\n", "extends: [/etc/passwd]\n",
    "\u2028", "\ufeff", "!<tag:x> y", "a" * 70_000, "[" * 2000, "{a: " * 2000, "1_000",
)  # fmt: skip


@st.composite
def spoilt(draw: Draw, content: bytes, kind: str) -> bytes:
    """The content of a file of some kind (see ``_EDITS``), changed one to three times."""
    edits = _EDITS.get(kind, ())
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        edit = draw(st.sampled_from((*_BLIND, *edits * len(_BLIND) * 2)))
        content = edit(draw, content)
    return content


def _position(draw: Draw, size: int) -> int:
    """A place in a file; every second time among the first bytes, where headers are."""
    near = min(size, 600)
    return int(draw(st.one_of(st.integers(0, near), st.integers(0, size))))


def flip(draw: Draw, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        if changed:
            changed[_position(draw, len(changed) - 1)] ^= draw(st.integers(1, 255))
    return bytes(changed)


def number(draw: Draw, content: bytes) -> bytes:
    """An integer that means something, over 1, 2, 4 or 8 bytes."""
    at, width = _position(draw, len(content)), draw(st.sampled_from((1, 2, 4, 8)))
    value = draw(st.sampled_from(NUMBERS)) & ((1 << 8 * width) - 1)
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


def truncate(draw: Draw, content: bytes) -> bytes:
    return content[: _position(draw, len(content))]


def cut_out(draw: Draw, content: bytes) -> bytes:
    at = _position(draw, len(content))
    return content[:at] + content[at + draw(st.integers(1, 64)) :]


def splice(draw: Draw, content: bytes) -> bytes:
    """A piece of the file once more, somewhere else."""
    start, at = _position(draw, len(content)), _position(draw, len(content))
    return content[:at] + content[start : start + draw(st.integers(1, 4096))] + content[at:]


def rubbish(draw: Draw, content: bytes) -> bytes:
    kept = content[: draw(st.sampled_from((0, 4, 8, 24)))]
    return kept + draw(st.binary(max_size=64)) * draw(st.sampled_from((1, 1, 1, 100)))


_BLIND = (flip, number, truncate, cut_out, splice, rubbish)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = list(enumerate(value))[:20]
    for key, child in children:
        yield from _paths(child, (*path, key))


_MARK = "\x1aedited\x1a"


def edit_json(draw: Draw, content: bytes) -> bytes:
    """One value replaced, a key renamed, given twice or left out."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    paths = list(_paths(value))
    path = paths[draw(st.integers(0, len(paths) - 1))]
    if not path:
        return draw(st.sampled_from(VALUES)).encode("utf-8", "surrogatepass")
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    what = draw(st.sampled_from(("value", "value", "value", "rename", "delete", "twice")))
    key = path[-1]
    if what == "delete":
        del inner[key]
    elif what == "rename" and isinstance(inner, dict):
        inner[draw(st.sampled_from(TEXTS))] = inner.pop(key)
    else:
        old, inner[key] = inner[key], _MARK
        new = draw(st.sampled_from(VALUES))
        if what == "twice" and isinstance(inner, dict):
            new = f"{json.dumps(old)},{json.dumps(key)}:{new}"
        return json.dumps(value).replace(json.dumps(_MARK), new, 1).encode("utf-8", "surrogatepass")
    return json.dumps(value).encode()


def edit_safetensors(draw: Draw, content: bytes) -> bytes:
    """The header as JSON; its length told rightly, or not."""
    if len(content) < 8:
        return content
    (length,) = struct.unpack("<Q", content[:8])
    header = edit_json(draw, content[8 : 8 + length])
    told = len(header) + draw(st.sampled_from((0, 0, 0, 1, -1, 8, 1 << 31, 1 << 62)))
    return struct.pack("<Q", max(told, 0)) + header + content[8 + length :]


def edit_json_lines(draw: Draw, content: bytes) -> bytes:
    lines = content.split(b"\n")
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = edit_json(draw, lines[at])
    return b"\n".join(lines)


def edit_zip(draw: Draw, content: bytes) -> bytes:
    """A member changed, its checksum made to fit: what is checked by sums is changed inside."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError):
        return content
    if not members:
        return content
    at = draw(st.integers(0, len(members) - 1))
    name, data = members[at]
    what = draw(st.sampled_from(("inside", "inside", "inside", "rename", "drop", "pack")))
    packing = zipfile.ZIP_DEFLATED if what == "pack" else zipfile.ZIP_STORED
    if what == "inside":
        data = draw(st.sampled_from(_BLIND))(draw, data)
    elif what == "rename":
        name = draw(st.sampled_from(("archive/data.pkl", "../x", "/x", "data.pkl", "x" * 300)))
    members[at] = (name, data)
    if what == "drop":
        del members[at]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for member, bytes_ in dict(members).items():
            archive.writestr(member, bytes_)
    return out.getvalue()


def edit_yaml(draw: Draw, content: bytes) -> bytes:
    """A hostile piece of YAML at a line's or a value's start."""
    places = [i + 1 for i, byte in enumerate(content) if byte in b"\n:"] or [0]
    at = places[draw(st.integers(0, len(places) - 1))]
    piece = draw(st.sampled_from(YAML_PIECES)).encode()
    rest = content[at:] if draw(st.booleans()) else content[at:].partition(b"\n")[2]
    return content[:at] + b" " + piece + b"\n" + rest


def edit_gguf(draw: Draw, content: bytes) -> bytes:
    """A count, length, type, dimension or offset of the header replaced."""
    places = list(gguf_numbers(content))
    if not places:
        return content
    at, width = places[draw(st.integers(0, len(places) - 1))]
    old = int.from_bytes(content[at : at + width], "little")
    near = (old + 1, old - 1, old * 2, old + (1 << 20))
    value = draw(st.sampled_from((*NUMBERS, *near))) & ((1 << 8 * width) - 1)
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_numbers(content: bytes) -> Iterator[tuple[int, int]]:
    """(offset, width) of every number of a GGUF header that a reader acts on.

    Written from the format's description; stops where the file no longer follows it.
    """
    try:
        yield 4, 4
        tensors, keys = struct.unpack_from("<QQ", content, 8)
        yield 8, 8
        yield 16, 8
        at = 24
        for _ in range(keys):
            yield at, 8
            at += 8 + struct.unpack_from("<Q", content, at)[0]
            yield at, 4
            kind, at = struct.unpack_from("<I", content, at)[0], at + 4
            start = at
            at = _after_value(content, at, kind)
            if kind == 9:
                yield start, 4
                yield start + 4, 8
            else:
                yield start, min(8, max(1, _SCALARS.get(kind, 8)))
        for _ in range(tensors):
            yield at, 8
            at += 8 + struct.unpack_from("<Q", content, at)[0]
            yield at, 4
            dimensions, at = struct.unpack_from("<I", content, at)[0], at + 4
            for _ in range(min(dimensions, 8)):
                yield at, 8
                at += 8
            yield at, 4
            yield at + 4, 8
            at += 12
    except (struct.error, OverflowError):
        return


def _after_value(content: bytes, at: int, kind: int) -> int:
    if kind == 8:
        return at + 8 + int(struct.unpack_from("<Q", content, at)[0])
    if kind != 9:
        return at + _SCALARS.get(kind, 1 << 62)
    inner, count = struct.unpack_from("<IQ", content, at)
    at += 12
    if inner in _SCALARS:
        return at + int(_SCALARS[inner] * count)
    for _ in range(count):
        at = _after_value(content, at, inner)
    return at


_EDITS: dict[str, tuple[Callable[[Draw, bytes], bytes], ...]] = {
    "json": (edit_json,),
    "jsonl": (edit_json_lines,),
    "safetensors": (edit_safetensors,),
    "zip": (edit_zip,),
    "yaml": (edit_yaml,),
    "gguf": (edit_gguf,),
}

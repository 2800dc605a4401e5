"""Opening a GGUF without its vocabulary: the places that gguf-py finds, and its refusals."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest

from so8tqc.errors import ModelError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.reader import HeaderReader
from tiny_gguf import write_llama


@pytest.mark.parametrize("big_endian", [False, True])
def test_fields_and_tensors_lie_where_gguf_py_finds_them(tmp_path: Path, big_endian: bool) -> None:
    path = write_llama(tmp_path / "x.gguf", big_endian=big_endian)
    ours, theirs = HeaderReader(str(path)), gguf.GGUFReader(str(path))
    assert [(n, f.offset, f.types[:1]) for n, f in ours.fields.items()] == [
        (n, f.offset, f.types[:1]) for n, f in theirs.fields.items()
    ]
    assert [(t.name, t.data_offset, t.n_bytes) for t in ours.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    scalars = {n: f.contents() for n, f in theirs.fields.items() if len(f.types) == 1}
    assert open_gguf(path).fields == scalars


def _with_array(path: Path, content: bytes) -> Path:
    """A GGUF of one key-value, an array of this content, and no tensors."""
    head = struct.pack("<IIQQ", 0x46554747, 3, 0, 1)
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<I", gguf.GGUFValueType.ARRAY)
    path.write_bytes(head + key + content)
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (struct.pack("<IQ", gguf.GGUFValueType.STRING, 2**60), "ends beyond the file"),
        (struct.pack("<IQQ", gguf.GGUFValueType.STRING, 2, 2**63), "malformed"),
        (struct.pack("<IQ", gguf.GGUFValueType.ARRAY, 1), "array of arrays"),
        (struct.pack("<IQ", 99, 1), "malformed"),
        (struct.pack("<I", 4), "ends beyond the file"),
    ],
)
def test_malformed_arrays_are_refused(content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        open_gguf(_with_array(tmp_path / "x.gguf", content))

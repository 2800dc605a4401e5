"""Setting key-values of a GGUF file: a new file, every other byte the same.

Layout (little- or big-endian throughout): magic, version, number of tensors, number of
key-values; the key-values; the tensor infos, whose offsets count from the start of the data;
padding to the alignment; the data. So the data may move as a whole, and all that is written
anew is the header's count, the values that are set, and the padding. gguf-py's reader says where
each part lies. Its writer is not used: it drops empty strings and arrays, and would have to
re-encode the vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from so8tqc.artifacts import atomic_file, require_space
from so8tqc.errors import ModelError
from so8tqc.llama.gguf_file import open_gguf
from so8tqc.progress import SILENT, Progress, Task

if TYPE_CHECKING:
    from gguf import GGUFReader

CALIBRATION_TEMPERATURE = "so8t.calibration.temperature"
SAMPLING_TEMPERATURE = "general.sampling.temp"

_COPY_BYTES = 8 << 20
_HEADER = "IIQQ"  # magic, version, tensors, key-values


def set_float_values(
    source: Path, destination: Path, values: Mapping[str, float], progress: Progress = SILENT
) -> None:
    """Copy a GGUF file with float32 key-values added or replaced.

    The source stays untouched; the destination appears complete or not at all. Memory is
    bounded by a copy buffer.

    Args:
        source: any GGUF file of one part.
        destination: another path.
        values: key → value; they are written after all other keys.
        progress: told about bytes.

    Raises:
        ModelError: the source is no GGUF, or one part of a split model; or the destination
            is the source.
        ToolError: the disk has no room.
    """
    if destination.resolve() == source.resolve():
        raise ModelError("the rewritten file may not replace its source", where=str(source))
    parts = _parts(source)
    require_space(destination.parent, source.stat().st_size, "the rewritten file needs {}")
    with (
        progress.task(f"writing {destination.name}", total=parts.size, unit="bytes") as task,
        source.open("rb") as original,
        atomic_file(destination) as temporary,
        temporary.open("wb") as copy,
    ):
        _write_head(original, copy, parts, values)
        original.seek(parts.data)
        _copy(original, copy, parts.size - parts.data, task)


@dataclass(frozen=True)
class _Parts:
    """Where the parts of a GGUF file lie, in bytes from its start.

    Attributes:
        values: key → (start, end), in the file's order.
        tensors: (start, end) of the tensor infos.
        data: start of the data.
        size: of the file.
        alignment: of the data.
        order: struct's byte-order mark.
    """

    values: dict[str, tuple[int, int]]
    tensors: tuple[int, int]
    data: int
    size: int
    alignment: int
    order: str


def _parts(path: Path) -> _Parts:
    from gguf import GGUFEndian, GGUFReader

    fields = open_gguf(path).fields  # refuses what is malformed
    if int(fields.get("split.count", 1)) > 1:
        raise ModelError(
            "one part of a split model",
            where=str(path),
            remedy="Merge it first: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    reader = GGUFReader(str(path), "r")
    infos = [tensor.field for tensor in reader.tensors]
    return _Parts(
        values=_value_ranges(reader, infos[0].offset),
        tensors=(infos[0].offset, infos[-1].offset + sum(p.nbytes for p in infos[-1].parts)),
        data=int(reader.data_offset),
        size=path.stat().st_size,
        alignment=int(reader.alignment),
        order=">" if reader.endianess == GGUFEndian.BIG else "<",
    )


def _value_ranges(reader: GGUFReader, end: int) -> dict[str, tuple[int, int]]:
    """key → (start, end): a key-value reaches to the start of the next, the last to the tensors."""
    starts = {
        name: int(field.offset)
        for name, field in reader.fields.items()
        if field.offset >= struct.calcsize("<" + _HEADER)  # the reader lists the header too
    }
    ends = [*list(starts.values())[1:], end]
    return {name: (start, stop) for (name, start), stop in zip(starts.items(), ends, strict=True)}


def _write_head(
    original: BinaryIO, copy: BinaryIO, parts: _Parts, values: Mapping[str, float]
) -> None:
    kept = {name: span for name, span in parts.values.items() if name not in values}
    header = parts.order + _HEADER
    magic, version, tensors, _ = struct.unpack(header, original.read(struct.calcsize(header)))
    copy.write(struct.pack(header, magic, version, tensors, len(kept) + len(values)))
    for start, end in kept.values():
        original.seek(start)
        copy.write(original.read(end - start))
    for key, value in values.items():
        copy.write(_encoded(key, value, parts.order))
    original.seek(parts.tensors[0])
    copy.write(original.read(parts.tensors[1] - parts.tensors[0]))
    copy.write(bytes(-copy.tell() % parts.alignment))


def _encoded(key: str, value: float, order: str) -> bytes:
    from gguf import GGUFValueType

    name = key.encode()
    return struct.pack(
        f"{order}Q{len(name)}sIf", len(name), name, GGUFValueType.FLOAT32.value, value
    )


def _copy(original: BinaryIO, copy: BinaryIO, remaining: int, task: Task) -> None:
    while remaining:
        piece = original.read(min(_COPY_BYTES, remaining))
        if not piece:
            raise ModelError("the file became shorter while it was read", where=original.name)
        copy.write(piece)
        remaining -= len(piece)
        task.advance(len(piece))

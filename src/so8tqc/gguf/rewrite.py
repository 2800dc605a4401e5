"""A GGUF file with key-values set and tensors replaced: a new file, every other byte the same.

Layout (little- or big-endian throughout): magic, version, number of tensors, number of
key-values; the key-values; the tensor infos, whose offsets count from the start of the data;
padding to the alignment; the data. So what stays is copied in its bytes, and all that is written
anew is the header's count, the values that are set, the infos and data of replaced tensors, the
offsets that follow, and padding. gguf-py's reader says where each part lies. Its writer is not
used: it drops empty strings and arrays, and would have to re-encode the vocabulary.

A model in several files becomes one: the key-values of its first part without those that speak of
parts, and the tensors of all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from so8tqc.disk.atomic import atomic_file, require_space
from so8tqc.errors import ModelError, ShapeError
from so8tqc.gguf.file import SPLIT_KEYS, aligned, open_gguf
from so8tqc.progress import SILENT, Progress, Task

if TYPE_CHECKING:
    from gguf import GGUFReader

CALIBRATION_TEMPERATURE = "so8t.calibration.temperature"
SAMPLING_TEMPERATURE = "general.sampling.temp"

Value = str | bool | float
"""What a key may be set to: stored as STRING, BOOL or FLOAT32."""

Float32Chunks = Callable[[], Iterable[npt.NDArray[np.float32]]]
"""Yields a tensor's values in storage order, in pieces of any size."""

_COPY_BYTES = 8 << 20
_HEADER = "IIQQ"  # magic, version, tensors, key-values
_FLOAT32_BYTES = 4


def changed_copy(
    source: Path,
    destination: Path,
    values: Mapping[str, Value],
    progress: Progress = SILENT,
    *,
    tensors: Mapping[str, Float32Chunks] = MappingProxyType({}),
) -> None:
    """As :func:`rewrite`, but the destination appears complete or not at all.

    Args:
        source: any GGUF file, or the first part of several; it stays untouched.
        destination: another path.
        values: key → value; they are written after all other keys.
        progress: told about bytes.
        tensors: tensor name → its values in storage order; stored as F32, shape unchanged.

    Raises:
        ModelError: the source is no GGUF; or the destination is the source.
        ToolError: the disk has no room.
    """
    if destination.resolve() == source.resolve():
        raise ModelError("the rewritten file may not replace its source", where=str(source))
    parts = _parts(source)
    require_space(destination.parent, open_gguf(source).size, "the rewritten file needs {}")
    with atomic_file(destination) as temporary:
        _rewrite(temporary, parts, values, tensors, progress, destination.name)


def rewrite(
    source: Path,
    destination: Path,
    values: Mapping[str, Value],
    tensors: Mapping[str, Float32Chunks],
    progress: Progress = SILENT,
) -> None:
    """Copy a GGUF file with key-values set and tensors replaced by float32 ones, in one pass.

    Memory is bounded by a copy buffer and one piece of a replaced tensor.

    Args:
        source: any GGUF file; of a model in several, the first part.
        destination: file to write (not atomic: give a temporary path).
        values: key → value; they are written after all other keys.
        tensors: tensor name → its values in storage order; stored as F32, shape unchanged.
        progress: told about bytes.

    Raises:
        ModelError: the source is no GGUF, or lacks a tensor.
        ShapeError: a replacement has another number of values than the tensor.
    """
    parts = _parts(source)
    if unknown := sorted(tensors.keys() - parts.tensors.keys()):
        raise ModelError(f"the file has no tensor {unknown[0]}", where=str(source))
    _rewrite(destination, parts, values, tensors, progress, "GGUF")


def key_values(path: Path) -> dict[str, bytes]:
    """key → the bytes of its value's type and value, vocabularies included; none about parts.

    Raises:
        ModelError: the file is no GGUF.
    """
    parts = _parts(path)
    found = {}
    with path.open("rb") as stream:
        for name, (start, end) in parts.kept_values.items():
            begin = start + 8 + len(name.encode())  # after the key's length and the key
            stream.seek(begin)
            found[name] = stream.read(end - begin)
    return found


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies, in bytes from its file's start.

    Attributes:
        file: number of its file, 0 but for models in several.
        info: (start, end) of its info without type and offset.
        type: number of its GGML type.
        elements: number of weights.
        data: (start, end) of its data, the padding behind it included.
    """

    file: int
    info: tuple[int, int]
    type: int
    elements: int
    data: tuple[int, int]


@dataclass(frozen=True)
class _Parts:
    """Where the parts of a GGUF file lie, in bytes from its start.

    Attributes:
        files: the file, or the files of one model.
        values: key → (start, end) in the first file, in its order.
        tensors: name → tensor, in the order of their infos.
        alignment: of the data.
        order: struct's byte-order mark.
    """

    files: tuple[Path, ...]
    values: dict[str, tuple[int, int]]
    tensors: dict[str, _Tensor]
    alignment: int
    order: str

    @property
    def by_position(self) -> list[tuple[str, _Tensor]]:
        """The tensors in the order of their data."""
        return sorted(self.tensors.items(), key=lambda item: (item[1].file, item[1].data))

    @property
    def kept_values(self) -> dict[str, tuple[int, int]]:
        """Keys of the whole: without those that speak of parts, if there are several."""
        if len(self.files) == 1:
            return self.values
        return {key: span for key, span in self.values.items() if key not in SPLIT_KEYS}


def _parts(path: Path) -> _Parts:
    from gguf import GGUFEndian

    from so8tqc.gguf.reader import HeaderReader

    files = open_gguf(path).parts  # which refuses what is malformed
    readers = [HeaderReader(str(file), "r") for file in files]
    first = readers[0]
    orders = {reader.endianess for reader in readers}
    if len({int(reader.alignment) for reader in readers}) > 1 or len(orders) > 1:
        raise ModelError("its files differ in alignment or byte order", where=str(path))
    return _Parts(
        files=files,
        values=_value_ranges(first, _end_of_values(first)),
        tensors={
            name: tensor
            for number, (file, reader) in enumerate(zip(files, readers, strict=True))
            for name, tensor in _tensors(reader, file.stat().st_size, number).items()
        },
        alignment=int(first.alignment),
        order=">" if first.endianess == GGUFEndian.BIG else "<",
    )


def _end_of_values(reader: GGUFReader) -> int:
    """Where the key-values end: at the first tensor's info, or at the data where there is none."""
    if reader.tensors:
        return int(reader.tensors[0].field.offset)
    last = list(reader.fields.values())[-1]
    return int(last.offset) + sum(int(part.nbytes) for part in last.parts)


def _tensors(reader: GGUFReader, size: int, file: int) -> dict[str, _Tensor]:
    """Every tensor; its data reach to the start of the next, the last's to the end of the file."""
    starts = sorted(int(tensor.data_offset) for tensor in reader.tensors)
    ends = dict(zip(starts, [*starts, size][1:], strict=True))
    return {
        tensor.name: _Tensor(
            file=file,
            info=(tensor.field.offset, tensor.field.offset
                  + sum(int(part.nbytes) for part in tensor.field.parts[:4])),
            type=int(tensor.tensor_type),
            elements=int(tensor.n_elements),
            data=(int(tensor.data_offset), ends[int(tensor.data_offset)]),
        )
        for tensor in reader.tensors
    }  # fmt: skip


def _value_ranges(reader: GGUFReader, end: int) -> dict[str, tuple[int, int]]:
    """key → (start, end): a key-value reaches to the start of the next, the last to the tensors."""
    starts = {
        name: int(field.offset)
        for name, field in reader.fields.items()
        if field.offset >= struct.calcsize("<" + _HEADER)  # the reader lists the header too
    }
    ends = [*list(starts.values())[1:], end]
    return {name: (start, stop) for (name, start), stop in zip(starts.items(), ends, strict=True)}


def _rewrite(
    destination: Path,
    parts: _Parts,
    values: Mapping[str, Value],
    tensors: Mapping[str, Float32Chunks],
    progress: Progress,
    shown: str,
) -> None:
    sizes = {name: _size(name, tensor, parts, tensors) for name, tensor in parts.by_position}
    with (
        progress.task(f"writing {shown}", total=sum(sizes.values()), unit="bytes") as task,
        ExitStack() as opened,
        destination.open("wb") as copy,
    ):
        originals = [opened.enter_context(file.open("rb")) for file in parts.files]
        _write_head(originals[0], copy, parts, values)
        _write_infos(originals, copy, parts, sizes, set(tensors))
        for name, tensor in parts.by_position:
            if name in tensors:
                _write_floats(copy, name, tensor, tensors[name](), parts, task)
                continue
            original = originals[tensor.file]
            original.seek(tensor.data[0])
            _copy(original, copy, tensor.data[1] - tensor.data[0], task)
            copy.write(bytes(sizes[name] - (tensor.data[1] - tensor.data[0])))


def _size(name: str, tensor: _Tensor, parts: _Parts, tensors: Mapping[str, Float32Chunks]) -> int:
    """Bytes of a tensor's data in the new file, padding included."""
    if name in tensors:
        return aligned(tensor.elements * _FLOAT32_BYTES, parts.alignment)
    size = tensor.data[1] - tensor.data[0]
    return size if len(parts.files) == 1 else aligned(size, parts.alignment)


def _write_head(
    original: BinaryIO, copy: BinaryIO, parts: _Parts, values: Mapping[str, Value]
) -> None:
    kept = {name: span for name, span in parts.kept_values.items() if name not in values}
    header = parts.order + _HEADER
    magic, version, _, _ = struct.unpack(header, original.read(struct.calcsize(header)))
    counts = len(parts.tensors), len(kept) + len(values)
    copy.write(struct.pack(header, magic, version, *counts))
    for start, end in kept.values():
        original.seek(start)
        copy.write(original.read(end - start))
    for key, value in values.items():
        copy.write(_encoded(key, value, parts.order))


def _write_infos(
    originals: Sequence[BinaryIO],
    copy: BinaryIO,
    parts: _Parts,
    sizes: Mapping[str, int],
    replaced: set[str],
) -> None:
    from gguf import GGMLQuantizationType

    offsets, offset = {}, 0
    for name, _ in parts.by_position:
        offsets[name] = offset
        offset += sizes[name]
    for name, tensor in parts.tensors.items():
        start, end = tensor.info
        original = originals[tensor.file]
        original.seek(start)
        copy.write(original.read(end - start))
        kind = int(GGMLQuantizationType.F32) if name in replaced else tensor.type
        copy.write(struct.pack(f"{parts.order}IQ", kind, offsets[name]))
    copy.write(bytes(-copy.tell() % parts.alignment))


def _encoded(key: str, value: Value, order: str) -> bytes:
    from gguf import GGUFValueType

    if isinstance(value, bool):
        kind, content = GGUFValueType.BOOL, struct.pack("?", value)
    elif isinstance(value, str):
        kind, content = GGUFValueType.STRING, _string(value, order)
    else:
        kind, content = GGUFValueType.FLOAT32, struct.pack(f"{order}f", value)
    return _string(key, order) + struct.pack(f"{order}I", kind.value) + content


def _string(text: str, order: str) -> bytes:
    data = text.encode()
    return struct.pack(f"{order}Q", len(data)) + data


def _write_floats(
    copy: BinaryIO,
    name: str,
    tensor: _Tensor,
    chunks: Iterable[npt.NDArray[np.float32]],
    parts: _Parts,
    task: Task,
) -> None:
    written = 0
    for chunk in chunks:
        copy.write(np.ascontiguousarray(chunk, dtype=f"{parts.order}f4").data)
        written += chunk.size
        task.advance(chunk.size * _FLOAT32_BYTES, item=name)
    if written != tensor.elements:
        raise ShapeError(f"{written} values for a tensor of {tensor.elements}", where=name)
    size = written * _FLOAT32_BYTES
    copy.write(bytes(aligned(size, parts.alignment) - size))


def _copy(original: BinaryIO, copy: BinaryIO, remaining: int, task: Task) -> None:
    while remaining:
        piece = original.read(min(_COPY_BYTES, remaining))
        if not piece:
            raise ModelError("the file became shorter while it was read", where=original.name)
        copy.write(piece)
        remaining -= len(piece)
        task.advance(len(piece))

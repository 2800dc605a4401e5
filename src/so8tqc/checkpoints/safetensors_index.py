"""Which tensor lies in which file at which bytes, of a safetensors checkpoint.

The library validates every file (lengths, offsets, overlaps, duplicates) when it
opens it; the byte ranges, which its API does not give, are then read from the
header, whose format is 8 bytes little-endian length, then JSON, then the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from so8tqc.disk.foreign import read_whole, require_safetensors_header
from so8tqc.errors import ModelError

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_ALIGNMENT = 8

READ_BYTES = 1 << 18
"""Bytes of a tensor read at a time: what is hashed, compared or searched lies in the cache then,
four times as fast as with 1 MiB."""
_SHOWN = 80  # characters of a name that may be anything

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
}
"""Bytes of the floating-point dtypes a baked tensor may have, by safetensors name."""


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor.

    Attributes:
        name: its key.
        file: the shard it lies in.
        dtype: safetensors name, e.g. ``BF16``.
        shape: as stored.
        start, end: byte range in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A model directory's weights.

    Attributes:
        directory: the model directory.
        tensors: name → entry, in file order.
        files: the shards.
        config: parsed config.json.
    """

    directory: Path
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """``model_type`` of the text model."""
        text = self.config.get("text_config")
        inner = text.get("model_type") if isinstance(text, dict) else None
        return str(inner or self.config.get("model_type", ""))

    @property
    def bytes(self) -> int:
        """Size of all weights, bytes."""
        return sum(entry.end - entry.start for entry in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor → its shape."""
        return {name: tuple(entry.shape) for name, entry in self.tensors.items()}


def open_checkpoint(directory: Path) -> Checkpoint:
    """Index a model directory, sharded or single-file.

    Raises:
        ModelError: missing or malformed config, index or shard; an index that names a
            file outside the directory, or a tensor its file does not hold.
    """
    config = json_object(directory / "config.json")
    files = _shards(directory)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in tensors:
                raise ModelError(
                    f"tensor {entry.name} is stored twice",
                    where=f"{tensors[entry.name].file.name} and {file.name}",
                )
            tensors[entry.name] = entry
    _check_index(directory, tensors)
    return Checkpoint(directory, tensors, files, config)


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """Entries of one safetensors file, by position.

    Raises:
        ModelError: the file is missing, truncated or malformed, or its header larger than 16 MiB.
    """
    from safetensors import SafetensorError, safe_open

    require_safetensors_header(file, ModelError)
    try:
        with safe_open(str(file), framework="np"):
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ModelError(
            f"not a valid safetensors file: {error}",
            where=str(file),
            remedy="A copy or download that broke off leaves such a file: get it again, whole.",
        ) from None
    base = 8 + length
    entries = [
        TensorEntry(
            name=name,
            file=file,
            dtype=item["dtype"],
            shape=tuple(item["shape"]),
            start=base + item["data_offsets"][0],
            end=base + item["data_offsets"][1],
        )
        for name, item in header.items()
        if name != "__metadata__"
    ]
    return tuple(sorted(entries, key=lambda entry: (entry.start, entry.end)))


def read_metadata(file: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file, {} if it has none."""
    from safetensors import safe_open

    with safe_open(str(file), framework="np") as handle:
        return dict(handle.metadata() or {})


def read_pieces(entry: TensorEntry, view: memoryview) -> Iterator[int]:
    """Fill ``view`` with the tensor's bytes, piece by piece; yields how many.

    Plain reads rather than a memory map: mapped pages would count as this process's memory.

    Raises:
        ModelError: the file ends before the tensor does.
    """
    left = entry.end - entry.start
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        while left:
            count = stream.readinto(view[: min(left, len(view))])
            if not count:
                raise ModelError("the file ended early", where=str(entry.file))
            left -= count
            yield count


@contextmanager
def mapped(entry: TensorEntry) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes as a read-only memory map; nothing is read until it is touched."""
    array = np.memmap(
        entry.file, dtype=np.uint8, mode="r", offset=entry.start, shape=(entry.end - entry.start,)
    )
    yield array


def encode_header(header: Mapping[str, object]) -> bytes:
    """A safetensors header: its length in 8 bytes, JSON, and spaces so that the data are aligned.

    Args:
        header: tensor → {dtype, shape, data_offsets}, and ``__metadata__``.
    """
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def torch_dtype(name: str) -> torch.dtype:
    """torch dtype of a safetensors name.

    Raises:
        ModelError: not a floating-point dtype that a bake can read.
    """
    import torch

    table = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    if name not in table:
        raise ModelError(
            f"dtype {name} cannot be baked",
            remedy="Bake the full-precision checkpoint, then quantize.",
        )
    return table[name]


def load_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor, copied into memory, in its stored dtype and shape."""
    import torch

    with mapped(entry) as raw:
        data = torch.frombuffer(bytearray(raw), dtype=torch_dtype(entry.dtype))
    return data.reshape(entry.shape)


def any_dtype(name: str) -> torch.dtype:
    """As :func:`torch_dtype`, of integers and 8-bit floats, too.

    Raises:
        ModelError: a dtype that torch does not have.
    """
    import torch

    others = {
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    return others[name] if name in others else torch_dtype(name)


def load_any(entry: TensorEntry) -> torch.Tensor:
    """As :func:`load_tensor`, of integers and 8-bit floats, too.

    Raises:
        ModelError: a dtype that torch does not have.
    """
    import torch

    with mapped(entry) as raw:
        data = torch.frombuffer(bytearray(raw), dtype=any_dtype(entry.dtype))
    return data.reshape(entry.shape)


def read_into(entry: TensorEntry, view: memoryview) -> None:
    """Fill ``view`` with all of the tensor's bytes; plain reads, as in :func:`read_pieces`.

    Raises:
        ModelError: the file ends before the tensor does.
    """
    done, size = 0, entry.end - entry.start
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        while done < size:
            count = stream.readinto(view[done:size])
            if not count:
                raise ModelError("the file ended early", where=str(entry.file))
            done += count


def _shards(directory: Path) -> tuple[Path, ...]:
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if single.is_file() and index.is_file():
        _require_same_set(directory, index)
        return (single,)
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if Path(name).name != name or name in (".", ".."):
                raise ModelError(
                    f"the index names {name[:_SHOWN]!r}, which is outside the model directory",
                    where=str(index),
                )
        return tuple(directory / name for name in names)
    if single.is_file():
        return (single,)
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return (found[0],)
    raise ModelError(
        "no safetensors weights here" if not found else f"no {INDEX_NAME} for {len(found)} shards",
        where=str(directory),
        remedy="Save the model with save_pretrained (safetensors).",
    )


def _require_same_set(directory: Path, index: Path) -> None:
    """Two sets of weights must be one: transformers loads the single file, others follow the index.

    Raises:
        ModelError: they hold different tensors.
    """
    single = {entry.name: entry for entry in read_header(directory / SINGLE_NAME)}
    mapping = _weight_map(index)
    if set(mapping.values()) == {SINGLE_NAME}:
        return
    parts = {Path(name).name for name in mapping.values()}
    other = {e.name: e for part in sorted(parts) for e in read_header(directory / part)}
    wrong = sorted(
        name
        for name in single.keys() | other.keys()
        if name not in single or name not in other or not _same_bytes(single[name], other[name])
    )
    if wrong:
        raise ModelError(
            f"{SINGLE_NAME} and the shards of {INDEX_NAME} are two different sets of weights: "
            f"{len(wrong)} tensors differ, first {wrong[0]}",
            where=str(directory),
            remedy="Remove the set that does not belong here. (transformers loads "
            f"{SINGLE_NAME}, llama.cpp's converter the shards.)",
        )


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with mapped(one) as a, mapped(other) as b:
        return bool(np.array_equal(a, b))


def _weight_map(index: Path) -> dict[str, str]:
    mapping = json_object(index).get("weight_map")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(isinstance(value, str) for value in mapping.values())
    ):
        raise ModelError("'weight_map' must map tensor names to file names", where=str(index))
    return mapping


def _check_index(directory: Path, tensors: Mapping[str, TensorEntry]) -> None:
    index = directory / INDEX_NAME
    if not index.is_file() or (directory / SINGLE_NAME).is_file():
        return
    mapping = _weight_map(index)
    for name, file in mapping.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(
                f"tensor {name} is not in {file}, where the index puts it", where=str(index)
            )
    if unlisted := sorted(set(tensors) - set(mapping)):
        raise ModelError(
            f"tensor {unlisted[0]} is in a shard but not in the index", where=str(index)
        )


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory.

    Raises:
        ModelError: missing, unreadable, or no object.
    """
    if not path.exists():
        raise ModelError(f"not a model directory: {path.name} is missing", where=str(path.parent))
    content = read_whole(path, ModelError)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError("expected a JSON object", where=str(path))
    return value

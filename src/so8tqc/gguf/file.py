"""Reading GGUF files: validated before libllama, which may abort the process, sees them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.disk.parts import part_name, part_paths
from so8tqc.errors import ModelError

QUANTIZED_COLUMNS = 256
"""K- and I-quants work on super-blocks of 256 columns; other widths fall back to other types."""


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file rather than a model directory."""
    return path.suffix.lower() == ".gguf"


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: its name.
        type: GGML type name, e.g. ``Q5_K``.
        shape: torch order, [out, in] for a matrix.
        bytes: stored size.
        offset: where in its file it begins, bytes.
        data: the stored bytes or values, memory-mapped, as gguf-py gives them.
        file: the file that it lies in, where it is known.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    offset: int
    data: npt.NDArray[Any]
    file: Path | None = None

    @property
    def elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        """The bytes as stored: [bytes] uint8."""
        return np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)

    def read(self) -> npt.NDArray[np.uint8]:
        """As :attr:`raw`, read anew: pages of a map that were touched count as memory.

        Raises:
            ModelError: the file ends before the tensor does.
        """
        if self.file is None or not self.file.is_file():  # renamed since it was opened
            return self.raw
        stored = np.fromfile(self.file, np.uint8, self.bytes, offset=self.offset)
        if stored.size != self.bytes:
            raise ModelError(f"the file ends inside {self.name}", where=str(self.file))
        return stored

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes as stored, hex."""
        return hashlib.sha256(self.raw.data).hexdigest()

    def values(self) -> npt.NDArray[np.float32]:
        """Dequantized to float32, in ``shape``."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.type]
        array: npt.NDArray[np.float32] = dequantize(self.data, kind).reshape(self.shape)
        return array


@dataclass(frozen=True)
class GGUFFile:
    """A readable GGUF file, or a model in several, read as one.

    Attributes:
        path: the file; the first part of several.
        fields: key → value (strings, numbers, booleans; long arrays are left out).
        tensors: name → tensor, of all parts.
        parts: the files, in order.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    parts: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes on disk, of all parts."""
        return sum(part.stat().st_size for part in self.parts or (self.path,))

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.fields.get("general.architecture", ""))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all weights."""
        stored = sum(tensor.bytes for tensor in self.tensors.values())
        return 8.0 * stored / sum(tensor.elements for tensor in self.tensors.values())

    @property
    def types(self) -> dict[str, int]:
        """GGML type → number of tensors, the most frequent first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def file_type(self) -> str:
        """Name of ``general.file_type``, e.g. ``Q5_K_M``; "" if unknown."""
        from gguf import LlamaFileType

        try:
            name = str(LlamaFileType(int(self.fields["general.file_type"])).name)
        except (KeyError, ValueError):
            return ""
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")


_ENDS_EARLY = ("cannot reshape array", "must be a divisor of")
"""What numpy says of a tensor that is cut off."""


SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
"""Keys of a part: its number, 0 for the first; how many parts; tensors of all together."""

SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)


def open_gguf(path: Path) -> GGUFFile:
    """Open and validate a GGUF file; data stays mapped, nothing large is read.

    Of a model in several files (``NAME-00001-of-0000N.gguf``) the first part stands for all.

    Raises:
        ModelError: missing, not GGUF, truncated, or malformed; a later part; a part is missing,
            or is another model's.
    """
    first = open_part(path)
    if _number(first, SPLIT_COUNT, 1) > 1:
        return _joined(first)
    if not first.tensors:
        raise ModelError("the GGUF file holds no tensors", where=str(path))
    return first


def open_part(path: Path) -> GGUFFile:
    """Open one file by itself, which may be a part of a model, or hold no tensors.

    Raises:
        ModelError: missing, not GGUF, truncated, or malformed.
    """
    from so8tqc.gguf.reader import HeaderReader

    if not path.is_file():
        raise ModelError("no such GGUF file", where=str(path))
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError("not a GGUF file (its first bytes are not GGUF)", where=str(path))
    try:
        reader = HeaderReader(str(path), "r")
        size = path.stat().st_size
        for tensor in reader.tensors:
            if int(tensor.data_offset) + int(tensor.n_bytes) > size:
                raise ModelError(
                    f"truncated: {tensor.name} ends beyond the file",
                    where=str(path),
                    remedy="Copy or export it again.",
                )
        tensors = {tensor.name: _tensor(tensor, path) for tensor in reader.tensors}
        fields = {name: _field(field) for name, field in reader.fields.items()}
    except (
        ValueError,
        KeyError,
        IndexError,
        OSError,
        OverflowError,
        MemoryError,
        struct.error,
    ) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if any(words in reason for words in _ENDS_EARLY):
            reason = "its tensors end before the sizes that it states"
        raise ModelError(
            f"a malformed or truncated GGUF file: {reason}",
            where=str(path),
            remedy="Copy or export it again.",
        ) from None
    known = {key: value for key, value in fields.items() if value is not None}
    return GGUFFile(path, known, tensors, (path,))


def _number(part: GGUFFile, key: str, absent: int) -> int:
    """An integer key of a part.

    Raises:
        ModelError: it is no integer.
    """
    value = part.fields.get(key, absent)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ModelError(f"{key} is {value!r}, no number", where=str(part.path))
    return int(value)


def _joined(first: GGUFFile) -> GGUFFile:
    """A model in several files, by its first part.

    Raises:
        ModelError: see :func:`open_gguf`.
    """
    count, number = _number(first, SPLIT_COUNT, 1), _number(first, SPLIT_NUMBER, 0)
    name = part_name(first.path)
    if name is None or name.total != count or name.number != number + 1:
        raise ModelError(
            f"part {number + 1} of {count} of a model in several files, under another name: the "
            "others are found by it",
            where=str(first.path),
            remedy=f"Name it NAME-{number + 1:05d}-of-{count:05d}.gguf again.",
        )
    paths = part_paths(first.path)
    if number:
        raise ModelError(
            f"part {number + 1} of {count} of a model in several files",
            where=str(first.path),
            remedy=f"Give its first part, which stands for all: {paths[0].name}",
        )
    if missing := [path for path in paths if not path.is_file()]:
        raise ModelError(
            f"{len(missing)} of the model's {count} files missing, first {missing[0].name}",
            where=str(first.path),
            remedy="Put all parts into one folder.",
        )
    parts = [first, *(open_part(path) for path in paths[1:])]
    for index, part in enumerate(parts):
        _require_part(part, index, first)
    tensors = _united(parts)
    return GGUFFile(first.path, first.fields, tensors, paths)


def _require_part(part: GGUFFile, index: int, first: GGUFFile) -> None:
    """See that a file is that part of the model that its first part begins.

    Raises:
        ModelError: it is another.
    """
    keys = (SPLIT_COUNT, SPLIT_TENSORS, *_TELLING)
    differing = [
        key
        for key in keys
        if key in part.fields and key in first.fields and part.fields[key] != first.fields[key]
    ]
    if _number(part, SPLIT_NUMBER, 0) != index or SPLIT_COUNT not in part.fields:
        differing.insert(0, SPLIT_NUMBER)
    if differing:
        key = differing[0]
        raise _other_model(
            part, first, f"{key} is {part.fields.get(key)}, not {first.fields.get(key, 0)}"
            if key != SPLIT_NUMBER
            else f"it calls itself part {_number(part, SPLIT_NUMBER, 0) + 1}, not {index + 1}"
        )  # fmt: skip
    width = first.fields.get(f"{first.architecture}.embedding_length")
    for tensor in part.tensors.values():
        if width and tensor.name.endswith(_AS_WIDE_AS_THE_MODEL) and tensor.shape != (int(width),):
            raise _other_model(part, first, f"{tensor.name} has {tensor.shape[0]}, not {width}")


_TELLING = ("general.architecture", "general.name", "general.file_type", "general.alignment")
"""Keys of which a part, where it has them, says what the first says. Most have them in the first
alone."""

_AS_WIDE_AS_THE_MODEL = (".attn_norm.weight", ".ffn_norm.weight", "output_norm.weight")


def _united(parts: Sequence[GGUFFile]) -> dict[str, GGUFTensor]:
    """The tensors of all parts.

    Raises:
        ModelError: two have the same one, or some are in none.
    """
    first = parts[0]
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise _other_model(part, first, f"{min(twice)} is in an earlier part, too")
        tensors |= part.tensors
    stated = _number(first, SPLIT_TENSORS, len(tensors))
    if stated != len(tensors) or not tensors:
        raise ModelError(
            f"its {len(parts)} files hold {len(tensors)} tensors, and should {stated}: parts of "
            "different models",
            where=str(first.path),
        )
    return tensors


def _other_model(part: GGUFFile, first: GGUFFile, why: str) -> ModelError:
    return ModelError(
        f"not a part of the model that {first.path.name} begins: {why}",
        where=str(part.path),
        remedy="Copy all parts of one model again.",
    )


def block_layout(type_: str) -> tuple[int, int]:
    """Weights and bytes of one block of a GGML type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
    return int(weights), int(size)


def aligned(size: int, alignment: int) -> int:
    """Bytes that ``size`` bytes of data take in the file, padding included."""
    return size + -size % alignment


def _tensor(tensor: Any, file: Path) -> GGUFTensor:
    return GGUFTensor(
        name=tensor.name,
        type=tensor.tensor_type.name,
        shape=tuple(int(n) for n in reversed(tensor.shape)),
        bytes=int(tensor.n_bytes),
        offset=int(tensor.data_offset),
        data=tensor.data,
        file=file,
    )


def _field(field: Any) -> Any:
    """A scalar field's value; None for arrays (vocabularies)."""
    from gguf import GGUFValueType

    if not field.types or field.types[0] == GGUFValueType.ARRAY:
        return None
    return field.contents()

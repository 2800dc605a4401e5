"""Reading GGUF files: validated before libllama, which may abort the process, sees them."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
        offset: where in the file it begins, bytes.
        data: the stored bytes or values, memory-mapped, as gguf-py gives them.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    offset: int
    data: npt.NDArray[Any]

    @property
    def elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        """The bytes as stored: [bytes] uint8."""
        return np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)

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
    """A readable GGUF file.

    Attributes:
        path: the file.
        fields: key → value (strings, numbers, booleans; long arrays are left out).
        tensors: name → tensor.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.fields.get("general.architecture", ""))

    @property
    def is_split(self) -> bool:
        """Whether it is one part of a model in several files."""
        return int(self.fields.get("split.count") or 0) > 1

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


def open_gguf(path: Path) -> GGUFFile:
    """Open and validate a GGUF file; data stays mapped, nothing large is read.

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
        tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
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
    if not tensors:
        raise ModelError("the GGUF file holds no tensors", where=str(path))
    return GGUFFile(path, {k: v for k, v in fields.items() if v is not None}, tensors)


def require_whole(gguf: GGUFFile) -> None:
    """Refuse one part of a split model.

    Raises:
        ModelError: it is one.
    """
    if int(gguf.fields.get("split.count", 1)) > 1:
        raise ModelError(
            "one part of a split model",
            where=str(gguf.path),
            remedy="Merge it first: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )


def block_layout(type_: str) -> tuple[int, int]:
    """Weights and bytes of one block of a GGML type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
    return int(weights), int(size)


def aligned(size: int, alignment: int) -> int:
    """Bytes that ``size`` bytes of data take in the file, padding included."""
    return size + -size % alignment


def _tensor(tensor: Any) -> GGUFTensor:
    return GGUFTensor(
        name=tensor.name,
        type=tensor.tensor_type.name,
        shape=tuple(int(n) for n in reversed(tensor.shape)),
        bytes=int(tensor.n_bytes),
        offset=int(tensor.data_offset),
        data=tensor.data,
    )


def _field(field: Any) -> Any:
    """A scalar field's value; None for arrays (vocabularies)."""
    from gguf import GGUFValueType

    if not field.types or field.types[0] == GGUFValueType.ARRAY:
        return None
    return field.contents()

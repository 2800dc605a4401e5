"""Importance matrices: mean squared inputs of every column, which weigh the rounding errors.

llama.cpp's GGUF format holds two float32 tensors for each weight: ``NAME.in_sum2``
[matrices, columns], sums of squared inputs, and ``NAME.counts`` [matrices], over how many
tokens (an expert that was never chosen has 0). Its older format (``.dat``) is a list of
(length, name, calls, length, means · calls), all int32 and float32, little-endian. libllama
wants the means.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ModelError
from so8tqc.gguf.file import GGUFFile, open_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_COMPUTE_AGAIN = "Compute the matrix again; this tensor saw no activations."

Means = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared inputs.

    Attributes:
        path: where they were read.
        means: GGUF tensor name → [matrices, columns] float32, finite and positive.
        chunks: how many chunks of text they were computed on, 0 if the file does not say.
        silent_columns: tensor → columns that saw nothing but zeros. They have the smallest
            importance of their tensor, since libllama cannot weigh a block of zeros.
        unseen_experts: tensor → matrices that saw no token and weigh all columns alike.
    """

    path: Path
    means: Mapping[str, Means]
    chunks: int
    silent_columns: Mapping[str, int]
    unseen_experts: Mapping[str, int]


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in llama.cpp's GGUF format or its older one (``.dat``).

    Raises:
        ModelError: missing, another kind of file, incomplete, or with values that cannot be
            means of squares; the message names the tensor.
    """
    if not path.is_file():
        raise ModelError("no such importance matrix", where=str(path))
    with path.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    means, chunks, unseen = _read_gguf(path) if is_gguf else _read_dat(path)
    silent = {name: int((values == 0).sum()) for name, values in means.items()}
    return ImportanceMatrix(
        path,
        {name: _without_zeros(values) for name, values in means.items()},
        chunks,
        {name: count for name, count in silent.items() if count},
        {name: count for name, count in unseen.items() if count},
    )


def _read_gguf(path: Path) -> tuple[dict[str, Means], int, dict[str, int]]:
    file = open_gguf(path)
    names = sorted(n.removesuffix(_SUMS) for n in file.tensors if n.endswith(_SUMS))
    if not names:
        raise ModelError("the GGUF file holds no importance matrix", where=str(path))
    means: dict[str, Means] = {}
    unseen: dict[str, int] = {}
    for name in names:
        means[name], unseen[name] = _means(file, name)
    return means, int(file.fields.get("imatrix.chunk_count", 0)), unseen


def _means(file: GGUFFile, name: str) -> tuple[Means, int]:
    where = f"{file.path}, {name}"
    if name + _COUNTS not in file.tensors:
        raise ModelError("the counts of an importance matrix are missing", where=where)
    counts = file.tensors[name + _COUNTS].values().reshape(-1, 1)
    sums = file.tensors[name + _SUMS].values()
    if not counts.size or sums.size % counts.size:
        raise ModelError(f"{sums.size} sums do not belong to {counts.size} counts", where=where)
    sums = sums.reshape(counts.size, -1)
    _require_squares(sums, where)
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise ModelError("a count is negative or not finite", where=where)
    seen = counts > 0
    if not seen.any():
        raise ModelError("every count is zero", where=where, remedy=_COMPUTE_AGAIN)
    # as llama-quantize has it: an expert without statistics weighs all columns alike
    means = np.where(seen, sums / np.where(seen, counts, 1), 1).astype(np.float32)
    return means, int((~seen).sum())


def _require_squares(values: Means, where: str) -> None:
    if not values.size:
        raise ModelError("there are no importances", where=where)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ModelError("an importance is negative or not finite", where=where)
    if not values.any():
        raise ModelError("every importance is zero", where=where, remedy=_COMPUTE_AGAIN)


def _without_zeros(means: Means) -> Means:
    return np.where(means > 0, means, means[means > 0].min()).astype(np.float32)


def _read_dat(path: Path) -> tuple[dict[str, Means], int, dict[str, int]]:
    data = path.read_bytes()
    means: dict[str, Means] = {}
    try:
        (entries,), at = struct.unpack_from("<i", data), 4
        for _ in range(entries):
            (length,) = struct.unpack_from("<i", data, at)
            name = struct.unpack_from(f"<{length}s", data, at + 4)[0].decode("utf-8")
            calls, count = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            values = np.frombuffer(struct.unpack_from(f"<{4 * count}s", data, at)[0], "<f4")
            at += 4 * count
            _require_squares(values, f"{path}, {name}")
            means[name] = (values / max(calls, 1)).astype(np.float32)[None]
        # how many chunks it was is an addition that the first writers did not make
        chunks = int(struct.unpack_from("<i", data, at)[0]) if at < len(data) else 0
    except (struct.error, ValueError):
        means = {}
    if not means:
        raise ModelError(
            "not an importance matrix: neither GGUF nor llama.cpp's older format, or cut off",
            where=str(path),
        )
    return means, chunks, {}


def write_imatrix(
    path: Path,
    sums: Mapping[str, npt.NDArray[np.float64]],
    counts: Mapping[str, npt.NDArray[np.int64]],
    *,
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """Write llama.cpp's GGUF format (not atomic: give a temporary path).

    Args:
        path: the file.
        sums: tensor name → [matrices, columns], sums of squared inputs.
        counts: tensor name → [matrices] or [1], over how many tokens.
        datasets: names of the texts.
        chunks: how many chunks of text.
        chunk_size: tokens of a chunk.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name in sorted(sums):
        writer.add_tensor(name + _SUMS, sums[name].astype(np.float32))
        writer.add_tensor(name + _COUNTS, counts[name].astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_without_importance(matrix: ImportanceMatrix, model: GGUFFile) -> tuple[str, ...]:
    """Matrices of a model that have no importance and so are rounded without weights.

    Raises:
        ModelError: the importance matrix belongs to another model.
    """
    for name, means in matrix.means.items():
        where = f"{matrix.path}, {name}"
        if name not in model.tensors:
            raise ModelError(
                f"an importance for a tensor that {model.path.name} does not have", where=where
            )
        shape = model.tensors[name].shape
        matrices, columns = int(np.prod(shape[:-2], dtype=np.int64)), shape[-1]
        # the older format, and dense stacks in the new one, have all matrices in one row
        if means.size != matrices * columns or means.shape[0] not in (1, matrices):
            raise ModelError(
                f"the importance matrix is {list(means.shape)}, {model.path.name} needs "
                f"{[matrices, columns]}",
                where=where,
            )
    return tuple(
        name
        for name, tensor in model.tensors.items()
        if len(tensor.shape) > 1 and name not in matrix.means
    )

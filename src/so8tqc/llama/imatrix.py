"""Importance matrices: mean squared inputs of every column, which weigh the rounding errors.

llama.cpp's GGUF format holds two float32 tensors for each weight: ``NAME.in_sum2``
[matrices, columns], sums of squared inputs, and ``NAME.counts`` [matrices], over how many
tokens (an expert that was never chosen has 0). libllama wants the means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ModelError
from so8tqc.llama.gguf_file import GGUFFile, open_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared inputs.

    Attributes:
        path: where they were read.
        means: GGUF tensor name → [matrices, columns] float32, finite, ≥ 0, not all zero.
        chunks: how many chunks of text they were computed on, 0 if the file does not say.
    """

    path: Path
    means: Mapping[str, npt.NDArray[np.float32]]
    chunks: int


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read llama.cpp's GGUF importance matrix.

    Raises:
        ModelError: missing, another kind of file, incomplete, or with values that cannot be
            means of squares; the message names the tensor.
    """
    file = open_gguf(path)
    names = sorted(n.removesuffix(_SUMS) for n in file.tensors if n.endswith(_SUMS))
    if not names:
        raise ModelError("the GGUF file holds no importance matrix", where=str(path))
    means = {name: _means(file, name) for name in names}
    return ImportanceMatrix(path, means, int(file.fields.get("imatrix.chunk_count", 0)))


def _means(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    where = f"{file.path}, {name}"
    if name + _COUNTS not in file.tensors:
        raise ModelError("the counts of an importance matrix are missing", where=where)
    counts = file.tensors[name + _COUNTS].values().reshape(-1, 1)
    sums = file.tensors[name + _SUMS].values()
    if sums.size % counts.size:
        raise ModelError(f"{sums.size} sums do not belong to {counts.size} counts", where=where)
    sums = sums.reshape(counts.size, -1)
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and sums.min() >= 0):
        raise ModelError("an importance is negative or not finite", where=where)
    if not sums.any():
        raise ModelError(
            "every importance is zero",
            where=where,
            remedy="Compute the matrix again; this tensor saw no activations.",
        )
    # as llama-quantize has it: an expert without statistics weighs all columns alike
    means: npt.NDArray[np.float32] = np.where(counts > 0, sums / np.maximum(counts, 1), 1)
    return means.astype(np.float32)


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
        wanted = (int(np.prod(shape[:-2], dtype=np.int64)), shape[-1])
        if means.shape != wanted:
            raise ModelError(
                f"the importance matrix is {list(means.shape)}, {model.path.name} needs "
                f"{list(wanted)}",
                where=where,
            )
    return tuple(
        name
        for name, tensor in model.tensors.items()
        if len(tensor.shape) > 1 and name not in matrix.means
    )

"""The tensors of a quantized file that second moments are known of, solved for and put in place.

libllama has written the file: its key-values, the order and the types of its tensors, and the bytes
of those that nothing is known of, stay. What is solved for has as many bytes, in the same place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.digests import sha256_json
from so8tqc.disk.system import make_folder, remove
from so8tqc.errors import ModelError, ShapeError
from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.llama.ggml import dequantizer
from so8tqc.progress import SILENT, Progress
from so8tqc.quantizers.grids import GRIDS
from so8tqc.quantizers.hessians import Group, MomentsFile, SecondMoments
from so8tqc.quantizers.solve import Curvature, chosen_rows, damped, solve
from so8tqc.record_kinds.quantize import SolvedFile, SolvedTensor

VERSION = 1
"""Of the method: another one gives other bytes for the same inputs."""

DAMPINGS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
"""What is tried, as shares of the mean second moment."""

UNJUDGED = 0.01
"""GPTQ's own damping, where no tokens were kept apart to choose one."""

_TRIAL_ROWS = 64
"""Of each tensor, on which dampings are compared: one chunk of the sweep."""

ENOUGH = 4
"""Tokens for each column with which more of them hardly lower the error on text kept apart."""

_DIGITS = 6


class _Found(NamedTuple):
    """A group's tensors as stored, and the damping they were solved with."""

    stored: dict[str, npt.NDArray[np.uint8]]
    damping: float


def solve_into(
    path: Path,
    source: GGUFFile,
    moments: MomentsFile,
    kept: Path,
    threads: int | None,
    progress: Progress = SILENT,
) -> SolvedFile:
    """Replace the bytes of every tensor that can be solved for, in a file that libllama wrote.

    Groups that are done are kept in a folder until all are, so that a run that was killed goes on
    with the next one.

    Args:
        path: the file, changed in place.
        source: what it was quantized from.
        moments: of the inputs of its tensors.
        kept: the folder.
        threads: CPU threads, None for all; the bytes do not depend on it.
        progress: told about groups.

    Raises:
        ModelError: a weight or a second moment is not finite, or second moments are singular.
    """
    written = open_gguf(path)
    make_folder(kept)
    workers = threads or os.cpu_count() or 1
    done: dict[str, SolvedTensor] = {}
    groups = moments.manifest.groups
    with (
        progress.task("solving", total=len(groups), unit="inputs") as task,
        path.open("r+b") as out,
    ):
        for group in groups:
            names = [name for name in group.tensors if _can(written.tensors.get(name))]
            if names:
                known = moments.moments(group)
                found = _resumed(group, names, written, source, moments, kept, known, workers)
                for name in names:
                    tensor = written.tensors[name]
                    done[name] = _compared(source.tensors[name], tensor, found, known)
                    out.seek(tensor.offset)
                    out.write(found.stored[name].tobytes())
            task.advance(1, item=group.tensors[0])
    remove(kept)
    left = {
        name: tensor.type
        for name, tensor in written.tensors.items()
        if name not in done and tensor.type in GRIDS
    }
    return SolvedFile(tensors=done, left=left)


def _can(tensor: GGUFTensor | None) -> bool:
    return tensor is not None and tensor.type in GRIDS and len(tensor.shape) == 2


def _resumed(
    group: Group,
    names: Sequence[str],
    written: GGUFFile,
    source: GGUFFile,
    moments: MomentsFile,
    kept: Path,
    known: SecondMoments,
    workers: int,
) -> _Found:
    """A group solved for, or as it was when an earlier run had solved for it."""
    part = moments.part(group)
    key = sha256_json(
        {
            "version": VERSION,
            "types": {name: written.tensors[name].type for name in names},
            "weights": {name: source.tensors[name].sha256 for name in names},
            "moments": [_digest(part.kept), _digest(part.held)],
        }
    )
    place = kept / f"{key[:32]}.npz"
    if place.is_file():
        with np.load(place, allow_pickle=False) as arrays:
            stored = {name: arrays[f"{index}"] for index, name in enumerate(names)}
            return _Found(stored, float(arrays["damping"]))
    found = _solved(names, written, source, known, workers)
    arrays_kept = {str(index): found.stored[name] for index, name in enumerate(names)}
    with atomic_file(place) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, damping=np.float64(found.damping), **arrays_kept)
    return found


def _digest(array: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _solved(
    names: Sequence[str], written: GGUFFile, source: GGUFFile, known: SecondMoments, workers: int
) -> _Found:
    weights = {name: weights_of(source, name) for name in names}
    types = {name: written.tensors[name].type for name in names}
    try:
        damping = _damping(weights, types, known, workers)
        curvature = damped(known.whole, damping)
    except ShapeError as error:
        raise ModelError(error.what, where=names[0], remedy=error.remedy) from None
    stored = {
        name: solve(weights[name], curvature, types[name], threads=workers).stored for name in names
    }
    return _Found(stored, damping)


def weights_of(source: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    """A tensor's weights.

    Raises:
        ModelError: one is not finite.
    """
    values = source.tensors[name].values()
    if not np.isfinite(values).all():
        raise ModelError("a weight is not finite", where=f"{source.path}, {name}")
    return values


def _damping(
    weights: Mapping[str, npt.NDArray[np.float32]],
    types: Mapping[str, str],
    known: SecondMoments,
    workers: int,
) -> float:
    """The damping whose codes cost least on the tokens kept apart, on some rows of each tensor."""
    held = known.held
    if held is None:
        return UNJUDGED
    rows = {
        name: values[list(chosen_rows(len(values), _TRIAL_ROWS))]
        for name, values in weights.items()
    }

    damped(known.fitted, DAMPINGS[-1])  # what cannot be factored with the largest never can

    def cost(damping: float) -> float:
        try:
            curvature = damped(known.fitted, damping)
        except ShapeError:  # singular with so little of it; a larger one will do
            return np.inf
        total = 0.0
        for name, values in rows.items():
            total += _held_out(values, curvature, types[name], held)
        return total

    with ThreadPoolExecutor(workers) as pool:
        costs = list(pool.map(cost, DAMPINGS))
    return DAMPINGS[int(np.argmin(costs))]


def _held_out(
    values: npt.NDArray[np.float32],
    curvature: Curvature,
    type_: str,
    held: npt.NDArray[np.float64],
) -> float:
    """Σ δ H δᵀ with the second moments of the tokens kept apart, after a sweep.

    The products are summed column by column in a fixed order: they decide.
    """
    swept = solve(values, curvature, type_, passes=0)
    delta = (values - decoded(swept.stored, type_, values.shape)).astype(np.float64)
    return float(sum(row_costs(delta, held).tolist()))


def row_costs(
    delta: npt.NDArray[np.float64], hessian: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """[rows] δ H δᵀ of each row, summed in a fixed order."""
    from so8tqc.quantizers.kernels import quadratic

    costs = np.empty(len(delta))
    quadratic(np.ascontiguousarray(delta), np.ascontiguousarray(hessian), costs)
    return costs


def decoded(
    stored: npt.NDArray[np.uint8], type_: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """What bytes of a type stand for, by libggml."""
    values = np.empty(shape, np.float32)
    dequantizer(type_)(np.ascontiguousarray(stored).reshape(-1), values.reshape(-1))
    return values


def _compared(
    before: GGUFTensor, replaced: GGUFTensor, found: _Found, known: SecondMoments
) -> SolvedTensor:
    """How far outputs move: with libllama's bytes, and with those solved for."""
    weights = before.values()
    hessian = known.whole.astype(np.float32)

    def error(values: npt.NDArray[np.float32]) -> float:
        return float(np.einsum("ri,ri->", values @ hessian, values, dtype=np.float64))

    whole = error(weights)

    def relative(stored: npt.NDArray[np.uint8]) -> float:
        moved = error(weights - decoded(stored, replaced.type, weights.shape))
        share = (max(moved, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
        return float(f"{share:.{_DIGITS}g}")

    return SolvedTensor(
        type=replaced.type,
        damping=found.damping,
        libllama=relative(replaced.raw),
        solved=relative(found.stored[replaced.name]),
    )


def moments_notices(moments: MomentsFile) -> Iterator[str]:
    """What a user should know of the calibration: too few tokens, columns that saw nothing."""
    groups = moments.manifest.groups
    scarce = [group for group in groups if group.tokens + group.held < group.columns]
    if scarce:
        widest = max(group.columns for group in scarce)
        tokens = min(group.tokens + group.held for group in scarce)
        yield (
            f"{tokens} calibration tokens are fewer than the {widest} columns of "
            f"{_first([n for g in scarce for n in g.tensors])}: their second moments are singular, "
            f"and damping alone makes them usable. {ENOUGH * widest} tokens would do."
        )
    dead = {group.tensors[0]: group.dead for group in groups if group.dead}
    if dead:
        yield (
            "Columns whose inputs were all zero, which damping alone keeps near their weights: "
            + ", ".join(f"{count} of {name}" for name, count in dead.items())
        )


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"

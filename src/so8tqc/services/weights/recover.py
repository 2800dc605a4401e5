"""The rotations that a model really carries, recovered from its weights and saved as gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import PlannedTensor, plan_bake
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.checkpoints.sites import layers_with_attention, locate
from so8tqc.errors import ModelError
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.record_kinds.qc import RecoveredLayer
from so8tqc.records import Check, judge
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.fold import fold, orient
from so8tqc.rotations.recover import distances, recover_rotations, refine_rotations
from so8tqc.rotations.rotation_set import FloatArray, RotationSet, Target, rotation_angles
from so8tqc.services.weights.gguf import error_limit, stored_weights

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 8
"""Block size of the rotations looked for where none are given: SO8T's."""

RESIDUAL_LIMIT = 4.0
"""A weight is explained by a rotation if what is left is at most this many times rounding."""


def recover(
    candidate: Path, base: Checkpoint, rotations: RotationSet | None, out: Path, subject: str
) -> tuple[Check, dict[str, RecoveredLayer]]:
    """Recover a model's rotations (Procrustes, refined) and write them as a native gate file.

    Args:
        candidate: a model directory or GGUF file that may carry rotations.
        base: the model before it was baked.
        rotations: what is expected, which tells site and block size; None to look for
            blocks of 8 at the input of every attention output projection.
        out: file to write: parametrization ``matrix``, convention ``column``.
        subject: the candidate's name, for the check.

    Returns:
        ``rotation.recovered``, and layer → what was found there.

    Raises:
        ModelError: the candidate lacks a weight, or one holds a NaN or an infinity.
    """
    import torch

    expected = rotations or _identities(base)
    planned = [
        p
        for p in plan_bake(base, expected, dtype="keep", all_layers=False)
        if len(p.entry.shape) == 2
    ]
    found: dict[Target, FloatArray] = {}
    rows: dict[str, RecoveredLayer] = {}
    for plan, stored, tolerance in _weights(candidate, planned):
        column = expected.column_blocks(plan.site.target)
        view = {"site": expected.site, "transposed": plan.site.transposed}
        matrix, blocks = orient(tensor_view(plan.entry), column, **view)  # type: ignore[arg-type]
        weight, _ = orient(stored, column, **view)  # type: ignore[arg-type]
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{plan.entry.name} holds NaN or infinity", where=str(candidate))
        result = recover_rotations(matrix, weight, blocks.shape[1])
        noise = tolerance or _rounding(matrix, result.blocks, weight.dtype)
        recovered = result.blocks
        if tolerance is None and (result.residual / noise).max() <= RESIDUAL_LIMIT:
            recovered = refine_rotations(matrix, weight, recovered)
        target = plan.site.target
        found[target] = _as_column(recovered, expected.site)
        rows[f"{target}"] = {
            "residual": float((result.residual / noise).max()),
            "angle_max": float(rotation_angles(recovered).max()),
            "determinant": float(np.linalg.det(recovered).min()),
            "distance": None if rotations is None else float(distances(recovered, blocks).max()),
        }
    write_native(
        out,
        found,
        parametrization=Parametrization.MATRIX,
        convention=Convention.COLUMN,
        site=expected.site,
        pet=None,
        metadata={"so8t.recovered_from": candidate.name},
    )
    worst = max(rows, key=lambda row: rows[row]["residual"])
    check = judge(
        "rotation.recovered",
        rows[worst]["residual"],
        RESIDUAL_LIMIT,
        subject=subject,
        detail=f"What no rotation explains of the weights, in units of their rounding; largest in "
        f"{worst}. The rotations recovered are in {out.name}.",
    )
    return check, rows


def _identities(base: Checkpoint) -> RotationSet:
    """No rotation at all, at the input of every attention output projection."""
    targets = tuple(Target(layer) for layer in sorted(layers_with_attention(base)))
    blocks = {}
    for site in locate(targets, base):
        width = base.tensors[site.weight].shape[0 if site.transposed else -1]
        blocks[site.target] = np.repeat(np.eye(BLOCK_SIZE)[None], width // BLOCK_SIZE, axis=0)
    return RotationSet(
        blocks, Convention.COLUMN, Site.INPUT, Parametrization.MATRIX, str(base.directory)
    )


def _weights(
    candidate: Path, planned: list[PlannedTensor]
) -> list[tuple[PlannedTensor, torch.Tensor, float | None]]:
    """(planned tensor, the candidate's, relative error of its type; None: its dtype's rounding)."""
    if is_gguf(candidate):
        gguf = open_gguf(candidate)
        weights, missing = stored_weights(gguf, planned)
        if missing or not weights:
            raise ModelError("attention output weights are missing", where=str(candidate))
        return [(p, values, error_limit(t.type)) for p, t, values in weights]
    baked = open_checkpoint(candidate)
    for plan in planned:
        entry = baked.tensors.get(plan.entry.name)
        if entry is None or entry.shape != plan.entry.shape:
            raise ModelError(f"{plan.entry.name} is missing or reshaped", where=str(candidate))
    return [(p, tensor_view(baked.tensors[p.entry.name]), None) for p in planned]


def _rounding(matrix: torch.Tensor, blocks: FloatArray, dtype: torch.dtype) -> FloatArray:
    """[N] relative residual that the same recovery sees in a correct fold of these blocks."""
    correct = recover_rotations(matrix, fold(matrix, blocks, dtype), blocks.shape[1])
    noise: FloatArray = np.maximum(correct.residual, np.finfo(np.float64).eps)
    return noise


def _as_column(blocks: FloatArray, site: Site) -> FloatArray:
    return np.ascontiguousarray(blocks if site.is_before else blocks.transpose(0, 2, 1))

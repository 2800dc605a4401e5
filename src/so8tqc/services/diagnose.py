"""When the algebra fails: what was done instead, and the command that mends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.records import Diagnosis
from so8tqc.rotations.algebra import FoldComparison
from so8tqc.rotations.enums import Parametrization, Site
from so8tqc.rotations.fold import fold, orient
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.recover import Recovered, distances, recover_rotations
from so8tqc.rotations.rotation_set import FloatArray, RotationSet
from so8tqc.services.structure import EXACT_LIMIT_ULP, TargetAlgebra

if TYPE_CHECKING:
    import torch

NOISE_FACTOR = 4.0
"""A hypothesis fits if it is within this many times the distance that rounding alone causes."""

_RESIDUAL_FACTOR = 4.0
_SMALLEST_NOISE = 1e-9


@dataclass(frozen=True)
class _Finding:
    """What one target's weight looks like."""

    layer: int
    code: str
    note: str


@dataclass(frozen=True)
class _Case:
    """One target under examination, everything oriented so that the fold is M' = M·B."""

    planned: PlannedTensor
    matrix: torch.Tensor
    stored: torch.Tensor
    blocks: FloatArray
    recovered: Recovered
    noise: float
    residual_noise: float


def diagnose(
    results: Sequence[TargetAlgebra], baked: Checkpoint, rotations: RotationSet, model: str
) -> list[Diagnosis]:
    """Explain every target whose stored weight is not the exact fold.

    From base and stored weight the rotation really applied is recovered and compared
    with what is known to go wrong. The yardstick is measured: the distance at which
    the same recovery sees a *correct* fold in this dtype.

    Args:
        results: the algebra of the candidate's targets.
        baked: the candidate.
        rotations: what should have been folded.
        model: the candidate's path, for the remedies.

    Returns:
        One diagnosis for each code found, with the layers it concerns.
    """
    findings = [
        _examine(result.planned, result.comparison, baked, rotations)
        for result in results
        if result.comparison.max_ulp > EXACT_LIMIT_ULP
    ]
    codes = dict.fromkeys(finding.code for finding in findings)
    return [_diagnosis(code, findings, len(results), model) for code in codes]


def _examine(
    planned: PlannedTensor, comparison: FoldComparison, baked: Checkpoint, rotations: RotationSet
) -> _Finding:
    layer = planned.site.target.layer
    if comparison.non_finite:
        return _Finding(layer, "non_finite", f"{comparison.non_finite} NaN or infinite elements")
    case = _case(planned, baked, rotations)
    for code, note, blocks in _hypotheses(case, rotations):
        if blocks.shape == case.blocks.shape and _fits(case, blocks):
            return _Finding(layer, code, note)
    if _is_wrong_site(case, rotations):
        return _Finding(layer, "wrong_site", "the fold was made on the projection's other side")
    return _Finding(layer, "foreign_edit", _describe_edit(case))


def _case(planned: PlannedTensor, baked: Checkpoint, rotations: RotationSet) -> _Case:
    column = rotations.column_blocks(planned.site.target)
    stored = tensor_view(baked.tensors[planned.entry.name])
    view = {"site": rotations.site, "transposed": planned.site.transposed}
    matrix, blocks = orient(tensor_view(planned.entry), column, **view)  # type: ignore[arg-type]
    candidate, _ = orient(stored, column, **view)  # type: ignore[arg-type]
    size = blocks.shape[1]
    correct = recover_rotations(matrix, fold(matrix, blocks, stored.dtype), size)
    return _Case(
        planned=planned,
        matrix=matrix,
        stored=candidate,
        blocks=blocks,
        recovered=recover_rotations(matrix, candidate, size),
        noise=max(float(distances(correct.blocks, blocks).max()), _SMALLEST_NOISE),
        residual_noise=max(float(correct.residual.max()), _SMALLEST_NOISE),
    )


def _fits(case: _Case, blocks: FloatArray) -> bool:
    """Whether every recovered block is this one, and nothing but a rotation was applied."""
    near = distances(case.recovered.blocks, blocks).max() <= NOISE_FACTOR * case.noise
    pure = case.recovered.residual.max() <= _RESIDUAL_FACTOR * case.residual_noise
    return bool(near and pure)


def _hypotheses(case: _Case, rotations: RotationSet) -> Iterator[tuple[str, str, FloatArray]]:
    """(code, note, blocks B that this fault would have applied), the likeliest first."""
    b = case.blocks
    transposed = b.transpose(0, 2, 1)
    yield "storage_rounding", "the right rotation, but not rounded once to the stored dtype", b
    yield "not_baked", "the weight is the base's", np.broadcast_to(np.eye(b.shape[1]), b.shape)
    yield "transposed", "Rᵀ was folded instead of R", transposed
    yield "double_baked", "R was folded twice", b @ b
    yield from _other_parametrizations(case, rotations)
    for target in rotations:
        if target != case.planned.site.target:
            other = rotations.column_blocks(target)
            other = other if rotations.site is Site.INPUT else other.transpose(0, 2, 1)
            yield "layers_permuted", f"the rotation of {target} was folded", other
    for order, note in _orders(case):
        yield "blocks_permuted", note, b[order]


def _other_parametrizations(
    case: _Case, rotations: RotationSet
) -> Iterator[tuple[str, str, FloatArray]]:
    theta = rotations.theta.get(case.planned.site.target)
    if theta is None:
        return
    for other in (Parametrization.EXP, Parametrization.CAYLEY, Parametrization.LEGACY_TAYLOR):
        if other is rotations.parametrization:
            continue
        r = rotation_blocks(theta, other)
        for blocks, note in (
            (r, f"R was made by {other}"),
            (r.transpose(0, 2, 1), f"Rᵀ by {other}"),
        ):
            yield "wrong_parametrization", note, blocks


def _orders(case: _Case) -> Iterator[tuple[np.ndarray[tuple[int], np.dtype[np.int64]], str]]:
    """The permutation of blocks that explains the recovered ones best."""
    b = case.blocks
    difference = np.linalg.norm(
        case.recovered.blocks[:, None] - b[None], axis=(2, 3)
    )  # [recovered, expected]
    order = difference.argmin(axis=1)
    if not np.array_equal(order, np.arange(b.shape[0])):
        moved = int((order != np.arange(b.shape[0])).sum())
        yield order, f"{moved} of {b.shape[0]} blocks stand in another block's place"


def _is_wrong_site(case: _Case, rotations: RotationSet) -> bool:
    """Whether W' is the fold at the other site (possible only if the features agree)."""
    base = tensor_view(case.planned.entry)
    column = rotations.column_blocks(case.planned.site.target)
    other = Site.OUTPUT if rotations.site is Site.INPUT else Site.INPUT
    matrix, blocks = orient(base, column, other, transposed=case.planned.site.transposed)
    if base.ndim != 2 or matrix.shape[1] != blocks.shape[0] * blocks.shape[1]:
        return False
    stored, _ = orient(
        _stored_as_saved(case, rotations), column, other, transposed=case.planned.site.transposed
    )
    error = (fold(matrix, blocks, stored.dtype).double() - stored.double()).norm()
    return float(error / matrix.double().norm()) <= _RESIDUAL_FACTOR * case.residual_noise


def _stored_as_saved(case: _Case, rotations: RotationSet) -> torch.Tensor:
    """Undo the orientation of the candidate's tensor."""
    along_rows = (rotations.site is Site.INPUT) == case.planned.site.transposed
    return case.stored.T if along_rows else case.stored


def _describe_edit(case: _Case) -> str:
    wrong = distances(case.recovered.blocks, case.blocks) > NOISE_FACTOR * case.noise
    edited = case.recovered.residual > _RESIDUAL_FACTOR * case.residual_noise
    blocks = np.flatnonzero(wrong | edited)
    kind = "changed by something that is no rotation" if edited.any() else "rotated otherwise"
    listed = ", ".join(map(str, blocks[:8])) + (" …" if blocks.size > 8 else "")
    return f"block(s) {listed} of {wrong.size} {kind}"


_REBAKE = "Bake again from the base model: so8tqc bake BASE ROTATIONS --out DIR"

_TEXTS = {
    "not_baked": ("The gate was never folded in", _REBAKE),
    "layer_missing": ("The gate was not folded in some layers", _REBAKE),
    "transposed": (
        "The transposed rotation was folded",
        "Bake again with the other convention (--convention row or column), or name the "
        "convention that training used.",
    ),
    "double_baked": ("The rotation was folded twice", _REBAKE + " (from the unbaked base)"),
    "wrong_parametrization": (
        "The rotation was made from theta by another parametrization",
        "Bake again with --parametrization as in training (exp, cayley or legacy-taylor).",
    ),
    "layers_permuted": ("Rotations of other layers were folded", _REBAKE),
    "blocks_permuted": ("The blocks of the rotation were folded in another order", _REBAKE),
    "wrong_site": (
        "The rotation was folded on the other side of the projection",
        "Bake again with --site input or output, as in training.",
    ),
    "foreign_edit": ("The weights were changed by something else", _REBAKE),
    "non_finite": ("The weights hold NaN or infinite values", _REBAKE),
    "storage_rounding": (
        "The right rotation was folded, with more rounding than storage needs",
        _REBAKE + " (each element is then rounded once)",
    ),
}


def _diagnosis(code: str, findings: Sequence[_Finding], targets: int, model: str) -> Diagnosis:
    concerned = [finding for finding in findings if finding.code == code]
    layers = tuple(sorted({finding.layer for finding in concerned}))
    if code == "not_baked" and len(concerned) < targets:
        code = "layer_missing"
    text, remedy = _TEXTS[code]
    notes = "; ".join(dict.fromkeys(finding.note for finding in concerned[:3]))
    where = f"{len(concerned)} of {targets} tensors of {model}"
    return Diagnosis(code=code, layers=layers, text=f"{text}: {notes} ({where}).", remedy=remedy)

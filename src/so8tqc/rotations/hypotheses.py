"""Known mistakes as hypotheses about a stored weight, and which of them explains it.

Everything is oriented (see ``fold.orient``): a right fold stores M·B, rounded once. A mistake is
a matrix M̃ and blocks B̃ that were folded instead. Errors are compared by maximum likelihood: under
rounding noise the true hypothesis has the smallest ‖M' − M̃·B̃‖_F, and one that differs from it by
‖D‖_F beats it by chance only where the noise reaches ‖D‖/2 in D's direction. With σ the noise of
an element that is ‖D‖/2σ standard deviations, so hypotheses nearer than ``SEPARABLE``·σ are not
told apart by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from so8tqc.rotations.algebra import ulp
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.fold import rounded_product, to_storage
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import FloatArray, RotationSet, Target

if TYPE_CHECKING:
    import torch

SEPARABLE = 12.0
"""Hypotheses nearer than this many σ are not told apart: six standard deviations of a mistake."""

SAMPLE_ELEMENTS = 1 << 16
"""Elements on which hypotheses are ranked; the best is then verified on all."""

_CHUNK_ELEMENTS = 1 << 19
_ROUNDINGS = 16
"""Roundings of a product of two blocks, generously: in R, in W, in each of 8 products and sums."""

_COARSER = 6.0
"""Eight products summed in a precision err about 2.5 times as much as one rounding to it, in some
rows of a small matrix twice that."""

_WIDESPREAD = 0.01
"""Imprecise arithmetic shows in many elements, an edit may show in few."""


@dataclass(frozen=True)
class Hypothesis:
    """What may have been folded: M' = matrix·diag(blocks).

    Attributes:
        code: diagnosis code, see ``services.weights.diagnose``.
        note: for people.
        matrix: [rows, N·b], oriented.
        blocks: [N, b, b], not necessarily rotations.
    """

    code: str
    note: str
    matrix: torch.Tensor
    blocks: FloatArray

    @property
    def is_right(self) -> bool:
        """Whether it is the right fold of unrounded rotations."""
        return self.code == "storage_rounding" and not self.note


class Precision(NamedTuple):
    """Arithmetic that a fold may have been computed in."""

    name: str
    unit_roundoff: float


PRECISIONS = (
    Precision("float32", 2.0**-24),
    Precision("float16", 2.0**-11),
    Precision("bfloat16", 2.0**-8),
)


def oriented(blocks: FloatArray, rotations: RotationSet) -> FloatArray:
    """R as the source defines it → B of ``fold.orient``, by the set's convention and site."""
    straight = (rotations.convention == "column") == rotations.site.is_before
    return blocks if straight else np.ascontiguousarray(blocks.transpose(0, 2, 1))


def turned(rotations: RotationSet, target: Target) -> FloatArray:
    """B of ``fold.orient`` at a target: what a right fold multiplies by."""
    c = rotations.column_blocks(target)
    return c if rotations.site.is_before else np.ascontiguousarray(c.transpose(0, 2, 1))


def hypotheses(
    target: Target,
    matrices: Mapping[Target, torch.Tensor],
    rotations: RotationSet,
    recovered: FloatArray | None,
) -> Iterator[Hypothesis]:
    """What may have been stored at a target, the right fold first.

    Args:
        target: whose weight is examined.
        matrices: target → base weight, oriented; of every target with a tensor like this one.
        rotations: what should have been folded.
        recovered: [N, b, b] rotations recovered from the stored weight, from which a
            permutation of the blocks is guessed; None to leave that out.
    """
    m = matrices[target]
    r = {t: turned(rotations, t) for t in rotations}
    b = r[target]
    yield Hypothesis("storage_rounding", "", m, b)
    one = np.broadcast_to(np.eye(b.shape[1]), b.shape)
    yield Hypothesis("not_baked", "the weight is the base's", m, one)
    yield Hypothesis("transposed", "Rᵀ was folded instead of R", m, _transposed(b))
    yield Hypothesis("double_baked", "R was folded twice", m, b @ b)
    yield Hypothesis("double_baked", "Rᵀ was folded twice", m, _transposed(b @ b))
    for note, blocks in _other_parametrizations(target, rotations):
        yield Hypothesis("wrong_parametrization", note, m, blocks)
    for other in rotations:
        if other != target and r[other].shape == b.shape:
            yield Hypothesis("layers_permuted", f"the rotation of {other} was folded", m, r[other])
            note = f"the transposed rotation of {other} was folded"
            yield Hypothesis("layers_permuted", note, m, _transposed(r[other]))
        if other != target and other in matrices and matrices[other].shape == m.shape:
            note = f"the baked weight of {other} stands here"
            yield Hypothesis("layers_permuted", note, matrices[other], r[other])
    if recovered is not None:
        order = np.linalg.norm(recovered[:, None] - b[None], axis=(2, 3)).argmin(axis=1)
        yield Hypothesis("blocks_permuted", _describe_order(order), m, b[order])
    for note, blocks in _rounded(target, rotations):
        yield Hypothesis("storage_rounding", note, m, blocks)


def nearest_hypotheses(stored: torch.Tensor, candidates: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The hypothesis with the smallest error, and all that are not told apart from it, in order.

    Errors are taken on a sample of rows, see the module's docstring.

    Args:
        stored: [rows, N·b], the weight under test, oriented, finite.
        candidates: at least one.
    """
    import torch

    rows = _sample(stored)
    w = stored[rows].double()
    products = [rounded_product(h.matrix[rows], h.blocks) for h in candidates]
    errors = torch.stack([(w - product).norm() for product in products])
    best = int(errors.argmin())
    rounding = ulp(products[0], stored.dtype).norm() / 12**0.5  # uniform on ± half a unit
    reach = SEPARABLE * float(errors[best].maximum(rounding)) / w.numel() ** 0.5
    return [
        candidate
        for candidate, product in zip(candidates, products, strict=True)
        if float((product - products[best]).norm()) <= reach
    ]


def relative_error(stored: torch.Tensor, hypothesis: Hypothesis) -> float:
    """‖M' − M̃·B̃‖_F / ‖M̃·B̃‖_F over all rows."""
    error, total = 0.0, 0.0
    for part in row_chunks(stored):
        product = rounded_product(hypothesis.matrix[part], hypothesis.blocks)
        error += float((stored[part].double() - product).square().sum())
        total += float(product.square().sum())
    return (error / total) ** 0.5 if total else float(error > 0)


def arithmetic_of(stored: torch.Tensor, hypothesis: Hypothesis) -> Precision | None:
    """The finest arithmetic in which a fold of this hypothesis may have given these values.

    Every element must lie within half a unit of the storage dtype plus the roundings of the
    arithmetic; for 16-bit arithmetic the error of every row and of every block must also be
    of the size that such arithmetic causes, and be widespread.

    Returns:
        None if something else than rounding happened.
    """
    import torch

    within = dict.fromkeys(PRECISIONS, True)
    worst_row = dict.fromkeys(PRECISIONS, 0.0)
    blocks, size, _ = hypothesis.blocks.shape
    error_of_block = torch.zeros(blocks, dtype=torch.float64)
    noise_of_block = {p: torch.zeros(blocks, dtype=torch.float64) for p in PRECISIONS}
    beyond, total = 0, 0
    columns = torch.from_numpy(np.linalg.norm(hypothesis.blocks, axis=1)).reshape(-1)
    for part in row_chunks(stored):
        m = hypothesis.matrix[part].double()
        product = rounded_product(m, hypothesis.blocks)
        error = (stored[part].double() - product).abs()
        norms = m.reshape(-1, blocks, size).norm(dim=2).repeat_interleave(size, dim=1) * columns
        half = ulp(product, stored.dtype) / 2
        squares = error.square()
        error_of_block += _block_sums(squares, size)
        for p in PRECISIONS:
            outside = error > half + _ROUNDINGS * p.unit_roundoff * norms
            within[p] &= not bool(outside.any())
            if p is PRECISIONS[0]:
                beyond += int(outside.sum())
                total += outside.numel()
            coarse = to_storage(product, getattr(torch, p.name))
            noise = (coarse.double() - product).square() + (half / 3**0.5).square()
            noise_of_block[p] += _block_sums(noise, size)
            worst_row[p] = max(worst_row[p], _largest_ratio(squares.sum(1), noise.sum(1)))
    for p in PRECISIONS:
        sized = (
            worst_row[p] <= _COARSER
            and _largest_ratio(error_of_block, noise_of_block[p]) <= _COARSER
            and beyond >= _WIDESPREAD * total
        )
        if within[p] and (p is PRECISIONS[0] or sized):
            return p
    return None


def row_chunks(matrix: torch.Tensor) -> Iterator[slice]:
    """Slices of rows that keep float64 copies small."""
    step = max(1, _CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def _sample(matrix: torch.Tensor) -> slice:
    """Evenly spaced rows."""
    wanted = max(1, SAMPLE_ELEMENTS // matrix.shape[1])
    return slice(0, None, max(1, matrix.shape[0] // wanted))


def _block_sums(values: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, N·b] → [N]."""
    return values.reshape(values.shape[0], -1, size).sum(dim=(0, 2))


def _largest_ratio(squares: torch.Tensor, noise: torch.Tensor) -> float:
    """Largest √(squares/noise); 0/0 is 0."""
    import torch

    ratio = torch.where(squares > 0, squares / noise, 0.0)
    return float(ratio.max().sqrt())


def _transposed(blocks: FloatArray) -> FloatArray:
    return blocks.transpose(0, 2, 1)


def _other_parametrizations(
    target: Target, rotations: RotationSet
) -> Iterator[tuple[str, FloatArray]]:
    """Rotations by every other parametrization; where none is declared, R is taken for theta."""
    if target in rotations.strength:  # I + s·R: no other parametrization is known of it
        return
    theta = rotations.theta.get(target)
    if theta is None:
        theta = rotations.blocks[target]
    for other in Parametrization:
        if other is rotations.parametrization:
            continue
        r = oriented(rotation_blocks(theta, other), rotations)
        if np.isfinite(r).all():
            made = "theta itself was folded" if other is Parametrization.MATRIX else f"{other}"
            note = made if other is Parametrization.MATRIX else f"R was made by {other}"
            yield note, r
            yield f"{note}, transposed", _transposed(r)


def _rounded(target: Target, rotations: RotationSet) -> Iterator[tuple[str, FloatArray]]:
    """R, or theta, rounded to a 16-bit type before the fold."""
    import torch

    def cast(values: FloatArray, dtype: str) -> FloatArray:
        array: FloatArray = (
            to_storage(torch.from_numpy(np.ascontiguousarray(values)), getattr(torch, dtype))
            .double()
            .numpy()
        )
        return array

    theta = None if target in rotations.strength else rotations.theta.get(target)
    for dtype in ("bfloat16", "float16"):
        blocks = turned(rotations, target)
        yield f"R was rounded to {dtype} before the fold", cast(blocks, dtype)
        if theta is not None:
            r = rotation_blocks(cast(theta, dtype), rotations.parametrization)
            note = f"theta was rounded to {dtype} before R was made"
            yield note, oriented(r, rotations)


def _describe_order(order: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    here = np.arange(order.size)
    if np.array_equal(order, here[::-1]):
        return f"the {order.size} blocks were folded in reverse"
    shift = int(order[0])
    if np.array_equal(order, (here + shift) % order.size):
        return f"the {order.size} blocks were folded rolled by {shift}"
    moved = np.flatnonzero(order != here)
    listed = ", ".join(map(str, moved[:8])) + (" …" if moved.size > 8 else "")
    return f"block(s) {listed} of {order.size} stand in another block's place"

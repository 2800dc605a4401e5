"""The fold itself: every stored element is the exact product, rounded once.

Conventions. Torch stores ``Linear.weight`` W as [out, in] and computes y = W·x + b
for a column vector x. With the gate's column blocks C (see
``RotationSet.column_blocks``; C = R for convention ``column``, Rᵀ for ``row``):

* input site: y = W·(C·x) + b = (W·C)·x + b, so W' = W·C and b is unchanged. Column
  block k of W' is ``W[:, bk : b(k+1)] @ C_k``.
* output site: y = C·(W·x + b) = (C·W)·x + C·b, so W' = C·W and b' = C·b.

All of them are one computation, M' = M·B, on a suitable view M of the stored
tensor and suitable blocks B: see :func:`orient`.

Rounding. The float64 sum s of b products differs from the exact one by at most
e = γ·‖m‖·‖c‖ (γ = n·u/(1 − n·u), n = b, u = 2⁻⁵³; Higham, Accuracy and Stability of
Numerical Algorithms, §3.1, with Cauchy–Schwarz for the sum of absolute products).
If s − e and s + e round to the same stored value, so does the exact sum. Ziv's strategy
in three steps: one bound for the whole chunk tells most elements apart; the suspects
get bounds of their own; those that are still open, a handful, are decided with rational
arithmetic. So the stored bytes do not depend on the order of summation, hence not on
BLAS, threads or CPU. A zero is always stored as +0: the exact sum has no signed zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from so8tqc.errors import ModelError, RotationError, ShapeError
from so8tqc.rotations.enums import Site
from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch

    Number = TypeVar("Number", float, torch.Tensor)
else:
    Number = TypeVar("Number")

_UNIT_ROUNDOFF = 2.0**-53
_SMALLEST_FLOAT64 = 2.0**-1074
_LONG = 64
"""Terms from which on a sum is worth more than one try."""

_SAFE_SMALLEST, _SAFE_LARGEST = 2.0**-900, 2.0**900
"""Products between them split without underflow or overflow."""


def orient(
    stored: torch.Tensor, column_blocks: FloatArray, site: Site, *, transposed: bool = False
) -> tuple[torch.Tensor, FloatArray]:
    """The view M of a stored tensor and the blocks B for which the fold is M' = M·B.

    With C the gate's column blocks, W the [out, in] weight:

    ========  ===================  ==========================  ========  =====
    site      stored               fold                        M         B
    ========  ===================  ==========================  ========  =====
    input     W [out, in]          W' = W·C                    W         C
    input     S = Wᵀ [in, out]     S' = Cᵀ·S, so S'ᵀ = Sᵀ·C    Sᵀ        C
    output    W [out, in]          W' = C·W, so W'ᵀ = Wᵀ·Cᵀ    Wᵀ        Cᵀ
    output    S = Wᵀ [in, out]     S' = S·Cᵀ                   S         Cᵀ
    output    bias b [out]         b' = C·b, so b'ᵀ = bᵀ·Cᵀ    b[None]   Cᵀ
    ========  ===================  ==========================  ========  =====

    Args:
        stored: the tensor as it lies in the file; M is a view, so writing into M's
            counterpart in another file patches that file's tensor.
        column_blocks: [N, b, b].
        site: where the gate sits.
        transposed: the weight is stored [in, out] (Conv1D).
    """
    blocks = column_blocks if site.is_before else column_blocks.transpose(0, 2, 1)
    if stored.ndim == 1:
        return stored[None], blocks
    return (stored.T if blocks_along_rows(site, transposed=transposed) else stored), blocks


def blocks_along_rows(site: Site, *, transposed: bool) -> bool:
    """Whether a block mixes rows of the stored matrix (:func:`orient` then gives its transpose)."""
    return site.is_before == transposed


def _row_and_column(row: int, column: int) -> str:
    return f"row {row}, column {column}"


def fold(
    matrix: torch.Tensor,
    blocks: FloatArray,
    dtype: torch.dtype,
    *,
    element: Callable[[int, int], str] = _row_and_column,
) -> torch.Tensor:
    """M' = M·B with B = diag(blocks), each element rounded once to ``dtype``.

    Args:
        matrix: [rows, N·b], any floating dtype.
        blocks: [N, b, b] float64; column block k of the result is M_k @ blocks[k].
        dtype: storage dtype of the result.
        element: how a message names M's element at a row and a column.

    Returns:
        [rows, N·b] in ``dtype``.

    Raises:
        ShapeError: the blocks do not cover the columns.
        ModelError: the matrix holds a NaN or an infinity.
        RotationError: a finite product does not fit the dtype (overflow to infinity).
    """
    import torch

    m, b = blockwise(matrix, blocks)
    smallest, largest = (float(end) for end in torch.aminmax(matrix))
    norm = math.sqrt(b.shape[1]) * max(-smallest, largest)  # of a row of a block, at most
    if not math.isfinite(norm):
        _refuse_non_finite(m, element)
    reach = norm * float(b.norm(dim=1).max())  # no element of the product is larger
    product = blockwise_product(m, blocks)
    folded, suspects = rounded_suspects(product, _error_bound(reach, b.shape[1]), dtype)
    if suspects.shape[0]:
        _decide(folded, product, m, b, suspects)
    if reach >= torch.finfo(dtype).max:
        _refuse_overflow(folded, product, element)
    folded += 0.0  # −0 becomes +0
    return flat(folded)


def blockwise(matrix: torch.Tensor, blocks: FloatArray) -> tuple[torch.Tensor, torch.Tensor]:
    """M and B in float64, ready for one batched product per block, never a dense D×D matrix.

    Args:
        matrix: [rows, N·b], any floating dtype.
        blocks: [N, b, b] float64.

    Returns:
        [N, rows, b], the columns of M block by block, and [N, b, b].

    Raises:
        ShapeError: the blocks do not cover the columns.
    """
    import torch

    count, size, _ = blocks.shape
    if count * size != matrix.shape[1]:
        raise ShapeError(f"{count} blocks of {size} do not cover {matrix.shape[1]} features")
    return by_block(matrix, size), torch.from_numpy(np.ascontiguousarray(blocks))


def blockwise_product(m: torch.Tensor, blocks: FloatArray) -> torch.Tensor:
    """[N, rows, b] and [N, b, b], float64 → [N, rows, b]; on 8×8 faster than ``torch.bmm``."""
    import torch

    return torch.from_numpy(np.matmul(m.numpy(), blocks))


def by_block(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, N·b] → [N, rows, b] float64, the columns block by block."""
    import torch

    return matrix.to(torch.float64).reshape(matrix.shape[0], -1, size).transpose(0, 1)


def rounded_product(matrix: torch.Tensor, blocks: FloatArray) -> torch.Tensor:
    """M·B in float64, its sums rounded: [rows, N·b] and [N, b, b] → [rows, N·b].

    Raises:
        ShapeError: the blocks do not cover the columns.
    """
    import torch

    return flat(torch.bmm(*blockwise(matrix, blocks)))


def flat(blocked: torch.Tensor) -> torch.Tensor:
    """[N, rows, b] → [rows, N·b], the inverse of :func:`by_block`."""
    return blocked.transpose(0, 1).reshape(blocked.shape[1], -1)


def error_bounds(m: torch.Tensor, b: torch.Tensor, where: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Bounds on |float64 sum − exact sum| for some elements of m·b.

    Args:
        m: [N, rows, b] float64.
        b: [N, b, b] float64.
        where: block, row and column of each element, [S] each.

    Returns:
        [S] float64: γ·‖row of m‖·‖column of b‖, see :func:`_error_bound`.
    """
    k, i, j = where
    rows, columns = m[k, i], b[k, :, j]
    bound: torch.Tensor = _error_bound(rows.norm(dim=1) * columns.norm(dim=1), b.shape[1])
    return bound


def _error_bound(absolute_sum: Number, terms: int) -> Number:
    """γ_n·Σ|m||b| and a little more.

    n is raised by 4 to cover the rounding of the norms themselves, and a few smallest subnormals
    cover underflow of products. Norms of float32 values neither overflow nor vanish in float64;
    those of float64 values may, towards infinity or zero: the first makes everything a suspect,
    the second needs the last term.
    """
    n = terms + 4
    gamma = n * _UNIT_ROUNDOFF / (1 - n * _UNIT_ROUNDOFF)
    return gamma * absolute_sum + n * _SMALLEST_FLOAT64


def rounded_suspects(
    product: torch.Tensor, bound: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product as torch rounds it, and the elements that may not be the exact one rounded.

    float32: those for which the ends of the error interval round differently. 16-bit types:
    torch converts through float32, rounding twice, which can only go wrong where the float32
    value is exactly halfway between two 16-bit values; and where it is not, the float64 error
    cannot matter either, as long as it is far below half a float32 ulp. So the halfway cases
    (one in 2^16 or 2^13), small values whose error is large beside them, and float16's
    subnormals, whose halfway points lie elsewhere, are told apart from the rest.

    Returns:
        [N, rows, b] in ``dtype``, and [S, 3] indices.
    """
    import torch

    if dtype.itemsize != 2:
        return product.to(dtype), _indices(
            (product - bound).to(dtype).ne((product + bound).to(dtype))
        )
    dropped = 16 if dtype is torch.bfloat16 else 13
    single = product.to(torch.float32)
    folded = single.to(dtype)
    found = (single.view(torch.int32) & ((1 << dropped) - 1)).eq(1 << (dropped - 1))
    # below twice the smallest normal number the spacing no longer follows the exponent
    small = max(1.01 * bound * 2.0**26, 2 * torch.finfo(dtype).tiny)
    if float(single.abs_().min()) < small:
        found.logical_or_(single.lt(small))
    return folded, _indices(found)


def _indices(found: torch.Tensor) -> torch.Tensor:
    """[S, ndim] indices of what is true: ``nonzero``, faster where little is."""
    import torch

    flat = np.flatnonzero(found.numpy())
    return torch.from_numpy(np.stack(np.unravel_index(flat, tuple(found.shape)), axis=1))


def _decide(
    folded: torch.Tensor,
    product: torch.Tensor,
    m: torch.Tensor,
    b: torch.Tensor,
    suspects: torch.Tensor,
) -> None:
    """Round the suspects' exact products, in place in ``folded``."""
    where = suspects.unbind(1)
    values, bounds = product[where], error_bounds(m, b, where)
    low, high = (to_storage(values + end, folded.dtype) for end in (-bounds, bounds))
    folded[where] = low
    for k, i, j in suspects[low.ne(high)].tolist():
        folded[k, i, j] = _rounded_dot(m[k, i], b[k, :, j], folded.dtype)


def _rounded_dot(row: torch.Tensor, column: torch.Tensor, dtype: torch.dtype) -> float:
    """Σ m·b rounded once to ``dtype``.

    Long sums (a dense matrix in front of the output head) are first taken to the last bit of
    float64, products split into two parts each that are exact (Dekker, Numerische Mathematik 18,
    1971) and summed without error; only what lies that near to a boundary needs rational
    arithmetic, which costs a thousand times as much.
    """
    if row.shape[0] >= _LONG:
        parts = exact_products(row.numpy(), column.numpy())
        near = math.fsum(np.concatenate(parts).tolist()) if parts is not None else math.nan
        if math.isfinite(near):
            reach = 2 * _UNIT_ROUNDOFF * abs(near)
            ends = torch_float64([near - reach, near + reach])
            low, high = to_storage(ends, dtype).tolist()
            if low == high:
                return float(low)
    return round_once(_exact_dot(row.tolist(), column.tolist()), dtype)


def torch_float64(values: list[float]) -> torch.Tensor:
    """A float64 tensor."""
    import torch

    return torch.tensor(values, dtype=torch.float64)


def exact_products(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """(p, e) with a·b = p + e exactly; None where a product leaves the range in which it is."""
    from so8tqc.rotations.double_double import two_product

    with np.errstate(all="ignore"):
        p, e = two_product(a, b)
    inside = (p == 0) | ((np.abs(p) > _SAFE_SMALLEST) & (np.abs(p) < _SAFE_LARGEST))
    zero = (p == 0) & (a != 0) & (b != 0)
    return (p, e) if bool(inside.all()) and not bool(zero.any()) else None


def _exact_dot(m: list[float], b: list[float]) -> Fraction:
    return sum((Fraction(x) * Fraction(y) for x, y in zip(m, b, strict=True)), Fraction(0))


def to_storage(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 → ``dtype``, rounded once.

    torch converts float64 to a 16-bit type through float32, which rounds twice: a value
    just above a tie becomes the tie, and then the even neighbour. Rounding the first
    step *to odd* (an inexact result takes the neighbour whose last bit is one) keeps
    the information that something was cut off, so the second step is right whenever
    float32 has two bits more than the target (Boldo and Melquiond, IEEE Transactions on
    Computers 57, 2008).
    """
    import torch

    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    nearest = values.to(torch.float32)
    bits = nearest.view(torch.int32)
    error = torch.nan_to_num(values - nearest.to(torch.float64), nan=0.0)
    even = (bits & 1).eq(0) & error.ne(0) & torch.isfinite(nearest)
    # sign-magnitude: one more bit is away from zero
    away = error.gt(0).ne(torch.signbit(nearest))
    odd = bits + torch.where(away, 1, -1).to(torch.int32)
    return torch.where(even, odd, bits).view(torch.float32).to(dtype)


def round_once(exact: Fraction, dtype: torch.dtype) -> float:
    """Round a rational to the nearest value of ``dtype``, ties to even.

    Rounding through float64 would round twice, so the neighbours in ``dtype`` of the
    float64 approximation are compared with the exact value. Infinity stands where the
    next number after the largest would be, as IEEE 754 §4.3.1 has it.
    """
    import torch

    info = torch.finfo(dtype)
    largest = Fraction(info.max)
    beyond = largest + (largest - Fraction(_step(info.max, -1, dtype)))
    near = min(max(float(exact), info.min), info.max)
    near = float(torch.tensor(near, dtype=torch.float64).to(dtype))
    near = min(max(near, info.min), info.max)
    candidates = [
        (Fraction(value) if np.isfinite(value) else (beyond if value > 0 else -beyond), value)
        for value in (_step(near, -1, dtype), near, _step(near, 1, dtype))
    ]
    best = min(abs(value - exact) for value, _ in candidates)
    nearest = [stored for value, stored in candidates if abs(value - exact) == best]
    if len(nearest) == 1:
        return nearest[0]
    return next(value for value in nearest if _is_even(value, dtype))


def _step(value: float, direction: int, dtype: torch.dtype) -> float:
    """The next representable value below (-1) or above (+1)."""
    import torch

    start = torch.tensor(value, dtype=dtype)
    return float(torch.nextafter(start, torch.tensor(direction * float("inf"), dtype=dtype)))


def _is_even(value: float, dtype: torch.dtype) -> bool:
    """Whether the last bit of the significand is zero (infinity counts as even)."""
    import torch

    stored = torch.tensor([value], dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.element_size()]
    return int(stored.view(integer).item()) & 1 == 0


def _refuse_non_finite(m: torch.Tensor, element: Callable[[int, int], str]) -> None:
    import torch

    found = torch.isfinite(m).logical_not_().nonzero()
    if found.shape[0]:  # else the norm of huge float64 values overflowed: everything is suspect
        block, row, column = found[0].tolist()
        raise ModelError(
            f"the weights hold a NaN or an infinity: {element(row, block * m.shape[2] + column)} "
            f"is {float(m[block, row, column])}"
        )


def _refuse_overflow(
    folded: torch.Tensor, product: torch.Tensor, element: Callable[[int, int], str]
) -> None:
    import torch

    overflow = torch.isinf(folded) & torch.isfinite(product)
    if bool(overflow.any()):
        block, row, column = overflow.nonzero()[0].tolist()
        raise RotationError(
            f"{element(row, block * folded.shape[2] + column)}: "
            f"{float(product[block, row, column]):.6g} does not fit {folded.dtype}",
            remedy="Use --baked-dtype bfloat16 or float32.",
        )

"""Judging a fold from the files alone, in float64; no model is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from so8tqc.rotations.fold import blockwise, blockwise_product, error_bounds
from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 1 << 16  # 512 KiB in float64: the arrays stay in the cache
_HALF_ULP = 0.5
_EXPONENT_BITS = 0x7FF << 52


@dataclass(frozen=True)
class FoldComparison:
    """A stored tensor against the exact fold.

    Attributes:
        max_ulp: largest distance from the exact fold in units in the last place of
            the stored dtype; at most 0.5 if every element is correctly rounded.
        relative_error: ‖M'_stored − M·B‖_F / ‖M·B‖_F.
        effect: ‖M'_stored − M‖_F / ‖M‖_F, what the bake changed; 0 if nothing was baked.
        expected_effect: ‖M·B − M‖_F / ‖M‖_F, what a right bake changes.
        non_finite: number of stored elements that are NaN or infinite.
    """

    max_ulp: float
    relative_error: float
    effect: float
    expected_effect: float
    non_finite: int


def compare_fold(matrix: torch.Tensor, stored: torch.Tensor, blocks: FloatArray) -> FoldComparison:
    """Compare a stored M' with M·B.

    Args:
        matrix: [rows, N·b], the base tensor, oriented (see ``fold.orient``).
        stored: [rows, N·b], the candidate's tensor in its stored dtype, oriented alike.
        blocks: [N, b, b] float64.
    """

    error, product_norm, effect, base_norm, expected = (0.0,) * 5
    max_ulp, non_finite = 0.0, 0
    step = max(1, _CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        m, b = blockwise(matrix[start : start + step], blocks)
        w, _ = blockwise(stored[start : start + step], blocks)
        product = blockwise_product(m, blocks)
        difference = w - product
        ulps, bad = _largest_ulps(difference, product, m, b, stored.dtype)
        max_ulp, non_finite = max(max_ulp, ulps), non_finite + bad
        error = math.hypot(error, _norm(difference))
        product_norm = math.hypot(product_norm, _norm(product))
        effect = math.hypot(effect, _norm(w.sub_(m)))
        expected = math.hypot(expected, _norm(product.sub_(m)))
        base_norm = math.hypot(base_norm, _norm(m))
    return FoldComparison(
        max_ulp=max_ulp,
        relative_error=_ratio(error, product_norm),
        effect=_ratio(effect, base_norm),
        expected_effect=_ratio(expected, base_norm),
        non_finite=non_finite,
    )


def _largest_ulps(
    difference: torch.Tensor,
    product: torch.Tensor,
    m: torch.Tensor,
    b: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[float, int]:
    """(Largest |stored − exact| in ulps, count of non-finite differences), of [N, rows, b].

    What the float64 sum itself may be off by is taken off, where it matters: where the
    distance seems to exceed the half ulp of a correct rounding.
    """
    import torch

    ulps = difference.abs().div_(ulp(product, dtype))
    largest = float(ulps.max())  # a NaN prevails
    if largest <= _HALF_ULP:
        return largest, 0
    finite = torch.isfinite(difference)
    beyond = (ulps.gt(_HALF_ULP) & finite).nonzero().unbind(1)
    bounds = error_bounds(m, b, beyond) / ulp(product[beyond], dtype)
    ulps[beyond] = (ulps[beyond] - bounds).clamp_min_(_HALF_ULP)
    bad = int((~finite).sum())
    return (math.inf if bad else float(ulps.max())), bad


def _norm(values: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.nan if math.isnan(part) or part == 0 else math.inf)


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unit in the last place of ``dtype`` at each float64 value: 2^(max(e, e_min) − p + 1).

    e is the exponent of the value (2^e ≤ |x| < 2^(e+1)), p the precision in bits; below
    the normal range the spacing is that of the subnormals.
    """
    import torch

    info = torch.finfo(dtype)
    # the exponent bits alone are 2^e as a float64 (0 for float64's own subnormals)
    exponent = values.contiguous().view(torch.int64).bitwise_and(_EXPONENT_BITS)
    return exponent.view(torch.float64).clamp_min(info.tiny).mul_(info.eps)

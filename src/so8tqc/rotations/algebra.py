"""Judging a fold from the files alone, in float64; no model is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from so8tqc.rotations.fold import exact_product
from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 1 << 19  # 4 MiB in float64


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
    import torch

    error, product_sum, effect, base_sum, expected = torch.zeros(5, dtype=torch.float64)
    max_ulp, non_finite = 0.0, 0
    step = max(1, _CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        m = matrix[start : start + step].to(torch.float64)
        w = stored[start : start + step].to(torch.float64)
        product, bound = (_flat(part) for part in exact_product(m, blocks))
        finite = torch.isfinite(w)
        non_finite += int((~finite).sum())
        ulps = ((w - product).abs() - bound).clamp_min(0) / ulp(product, stored.dtype)
        max_ulp = max(max_ulp, float(torch.where(finite, ulps, torch.inf).max()))
        error += (w - product).square().sum()
        product_sum += product.square().sum()
        effect += (w - m).square().sum()
        base_sum += m.square().sum()
        expected += (product - m).square().sum()
    return FoldComparison(
        max_ulp=max_ulp,
        relative_error=float((error / product_sum).sqrt()),
        effect=float((effect / base_sum).sqrt()),
        expected_effect=float((expected / base_sum).sqrt()),
        non_finite=non_finite,
    )


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unit in the last place of ``dtype`` at each float64 value: 2^(max(e, e_min) − p + 1).

    e is the exponent of the value (2^e ≤ |x| < 2^(e+1)), p the precision in bits; below
    the normal range the spacing is that of the subnormals.
    """
    import torch

    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)  # |x| = f·2^exponent with f in [1/2, 1)
    smallest = torch.frexp(torch.tensor(info.tiny, dtype=torch.float64))[1]
    return torch.ldexp(torch.full_like(values, info.eps), exponent.maximum(smallest) - 1)


def _flat(blocked: torch.Tensor) -> torch.Tensor:
    """[N, rows, b] → [rows, N·b]."""
    return blocked.transpose(0, 1).reshape(blocked.shape[1], -1)

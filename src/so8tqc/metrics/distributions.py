"""Next-token distributions of a block of positions, and divergences between two of them.

With logits z (reference) and w (candidate), p and q their softmax, L_z and L_w their
log-normalisers, d = w − z, x = ln(q/p) = d − (L_w − L_z) and φ(x) = e^x − 1 − x ≥ 0:

* KL(p‖q) = −Σ p x = Σ p φ(x), since Σ p e^x = Σ q = 1 = Σ p;
* KL(q‖p) = Σ q x = Σ q φ(−x), likewise;
* with t = |x|/2, the Jensen-Shannon divergence JS = ½ KL(p‖(p+q)/2) + ½ KL(q‖(p+q)/2)
  = Σ (p + q)/2 · (t tanh t − ln cosh t).

No term is negative, so that nothing cancels: KL of 1e-13 is as accurate as of 1. Where |x| is small
the terms are power series, and it hardly matters that the log-normalisers are rounded: an error δ
of x changes a term by δ p (e^x − 1), of which the sum over all tokens is zero. Elsewhere p φ(x) is
q − p − p x, which needs no e^x that may overflow, and δ matters in proportion.

The kernels that compute this are ``metrics.cpu_kernels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.columns import SIDE_ROW, Side, as_records

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]

WORKING_SET_BYTES = 1 << 20
"""Rows are taken so few at a time that their weights stay in the CPU's caches."""


class Workspace:
    """A float64 block that is used again and again.

    A fresh block of a megabyte comes from the operating system page by page, which
    costs several times the arithmetic done on it. What ``take`` returns is valid
    until the next is taken.
    """

    def __init__(self) -> None:
        self._block = np.empty((0, 0))

    def take(self, height: int, width: int) -> FloatArray:
        """An uninitialised block [height, width]."""
        if self._block.shape[0] < height or self._block.shape[1] != width:
            self._block = np.empty((height, width))
        return self._block[:height]


@dataclass(frozen=True)
class Distribution:
    """One model's side of a block of rows, computed once and compared many times.

    Attributes:
        logits: [t, V] float32 or float64.
        weights: [t, V] float64, e^(z − max z).
        numbers: [t, len(Side)] float64, by the positions of ``columns.Side``.
        leaders: [t, 5] int64, the most likely tokens in order, of equal ones the first before the
            others; V where there are fewer.
        targets: [t] int64, the token that really follows.
    """

    logits: npt.NDArray[np.floating]
    weights: FloatArray
    numbers: FloatArray
    leaders: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """[t], whether all logits of a row are finite, and their differences: else the entropy is
        not, either."""
        return np.isfinite(self.numbers[:, Side.ENTROPY])


def distribution(
    logits: torch.Tensor, targets: torch.Tensor, workspace: Workspace | None = None
) -> Distribution:
    """Softmax and what follows from it.

    Args:
        logits: [t, V], any float dtype.
        targets: [t] the token that really follows.
        workspace: where the weights live; None for their own.

    Raises:
        ValueError: there are more or fewer targets than rows.
        IndexError: a target is not in the vocabulary.
    """
    import torch

    from so8tqc.metrics import cpu_kernels as kernels

    height, width = logits.shape
    goal = targets.numpy().astype(np.int64, copy=False)
    if goal.shape != (height,):
        raise ValueError(f"{goal.shape} targets for {height} rows")
    if height and not 0 <= goal.min() <= goal.max() < width:
        raise IndexError(f"a token is not among the {width} of the vocabulary")
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous().numpy()
    weights = (workspace or Workspace()).take(height, width)
    numbers = np.empty((height, len(Side)))
    leaders = np.empty((height, kernels.LEADERS), np.int64)
    kernels.side_rows(z, goal, weights, as_records(numbers, SIDE_ROW), leaders)
    return Distribution(z, weights, numbers, leaders, goal)


def rows_per_block(vocab_size: int) -> int:
    """How many rows of weights fit the working set; at least one."""
    return max(1, WORKING_SET_BYTES // (8 * vocab_size))

"""Steps that add elementwise products of two matrices to a weight (LoHa, LoKr).

Each of the two matrices is stored, or is a product of two thin ones that is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.adapters import dyadic as dy
from so8tqc.adapters.dyadic import Dyadic, dyadic
from so8tqc.adapters.steps import TINY, Chunk, Columns, Exact, gamma
from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Factor:
    """A matrix, or a product L·R.

    A sum of r products is off by at most γ_r·‖L_i‖·‖R_j‖.

    Attributes:
        left: the matrix [m, n], or L [m, r]; float64.
        right: R [r, n]; None: there is none.
    """

    left: FloatArray
    right: FloatArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        last = self.left if self.right is None else self.right
        return self.left.shape[0], last.shape[1]

    @property
    def any(self) -> bool:
        """Whether it is not zero throughout."""
        return bool(self.left.any()) and (self.right is None or bool(self.right.any()))

    def rows(self, rows: Columns) -> tuple[torch.Tensor, float, float]:
        """Some rows [·, n] in float64, a bound on their errors, and one on their magnitudes."""
        import torch

        left = torch.from_numpy(self.left[rows])
        if self.right is None:
            return left, 0.0, float(left.abs().max())
        reach = float(left.norm(dim=1).max()) * self._reach * (1 + 1e-9)
        return left @ torch.from_numpy(self.right), gamma(left.shape[1]) * reach + TINY, reach

    def exact(self, row: int, columns: Columns) -> Dyadic:
        """Some elements of a row, exactly."""
        if self.right is None:
            return dyadic(self.left[row, columns])
        return dy.matmul(dyadic(self.left[row : row + 1]), dyadic(self.right[:, columns]))[0]

    @cached_property
    def _reach(self) -> float:
        """Largest ‖R_j‖."""
        assert self.right is not None
        return float(np.linalg.norm(self.right, axis=0).max(initial=0.0))


@dataclass(frozen=True)
class AddProducts:
    """W + s·P∘Q, or W + s·P⊗Q: each element of the change is a product of two.

    Of P⊗Q, element (i, j) is P[i div m, j div n]·Q[i mod m, j mod n], Q being [m, n]. With p and q
    known within e_p and e_q the change is off by at most |s|·(|p|·e_q + |q|·e_p + e_p·e_q) and four
    roundings.

    Attributes:
        first: P.
        second: Q.
        scale: s.
        kronecker: P⊗Q.
    """

    first: Factor
    second: Factor
    scale: float
    kronecker: bool = False
    row_multiple: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change."""
        (a, b), (m, n) = self.first.shape, self.second.shape
        return (a * m, b * n) if self.kronecker else (a, b)

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        rows = np.arange(chunk.rows.start, chunk.rows.stop)
        outer, inner = self._indices(rows, axis=0)
        p, p_error, p_most = self.first.rows(outer)
        q, q_error, q_most = self.second.rows(inner)
        if self.kronecker:
            product = p[:, :, None] * q[:, None, :]
            change = product.reshape(len(rows), -1) * self.scale
        else:
            change = p * q * self.scale
        largest, size = chunk.largest, abs(self.scale)
        most = size * (p_most + p_error) * (q_most + q_error) * (1 + 1e-9)
        chunk.value.add_(change)
        chunk.bounded(None)
        chunk.error += size * (p_most * q_error + q_most * p_error + p_error * q_error) * (1 + 1e-9)
        chunk.error += gamma(4) * (most + largest + chunk.error) + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""
        scale = dyadic(np.array(self.scale))

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            (i,), (k,) = self._indices(np.array([row]), axis=0)
            j, m = self._indices(columns, axis=1)
            product = dy.multiply(self.first.exact(int(i), j), self.second.exact(int(k), m))
            return dy.add(before(row, columns, bits), dy.multiply(product, scale))

        return values

    def _indices(self, places: Columns, axis: int) -> tuple[Columns, Columns]:
        """Where P's and Q's elements stand for these rows or columns."""
        if not self.kronecker:
            return places, places
        size = self.second.shape[axis]
        return places // size, places % size


@dataclass(frozen=True)
class ScaleColumns:
    """W·diag(d): one product an element.

    Attributes:
        factors: d [in] float64.
    """

    factors: FloatArray
    row_multiple: int = 1

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        largest = float(np.abs(self.factors).max(initial=0.0))
        chunk.value.mul_(torch.from_numpy(self.factors))
        chunk.bounded(None)
        chunk.error = largest * chunk.error * (1 + gamma(1)) + gamma(1) * chunk.largest + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            return dy.multiply(before(row, columns, bits), dyadic(self.factors[columns]))

        return values

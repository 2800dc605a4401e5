"""What a step of an adapter does to a weight: in float64 within a bound, and exactly.

Bounds. u = 2⁻⁵³, γ_n = n·u/(1 − n·u). A float64 sum of n products, in any order, differs from the
exact one by at most γ_n·Σ|a||b| (Higham, Accuracy and Stability of Numerical Algorithms, §3.1); a
computed value that is itself off by e adds Σ|e||b|. Each step takes a bound e on every element of
its input chunk and returns one for its output. Magnitudes are bounded by maxima and by sums of
absolute values of the parameters, so a bound costs a pass over the chunk, not over its products.

Every step can also be evaluated exactly, for some columns of one row: it asks its input for what it
needs, a column, a block, or the whole row. Parameters are float64 numbers and mean themselves: what
is trained is not always one (a Cayley transform, a cosine), and is then computed in double-double
and rounded once, so that it is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from so8tqc.adapters import dyadic as dy
from so8tqc.adapters.dyadic import Dyadic, dyadic
from so8tqc.errors import RotationError
from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch

U = 2.0**-53
TINY = 2.0**-1070
"""Covers underflow of products: a few of the smallest float64 numbers."""

Columns = npt.NDArray[np.intp]
Floats32 = npt.NDArray[np.float32]
Exact = Callable[[int, Columns, int], Dyadic]
"""(row, columns, bits) → the exact values of a row's columns, [columns]; ``bits`` of a root."""


def gamma(terms: int) -> float:
    """γ_n, and a little more for the roundings of the bounds themselves."""
    n = terms + 8
    return n * U / (1 - n * U)


class Chunk:
    """Some rows of W on their way to W'.

    Args:
        rows: which rows of the logical weight.
        weight: [out, in], the logical weight as stored.

    Attributes:
        value: [rows, in] float64; a step may overwrite it.
        error: bound on |value − exact|, of every element.
    """

    def __init__(self, rows: slice, weight: torch.Tensor) -> None:
        import torch

        self.rows = rows
        self.error = 0.0
        self._stored = weight[rows]
        self._value = self._stored.to(torch.float64, copy=True)
        self._largest: float | None = None

    @property
    def value(self) -> torch.Tensor:
        """[rows, in] float64; what changes it in place tells :meth:`bounded`."""
        return self._value

    @value.setter
    def value(self, new: torch.Tensor) -> None:
        self._value, self._largest = new, None

    @property
    def base(self) -> torch.Tensor:
        """[rows, in] float64, as stored: a copy."""
        import torch

        return self._stored.to(torch.float64, copy=True)

    @property
    def largest(self) -> float:
        """Bound on the magnitudes; a NaN or an infinity if there is one at the start."""
        import torch

        if self._largest is None:
            low, high = (float(end) for end in torch.aminmax(self._value))
            self._largest = math.nan if math.isnan(low) else max(-low, high)
        return self._largest

    def bounded(self, largest: float | None) -> None:
        """The value was changed in place; no magnitude is larger, None if that is not known."""
        self._largest = largest

    def again(self) -> Chunk:
        """The same rows, from the start."""
        new = Chunk.__new__(Chunk)
        new.rows, new.error, new._stored = self.rows, 0.0, self._stored
        new._value, new._largest = self.base, None
        return new


class Step(Protocol):
    """One step."""

    @property
    def row_multiple(self) -> int:
        """A chunk of rows must be whole groups of so many."""

    def apply(self, chunk: Chunk) -> None:
        """Do it, in place."""

    def exact(self, before: Exact, base: Exact, /) -> Exact:
        """The exact values after it, of those before it and of the stored weight."""


class AddLowRank:
    """W + s·B·A.

    r products a sum, one more with s, one addition: the value is off by at most
    γ_{r+2}·(|s|·Σ|B||A| + |W|), and Σ_k |B_ik||A_kj| ≤ ‖B_i‖·‖A_j‖ (Cauchy–Schwarz).

    The factors stay in the dtype in which they are stored, and are converted as they are used: of a
    large model there are hundreds.

    Args:
        left: B [out, r], any floating dtype.
        right: A [r, in], likewise.
        scale: s.
    """

    row_multiple = 1

    def __init__(
        self,
        left: torch.Tensor | FloatArray,
        right: torch.Tensor | FloatArray,
        scale: float = 1.0,
    ) -> None:
        import torch

        self._b = left if isinstance(left, torch.Tensor) else torch.from_numpy(left)
        self._a = right if isinstance(right, torch.Tensor) else torch.from_numpy(right)
        self.scale = scale

    @property
    def left(self) -> FloatArray:
        """B [out, r] float64."""
        values: FloatArray = self._b.double().contiguous().numpy()
        return values

    @property
    def right(self) -> FloatArray:
        """A [r, in] float64."""
        values: FloatArray = self._a.double().contiguous().numpy()
        return values

    @property
    def rank(self) -> int:
        """r."""
        return int(self._a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self._b.shape[0]), int(self._a.shape[1])

    def times(self, factor: float) -> AddLowRank:
        """The same with s times ``factor``."""
        return AddLowRank(self._b, self._a, self.scale * factor)

    @property
    def narrow(self) -> bool:
        """Whether A's numbers are float32's."""
        return self._a.dtype.itemsize <= 4

    def parts(self, rows: slice) -> tuple[FloatArray, Floats32, Floats32]:
        """(s·B [rows, r] float64, A [r, in] float32, ‖A_j‖ [in], a little more) of a narrow A."""
        import torch

        left = self._b[rows].double() * self.scale
        a = self._a.to(torch.float32).contiguous()
        return left.contiguous().numpy(), a.numpy(), self._norms

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        left = self._b[chunk.rows].double() * self.scale
        right = self._a.double()
        reach = float(left.norm(dim=1).max()) * self._norm * (1 + 1e-9)
        magnitude = reach + chunk.largest
        chunk.value.addmm_(left, right)
        chunk.bounded(magnitude)
        chunk.error += gamma(self.rank + 2) * magnitude + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            return dy.add(before(row, columns, bits), self.delta(row, columns))

        return values

    def delta(self, row: int, columns: Columns) -> Dyadic:
        """s·B·A exactly, for some columns of a row."""
        import torch

        left = self._b[row : row + 1].double().numpy()
        right = self._a[:, torch.from_numpy(columns)].double().numpy()
        product = dy.matmul(dyadic(left), dyadic(right))
        return dy.multiply(product, dyadic(np.array(self.scale)))[0]

    @cached_property
    def _norms(self) -> Floats32:
        """‖A_j‖ rounded up."""
        norms: Floats32 = (self._a.double().norm(dim=0) * (1 + 2.0**-20)).float().numpy()
        return norms

    @cached_property
    def _norm(self) -> float:
        """Largest ‖A_j‖."""
        return float(self._a.double().norm(dim=0).max())


@dataclass(frozen=True)
class ReplaceRows:
    """Some rows are others: W'[t_k] = D[k].

    What is put there is exact; the bound stays that of the other rows.

    Attributes:
        places: t, ascending.
        values: D [k, in] float64.
    """

    places: Columns
    values: FloatArray
    row_multiple: int = 1

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        first, last = np.searchsorted(self.places, (chunk.rows.start, chunk.rows.stop)).tolist()
        if first == last:
            return
        at = torch.from_numpy(self.places[first:last] - chunk.rows.start)
        chunk.value[at] = torch.from_numpy(np.ascontiguousarray(self.values[first:last]))
        chunk.bounded(None)

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            at = int(np.searchsorted(self.places, row))
            if at == len(self.places) or self.places[at] != row:
                return before(row, columns, bits)
            return dyadic(self.values[at, columns])

        return values


def same_rows(some: Sequence[Step], others: Sequence[Step]) -> bool:
    """Whether both put the same rows in the same places."""
    return len(some) == len(others) and all(
        isinstance(one, ReplaceRows)
        and isinstance(other, ReplaceRows)
        and np.array_equal(one.places, other.places)
        and np.array_equal(one.values, other.values)
        for one, other in zip(some, others, strict=True)
    )


def same_sums(some: Sequence[Step], others: Sequence[Step]) -> bool:
    """Whether both are sums of the same s·B·A, factor by factor."""
    import torch

    return len(some) == len(others) and all(
        isinstance(one, AddLowRank)
        and isinstance(other, AddLowRank)
        and one.scale == other.scale
        and torch.equal(torch.from_numpy(one.left), torch.from_numpy(other.left))
        and torch.equal(torch.from_numpy(one.right), torch.from_numpy(other.right))
        for one, other in zip(some, others, strict=True)
    )


@dataclass(frozen=True)
class BlockColumns:
    """W·P·diag(C_1 … C_N)·Pᵀ: columns mixed block by block, P an order of the columns.

    Off by at most γ_b·max|W|·Σ_k|C_kj|, and the input's error times the same sum.

    Attributes:
        blocks: [N, b, b] float64.
        order: the columns of W in the order in which the blocks take them; None: as they are.
    """

    blocks: FloatArray
    order: npt.NDArray[np.intp] | None = None
    row_multiple: int = 1

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        count, size, _ = self.blocks.shape
        width, largest = self._width, chunk.largest
        taken = chunk.value if self.order is None else chunk.value[:, self._order]
        blocked = taken.reshape(-1, count, size).transpose(0, 1)
        product = torch.bmm(blocked, self._blocks).transpose(0, 1).reshape(chunk.value.shape)
        if self.order is None:
            chunk.value = product
        else:
            spread = torch.empty_like(product)
            spread[:, self._order] = product
            chunk.value = spread
        chunk.error = width * (chunk.error + gamma(size) * (largest + chunk.error)) + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""
        size = self.blocks.shape[1]
        order = np.arange(self.blocks.shape[0] * size) if self.order is None else self.order
        place = np.argsort(order)

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            parts = []
            for column in columns.tolist():
                block, j = divmod(int(place[column]), size)
                wanted = order[block * size : (block + 1) * size]
                x = before(row, wanted, bits)
                one = Dyadic(x.n[None], x.e, x.radius)
                parts.append(dy.matmul(one, dyadic(self.blocks[block][:, j : j + 1]))[0])
            return joined(parts)

        return values

    @cached_property
    def _blocks(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(self.blocks))

    @cached_property
    def _order(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.asarray(self.order, dtype=np.int64))

    @cached_property
    def _width(self) -> float:
        return float(np.abs(self.blocks).sum(axis=1).max())


@dataclass(frozen=True)
class SubtractProjection:
    """W − (W·V)·Zᵀ: how a product of reflections acts on the rows of W.

    t = W·V is a sum of D terms, off by at most γ_D·max|W|·Σ_j|V_jk| plus the input's error times
    that sum; then one of r terms. The long sum is taken in numpy's extended precision, whose unit
    roundoff stands in the bound (on machines without one it is float64's).

    Attributes:
        v: [in, r] float64.
        z: [in, r] float64.
    """

    v: FloatArray
    z: FloatArray
    row_multiple: int = 1

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        features, rank = self.v.shape
        largest = chunk.largest
        sums = np.abs(self.v).sum(axis=0)
        extended = chunk.value.numpy().astype(np.longdouble) @ self.v.astype(np.longdouble)
        t = extended.astype(np.float64)
        roundoff = float(np.finfo(np.longdouble).eps)
        reach = float(np.abs(t).max(initial=0.0))
        long_sum = (features + 8) * roundoff * float(sums.max()) * (largest + chunk.error) * 1.01
        t_error = long_sum + chunk.error * float(sums.max()) + 2 * U * reach
        width = float(np.abs(self.z).sum(axis=1).max())
        chunk.value.addmm_(torch.from_numpy(t), self._zt, alpha=-1.0)
        chunk.bounded(None)
        chunk.error += width * t_error + gamma(rank + 2) * (width * (reach + t_error) + largest)
        chunk.error += TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""
        everything = np.arange(self.v.shape[0])

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            x = before(row, everything, bits)
            t = dy.matmul(Dyadic(x.n[None], x.e, x.radius), self._exact_v)
            drop = dy.matmul(t, dyadic(-self.z[columns].T))[0]
            return dy.add(x[columns], drop)

        return values

    @cached_property
    def _exact_v(self) -> Dyadic:
        return dyadic(self.v)

    @cached_property
    def _zt(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(self.z.T))


@dataclass(frozen=True)
class ScaleRows:
    """diag(d)·W: one product an element.

    Attributes:
        factors: d [out] float64.
    """

    factors: FloatArray
    row_multiple: int = 1

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        d = self.factors[chunk.rows]
        largest = float(np.abs(d).max(initial=0.0))
        chunk.value.mul_(torch.from_numpy(d)[:, None])
        chunk.bounded(None)
        chunk.error = largest * chunk.error * (1 + 4 * U) + 2 * U * chunk.largest + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            return dy.multiply(before(row, columns, bits), dyadic(self.factors[row : row + 1]))

        return values


@dataclass(frozen=True)
class MixRowPairs:
    """Row i becomes a_i·W_i + b_i·W_p(i), p the partner of i in its group.

    Two products, one addition: off by at most γ_2·(|a_i| + |b_i|)·max|W|, and the input's error
    times (|a_i| + |b_i|).

    Attributes:
        own: a [out] float64.
        other: b [out] float64.
        group: rows of a group; partners are half of one apart.
    """

    own: FloatArray
    other: FloatArray
    group: int

    @property
    def row_multiple(self) -> int:
        """A whole group at a time."""
        return self.group

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        a, b = (torch.from_numpy(part[chunk.rows])[:, None] for part in (self.own, self.other))
        width = float((a.abs() + b.abs()).max())
        largest = chunk.largest
        pairs = chunk.value.reshape(-1, 2, self.group // 2, chunk.value.shape[1])
        partner = pairs.flip(1).reshape(chunk.value.shape)
        chunk.value = chunk.value * a + partner * b
        chunk.error = width * (chunk.error + gamma(2) * (largest + chunk.error)) + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            own = dy.multiply(before(row, columns, bits), dyadic(self.own[row : row + 1]))
            mate = before(self.partner(row), columns, bits)
            return dy.add(own, dy.multiply(mate, dyadic(self.other[row : row + 1])))

        return values

    def partner(self, row: int) -> int:
        """p(row)."""
        half = self.group // 2
        return row + half if row % self.group < half else row - half


@dataclass(frozen=True)
class BlockRows:
    """diag(C_1 … C_N)·W: rows mixed block by block (a gate on the projection's output).

    Off by at most γ_b·max|W|·Σ_k|C_ik|, and the input's error times the same sum.

    Attributes:
        blocks: [N, b, b] float64.
    """

    blocks: FloatArray

    @property
    def row_multiple(self) -> int:
        """A whole block at a time."""
        return int(self.blocks.shape[1])

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        size = self.blocks.shape[1]
        blocks = self.blocks[chunk.rows.start // size : chunk.rows.stop // size]
        width, largest = float(np.abs(blocks).sum(axis=2).max()), chunk.largest
        grouped = chunk.value.reshape(len(blocks), size, -1)
        product = torch.bmm(torch.from_numpy(np.ascontiguousarray(blocks)), grouped)
        chunk.value = product.reshape(chunk.value.shape)
        chunk.error = width * (chunk.error + gamma(size) * (largest + chunk.error)) + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""
        size = self.blocks.shape[1]

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            block, i = divmod(row, size)
            total: Dyadic | None = None
            for k in range(size):
                factor = dyadic(self.blocks[block, i, k : k + 1])
                term = dy.multiply(before(block * size + k, columns, bits), factor)
                total = term if total is None else dy.add(total, term)
            assert total is not None
            return total

        return values


@dataclass(frozen=True)
class NormalisedAdd:
    """DoRA: g·(W + s·B·A) row by row, g_i = m_i / ‖W⁰_i + s·(B·A)_i‖, W⁰ the stored weight.

    The norm is that of the *stored* weight's row plus this branch, whatever steps came before: so
    does PEFT's forward. With v the computed row, off by at most e in each of D elements, v² sums to
    within γ_{D+2}·‖v‖² + 2·e·√D·‖v‖ + D·e²; the root halves the relative error, and the division
    and products add a few roundings. The norm is a root: its exact value is compared by bits, as
    many as it takes, and is exact where it is a rational number.

    Attributes:
        branch: s·B·A.
        magnitude: m [out] float64.
    """

    branch: AddLowRank
    magnitude: FloatArray
    row_multiple: int = 1

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`.

        Raises:
            RotationError: a row of W + s·B·A is zero: it has no direction.
        """
        import torch

        own = chunk.again()
        self.branch.apply(own)
        norms = torch.linalg.vector_norm(own.value, dim=1)
        if not bool((norms > 0).all()):
            row = chunk.rows.start + int((norms > 0).logical_not().nonzero()[0])
            raise RotationError(
                f"row {row} of W + s·B·A is zero: DoRA divides by its norm",
                remedy="Train the adapter again; PEFT's forward gives NaN here.",
            )
        features = own.value.shape[1]
        rough = own.error * math.sqrt(features) / norms
        relative = 0.51 * (gamma(features + 2) + 2 * rough + rough * rough) + 4 * U
        factors = torch.from_numpy(self.magnitude[chunk.rows]) / norms
        self.branch.apply(chunk)
        largest_row = chunk.value.abs().amax(dim=1)
        g = factors.abs()
        error = g * (1 + relative) * chunk.error + g * largest_row * (relative + 3 * U)
        chunk.value.mul_(factors[:, None])
        chunk.bounded(None)
        chunk.error = float(error.max()) * (1 + 8 * U) + TINY

    def exact(self, before: Exact, base: Exact, /) -> Exact:
        """See :class:`Step`."""
        summed = self.branch.exact(before, base)
        own = self.branch.exact(base, base)
        everything = np.arange(self.branch.shape[1])
        known: dict[tuple[int, int], Dyadic] = {}

        def factor(row: int, bits: int) -> Dyadic:
            if (row, bits) not in known:
                v = own(row, everything, bits)
                square = Fraction(int((v.n * v.n).sum())) * Fraction(2) ** (2 * v.e)
                m = Fraction(float(self.magnitude[row]))
                known[row, bits] = root_of(m * m / square, bits, negative=m < 0)
            return known[row, bits]

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            return dy.multiply(summed(row, columns, bits), factor(row, bits))

        return values


def root_of(square: Fraction, bits: int, *, negative: bool) -> Dyadic:
    """±√square within 2^−bits of its size; exact where that is a binary fraction."""
    size = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    shift = bits - size
    numerator, denominator = square.numerator, square.denominator
    scaled = (numerator << 2 * shift) if shift >= 0 else numerator
    denominator <<= 0 if shift >= 0 else -2 * shift
    whole, rest = divmod(scaled, denominator)
    n = math.isqrt(whole)
    exact = rest == 0 and n * n == whole
    radius = Fraction(0) if exact else Fraction(2) ** -shift
    return Dyadic(np.array([-n if negative else n], dtype=object), -shift, radius)


def joined(parts: list[Dyadic]) -> Dyadic:
    """Single numbers as one row."""
    low = min(part.e for part in parts)
    n = np.array([int(p.n.item()) << (p.e - low) for p in parts], dtype=object)
    return Dyadic(n, low, max(part.radius for part in parts))


@dataclass(frozen=True)
class Steps:
    """All steps of one logical weight, in order, and their exact composition."""

    steps: tuple[Step, ...] = field(default_factory=tuple)

    @property
    def row_multiple(self) -> int:
        """Rows of a chunk: a multiple of this."""
        return math.lcm(*(step.row_multiple for step in self.steps))

    def apply(self, rows: slice, weight: torch.Tensor) -> Chunk:
        """W' in float64 with its bound, for some rows of W.

        Args:
            rows: of the logical weight.
            weight: [out, in], the logical weight as stored.
        """
        return self.finish(Chunk(rows, weight))

    def finish(self, chunk: Chunk) -> Chunk:
        """All steps on rows that are as stored."""
        for step in self.steps:
            step.apply(chunk)
        return chunk

    def exact(self, base: Exact) -> Exact:
        """W' exactly, where asked."""
        values = base
        for step in self.steps:
            values = step.exact(values, base)
        return values

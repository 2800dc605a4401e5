"""Steps of small tensors spread over a weight: tiles, circulant blocks, places, sums of waves.

What they add is never stored whole: it is looked up, or multiplied out, for some rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.adapters import dyadic as dy
from so8tqc.adapters.dyadic import Dyadic, dyadic
from so8tqc.adapters.products import Factor
from so8tqc.adapters.steps import TINY, Chunk, Columns, Exact, gamma
from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch

Places = npt.NDArray[np.int64]


class AddLookedUp(ABC):
    """W + T, T's elements looked up in a small table: one addition, off by u·|W + T|."""

    row_multiple = 1

    @abstractmethod
    def elements(self, rows: Columns, columns: Columns) -> FloatArray:
        """T at all crossings of some rows and columns, [rows, columns] float64."""

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        rows = np.arange(chunk.rows.start, chunk.rows.stop)
        added = self.elements(rows, np.arange(chunk.value.shape[1]))
        chunk.value.add_(torch.from_numpy(added))
        chunk.bounded(None)
        chunk.error += gamma(1) * chunk.largest + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            added = self.elements(np.array([row]), columns)[0]
            return dy.add(before(row, columns, bits), dyadic(added))

        return values


@dataclass(frozen=True)
class AddTiles(AddLookedUp):
    """T[i, j] = tile[i mod p, j mod q].

    Attributes:
        tile: [p, q] float64.
    """

    tile: FloatArray

    def elements(self, rows: Columns, columns: Columns) -> FloatArray:
        """See :class:`AddLookedUp`."""
        p, q = self.tile.shape
        found: FloatArray = self.tile[np.ix_(rows % p, columns % q)]
        return found


@dataclass(frozen=True)
class AddCirculants(AddLookedUp):
    """T in circulant blocks of b × b: T[m·b + i, n·b + j] = kernel[m, n, (j − i) mod b].

    Attributes:
        kernel: [out / b, in / b, b] float64.
    """

    kernel: FloatArray

    def elements(self, rows: Columns, columns: Columns) -> FloatArray:
        """See :class:`AddLookedUp`."""
        size = self.kernel.shape[2]
        i, j = rows[:, None], columns[None]
        found: FloatArray = self.kernel[i // size, j // size, (j - i) % size]
        return found


@dataclass(frozen=True)
class AddPlaces(AddLookedUp):
    """T is zero but for some places.

    Attributes:
        places: row·in + column of each, in ascending order, none twice.
        numbers: T there, float64.
        width: in.
    """

    places: Places
    numbers: FloatArray
    width: int

    def elements(self, rows: Columns, columns: Columns) -> FloatArray:
        """See :class:`AddLookedUp`."""
        found = np.zeros((len(rows), len(columns)))
        for at, row in enumerate(rows.tolist()):
            low, high = np.searchsorted(self.places, [row * self.width, (row + 1) * self.width])
            whole = np.zeros(self.width)
            whole[self.places[low:high] - row * self.width] = self.numbers[low:high]
            found[at] = whole[columns]
        return found


@dataclass(frozen=True)
class AddTimesBase:
    """W + W⁰∘(B·A), W⁰ the stored weight, whatever steps came before: so does PEFT's forward.

    With the product known within e the change is off by at most |W⁰|·e, and by two roundings.

    Attributes:
        factor: B·A.
    """

    factor: Factor
    row_multiple: int = 1

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        rows = np.arange(chunk.rows.start, chunk.rows.stop)
        product, error, most = self.factor.rows(rows)
        base = chunk.base
        largest = float(base.abs().max())
        reach = largest * (most + error) * (1 + 1e-9)
        chunk.value.addcmul_(base, product)
        chunk.bounded(None)
        chunk.error += largest * error * (1 + 1e-9) + gamma(2) * (reach + chunk.largest) + TINY

    def exact(self, before: Exact, base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            change = dy.multiply(base(row, columns, bits), self.factor.exact(row, columns))
            return dy.add(before(row, columns, bits), change)

        return values


@dataclass(frozen=True)
class MixBlocks:
    """Each block of r × r in the b-th r rows, W_b, becomes W_b + W_b·M_b + M_b.

    r products a sum and two additions: off by at most γ_{r+2}·(max|W|·(1 + w) + max|M|), w the
    largest Σ_k|M_kj|, and the input's error times 1 + w.

    Attributes:
        blocks: M [out / r, r, r] float64.
    """

    blocks: FloatArray

    @property
    def row_multiple(self) -> int:
        """A whole block at a time."""
        return int(self.blocks.shape[1])

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        size, largest = self.row_multiple, chunk.largest
        blocks = self.blocks[chunk.rows.start // size : chunk.rows.stop // size]
        width = 1 + float(np.abs(blocks).sum(axis=1).max())
        m = torch.from_numpy(np.ascontiguousarray(blocks))
        old = chunk.value
        w = old.reshape(len(blocks), -1, size)  # [b, row in the block × column block, r]
        mixed = (w + torch.bmm(w, m)).reshape(len(blocks), size, -1, size) + m[:, :, None]
        chunk.value = mixed.reshape(old.shape)
        most = float(np.abs(blocks).max())
        chunk.error = width * chunk.error + gamma(size + 2) * (width * largest + most) + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""
        size = self.row_multiple

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            block, i = divmod(row, size)
            x = before(row, columns, bits)
            total = dy.add(x, dyadic(self.blocks[block, i, columns % size]))
            start = columns - columns % size
            for k in range(size):
                factor = dyadic(self.blocks[block, k, columns % size])
                total = dy.add(total, dy.multiply(before(row, start + k, bits), factor))
            return total

        return values


class AddOuterProducts(ABC):
    """W + L·R, L and R made for some rows and some columns at a time.

    K products a sum and one addition: off by at most γ_{K+1}·(‖L_i‖·‖R_j‖ + max|W|).
    """

    row_multiple = 1

    @abstractmethod
    def left(self, rows: Columns) -> FloatArray:
        """Some rows of L, [rows, K] float64: the same numbers, whichever rows are asked for."""

    @abstractmethod
    def right(self, columns: Columns) -> FloatArray:
        """Some columns of R, [K, columns] float64: likewise."""

    def apply(self, chunk: Chunk) -> None:
        """See :class:`Step`."""
        import torch

        left = torch.from_numpy(self.left(np.arange(chunk.rows.start, chunk.rows.stop)))
        right = torch.from_numpy(self.right(np.arange(chunk.value.shape[1])))
        reach = float(left.norm(dim=1).max() * right.norm(dim=0).max()) * (1 + 1e-9)
        magnitude = reach + chunk.largest
        chunk.value.addmm_(left, right)
        chunk.bounded(magnitude)
        chunk.error += gamma(left.shape[1] + 1) * magnitude + TINY

    def exact(self, before: Exact, _base: Exact, /) -> Exact:
        """See :class:`Step`."""

        def values(row: int, columns: Columns, bits: int) -> Dyadic:
            left, right = self.left(np.array([row])), self.right(columns)
            return dy.add(before(row, columns, bits), dy.matmul(dyadic(left), dyadic(right))[0])

        return values


@dataclass(frozen=True)
class AddScaledBases(AddOuterProducts):
    """RandLoRA: a shared basis times another one that is scaled, or the transpose of that.

    With K = r·n the shared basis is S [larger, K] and the scaled one D [K, smaller], D[a·n + b, j]
    = λ_ab·A_aj·γ_bj: the change is S·D, or (S·D)ᵀ. The products with A and then with γ are rounded,
    and these numbers mean themselves.

    Attributes:
        shared: [at least larger, at least n, r], any floating dtype.
        scaled: A [r, at least smaller], likewise.
        strengths: s·λ [r, n] float64, rounded once.
        weights: γ [n, smaller], any floating dtype.
        wide: the shared basis is on the side of the input.
    """

    shared: torch.Tensor
    scaled: torch.Tensor
    strengths: FloatArray
    weights: torch.Tensor
    wide: bool

    def left(self, rows: Columns) -> FloatArray:
        """See :class:`AddOuterProducts`."""
        return np.ascontiguousarray(self._scaled(rows).T) if self.wide else self._shared(rows)

    def right(self, columns: Columns) -> FloatArray:
        """See :class:`AddOuterProducts`."""
        if self.wide:
            return np.ascontiguousarray(self._shared(columns).T)
        return self._scaled(columns)

    def _shared(self, places: Columns) -> FloatArray:
        """[places, K]."""
        import torch

        taken = self.shared[torch.from_numpy(places), : self.strengths.shape[1]]
        values: FloatArray = taken.double().reshape(len(places), -1).numpy()
        return values

    def _scaled(self, places: Columns) -> FloatArray:
        """[K, places]."""
        import torch

        at = torch.from_numpy(places)
        basis, weights = (part[:, at].double().numpy() for part in (self.scaled, self.weights))
        product: FloatArray = self.strengths[:, :, None] * basis[:, None] * weights[None]
        return product.reshape(-1, len(places))


@dataclass(frozen=True)
class AddGrid(AddOuterProducts):
    """GraLoRA: N × N blocks, block (j, n) Σ_s B_j[n·t + s]·A_n[j·t + s].

    Attributes:
        a: [N, in / N, r] float64, r = N·t.
        b: [N, r, out / N] float64, the scale multiplied in and rounded once.
    """

    a: FloatArray
    b: FloatArray

    def left(self, rows: Columns) -> FloatArray:
        """See :class:`AddOuterProducts`."""
        count, rank, size = self.b.shape
        spread = np.zeros((len(rows), count, rank))
        spread[np.arange(len(rows)), rows // size] = self.b[rows // size, :, rows % size]
        return spread.reshape(len(rows), -1)

    def right(self, columns: Columns) -> FloatArray:
        """See :class:`AddOuterProducts`."""
        count, size, rank = self.a.shape
        spread = np.zeros((len(columns), count, count, rank // count))  # column, j, n, s
        own = self.a[columns // size, columns % size].reshape(len(columns), count, -1)
        spread[np.arange(len(columns)), :, columns // size] = own
        return np.ascontiguousarray(spread.reshape(len(columns), -1).T)


@dataclass(frozen=True)
class AddWaves(AddOuterProducts):
    """FourierFT: Σ_k a_k·cos(2π·(u_k·i/M + v_k·j/N)), by cos(x + y) = cos x·cos y − sin x·sin y.

    Attributes:
        amplitudes: a [K] float64.
        rows_at: u [K].
        columns_at: v [K].
        down: cos and sin of 2π·i/M, [M] each, float64.
        across: cos and sin of 2π·j/N, [N] each, float64.
    """

    amplitudes: FloatArray
    rows_at: Places
    columns_at: Places
    down: tuple[FloatArray, FloatArray]
    across: tuple[FloatArray, FloatArray]

    def left(self, rows: Columns) -> FloatArray:
        """See :class:`AddOuterProducts`."""
        at = rows[:, None] * self.rows_at[None] % len(self.down[0])
        cosine, sine = (part[at] * self.amplitudes for part in self.down)
        return np.concatenate([cosine, -sine], axis=1)

    def right(self, columns: Columns) -> FloatArray:
        """See :class:`AddOuterProducts`."""
        at = self.columns_at[:, None] * columns[None] % len(self.across[0])
        return np.concatenate([part[at] for part in self.across], axis=0)

"""Exact arithmetic on arrays of binary fractions: n·2^e with whole n, as Python has them.

Every finite float is one, and sums and products of them are again. Only DoRA's row norms are none:
these are known within a radius, which shrinks as more bits are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from so8tqc.rotations.rotation_set import FloatArray

Integers = npt.NDArray[np.object_]
_MANTISSA = 53


@dataclass(frozen=True)
class Dyadic:
    """Numbers n·2^e, each known within ``radius``.

    Attributes:
        n: Python integers, any shape.
        e: the exponent that they share.
        radius: no true value is farther than this from n·2^e; 0: they are exact.
    """

    n: Integers
    e: int
    radius: Fraction = Fraction(0)

    def __getitem__(self, key: int | npt.NDArray[np.intp]) -> Dyadic:
        return Dyadic(self.n[key], self.e, self.radius)

    def fraction(self) -> Fraction:
        """The value of a single number (its middle, if it has a radius)."""
        return Fraction(int(self.n.item())) * Fraction(2) ** self.e

    def largest(self) -> Fraction:
        """Bound on the magnitudes of all of them."""
        top = max((abs(int(n)) for n in self.n.ravel()), default=0)
        return Fraction(top) * Fraction(2) ** self.e + self.radius


def dyadic(values: FloatArray) -> Dyadic:
    """Floats, exactly."""
    values = np.asarray(values, dtype=np.float64)
    mantissa, exponent = np.frexp(values)
    whole = np.ldexp(mantissa, _MANTISSA).astype(np.int64)
    there = whole != 0
    if not there.any():
        return Dyadic(np.zeros(values.shape, dtype=object), 0)
    low = int(exponent[there].min())
    shift = np.where(there, exponent - low, 0)
    n = np.empty(values.shape, dtype=object)
    for at in np.ndindex(values.shape):
        n[at] = int(whole[at]) << int(shift[at])
    return Dyadic(n, low - _MANTISSA)


def add(a: Dyadic, b: Dyadic) -> Dyadic:
    """a + b."""
    low = min(a.e, b.e)
    n = a.n * (1 << (a.e - low)) + b.n * (1 << (b.e - low))
    return Dyadic(np.asarray(n, dtype=object), low, a.radius + b.radius)


def multiply(a: Dyadic, b: Dyadic) -> Dyadic:
    """a·b, element by element."""
    radius = a.radius * b.largest() + b.radius * a.largest() if a.radius or b.radius else a.radius
    return Dyadic(np.asarray(a.n * b.n, dtype=object), a.e + b.e, radius)


def matmul(a: Dyadic, b: Dyadic) -> Dyadic:
    """[m, k]·[k, n] → [m, n]; b exact."""
    n = np.zeros((a.n.shape[0], b.n.shape[1]), dtype=object)
    for k in range(a.n.shape[1]):
        n = n + a.n[:, k, None] * b.n[None, k]
    radius = a.radius * b.largest() * a.n.shape[1] if a.radius else a.radius
    return Dyadic(n, a.e + b.e, radius)

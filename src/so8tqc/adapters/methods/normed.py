"""DeLoRA (``delora/layer.py``): W' = W + B·diag(c)·A·diag(w), c_k = λ / (r·‖A_k‖·‖B_k‖).

A_k is a row of A, B_k a column of B; a norm below 1e-4 counts as 1e-4. w [in] are the norms of the
columns of W as they were when the training began: they are stored with the adapter. The c are roots
of rational numbers, computed to 110 bits.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from so8tqc.adapters.dyadic import dyadic
from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.methods.lora import declared_rank
from so8tqc.adapters.steps import AddLowRank, root_of
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.rotation_set import FloatArray

_SMALLEST_NORM = 1e-4
_BITS = 110


def delora(c: Context) -> ModuleSteps:
    """Steps of a DeLoRA module; B·diag(c) is rounded once."""
    c.only(*(f"delora_{part}.weight" for part in ("A", "B", "lambda", "w_norm")))
    a, b, strength, norms = (
        c.take(f"delora_{part}.weight") for part in ("A", "B", "lambda", "w_norm")
    )
    rank = declared_rank(c.files, c.module)
    c.require("delora_A", a.shape, (rank, c.shape.into))
    c.require("delora_B", b.shape, (c.shape.out, rank))
    c.require("delora_lambda", strength.shape, (1,))
    c.require("delora_w_norm", norms.shape, (c.shape.into,))
    zero = not (a.any() and b.any() and strength.any() and norms.any())
    factors = [_factor(a[k], b[:, k], float(strength[0]), rank) for k in range(rank)]
    high = np.array([float(f) for f in factors])
    low = np.array([float(f - Fraction(float(f))) for f in factors])
    spread = dd.DoubleDouble(*(np.broadcast_to(part, b.shape) for part in (high, low)))
    left = dd.to_float64(dd.multiply(dd.from_float64(b), spread))
    # products of two float32 numbers are float64 numbers, exactly
    return ModuleSteps((AddLowRank(left, a * norms),), zero=zero)


def _factor(a: FloatArray, b: FloatArray, strength: float, rank: int) -> Fraction:
    """c of one row of A and one column of B."""
    if strength == 0:
        return Fraction(0)
    square = (Fraction(strength) / rank) ** 2 / (_square_norm(a) * _square_norm(b))
    return root_of(square, _BITS, negative=strength < 0).fraction()


def _square_norm(vector: FloatArray) -> Fraction:
    numbers = dyadic(vector)
    square = Fraction(int((numbers.n * numbers.n).sum())) * Fraction(2) ** (2 * numbers.e)
    return max(square, Fraction(_SMALLEST_NORM) ** 2)

"""Divergences of two distributions that are nearly the same, without cancellation.

With logits z (reference) and w (candidate), p and q their softmax, d = w − z, and the centred
difference e = d − Σ p d, for which Σ p e = 0:

* KL(p‖q) = ln Σ p e^e = ln(1 + Σ p (e^e − 1 − e)), a sum of non-negative terms: nothing
  cancels, and KL of 1e-13 is as accurate as of 1;
* ln(q/p) = x = e − KL, and q = p e^e e^(−KL), hence
  KL(q‖p) = Σ q x = e^(−KL) Σ p (e^e − 1) e − KL;
* with t = x/2, JS = Σ (p + q)/2 · (t tanh t − ln cosh t).

Where |e| is small, which is nearly everywhere, the terms are power series, and their sums are
those of p e², p e³, …: no exponential is taken, and e^e − 1 − e loses no digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]

SERIES = 2.0**-5
"""|e| up to which the series to e⁶ are within 1e-10 of the whole."""

_LARGEST = 700.0
"""e^700 is just representable in float64."""


@dataclass(frozen=True)
class _Outliers:
    """The tokens beyond the series, k of them in all rows: row, probability and e, [k] each."""

    row: npt.NDArray[np.int64]
    p: FloatArray
    e: FloatArray


def dot(a: torch.Tensor, b: torch.Tensor) -> FloatArray:
    """Dot product of each row: [t, V], [t, V] → [t]. (``vecdot`` makes a [t, V] product.)"""
    import torch

    return np.array([torch.dot(x, y).item() for x, y in zip(a, b, strict=True)])


def close_divergences(
    weights: torch.Tensor,
    total: FloatArray,
    e: torch.Tensor,
    scratch: torch.Tensor,
    more: torch.Tensor,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """KL, reverse KL and JS of each row, accurate where they are small.

    Args:
        weights: [t, V] float64, proportional to p.
        total: [t], Σ of the weights.
        e: [t, V] centred difference; overwritten.
        scratch, more: [t, V] float64; overwritten.

    Returns:
        Three [t], nats.
    """
    import torch

    far = _set_aside(weights, total, e, torch.abs(e, out=scratch))
    square = torch.mul(e, e, out=scratch)
    product = torch.mul(square, weights, out=more)
    m2 = product.sum(dim=1).numpy() / total
    m3, m4 = dot(product, e) / total, dot(product, square) / total
    product.mul_(square)
    m5, m6 = dot(product, e) / total, dot(product, square) / total
    kl, reverse, m1 = np.zeros_like(total), np.zeros_like(total), np.zeros_like(total)
    m0 = np.ones_like(total)
    if far is not None:
        growth = np.expm1(far.e)
        np.add.at(kl, far.row, far.p * (growth - far.e))
        np.add.at(reverse, far.row, far.p * growth * far.e)
        np.subtract.at(m0, far.row, far.p)
        np.subtract.at(m1, far.row, far.p * far.e)  # Σ p e over all tokens is zero
    kl = np.log1p(kl + m2 / 2 + m3 / 6 + m4 / 24 + m5 / 120 + m6 / 720)
    reverse = np.exp(-kl) * (reverse + m2 + m3 / 2 + m4 / 6 + m5 / 24 + m6 / 120) - kl
    # Σ p x^k for x = e − KL, from Σ p e^k, without the tokens set aside
    x2 = m2 - 2 * kl * m1 + m0 * np.square(kl)
    x3 = m3 - 3 * kl * m2 + 3 * np.square(kl) * m1
    x4 = m4 - 4 * kl * m3 + 6 * np.square(kl) * m2
    x5 = m5 - 5 * kl * m4
    js = (x2 + x3 / 2 + x4 / 8 + x5 / 48 + m6 / 288) / 8
    if far is not None:
        np.add.at(js, far.row, far.p * _js_terms(far.e - kl[far.row]))
    return kl, reverse, js


def _set_aside(
    weights: torch.Tensor, total: FloatArray, e: torch.Tensor, size: torch.Tensor
) -> _Outliers | None:
    """Take the tokens beyond the series, by their size |e|, out of ``e``: zeros are left."""
    if float(size.amax()) <= SERIES:
        return None
    at = np.flatnonzero(size.numpy() > SERIES)
    row = at // e.shape[1]
    flat = e.numpy().reshape(-1)
    # where e^e would overflow, p is zero in float64, and must stay so in a product
    far = np.minimum(flat[at], _LARGEST)
    flat[at] = 0
    return _Outliers(row, weights.numpy().reshape(-1)[at] / total[row], far)


def _js_terms(x: FloatArray) -> FloatArray:
    """(1 + e^x)/2 · (t tanh t − ln cosh t) for t = x/2, elementwise.

    Up to |x| = 1/32 it is x²/8 (1 + x/2 + x²/8 + x³/48 + x⁴/288 + …).
    """
    t = np.abs(x) / 2
    spread = t * np.tanh(t) - t - np.log1p(np.exp(-2 * t)) + math.log(2)
    terms: FloatArray = (1 + np.expm1(x) / 2) * spread
    return terms

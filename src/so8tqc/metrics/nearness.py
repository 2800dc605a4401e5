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

_GROWN = 1.0
"""e from which on p e^e is computed as e^(ln p + e): p itself may be zero in float64."""


@dataclass(frozen=True)
class _Outliers:
    """The tokens beyond the series, k of them in all rows: row, p, ln p and e, [k] each."""

    row: npt.NDArray[np.int64]
    p: FloatArray
    log_p: FloatArray
    e: FloatArray

    def growth(self, e: FloatArray) -> FloatArray:
        """p (e^e − 1), [k] → [k]; at most about 1, since p e^e is about q."""
        grown = e > _GROWN
        far = np.exp(np.where(grown, self.log_p + e, 0)) - self.p
        values: FloatArray = np.where(grown, far, self.p * np.expm1(np.where(grown, 0, e)))
        return values


def dot(a: torch.Tensor, b: torch.Tensor) -> FloatArray:
    """Dot product of each row: [t, V], [t, V] → [t]. (``vecdot`` makes a [t, V] product.)"""
    import torch

    return np.array([torch.dot(x, y).item() for x, y in zip(a, b, strict=True)])


def close_divergences(
    weights: torch.Tensor,
    total: FloatArray,
    logits: torch.Tensor,
    log_normaliser: FloatArray,
    e: torch.Tensor,
    reach: FloatArray,
    scratch: torch.Tensor,
    more: torch.Tensor,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """KL, reverse KL and JS of each row, accurate where they are small.

    Args:
        weights: [t, V] float64, proportional to p.
        total: [t], Σ of the weights.
        logits: [t, V] float64, those of p.
        log_normaliser: [t], of the logits.
        e: [t, V] centred difference; overwritten.
        reach: [t], at least max |e|.
        scratch, more: [t, V] float64; overwritten.

    Returns:
        Three [t], nats.
    """
    import torch

    far = None
    if reach.max() > SERIES:
        far = _set_aside(e, torch.abs(e, out=scratch), weights, total, logits, log_normaliser)
    square = torch.mul(e, e, out=scratch)
    product = torch.mul(square, weights, out=more)
    m2 = product.sum(dim=1).numpy() / total
    m3, m4 = dot(product, e) / total, dot(product, square) / total
    product.mul_(square)
    m5, m6 = dot(product, e) / total, dot(product, square) / total
    kl, reverse, m1 = np.zeros_like(total), np.zeros_like(total), np.zeros_like(total)
    m0 = np.ones_like(total)
    if far is not None:
        growth = far.growth(far.e)
        np.add.at(kl, far.row, growth - far.p * far.e)
        np.add.at(reverse, far.row, growth * far.e)
        np.subtract.at(m0, far.row, far.p)
        np.subtract.at(m1, far.row, far.p * far.e)  # Σ p e over all tokens is zero
    kl = np.log1p(kl + m2 / 2 + m3 / 6 + m4 / 24 + m5 / 120 + m6 / 720)
    reverse = np.exp(-kl) * (reverse + m2 + m3 / 2 + m4 / 6 + m5 / 24 + m6 / 120) - kl
    # (1 + e^x)/2 (t tanh t − ln cosh t) = x²/8 (1 + x/2 + x²/8 + x³/48 + x⁴/288 + …)
    # Σ p x^k for x = e − KL, from Σ p e^k, without the tokens set aside
    x2 = m2 - 2 * kl * m1 + m0 * np.square(kl)
    x3 = m3 - 3 * kl * m2 + 3 * kl**2 * m1 - kl**3 * m0
    x4 = m4 - 4 * kl * m3 + 6 * kl**2 * m2 - 4 * kl**3 * m1 + kl**4 * m0
    x5 = m5 - 5 * kl * m4 + 10 * kl**2 * m3 - 10 * kl**3 * m2
    x6 = m6 - 6 * kl * m5 + 15 * kl**2 * m4
    js = (x2 + x3 / 2 + x4 / 8 + x5 / 48 + x6 / 288) / 8
    if far is not None:
        x = far.e - kl[far.row]
        np.add.at(js, far.row, (far.p + far.growth(x) / 2) * _spread(x))
    return kl, reverse, js


def _set_aside(
    e: torch.Tensor,
    size: torch.Tensor,
    weights: torch.Tensor,
    total: FloatArray,
    logits: torch.Tensor,
    log_normaliser: FloatArray,
) -> _Outliers | None:
    """Take the tokens beyond the series, by their size |e|, out of ``e``: zeros are left."""
    at = np.flatnonzero(size.numpy() > SERIES)
    if not at.size:
        return None
    row = at // e.shape[1]
    flat = e.numpy().reshape(-1)
    far = flat[at]
    flat[at] = 0
    p = weights.numpy().reshape(-1)[at] / total[row]
    return _Outliers(row, p, logits.numpy().reshape(-1)[at] - log_normaliser[row], far)


def _spread(x: FloatArray) -> FloatArray:
    """t tanh t − ln cosh t for t = x/2, elementwise."""
    t = np.abs(x) / 2
    spread: FloatArray = t * np.tanh(t) - t - np.log1p(np.exp(-2 * t)) + math.log(2)
    return spread

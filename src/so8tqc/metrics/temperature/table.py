"""Every temperature at once: what one pass over the logits must keep.

With inverse temperature β = 1/T, u_v = z_v − max z ≤ 0 and the log-partition function

    G(β) = ln Σ_v e^{β u_v},

p_v(T) = e^{β u_v − G(β)}, and all that calibration asks of a token follows from G alone:

* NLL(T)      = G(β) − β u_y, y the token that follows;
* max_v p_v   = e^{−G(β)};
* Σ_v p_v²    = Σ_v e^{2β u_v} / (Σ_v e^{β u_v})² = e^{G(2β) − 2 G(β)};
* entropy     = G(β) − β G'(β), since G'(β) = Σ_v p_v u_v.

So G is sampled at knots β and interpolated. The knots are β_k = 2^{k/m}: 2β is a knot where β is
one, T = 1 is one, and e^{β_{k+m} u} is the square of e^{β_k u}, so that only m of the K
exponentials are computed. At each knot G' = E[u] and G'' = Var[u] come along for two dot
products, and G is taken as the quintic Hermite interpolant in x = ln β,

    dG/dx = β G',   d²G/dx² = β G' + β² G''.

Its error falls as the sixth power of the knots' distance (ln 2)/m. The nearest singularity of
G is a zero of the partition function; for one likely token against V equal others it lies
π / ln V away in x, which at V = 262,144 and m = 4 still leaves errors below 1e-3 in G for that
worst token. On a real model's logits the mean over tokens is good to about 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.calibration import brier_score, negative_log_likelihood

if TYPE_CHECKING:
    from scipy.interpolate import BPoly

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]

KNOTS_PER_OCTAVE = 4


def knots(bounds: tuple[float, float]) -> FloatArray:
    """Inverse temperatures β_k = 2^{k/m} that cover 1/T and 2/T for every T within bounds: [K]."""
    low, high = bounds
    first = np.floor(KNOTS_PER_OCTAVE * np.log2(1.0 / high))
    last = np.ceil(KNOTS_PER_OCTAVE * np.log2(2.0 / low))
    betas: FloatArray = np.exp2(np.arange(first, last + 1) / KNOTS_PER_OCTAVE)
    return betas


def partition_rows(
    logits: npt.NDArray[np.floating], betas: FloatArray
) -> tuple[FloatArray, IntArray]:
    """G and its first two derivatives in ln β at every knot, and the most likely tokens.

    Args:
        logits: [t, V] float32 or float64. A NaN or infinity in a row makes results of that row NaN.
        betas: [K] from :func:`knots`.

    Returns:
        [t, K, 3] float64: G, dG/dx, d²G/dx² with x = ln β; [t] where the largest logit is, of equal
        ones the first (V where a logit is NaN).
    """
    from so8tqc.metrics.temperature.kernels import partition

    rows = np.empty((logits.shape[0], betas.size, 3))
    tops = np.empty(logits.shape[0], dtype=np.intp)
    partition(logits, betas, KNOTS_PER_OCTAVE, rows, tops)
    return rows, tops


class TokenScores:
    """Scores of n tokens, each computed when it is asked for: a fit asks for one of them.

    Args:
        table: of the tokens.
        beta: [] or [n] inverse temperatures, within the table's bounds.
    """

    def __init__(self, table: TemperatureTable, beta: FloatArray) -> None:
        self._table = table
        self._beta = beta
        self._x = np.log(beta)

    @cached_property
    def _value(self) -> FloatArray:
        return self._table.log_partition_at(self._x)

    @cached_property
    def nll(self) -> FloatArray:
        """[n] nats."""
        return negative_log_likelihood(self._value, self._beta * self._table.target)

    @cached_property
    def entropy(self) -> FloatArray:
        """[n] nats, of the predicted distribution."""
        return self._value - self._table.log_partition_at(self._x, slope=True)

    @cached_property
    def confidence(self) -> FloatArray:
        """[n], the largest probability."""
        largest: FloatArray = np.exp(-self._value)
        return largest

    @cached_property
    def brier(self) -> FloatArray:
        """[n]."""
        doubled = self._table.log_partition_at(self._x + np.log(2.0))
        return brier_score(np.exp(doubled - 2.0 * self._value), np.exp(-self.nll))

    @cached_property
    def classes(self) -> FloatArray | None:
        """[n, k] probabilities of chosen vocabulary entries, None if none were."""
        if self._table.classes is None:
            return None
        exponent = np.reshape(self._beta, (-1, 1)) * self._table.classes.u - self._value[:, None]
        return np.exp(exponent, out=exponent)


@dataclass(frozen=True)
class ClassLogits:
    """What a classwise measure needs of k chosen vocabulary entries (classes).

    Attributes:
        u: [n, k] their logits below the largest one, float32.
        target: [n] which of them follows, −1 if none does.
    """

    u: npt.NDArray[np.float32]
    target: IntArray

    def select(self, kept: IntArray) -> ClassLogits:
        """The given tokens (indices)."""
        return ClassLogits(self.u[kept], self.target[kept])


@dataclass(frozen=True)
class TemperatureTable:
    """All that is kept of n tokens: their scores at any temperature within the bounds.

    A temperature is one number for all tokens, or [n], one for each.

    Attributes:
        log_partition: piecewise polynomial x = ln β → G, [n] values.
        target: [n] u_y, the logit of the token that follows below the largest one.
        correct: [n] whether the argmax is the token that follows.
        text: [n] index into ``texts``.
        texts: ids.
        bounds: temperatures that can be asked for.
        classes: logits of chosen vocabulary entries, None if none were.
    """

    log_partition: BPoly
    target: FloatArray
    correct: BoolArray
    text: IntArray
    texts: tuple[str, ...]
    bounds: tuple[float, float]
    classes: ClassLogits | None = None

    def __len__(self) -> int:
        return int(self.target.size)

    def at(self, temperature: float | FloatArray) -> TokenScores:
        """Scores of every token at temperatures within the bounds."""
        return TokenScores(self, self._beta(temperature))

    def nll_slope(self, temperature: float | FloatArray) -> FloatArray:
        """dNLL/dT of every token, nats: [n]; with x = −ln T it is (β u_y − dG/dx) / T."""
        beta = self._beta(temperature)
        slope: FloatArray = beta * (
            beta * self.target - self.log_partition_at(np.log(beta), slope=True)
        )
        return slope

    def _beta(self, temperature: float | FloatArray) -> FloatArray:
        low, high = self.bounds
        values = np.asarray(temperature, dtype=np.float64)
        if not np.all((low <= values) & (values <= high)):
            raise ValueError(f"temperature {temperature} is not within {low} and {high}")
        return 1.0 / values

    def log_partition_at(self, x: FloatArray, *, slope: bool = False) -> FloatArray:
        """G, or dG/dx, of every token at its x: [] or [n] → [n]."""
        knots_x: FloatArray = self.log_partition.x
        piece = np.clip(np.searchsorted(knots_x, x, side="right") - 1, 0, knots_x.size - 2)
        width = knots_x[piece + 1] - knots_x[piece]
        each = slice(None) if x.ndim == 0 else np.arange(len(self))
        coefficients: FloatArray = self.log_partition.c[:, piece, each]
        if slope:
            coefficients = np.diff(coefficients, axis=0) * (coefficients.shape[0] - 1) / width
        return _bernstein(coefficients, (x - knots_x[piece]) / width)

    def select(self, texts: IntArray) -> TemperatureTable:
        """The tokens of the given texts (indices), which are numbered anew in that order."""
        from scipy.interpolate import BPoly

        number = np.full(len(self.texts), -1, dtype=np.intp)
        number[texts] = np.arange(texts.size)
        kept = np.flatnonzero(number[self.text] >= 0)
        return TemperatureTable(
            log_partition=BPoly(self.log_partition.c[..., kept], self.log_partition.x),
            target=self.target[kept],
            correct=self.correct[kept],
            text=number[self.text[kept]],
            texts=tuple(self.texts[i] for i in texts),
            bounds=self.bounds,
            classes=None if self.classes is None else self.classes.select(kept),
        )

    def per_text(self, *columns: FloatArray) -> FloatArray:
        """Sums of per-token columns over each text, then the token counts: [texts, k + 1]."""
        n = len(self.texts)
        sums = [np.bincount(self.text, column, minlength=n) for column in columns]
        return np.stack([*sums, np.bincount(self.text, minlength=n).astype(np.float64)], axis=1)


def _bernstein(coefficients: FloatArray, s: FloatArray) -> FloatArray:
    """Values of n polynomials in Bernstein form, at one s in [0, 1] or each at its own.

    Args:
        coefficients: [k + 1, n], of degree k.
        s: [] or [n].

    Returns:
        [n]: Σ_i C(k, i) s^i (1 − s)^{k−i} c_i.
    """
    degree = coefficients.shape[0] - 1
    values = np.zeros(coefficients.shape[1])
    for i, row in enumerate(coefficients):
        values += comb(degree, i) * s**i * (1.0 - s) ** (degree - i) * row
    return values


def temperature_table(
    rows: FloatArray,
    target: FloatArray,
    correct: BoolArray,
    text: IntArray,
    texts: tuple[str, ...],
    bounds: tuple[float, float],
    classes: ClassLogits | None = None,
) -> TemperatureTable:
    """A table from the rows of :func:`partition_rows`.

    Args:
        rows: [n, K, 3], at the knots of ``bounds``.
        target: [n] logit of the token that follows minus the largest logit.
        correct: [n] whether the argmax is the token that follows.
        text: [n] index into ``texts``.
        texts: ids.
        bounds: temperatures that can be asked for.
        classes: logits of chosen vocabulary entries.
    """
    from scipy.interpolate import BPoly

    return TemperatureTable(
        log_partition=BPoly.from_derivatives(np.log(knots(bounds)), rows.transpose(1, 2, 0)),
        target=target,
        correct=correct,
        text=text,
        texts=texts,
        bounds=bounds,
        classes=classes,
    )

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


def partition_rows(logits: npt.NDArray[np.floating], betas: FloatArray) -> FloatArray:
    """G and its first two derivatives in ln β at every knot.

    Args:
        logits: [t, V] float32 or float64. A NaN or infinity in a row makes results of that row NaN.
        betas: [K] from :func:`knots`.

    Returns:
        [t, K, 3] float64: G, dG/dx, d²G/dx² with x = ln β.
    """
    from so8tqc.metrics.temperature.kernels import partition

    rows = np.empty((logits.shape[0], betas.size, 3))
    partition(logits, betas, KNOTS_PER_OCTAVE, rows)
    return rows


@dataclass(frozen=True)
class TokenScores:
    """Scores of n tokens at one temperature.

    Attributes:
        nll: [n] nats.
        entropy: [n] nats, of the predicted distribution.
        confidence: [n], the largest probability.
        brier: [n].
        classes: [n, k] probabilities of chosen vocabulary entries, None if none were.
    """

    nll: FloatArray
    entropy: FloatArray
    confidence: FloatArray
    brier: FloatArray
    classes: FloatArray | None = None


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
        beta = self._beta(temperature)
        x = np.log(beta)
        value = self._log_partition(x)
        nll = negative_log_likelihood(value, beta * self.target)
        return TokenScores(
            nll=nll,
            entropy=value - self._log_partition(x, slope=True),
            confidence=np.exp(-value),
            brier=brier_score(
                np.exp(self._log_partition(x + np.log(2.0)) - 2.0 * value), np.exp(-nll)
            ),
            classes=self._class_probabilities(beta, value),
        )

    def nll_slope(self, temperature: float | FloatArray) -> FloatArray:
        """dNLL/dT of every token, nats: [n]; with x = −ln T it is (β u_y − dG/dx) / T."""
        beta = self._beta(temperature)
        slope: FloatArray = beta * (
            beta * self.target - self._log_partition(np.log(beta), slope=True)
        )
        return slope

    def _beta(self, temperature: float | FloatArray) -> FloatArray:
        low, high = self.bounds
        values = np.asarray(temperature, dtype=np.float64)
        if not np.all((low <= values) & (values <= high)):
            raise ValueError(f"temperature {temperature} is not within {low} and {high}")
        return 1.0 / values

    def _log_partition(self, x: FloatArray, *, slope: bool = False) -> FloatArray:
        """G, or dG/dx, of every token at its x: [] or [n] → [n]."""
        if x.ndim == 0:
            whole: FloatArray = self.log_partition(x, nu=int(slope))
            return whole
        knots_x: FloatArray = self.log_partition.x
        piece = np.clip(np.searchsorted(knots_x, x, side="right") - 1, 0, knots_x.size - 2)
        width = knots_x[piece + 1] - knots_x[piece]
        coefficients: FloatArray = self.log_partition.c[:, piece, np.arange(len(self))]
        if slope:
            coefficients = np.diff(coefficients, axis=0) * (coefficients.shape[0] - 1) / width
        return _de_casteljau(coefficients, (x - knots_x[piece]) / width)

    def _class_probabilities(self, beta: FloatArray, value: FloatArray) -> FloatArray | None:
        if self.classes is None:
            return None
        exponent = np.reshape(beta, (-1, 1)) * self.classes.u - value[:, None]
        return np.exp(exponent, out=exponent)

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


def _de_casteljau(coefficients: FloatArray, s: FloatArray) -> FloatArray:
    """Values of n polynomials in Bernstein form, each at its own s in [0, 1]: [k, n], [n] → [n]."""
    while coefficients.shape[0] > 1:
        coefficients = (1.0 - s) * coefficients[:-1] + s * coefficients[1:]
    values: FloatArray = coefficients[0]
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

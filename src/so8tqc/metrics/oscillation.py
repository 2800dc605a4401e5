"""How much a series of one number per token oscillates, and whether more than another.

For a series x_t, t = 1 … T (maximum logit, entropy, …):

* oscillation index: mean |Δ²x|, Δ²x_t = x_{t+1} − 2x_t + x_{t−1};
* von Neumann ratio: mean (Δx)² / mean (x − x̄)² (von Neumann, Annals of Mathematical
  Statistics 12, 1941): 2 for white noise, near 0 for a smooth series, 4 for pure alternation;
* high-frequency share: power at periods below 4 tokens over all power, of the series
  without its linear trend; 1/2 for white noise;
* high-variance points: where the variance of the tokens around is a multiple of what it
  usually is.

The first three are ratios of sums over tokens, so two models' series on the same tokens are
compared by a paired moving-block bootstrap: blocks of consecutive tokens, which may begin
anywhere, are resampled for both at once (Künsch, Annals of Statistics 17, 1989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.bootstrap import percentile_interval

FloatArray = npt.NDArray[np.float64]

BLOCK_TOKENS = 64
"""Long enough to hold the correlation of neighbouring tokens, short enough to have many."""

LEAST_BLOCKS = 8
"""A text of fewer blocks is cut into shorter ones: an interval from two or three means nothing."""

VARIANCE_WINDOW, VARIANCE_FACTOR = 32, 2.0
"""Tokens around a point, and the multiple of the median variance from which it stands out: Gaussian
white noise does so at one point in a thousand (χ² with 31 degrees of freedom)."""

HIGH_FREQUENCY = 0.25
"""Cycles per token from which a frequency is high: periods below 4 tokens."""

INDICES = ("index", "von_neumann", "high_frequency")


def contributions(series: FloatArray) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Per-token numerators and denominators of the three indices: name → ([T], [T])."""
    x = np.asarray(series, dtype=np.float64)
    second = np.zeros_like(x)
    second[1:-1] = np.abs(x[2:] - 2 * x[1:-1] + x[:-2])
    first = np.zeros_like(x)
    first[1:] = np.square(np.diff(x))
    rest = detrended(x)
    return {
        "index": (second, np.ones_like(x)),
        "von_neumann": (first, np.square(x - x.mean())),
        "high_frequency": (np.square(_high_pass(rest)), np.square(rest)),
    }


def indices(series: FloatArray) -> dict[str, float]:
    """The three indices of a series: [T] → name → value."""
    return {
        name: _ratio(float(top.sum()), float(bottom.sum()))
        for name, (top, bottom) in contributions(series).items()
    }


@dataclass(frozen=True)
class Change:
    """How much larger a candidate's index is than the reference's.

    Attributes:
        reference, candidate: the index of each.
        relative: candidate / reference − 1.
        ci95: 95 % interval of ``relative``.
    """

    reference: float
    candidate: float
    relative: float
    ci95: tuple[float, float]


def changes(
    reference: FloatArray, candidate: FloatArray, *, resamples: int, seed: int
) -> dict[str, Change]:
    """Compare the indices of two series on the same tokens.

    Args:
        reference, candidate: [T].
        resamples, seed: of the block bootstrap.
    """
    ours, theirs = contributions(candidate), contributions(reference)
    result = {}
    for name in INDICES:
        parts = np.stack([*ours[name], *theirs[name]], axis=1)  # [T, 4]
        whole = parts.sum(axis=0)
        result[name] = Change(
            reference=_ratio(whole[2], whole[3]),
            candidate=_ratio(whole[0], whole[1]),
            relative=float(_relative(whole)),
            ci95=block_interval(parts, _relative, resamples, seed),
        )
    return result


@dataclass(frozen=True)
class Slope:
    """Linear trend of a series over position.

    Attributes:
        per_thousand: change for every 1,000 tokens.
        ci95: 95 % interval, by resampling blocks of tokens.
    """

    per_thousand: float
    ci95: tuple[float, float]


def slope(series: FloatArray, *, resamples: int, seed: int) -> Slope:
    """Least-squares slope of a series over its position, in units per 1,000 tokens."""
    t = np.arange(series.size) / 1000.0
    ones = np.ones_like(t)
    parts = np.stack([ones, t, series, t * t, t * series], axis=1)
    interval = block_interval(parts, _least_squares, resamples, seed)
    return Slope(float(_least_squares(parts.sum(axis=0))), interval)


def high_variance(series: FloatArray) -> npt.NDArray[np.bool_]:
    """Points whose surroundings vary ``VARIANCE_FACTOR`` times as much as is usual: [T] → [T].

    The variance around a point is that of the ``VARIANCE_WINDOW`` tokens centred on it, the
    usual one is the median over the text.
    """
    if series.size < VARIANCE_WINDOW:
        return np.zeros(series.size, dtype=bool)
    windows = np.lib.stride_tricks.sliding_window_view(series, VARIANCE_WINDOW)
    variance = np.pad(
        windows.var(axis=1), (VARIANCE_WINDOW // 2, (VARIANCE_WINDOW - 1) // 2), mode="edge"
    )
    flagged: npt.NDArray[np.bool_] = variance > VARIANCE_FACTOR * np.median(variance)
    return flagged


def detrended(series: FloatArray) -> FloatArray:
    """The series without its least-squares line."""
    t = np.arange(series.size, dtype=np.float64)
    coefficients = np.polynomial.polynomial.polyfit(t, series, 1)
    rest: FloatArray = series - np.polynomial.polynomial.polyval(t, coefficients)
    return rest


def _high_pass(series: FloatArray) -> FloatArray:
    """The part of a series at or above ``HIGH_FREQUENCY``."""
    spectrum = np.fft.rfft(series)
    spectrum[np.fft.rfftfreq(series.size) < HIGH_FREQUENCY] = 0
    return np.fft.irfft(spectrum, n=series.size)


def block_interval(
    parts: FloatArray,
    statistic: Callable[[FloatArray], FloatArray],
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % interval of a statistic of sums over tokens, by moving blocks.

    Args:
        parts: [T, k] what every token adds to each sum.
        statistic: [..., k] sums → [...].
    """
    length = parts.shape[0]
    block = min(BLOCK_TOKENS, max(1, length // LEAST_BLOCKS))
    sums = np.cumsum(np.concatenate([np.zeros((1, parts.shape[1])), parts]), axis=0)
    windows = sums[block:] - sums[:-block]
    draws = -(-length // block)
    chosen = np.random.default_rng(seed).integers(windows.shape[0], size=(resamples, draws))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.concatenate(
            [statistic(windows[some].sum(axis=1)) for some in _batches(chosen, windows.shape[1])]
        )
    finite = values[np.isfinite(values)]
    return percentile_interval(finite, draws) if finite.size else (float("nan"), float("nan"))


def _batches(chosen: npt.NDArray[np.int64], width: int) -> list[npt.NDArray[np.int64]]:
    """Resamples in parts whose gathered windows stay within some 16 MiB."""
    rows = max(1, (1 << 21) // (chosen.shape[1] * width))
    return [chosen[i : i + rows] for i in range(0, len(chosen), rows)]


def _relative(totals: FloatArray) -> FloatArray:
    """[..., 4] (top, bottom of candidate; top, bottom of reference) → relative change."""
    change: FloatArray = (totals[..., 0] * totals[..., 3]) / (totals[..., 1] * totals[..., 2]) - 1.0
    return change


def _least_squares(totals: FloatArray) -> FloatArray:
    """[..., 5] sums of (1, t, y, t², ty) → slope."""
    n, t, y, tt, ty = np.moveaxis(totals, -1, 0)
    result: FloatArray = (n * ty - t * y) / (n * tt - t * t)
    return result


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom else 0.0

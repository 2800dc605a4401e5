"""Bootstrap intervals over texts.

Tokens of one text are not independent, so texts (or windows) are resampled
whole. Statistics are functions of per-text sums, which makes a resample one
row of a weight matrix and the whole bootstrap one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def resample_weights(texts: int, resamples: int, seed: int) -> FloatArray:
    """How often each text is drawn in each resample: [resamples, texts], rows sum to ``texts``.

    Drawing n texts with replacement gives multinomial counts (Efron and Tibshirani,
    An Introduction to the Bootstrap, ch. 6). The same seed gives the same resamples,
    so that two statistics computed with it are paired.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(texts, np.full(texts, 1.0 / texts), size=resamples)
    return counts.astype(np.float64)


def paired_bootstrap(
    per_text: FloatArray,
    statistic: Callable[[FloatArray], FloatArray],
    *,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of per-text sums.

    Args:
        per_text: [texts, k], additive quantities of each text (sums, counts).
        statistic: [..., k] totals → [...] values, vectorised, e.g. ``s[..., 0] / s[..., 1]``.
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        (low, high), the 2.5 % and 97.5 % quantiles. With a single text there is nothing to
        resample: both are NaN.
    """
    if per_text.shape[0] < 2:
        return (float("nan"), float("nan"))
    totals = resample_weights(per_text.shape[0], resamples, seed) @ per_text
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(totals)
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def ratio_of_sums(totals: FloatArray) -> FloatArray:
    """[..., 2] → [...]: a token-weighted mean, sum over count."""
    ratio: FloatArray = totals[..., 0] / totals[..., 1]
    return ratio

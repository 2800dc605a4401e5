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

LEAST_TEXTS = 5
"""With fewer, the resamples repeat a handful of values (35 for four texts) that lie within the
few that were seen, and no interval of them covers what it should."""


def resample_weights(texts: int, resamples: int, seed: int) -> FloatArray:
    """How often each text is drawn in each resample: [resamples, texts], rows sum to ``texts``.

    Drawing n texts with replacement gives multinomial counts (Efron and Tibshirani,
    An Introduction to the Bootstrap, ch. 6). The same seed gives the same resamples,
    so that two statistics computed with it are paired.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(texts, np.full(texts, 1.0 / texts), size=resamples)
    return counts.astype(np.float64)


def texts_to_halve(texts: int) -> int:
    """How many texts of the same kind make an interval half as wide.

    A mean's interval is 2·t_{0.975, n−1}·s/√n wide, with s what one text differs from another by,
    so that n' is the least with t_{n'−1}/√n' ≤ ½·t_{n−1}/√n: four times as many, a few less where
    n is small.

    Args:
        texts: n, at least LEAST_TEXTS.
    """
    from scipy.stats import t

    def width(count: int) -> float:
        return float(t.ppf(0.975, count - 1)) / float(np.sqrt(count))

    wanted = width(texts) / 2
    low, high = texts, 4 * texts
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if width(middle) <= wanted else (middle + 1, high)
    return low


def percentile_interval(values: FloatArray, texts: int, looks: int = 1) -> tuple[float, float]:
    """95 % interval from bootstrap values of a statistic of few texts.

    The plain 2.5 % and 97.5 % quantiles are too narrow for few texts: a resample's spread is
    √((n−1)/n) of the true one, and its tails are normal where Student's are due. The levels are
    therefore Φ(∓ √(n/(n−1)) t_{0.975, n−1}), the *expanded percentile* interval of Hesterberg
    (What Teachers Should Know About the Bootstrap, The American Statistician 69:4, 2015). In
    a simulation with a known temperature it raises the coverage from 80 % to 87 % with 6 texts,
    and from 92 % to 96 % with 12.

    Args:
        values: [resamples].
        texts: n, at least LEAST_TEXTS.
        looks: so many intervals, at this and other numbers of texts, hold together with 95 %: each
            has a level of 1 − 0.05/looks (Bonferroni).
    """
    from scipy.stats import norm, t

    level = 1 - 0.025 / looks
    tail = float(norm.cdf(-np.sqrt(texts / (texts - 1)) * t.ppf(level, texts - 1)))
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def paired_bootstrap(
    per_text: FloatArray,
    statistic: Callable[[FloatArray], FloatArray],
    *,
    resamples: int,
    seed: int,
    looks: int = 1,
) -> tuple[float, float]:
    """95 % interval of a statistic of per-text sums (see :func:`percentile_interval`).

    Args:
        per_text: [texts, k], additive quantities of each text (sums, counts).
        statistic: [..., k] totals → [...] values, vectorised, e.g. ``s[..., 0] / s[..., 1]``.
        resamples: number of resamples.
        seed: of the resampling.
        looks: see :func:`percentile_interval`.

    Returns:
        (low, high); both NaN with fewer than LEAST_TEXTS texts.
    """
    if per_text.shape[0] < LEAST_TEXTS:
        return (float("nan"), float("nan"))
    totals = resample_weights(per_text.shape[0], resamples, seed) @ per_text
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(totals)
    return percentile_interval(values[np.isfinite(values)], per_text.shape[0], looks)


def ratio_of_sums(totals: FloatArray) -> FloatArray:
    """[..., 2] → [...]: a token-weighted mean, sum over count."""
    ratio: FloatArray = totals[..., 0] / totals[..., 1]
    return ratio


def quantile_interval(
    values: FloatArray,
    text: npt.NDArray[np.integer],
    texts: int,
    quantile: float,
    *,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % interval of a quantile of token values, texts resampled whole.

    A resample weighs each token by how often its text was drawn; its quantile is the smallest
    value at which the weights reach that share (the inverse of the weighted distribution).

    Args:
        values: [tokens].
        text: [tokens] index of the text of each token.
        texts: number of texts.
        quantile: in (0, 1).
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        (low, high); both NaN with fewer than LEAST_TEXTS texts.
    """
    if texts < LEAST_TEXTS:
        return (float("nan"), float("nan"))
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], text[order]
    found = np.empty(resamples)
    for i, weights in enumerate(resample_weights(texts, resamples, seed)):
        reached = np.cumsum(weights[owner])
        at = int(np.searchsorted(reached, quantile * reached[-1]))
        found[i] = ordered[min(at, ordered.size - 1)]
    return percentile_interval(found, texts)

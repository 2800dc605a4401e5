"""Paired differences of several candidates, judged together: intervals that hold all at once.

Two models scored on the same tokens differ token by token; the texts are the independent units.
The difference of mean measures is the ratio θ = Σ_i d_i / Σ_i n_i over texts i (d_i the summed
differences of text i, n_i its tokens). Its standard error follows from the residuals
e_i = d_i − θ n_i by linearisation (Cochran, Sampling Techniques, §6.3):

    se² = m / (m − 1) · Σ e_i² / (Σ n_i)²,   m texts.

Texts are resampled whole, the same ones for every comparison, and each comparison is studentised in
each resample (bootstrap-t). The largest |t*| over all comparisons has one 95 % quantile c, and
the intervals θ_j ∓ c·se_j hold *all at once* with 95 % (the single-step max-T method: Westfall and
Young, Resampling-Based Multiple Testing, 1993; Romano and Wolf, Econometrica 73:4, 2005). That
takes the place of Bonferroni's correction, which ignores how strongly such comparisons depend on
each other.

A difference that is zero in nearly every text (a top token that moved in two of them) has no such
interval: many resamples hold none of the others, and there its t is infinite. It gets none, and
takes no part in the largest |t*|, where it would take every other comparison's interval with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.bootstrap import LEAST_TEXTS, resample_weights

FloatArray = npt.NDArray[np.float64]

LEVEL = 0.95
"""Coverage of all intervals together."""


@dataclass(frozen=True)
class Differences:
    """k differences of means with simultaneous intervals.

    Attributes:
        values: [k] differences of token-weighted means.
        low, high: [k] ends of the intervals; NaN where fewer than LEAST_TEXTS texts differ, unless
            none does.
        p: [k] adjusted p-values of a difference of 0; NaN likewise.
        critical: c, the factor of the standard errors; NaN with fewer than LEAST_TEXTS texts.
    """

    values: FloatArray
    low: FloatArray
    high: FloatArray
    p: FloatArray
    critical: float


def simultaneous_differences(
    sums: FloatArray, counts: FloatArray, *, resamples: int, seed: int, looks: int = 1
) -> Differences:
    """Intervals of k paired differences that hold all at once.

    Args:
        sums: [texts, k] summed differences of each text, one column for each comparison.
        counts: [texts] tokens of each text.
        resamples: number of resamples.
        looks: so many such comparisons hold together, see ``bootstrap.percentile_interval``.
        seed: of the resampling.
    """
    texts = counts.size
    values: FloatArray = sums.sum(axis=0) / counts.sum()
    if texts < LEAST_TEXTS:
        nothing = np.full(values.shape, np.nan)
        return Differences(values, nothing, nothing, nothing, float("nan"))
    residuals = sums - values * counts[:, None]
    errors = _standard_errors(np.square(residuals).sum(axis=0), counts.sum(), texts)
    differing = np.count_nonzero(sums, axis=0)
    few = (differing > 0) & (differing < LEAST_TEXTS)
    varies = (errors > 0) & ~few
    largest = np.zeros(resamples)
    if varies.any():
        scaled = residuals[:, varies] / errors[varies]
        largest = _largest_t(scaled, counts, resample_weights(texts, resamples, seed))
    critical = float(np.quantile(largest, 1 - (1 - LEVEL) / looks, method="higher"))
    half = np.where(varies, critical * errors, np.where(few, np.nan, 0.0))
    # a difference that is the same in every text has no error to be judged by
    t = np.divide(np.abs(values), errors, out=np.where(values == 0, 0.0, np.inf), where=varies)
    exceeding = (largest[:, None] >= t[None, :]).sum(axis=0)
    p = np.where(values == 0, 1.0, (exceeding + 1) / (resamples + 1))
    p[few] = np.nan
    return Differences(values, values - half, values + half, p, critical)


def _largest_t(residuals: FloatArray, counts: FloatArray, weights: FloatArray) -> FloatArray:
    """[resamples] the largest |t*| over the comparisons of each resample.

    Args:
        residuals: [texts, k] e_i, whose difference of means is 0.
        counts: [texts] n_i.
        weights: [resamples, texts] how often each text is drawn.
    """
    tokens = (weights @ counts)[:, None]
    means = weights @ residuals / tokens
    squares = (
        weights @ np.square(residuals)
        - 2 * means * (weights @ (residuals * counts[:, None]))
        + np.square(means) * (weights @ np.square(counts))[:, None]
    )
    errors = _standard_errors(np.maximum(squares, 0.0), tokens, counts.size)
    # a resample of one text alone has no spread: its t is infinite, on the safe side
    t = np.divide(np.abs(means), errors, out=np.full(means.shape, np.inf), where=errors > 0)
    largest: FloatArray = t.max(axis=1)
    return largest


def _standard_errors(
    squares: FloatArray, tokens: FloatArray | np.floating, texts: int
) -> FloatArray:
    errors: FloatArray = np.sqrt(texts / (texts - 1) * squares) / tokens
    return errors

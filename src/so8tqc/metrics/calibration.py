"""Calibration of next-token probabilities: are they as often right as they say?

All measures are means over tokens; probabilities are of the whole vocabulary V, the
confidence of a token is max_v p_v, and it is correct if the argmax is the token that follows.

* NLL = −ln p_y, y the token that follows. Proper.
* Brier score = Σ_v (p_v − 1[v = y])², in [0, 2] (Brier 1950, the multi-class form). Proper.
* ECE = Σ_b n_b/n · |accuracy_b − confidence_b| over M bins of confidence, bin b = (b/M, (b+1)/M]
  (Naeini et al. 2015; Guo et al. 2017, whose M = 15 and half-open bins these are).
* Adaptive ECE: the same sum over bins of equal mass (Nguyen and O'Connor 2015).
* Classwise ECE: for one vocabulary entry v, its probability p_v at every position is the
  confidence and "v follows" the outcome; the ECE of that, averaged over entries (Kull et al. 2019,
  eq. 4). Over a whole vocabulary it is the mean of tens of thousands of numbers near zero, so it
  is taken over the k entries that follow most often in the texts (classwise-top-k), a choice that
  depends on the texts alone.

With s_b the sum over a bin of (correct − confidence), ECE = Σ_b |s_b| / n. So it is a function
of sums that add up over texts, which is what a bootstrap over texts needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]

BINS = 15


def negative_log_likelihood(log_partition: FloatArray, target_logit: FloatArray) -> FloatArray:
    """NLL of each token from ln Σ_v e^{z_v} and z_y: [n], [n] → [n] nats."""
    return log_partition - target_logit


def brier_score(squared_norm: FloatArray, target_probability: FloatArray) -> FloatArray:
    """Multi-class Brier score of each token from Σ_v p_v² and p_y: [n], [n] → [n].

    Σ_v (p_v − 1[v = y])² = Σ_v p_v² − 2 p_y + 1.
    """
    return squared_norm - 2.0 * target_probability + 1.0


def equal_width_edges(bins: int = BINS) -> FloatArray:
    """Edges of equally wide bins of [0, 1]: [bins + 1]."""
    return np.linspace(0.0, 1.0, bins + 1)


def equal_mass_edges(confidence: FloatArray, bins: int = BINS) -> FloatArray:
    """Edges that put equally many tokens in each bin: [bins + 1], from 0 to 1.

    The edges are quantiles, so tokens of equal confidence share a bin and the order of the
    tokens does not matter; with many ties some bins are empty.
    """
    edges: FloatArray = np.quantile(confidence, np.linspace(0.0, 1.0, bins + 1))
    edges[0], edges[-1] = 0.0, 1.0
    return edges


def bin_index(confidence: FloatArray, edges: FloatArray) -> IntArray:
    """Which bin (edges[b], edges[b + 1]] each confidence falls into; 0 belongs to the first."""
    return np.searchsorted(edges[1:-1], confidence, side="left")


def calibration_sums(
    confidence: FloatArray, correct: BoolArray, edges: FloatArray, group: IntArray, groups: int
) -> FloatArray:
    """Signed gaps of each bin, summed over each group of tokens.

    Args:
        confidence: [n], in [0, 1].
        correct: [n].
        edges: [bins + 1].
        group: [n], the text of each token.
        groups: number of texts.

    Returns:
        [groups, bins + 1]: Σ (correct − confidence) of each bin, then the number of tokens.
    """
    bins = edges.size - 1
    gaps = np.bincount(
        group * bins + bin_index(confidence, edges),
        weights=correct - confidence,
        minlength=groups * bins,
    ).reshape(groups, bins)
    counts = np.bincount(group, minlength=groups).astype(np.float64)
    return np.concatenate([gaps, counts[:, None]], axis=1)


def calibration_error(sums: FloatArray) -> FloatArray:
    """ECE from the totals of :func:`calibration_sums`: [..., bins + 1] → [...]."""
    error: FloatArray = np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]
    return error


def classwise_sums(
    probabilities: FloatArray, target: IntArray, edges: FloatArray, group: IntArray, groups: int
) -> FloatArray:
    """Signed gaps of each class and bin, summed over each group of tokens.

    Args:
        probabilities: [n, k] of each class, in [0, 1].
        target: [n] which class follows, −1 if none of them.
        edges: [bins + 1].
        group: [n], the text of each token.
        groups: number of texts.

    Returns:
        [groups, k · bins + 1]: Σ ([class follows] − p) of each class's bins, then the tokens.
    """
    parts = [
        calibration_sums(probabilities[:, c], target == c, edges, group, groups)
        for c in range(probabilities.shape[1])
    ]
    return np.concatenate([*(part[:, :-1] for part in parts), parts[0][:, -1:]], axis=1)


def classwise_calibration_error(
    probabilities: FloatArray, target: IntArray, bins: int = BINS
) -> float:
    """Mean over classes of the ECE of each class's probability, over equally wide bins.

    Args:
        probabilities: [n, k] of each class.
        target: [n] which class follows, −1 if none of them.
        bins: of equal width.
    """
    everything = np.zeros(target.size, dtype=np.intp)
    sums = classwise_sums(probabilities, target, equal_width_edges(bins), everything, 1)
    return float(calibration_error(sums)[0] / probabilities.shape[1])


def expected_calibration_error(
    confidence: FloatArray, correct: BoolArray, bins: int = BINS
) -> float:
    """ECE over equally wide bins."""
    return _error(confidence, correct, equal_width_edges(bins))


def adaptive_calibration_error(
    confidence: FloatArray, correct: BoolArray, bins: int = BINS
) -> float:
    """ECE over bins of equal mass."""
    return _error(confidence, correct, equal_mass_edges(confidence, bins))


def _error(confidence: FloatArray, correct: BoolArray, edges: FloatArray) -> float:
    everything = np.zeros(confidence.size, dtype=np.intp)
    return float(calibration_error(calibration_sums(confidence, correct, edges, everything, 1))[0])


@dataclass(frozen=True)
class ReliabilityBins:
    """A reliability diagram's data.

    Attributes:
        edges: [bins + 1].
        count: [bins] tokens.
        confidence, accuracy: [bins] means; NaN where a bin is empty.
    """

    edges: FloatArray
    count: IntArray
    confidence: FloatArray
    accuracy: FloatArray


def reliability_bins(
    confidence: FloatArray, correct: BoolArray, bins: int = BINS
) -> ReliabilityBins:
    """Count, mean confidence and accuracy of each of ``bins`` equally wide bins."""
    edges = equal_width_edges(bins)
    index = bin_index(confidence, edges)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        return ReliabilityBins(
            edges=edges,
            count=count,
            confidence=np.bincount(index, weights=confidence, minlength=bins) / count,
            accuracy=np.bincount(index, weights=correct, minlength=bins) / count,
        )

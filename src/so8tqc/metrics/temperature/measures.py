"""What is minimised or reported at a temperature, as functions of sums that add up over texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from so8tqc.metrics.bootstrap import ratio_of_sums
from so8tqc.metrics.calibration import (
    calibration_error,
    calibration_sums,
    classwise_sums,
    equal_mass_edges,
    equal_width_edges,
)
from so8tqc.metrics.temperature.table import FloatArray, TemperatureTable, TokenScores


@dataclass(frozen=True)
class Measure:
    """Something about a set of tokens at a temperature; smaller is better (but for sharpness).

    Attributes:
        name: e.g. ``nll``.
        sums: (table, its scores at a temperature) → [texts, k] additive quantities.
        value: [..., k] totals → [...] values.
    """

    name: str
    sums: Callable[[TemperatureTable, TokenScores], FloatArray]
    value: Callable[[FloatArray], FloatArray]

    def at(self, table: TemperatureTable, temperature: float | FloatArray) -> float:
        """The value over all texts of a table."""
        return float(self.value(self.sums(table, table.at(temperature)).sum(axis=0)))


NLL = Measure("nll", lambda table, scores: table.per_text(scores.nll), ratio_of_sums)
BRIER = Measure("brier", lambda table, scores: table.per_text(scores.brier), ratio_of_sums)


def ece(bins: int) -> Measure:
    """ECE over equally wide bins."""
    edges = equal_width_edges(bins)
    return Measure(
        "ece",
        lambda table, scores: calibration_sums(
            scores.confidence, table.correct, edges, table.text, len(table.texts)
        ),
        calibration_error,
    )


def adaptive_ece(bins: int) -> Measure:
    """ECE over bins of equal mass; the edges are those of the whole table at the temperature."""
    return Measure(
        "adaptive_ece",
        lambda table, scores: calibration_sums(
            scores.confidence,
            table.correct,
            equal_mass_edges(scores.confidence, bins),
            table.text,
            len(table.texts),
        ),
        calibration_error,
    )


def classwise_ece(bins: int, classes: int) -> Measure:
    """Mean ECE of the probabilities of a table's chosen vocabulary entries.

    Args:
        bins: of equal width.
        classes: how many entries the table chose, at least one.
    """
    edges = equal_width_edges(bins)

    def sums(table: TemperatureTable, scores: TokenScores) -> FloatArray:
        if table.classes is None or scores.classes is None:
            raise ValueError("the table chose no vocabulary entries")
        return classwise_sums(
            scores.classes, table.classes.target, edges, table.text, len(table.texts)
        )

    return Measure("classwise_ece", sums, lambda totals: calibration_error(totals) / classes)


SHARPNESS = Measure(
    "sharpness", lambda table, scores: table.per_text(scores.confidence), ratio_of_sums
)
"""Mean largest probability: how much the model claims to know. Neither more nor less is better by
itself; a calibrated model is as sharp as it is accurate."""


def entropy_mismatch(reference: FloatArray) -> Measure:
    """(mean entropy − the reference model's)², nats².

    Args:
        reference: [n] the reference's entropies of the very tokens of the table.
    """
    return Measure(
        "entropy",
        lambda table, scores: table.per_text(scores.entropy, reference),
        lambda totals: ((totals[..., 0] - totals[..., 1]) / totals[..., 2]) ** 2,
    )


def _variance(totals: FloatArray) -> FloatArray:
    mean, square = totals[..., 0] / totals[..., 2], totals[..., 1] / totals[..., 2]
    variance: FloatArray = square - mean**2
    return variance


CONFIDENCE_VARIANCE = Measure(
    "confidence-variance",
    lambda table, scores: table.per_text(scores.confidence, scores.confidence**2),
    _variance,
)
"""Variance of the largest probability. Degenerate: flat distributions all have the same
confidence, so the minimum tends to the upper bound."""

"""Fitting one temperature, and how sure one can be of it.

Tokens of one text are not independent, so texts are resampled whole. A resample is a weighting
of a measure's per-text sums, so the temperature is fitted anew in each of thousands of resamples
by matrix products alone, without a token being looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from so8tqc.metrics.bootstrap import LEAST_TEXTS, percentile_interval, resample_weights
from so8tqc.metrics.temperature.measures import Measure
from so8tqc.metrics.temperature.table import FloatArray, TemperatureTable, TokenScores

GRID = 97
"""Temperatures looked at before refining, log-spaced: steps of 1.9 % within 0.5–3.0."""

TOLERANCE = 1e-6
"""Of ln T, to which a fit is found. A fit within 100 tolerances of a bound is at the bound."""


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature.

    Attributes:
        temperature: minimises the measure within the bounds.
        ci95: 95 % interval over resampled texts; None for fewer than LEAST_TEXTS.
        at_bound: the minimum lies on a bound, so the bound chose it and not the data.
        converged: what the minimiser reports.
        value: of the measure at the temperature.
        log_deviation: standard deviation of ln T over resampled texts; None for fewer than
            LEAST_TEXTS.
        grid: [g] temperatures that were scanned.
        curve: [g] the measure there.
    """

    temperature: float
    ci95: tuple[float, float] | None
    at_bound: bool
    converged: bool
    value: float
    log_deviation: float | None
    grid: FloatArray
    curve: FloatArray


def fit_temperature(
    table: TemperatureTable, measure: Measure, *, resamples: int, seed: int
) -> TemperatureFit:
    """Minimise a measure over the table's bounds.

    The log-spaced grid finds the right valley (ECE has many), ``scipy.optimize`` its floor.
    """
    from scipy.optimize import minimize_scalar

    low, high = table.bounds
    grid = np.geomspace(low, high, GRID)
    grid[0], grid[-1] = low, high  # geomspace rounds its ends
    sums = np.stack([measure.sums(table, table.at(float(t))) for t in grid])
    curve = measure.value(sums.sum(axis=1))
    best = int(curve.argmin())
    valley = np.log(grid[[max(best - 1, 0), min(best + 1, GRID - 1)]])
    result = minimize_scalar(
        lambda x: measure.at(table, float(np.clip(np.exp(x), low, high))),
        bounds=tuple(valley),
        method="bounded",
        options={"xatol": TOLERANCE},
    )
    temperature = float(np.exp(result.x)) if result.fun < curve[best] else float(grid[best])
    refitted = (
        _refitted(sums, measure, grid, resamples, seed) if len(table.texts) >= LEAST_TEXTS else None
    )
    for bound in (low, high):
        if abs(np.log(temperature / bound)) < 100 * TOLERANCE:
            temperature = bound
    return TemperatureFit(
        temperature=temperature,
        ci95=None if refitted is None else percentile_interval(refitted, len(table.texts)),
        at_bound=temperature in (low, high),
        converged=bool(result.success),
        value=measure.at(table, temperature),
        log_deviation=None if refitted is None else float(np.log(refitted).std()),
        grid=grid,
        curve=curve,
    )


def _refitted(
    sums: FloatArray, measure: Measure, grid: FloatArray, resamples: int, seed: int
) -> FloatArray:
    """The temperature fitted anew to each resample of the texts: [resamples].

    Args:
        sums: [g, texts, k] at each temperature of the grid.
        measure: what is minimised.
        grid: [g] those temperatures, log-spaced.
        resamples: number of resamples.
        seed: of the resampling.
    """
    weights = resample_weights(sums.shape[1], resamples, seed)
    curves = np.stack([measure.value(weights @ per_text) for per_text in sums], axis=1)
    fitted: FloatArray = np.clip(np.exp(_valleys(curves, np.log(grid))), grid[0], grid[-1])
    return fitted


def _valleys(curves: FloatArray, x: FloatArray) -> FloatArray:
    """Where each curve is smallest: [r, g] → [r].

    The vertex of the parabola through the smallest point and its two neighbours, at most
    half a step away; at an end of the grid, the end.
    """
    best = curves.argmin(axis=1)
    inner = np.clip(best, 1, x.size - 2)
    each = np.arange(best.size)
    left, middle, right = (curves[each, inner + i] for i in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.divide(left - right, 2 * bend, out=np.zeros_like(bend), where=bend > 0)
    vertex = x[inner] + np.clip(shift, -0.5, 0.5) * (x[1] - x[0])
    places: FloatArray = np.where(best == inner, vertex, x[best])
    return places


@dataclass(frozen=True)
class Change:
    """A measure before and after something, on the same tokens.

    Attributes:
        before, after: its values.
        ci95: paired 95 % interval of after − before over resampled texts; None for fewer than
            LEAST_TEXTS.
    """

    before: float
    after: float
    ci95: tuple[float, float] | None

    @property
    def difference(self) -> float:
        """after − before; negative is better."""
        return self.after - self.before

    @property
    def better(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.ci95 is not None and self.ci95[1] < 0.0

    @property
    def margin(self) -> float:
        """How much worse it could look by the choice of texts alone: difference − lower end."""
        return 0.0 if self.ci95 is None else max(0.0, self.difference - self.ci95[0])


@dataclass(frozen=True)
class Scored:
    """A temperature table, evaluated at one temperature."""

    table: TemperatureTable
    scores: TokenScores


def scored(table: TemperatureTable, temperature: float | FloatArray = 1.0) -> Scored:
    """A table at one temperature, or at one for each token."""
    return Scored(table, table.at(temperature))


def paired_change(
    before: Scored, after: Scored, measure: Measure, *, resamples: int, seed: int
) -> Change:
    """What a measure is on the same texts by two models, or by one at two temperatures.

    Args:
        before, after: over the same texts, in the same order.
        measure: what is compared.
        resamples: of the texts.
        seed: of the resampling.
    """
    sums = [measure.sums(side.table, side.scores) for side in (before, after)]
    texts = len(before.table.texts)
    interval = None
    if texts >= LEAST_TEXTS:
        weights = resample_weights(texts, resamples, seed)
        differences = measure.value(weights @ sums[1]) - measure.value(weights @ sums[0])
        interval = percentile_interval(differences, texts)
    return Change(
        before=float(measure.value(sums[0].sum(axis=0))),
        after=float(measure.value(sums[1].sum(axis=0))),
        ci95=interval,
    )


def change(
    table: TemperatureTable,
    measure: Measure,
    temperature: float | FloatArray,
    *,
    resamples: int,
    seed: int,
) -> Change:
    """What a temperature does to a measure, against T = 1."""
    return paired_change(
        scored(table), scored(table, temperature), measure, resamples=resamples, seed=seed
    )

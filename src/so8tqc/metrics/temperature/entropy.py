"""A temperature that depends on how sure the model is: T(H) = a + b·H.

H is the entropy (nats) of the model's own prediction at T = 1, so nothing but the logits is needed
to apply it. With b > 0 the unsure predictions are flattened more than the sure ones. T is held
within the bounds of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from so8tqc.metrics.temperature.table import FloatArray, TemperatureTable


@dataclass(frozen=True)
class EntropyTemperature:
    """T(H) = a + b·H, held within bounds.

    Attributes:
        a: temperature at zero entropy.
        b: per nat.
        bounds: least and largest temperature.
        converged: what the minimiser reports.
        held: share of the fit tokens whose temperature is at a bound.
    """

    a: float
    b: float
    bounds: tuple[float, float]
    converged: bool
    held: float

    def at(self, entropy: FloatArray) -> FloatArray:
        """[n] entropies, nats → [n] temperatures."""
        return np.clip(self.a + self.b * entropy, *self.bounds)


def fit_entropy_temperature(table: TemperatureTable, start: float) -> EntropyTemperature:
    """Minimise the mean NLL over (a, b) by L-BFGS-B with its exact gradient.

    Entropies are centred meanwhile, else a and b would lean on each other.

    Args:
        table: tokens to fit on.
        start: the best temperature that does not depend on entropy; the fit cannot end worse.
    """
    from scipy.optimize import minimize

    entropy = table.at(1.0).entropy
    centre = float(entropy.mean())
    centred = entropy - centre
    low, high = table.bounds

    def value_and_gradient(x: FloatArray) -> tuple[float, FloatArray]:
        free = x[0] + x[1] * centred
        temperature = np.clip(free, low, high)
        slope = np.where(free == temperature, table.nll_slope(temperature), 0.0)
        gradient = np.array([slope.mean(), (slope * centred).mean()])
        return float(table.at(temperature).nll.mean()), gradient

    result = minimize(
        value_and_gradient,
        np.array([start, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=((low, high), (None, None)),
        options={"ftol": 1e-12, "gtol": 1e-7},
    )
    level, b = (float(value) for value in result.x)
    free = level + b * centred
    return EntropyTemperature(
        a=level - b * centre,
        b=b,
        bounds=table.bounds,
        converged=bool(result.success),
        held=float(((free <= low) | (free >= high)).mean()),
    )

"""T(H) = a + b·H against a fit on full logits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from so8tqc.metrics.temperature.entropy import EntropyTemperature, fit_entropy_temperature
from so8tqc.metrics.temperature.fit import fit_temperature
from so8tqc.metrics.temperature.measures import NLL
from so8tqc.metrics.temperature.table import (
    TemperatureTable,
    knots,
    partition_rows,
    temperature_table,
)


def _world(
    a: float, b: float, bounds: tuple[float, float] = (0.5, 3.0), tokens: int = 6000
) -> tuple[TemperatureTable, np.ndarray, np.ndarray, np.ndarray]:
    """Next tokens drawn from softmax(z / (a + b·H)); sure and unsure positions."""
    generator = np.random.default_rng(0)
    scale = generator.uniform(0.5, 5.0, size=(tokens, 1))
    z = (generator.normal(size=(tokens, 30)) * scale).astype(np.float32)
    logp = log_softmax(z.astype(np.float64), axis=1)
    entropy = -(np.exp(logp) * logp).sum(axis=1)
    temperature = np.clip(a + b * entropy, 0.5, 3.0)[:, None]
    y = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
    top, each = z.argmax(axis=1), np.arange(tokens)
    table = temperature_table(
        partition_rows(z, knots(bounds))[0],
        z[each, y].astype(np.float64) - z[each, top],
        top == y,
        np.zeros(tokens, dtype=np.intp),
        ("t",),
        bounds,
    )
    return table, z.astype(np.float64), y, entropy


@pytest.mark.parametrize(("a", "b"), [(0.9, 0.4), (1.8, -0.3), (1.3, 0.0)])
def test_fit_is_the_optimum_of_full_logits(a: float, b: float) -> None:
    table, z, y, entropy = _world(a, b)

    def nll(x: np.ndarray) -> float:
        temperature = np.clip(x[0] + x[1] * entropy, 0.5, 3.0)[:, None]
        return float(-log_softmax(z / temperature, axis=1)[np.arange(y.size), y].mean())

    exact = minimize(nll, [1.2, 0.1], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12})
    fit = fit_entropy_temperature(table, 1.2)
    assert fit.converged
    assert (fit.a, fit.b) == pytest.approx(tuple(exact.x), abs=5e-3)
    assert nll(np.array([fit.a, fit.b])) == pytest.approx(exact.fun, abs=1e-6)
    assert fit.a == pytest.approx(a, abs=0.15)
    assert fit.b == pytest.approx(b, abs=0.12)


def test_never_worse_than_one_temperature() -> None:
    table, *_ = _world(1.3, 0.0, tokens=400)
    one = fit_temperature(table, NLL, resamples=100, seed=0)
    fit = fit_entropy_temperature(table, one.temperature)
    assert table.at(fit.at(table.at(1.0).entropy)).nll.mean() <= one.value + 1e-12


def test_temperatures_stay_within_bounds_and_that_is_reported() -> None:
    table, _, _, entropy = _world(0.9, 0.6, bounds=(0.8, 1.3))
    fit = fit_entropy_temperature(table, 1.2)
    temperature = fit.at(entropy)
    assert temperature.min() >= 0.8
    assert temperature.max() <= 1.3
    free = fit.a + fit.b * entropy
    assert fit.held == pytest.approx(((free <= 0.8) | (free >= 1.3)).mean(), abs=1e-3)
    assert fit.held > 0.3


def test_clipping() -> None:
    rule = EntropyTemperature(1.0, 0.5, (0.9, 2.0), True, 0.0)
    assert rule.at(np.array([-1.0, 0.0, 1.0, 9.0])).tolist() == [0.9, 1.0, 1.5, 2.0]

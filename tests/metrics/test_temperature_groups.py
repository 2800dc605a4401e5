"""Temperatures of groups: apart where the data say so, together where they do not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from so8tqc.metrics.temperature.fit import fit_temperature
from so8tqc.metrics.temperature.groups import (
    between_variance,
    group_temperatures,
    temperature_of_tokens,
)
from so8tqc.metrics.temperature.measures import NLL
from so8tqc.metrics.temperature.table import (
    TemperatureTable,
    knots,
    partition_rows,
    temperature_table,
)

BOUNDS = (0.5, 3.0)


def _world(
    true: list[float], texts: int, tokens: int, seed: int = 0
) -> tuple[TemperatureTable, list[str], np.ndarray, np.ndarray]:
    """Texts of several groups, each with a temperature of its own."""
    generator = np.random.default_rng(seed)
    per_text = np.repeat(true, texts)
    z = (generator.normal(size=(per_text.size * tokens, 40)) * 2.5).astype(np.float32)
    temperature = np.repeat(per_text, tokens)[:, None]
    y = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
    top, each = z.argmax(axis=1), np.arange(y.size)
    table = temperature_table(
        partition_rows(z, knots(BOUNDS))[0],
        z[each, y].astype(np.float64) - z[each, top],
        top == y,
        np.repeat(np.arange(per_text.size), tokens),
        tuple(f"t{i}" for i in range(per_text.size)),
        BOUNDS,
    )
    return table, [f"g{g}" for g in np.repeat(np.arange(len(true)), texts)], z, y


def _groups(true: list[float], texts: int, tokens: int, seed: int = 0):
    table, labels, _, _ = _world(true, texts, tokens, seed)
    overall = fit_temperature(table, NLL, resamples=100, seed=0).temperature
    return overall, group_temperatures(table, labels, overall, resamples=300, seed=0)


def test_groups_that_differ_keep_their_own() -> None:
    _, found = _groups([1.0, 1.5, 2.2], texts=12, tokens=80)
    for group, true in zip(found.values(), (1.0, 1.5, 2.2), strict=True):
        assert group.weight > 0.9
        assert group.temperature == pytest.approx(true, abs=0.15)
        assert group.texts == 12


def test_groups_that_are_alike_are_drawn_together() -> None:
    weights, apart = [], []
    for seed in range(10):
        overall, found = _groups([1.4] * 5, texts=8, tokens=20, seed=seed)
        for group in found.values():
            assert group.own is not None
            weights.append(group.weight)
            apart.append(
                (abs(np.log(group.temperature / overall)), abs(np.log(group.own / overall)))
            )
    assert np.mean(weights) < 0.35
    drawn, own = np.mean(apart, axis=0)
    assert drawn < 0.6 * own


def test_the_drawn_temperature_lies_between() -> None:
    overall, found = _groups([1.2, 1.4, 1.6], texts=8, tokens=30)
    for group in found.values():
        assert group.own is not None
        expected = np.log(overall) + group.weight * (np.log(group.own) - np.log(overall))
        assert np.log(group.temperature) == pytest.approx(expected)


def test_a_group_of_few_texts_and_one_at_a_bound_get_the_overall_temperature() -> None:
    table, labels, _, _ = _world([1.2, 1.6, 9.0], texts=9, tokens=60)
    labels[0:6] = ["few"] * 3 + ["other"] * 3
    found = group_temperatures(table, labels, 1.5, resamples=200, seed=0)
    for name in ("few", "g2"):
        assert (found[name].temperature, found[name].weight, found[name].own) == (1.5, 0.0, None)


def test_one_group_has_nothing_to_differ_from() -> None:
    overall, found = _groups([1.4], texts=8, tokens=30)
    assert found["g0"].temperature == pytest.approx(overall)


def test_between_variance_by_hand() -> None:
    t, variance = np.array([0.0, 0.2, 0.7]), np.array([0.01, 0.02, 0.04])
    v = 1 / variance  # 100, 50, 25
    mean = (50 * 0.2 + 25 * 0.7) / 175
    q = 100 * mean**2 + 50 * (0.2 - mean) ** 2 + 25 * (0.7 - mean) ** 2
    expected = (q - 2) / (175 - (v**2).sum() / 175)
    assert between_variance(t, variance) == pytest.approx(expected)
    assert between_variance(np.array([0.1, 0.1]), variance[:2]) == 0.0
    assert between_variance(t[:1], variance[:1]) == 0.0


def test_each_token_gets_its_groups_temperature() -> None:
    table, labels, z, y = _world([1.0, 2.0], texts=6, tokens=10)
    found = group_temperatures(table, labels, 1.5, resamples=200, seed=0)
    labels[-1] = "unseen"
    temperature = temperature_of_tokens(table, labels, found, 1.5)
    expected = [found[label].temperature if label in found else 1.5 for label in labels]
    assert temperature.tolist() == np.repeat(expected, 10).tolist()
    nll = -log_softmax(z.astype(np.float64) / temperature[:, None], axis=1)[range(y.size), y]
    assert table.at(temperature).nll.mean() == pytest.approx(nll.mean(), abs=1e-4)

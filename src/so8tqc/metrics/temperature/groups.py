"""A temperature for each group of texts, as far as the group's own texts can tell it apart.

Every group g gets its own optimum t_g = ln T_g with a variance s_g² over its resampled texts. A
few texts make t_g vary though the groups be alike, so it is drawn towards the global t:

    ln T = t + w_g (t_g − t),   w_g = τ² / (τ² + s_g²),

the posterior mean if the groups' true values are normal about t with variance τ² (empirical
Bayes; Efron and Morris 1975). τ² is estimated by the method of moments (DerSimonian and Laird
1986): with v_g = 1/s_g² and t̄ = Σ v_g t_g / Σ v_g over k groups,

    τ² = max(0, (Σ v_g (t_g − t̄)² − (k − 1)) / (Σ v_g − Σ v_g² / Σ v_g)).

Where the groups differ no more than chance has it, τ² = 0 and every group gets the global one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from so8tqc.metrics.temperature.fit import TemperatureFit, fit_temperature
from so8tqc.metrics.temperature.measures import NLL
from so8tqc.metrics.temperature.table import FloatArray, IntArray, TemperatureTable


@dataclass(frozen=True)
class GroupTemperature:
    """The temperature of one group.

    Attributes:
        temperature: drawn towards the global one.
        own: the optimum of the group's texts alone; None if they are too few to say.
        weight: of the group's own optimum, 0 to 1.
        texts: how many it was fitted on.
    """

    temperature: float
    own: float | None
    weight: float
    texts: int


def group_temperatures(
    table: TemperatureTable,
    labels: Sequence[str],
    overall: float,
    *,
    resamples: int,
    seed: int,
) -> dict[str, GroupTemperature]:
    """Temperatures of groups of texts by NLL, each drawn towards the one of all texts.

    A group of fewer than LEAST_TEXTS texts, and one whose own fit ended at a bound, gets the
    overall one.

    Args:
        table: the fit texts.
        labels: [texts] group of each of the table's texts.
        overall: the temperature fitted to all of them.
        resamples: for each group's variance.
        seed: of the resampling.

    Returns:
        label → temperature, labels ascending.
    """
    members = {label: np.flatnonzero(np.array(labels) == label) for label in sorted(set(labels))}
    fits = {
        label: fit_temperature(table.select(texts), NLL, resamples=resamples, seed=seed)
        for label, texts in members.items()
    }
    known = {label: fit for label, fit in fits.items() if fit.log_deviation and not fit.at_bound}
    weights = _weights(known, members)
    found = {}
    for label, texts in members.items():
        fit, weight = known.get(label), weights.get(label, 0.0)
        own = None if fit is None else fit.temperature
        drawn = overall if own is None else float(overall * (own / overall) ** weight)
        found[label] = GroupTemperature(drawn, own, weight, int(texts.size))
    return found


def _weights(
    fits: Mapping[str, TemperatureFit], members: Mapping[str, IntArray]
) -> dict[str, float]:
    """w of each group: 0 for all where there is but one, or none."""
    t = np.array([np.log(fit.temperature) for fit in fits.values()])
    sizes = np.array([members[label].size for label in fits])
    # a resample of n texts spreads by √((n − 1)/n) of what n new ones would
    deviation = np.array([fit.log_deviation for fit in fits.values()], dtype=np.float64)
    variance = deviation**2 * sizes / np.maximum(sizes - 1, 1)
    between = between_variance(t, variance)
    return dict(zip(fits, (between / (between + variance)).tolist(), strict=True))


def between_variance(t: FloatArray, variance: FloatArray) -> float:
    """τ² of DerSimonian and Laird: [k] estimates, [k] their variances; 0 for fewer than two."""
    if t.size < 2:
        return 0.0
    v = 1.0 / variance
    mean = (v * t).sum() / v.sum()
    excess = (v * (t - mean) ** 2).sum() - (t.size - 1)
    return max(0.0, float(excess / (v.sum() - (v**2).sum() / v.sum())))


def temperature_of_tokens(
    table: TemperatureTable,
    labels: Sequence[str],
    groups: Mapping[str, GroupTemperature],
    overall: float,
) -> FloatArray:
    """[n] temperature of each token by its text's group; ``overall`` for groups not seen."""
    texts = [groups[label].temperature if label in groups else overall for label in labels]
    return np.array(texts)[table.text]

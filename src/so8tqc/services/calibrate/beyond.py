"""Beyond one number: temperatures of groups and of entropy, each judged on held-out text.

Either competes with the best single temperature there is: T = 1 or the one fitted by NLL, whichever
does better on the held-out texts. It is significant if the interval of its further gain in NLL
lies below zero; else nothing of it is reported but that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from so8tqc.config import CalibrateOptions
from so8tqc.metrics.temperature.entropy import EntropyTemperature, fit_entropy_temperature
from so8tqc.metrics.temperature.fit import Change, paired_change, scored
from so8tqc.metrics.temperature.groups import (
    GroupTemperature,
    group_temperatures,
    temperature_of_tokens,
)
from so8tqc.metrics.temperature.measures import NLL, ece
from so8tqc.metrics.temperature.table import FloatArray, TemperatureTable

_MOST_HELD = 0.5
"""If more of the fit tokens than this share are at a bound, the bounds made the fit."""


@dataclass(frozen=True)
class JudgedGroups:
    """Temperatures by one label of the texts.

    Attributes:
        temperatures: label → temperature.
        against: the single temperature they compete with.
        nll, ece: held-out changes from that one to them.
        significant: whether the data support them.
    """

    temperatures: Mapping[str, GroupTemperature]
    against: float
    nll: Change
    ece: Change
    significant: bool


@dataclass(frozen=True)
class JudgedEntropy:
    """T(H) = a + b·H.

    Attributes:
        rule: as fitted.
        against: the single temperature it competes with.
        nll, ece: held-out changes from that one to it.
        at_bound: the bounds made the fit: more than half of the fit tokens are at one.
        significant: whether the data support it.
    """

    rule: EntropyTemperature
    against: float
    nll: Change
    ece: Change
    at_bound: bool
    significant: bool


def judge_groups(
    fit_table: TemperatureTable,
    holdout: TemperatureTable,
    fit_labels: Sequence[str],
    holdout_labels: Sequence[str],
    overall: float,
    options: CalibrateOptions,
) -> JudgedGroups:
    """Fit a temperature for each label on the fit texts, judge all of them on the held-out ones.

    Args:
        fit_table, holdout: per-token data of either side.
        fit_labels, holdout_labels: label of each of their texts.
        overall: the temperature fitted to all fit texts by NLL.
        options: bounds, bins, resampling.
    """
    found = group_temperatures(
        fit_table, fit_labels, overall, resamples=options.resamples, seed=options.seed
    )
    against = _best_single(holdout, overall)
    nll, error = _gains(
        holdout,
        against,
        temperature_of_tokens(holdout, holdout_labels, found, overall),
        options,
    )
    return JudgedGroups(found, against, nll, error, significant=nll.better)


def judge_entropy(
    fit_table: TemperatureTable,
    holdout: TemperatureTable,
    overall: float,
    options: CalibrateOptions,
) -> JudgedEntropy:
    """Fit T(H) on the fit texts, judge it on the held-out ones; arguments as above."""
    rule = fit_entropy_temperature(fit_table, overall)
    against = _best_single(holdout, overall)
    nll, error = _gains(holdout, against, rule.at(holdout.at(1.0).entropy), options)
    at_bound = rule.held > _MOST_HELD
    significant = nll.better and rule.converged and not at_bound
    return JudgedEntropy(rule, against, nll, error, at_bound, significant)


def _best_single(holdout: TemperatureTable, overall: float) -> float:
    return min(1.0, overall, key=lambda temperature: NLL.at(holdout, temperature))


def _gains(
    holdout: TemperatureTable,
    against: float,
    temperatures: FloatArray,
    options: CalibrateOptions,
) -> tuple[Change, Change]:
    # for each token on both sides, so that equal temperatures differ by nothing at all
    before = scored(holdout, np.full(len(holdout), against))
    after = scored(holdout, temperatures)
    nll, error = (
        paired_change(before, after, measure, resamples=options.resamples, seed=options.seed)
        for measure in (NLL, ece(options.bins))
    )
    return nll, error

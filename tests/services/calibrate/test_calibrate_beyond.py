"""Temperatures of groups and of entropy: found where they are, not claimed where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from known_temperature import (
    OPTIONS,
    calibrate,
    entropy_world,
    two_languages,
)

from so8tqc.services.calibrate import beyond as temperature_beyond
from so8tqc.services.calibrate.summary import temperature_summary


def test_languages_that_differ_get_their_own_temperature() -> None:
    calibration = calibrate(two_languages(1.1, 2.2))
    languages = calibration.groups["language"]
    assert languages.significant
    assert languages.temperatures["en"].temperature == pytest.approx(1.1, abs=0.12)
    assert languages.temperatures["ja"].temperature == pytest.approx(2.2, abs=0.25)
    assert languages.against == pytest.approx(calibration.objectives["nll"].temperature)
    assert not calibration.groups["category"].significant
    written = temperature_summary(calibration, OPTIONS)["group_temperatures"]
    assert isinstance(written, dict)
    assert set(written["language"]["temperatures"]) == {"en", "ja"}
    assert written["category"]["temperatures"] is None


def test_languages_that_are_alike_do_not() -> None:
    supported = [
        calibrate(two_languages(1.5, 1.5, seed)).groups["language"].significant for seed in range(6)
    ]
    assert sum(supported) <= 1


def test_equal_temperatures_differ_by_nothing() -> None:
    calibration = calibrate(two_languages(1.5, 1.5))
    language = calibration.groups["language"]
    nll, error = temperature_beyond._gains(
        calibration.holdout_table,
        language.against,
        np.full(len(calibration.holdout_table), language.against),
        OPTIONS,
    )
    assert (nll.difference, nll.ci95, error.difference) == (0.0, (0.0, 0.0), 0.0)
    assert not nll.better


def test_a_temperature_that_grows_with_entropy_is_found() -> None:
    judged = calibrate(entropy_world(0.5)).entropy
    assert judged.significant
    assert (judged.rule.a, judged.rule.b) == pytest.approx((1.0, 0.5), abs=0.2)
    assert judged.nll.ci95 is not None
    assert judged.nll.ci95[1] < 0


def test_a_temperature_that_does_not_is_not_claimed() -> None:
    claims = [calibrate(entropy_world(0.0, seed)).entropy.significant for seed in range(6)]
    assert sum(claims) <= 1

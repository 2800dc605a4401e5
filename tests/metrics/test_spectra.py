"""Rotary wavelengths against their definition, and against a model's own frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from so8tqc.metrics.spectra import nearest_wavelength, rope_wavelengths


def test_wavelengths_of_plain_rope() -> None:
    i = np.arange(32)
    wavelengths = rope_wavelengths(10_000.0 ** (-2 * i / 64))
    np.testing.assert_allclose(wavelengths, 2 * np.pi * 10_000.0 ** (2 * i / 64))
    assert nearest_wavelength(2 * np.pi * 1.02, wavelengths) == pytest.approx(2 * np.pi)


def test_pairs_that_do_not_turn_have_no_wavelength() -> None:
    np.testing.assert_allclose(rope_wavelengths(np.array([0.0, 1.0, 1.0])), [2 * np.pi])
    assert rope_wavelengths(np.empty(0)).size == 0
    assert nearest_wavelength(10.0, np.empty(0)) is None

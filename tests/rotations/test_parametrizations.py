"""Parametrizations against scipy, mpmath at 50 digits, numpy and a literal restatement."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.rotations import double_double as dd
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.parametrization import _exp_series, rotation_blocks

EXP, CAYLEY, LEGACY, MATRIX = (
    Parametrization.EXP,
    Parametrization.CAYLEY,
    Parametrization.LEGACY_TAYLOR,
    Parametrization.MATRIX,
)


def theta(seed: int, count: int, scale: float, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, size, size)) * scale


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("size", [2, 8, 32])
def test_exp_agrees_with_scipy(scale: float, size: int) -> None:
    t = theta(0, 5, scale, size)
    expected = np.stack([scipy.linalg.expm(x - x.T) for x in t])
    tolerance = 1e-14 * max(1.0, scale * size)
    np.testing.assert_allclose(rotation_blocks(t, EXP), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e-3, 0.1, 2.0, 1e3])
def test_exp_and_cayley_are_the_exact_value_rounded_once(scale: float, size: int) -> None:
    t = theta(1, 2, scale, size)
    for block, exp, cayley in zip(
        t, rotation_blocks(t, EXP), rotation_blocks(t, CAYLEY), strict=True
    ):
        with mpmath.workdps(60):
            m = mpmath.matrix(block.tolist())
            a = m - m.T
            exact_exp = expm_by_halving(a)
            one = mpmath.eye(size)
            exact_cayley = mpmath.inverse(one - a / 2) * (one + a / 2)
            for exact, ours in ((exact_exp, exp), (exact_cayley, cayley)):
                rounded = np.array(exact.tolist(), dtype=np.float64)
                np.testing.assert_array_equal(ours, rounded)


def expm_by_halving(a: mpmath.matrix) -> mpmath.matrix:
    """exp(A) = exp(A/2^16)^(2^16) at the working precision, 60 digits and more."""
    with mpmath.workdps(90):
        r = mpmath.expm(a / 2**16, method="taylor")
        for _ in range(16):
            r = r * r
        return r


def test_the_series_itself_is_good_to_98_bits_at_the_end_of_its_range() -> None:
    """What squaring multiplies and rounding cuts off must not be visible in float64."""
    a = theta(2, 1, 1.0)[0]
    a = (a - a.T) / np.linalg.norm(a - a.T) / 16
    ours = _exp_series(dd.from_blocks(a[None]))
    with mpmath.workdps(60):
        exact = expm_by_halving(mpmath.matrix(a.tolist()))
        worst = max(
            abs(mpmath.mpf(float(ours.hi[i, j, 0])) + float(ours.lo[i, j, 0]) - exact[i, j])
            for i in range(8)
            for j in range(8)
        )
    assert worst < mpmath.mpf(2) ** -98


def test_cayley_agrees_with_numpy_solve() -> None:
    t = theta(2, 6, 1.0)
    a = t - t.transpose(0, 2, 1)
    expected = np.linalg.solve(np.eye(8) - a / 2, np.eye(8) + a / 2)
    np.testing.assert_allclose(rotation_blocks(t, CAYLEY), expected, rtol=0, atol=1e-13)


def legacy_restated(t: np.ndarray) -> np.ndarray:
    """The training code's computation, word for word from its description, in torch float64."""
    x = torch.from_numpy(t)
    a = x - x.transpose(1, 2) + 1e-6 * torch.eye(8, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(a)
    s = norm.clamp(max=1.0)
    b = a / (s + 1e-8)[:, None, None]
    total, term = torch.eye(8, dtype=torch.float64).expand_as(b).clone(), b.clone()
    for k in range(1, 11):
        total = total + term
        term = term @ b / (k + 1)
    if bool((s >= 1).any()):
        total = total @ total
    return total.numpy()


@pytest.mark.parametrize("scale", [1e-3, 0.05, 0.5])
def test_legacy_taylor_agrees_with_its_description(scale: float) -> None:
    t = theta(3, 4, scale)
    expected = legacy_restated(t)
    tolerance = 1e-14 * np.abs(expected).max()
    np.testing.assert_allclose(rotation_blocks(t, LEGACY), expected, rtol=0, atol=tolerance)


def test_one_large_block_squares_its_whole_layer_in_legacy_taylor() -> None:
    small = theta(4, 3, 1e-3)
    alone = rotation_blocks(small, LEGACY)
    large = np.concatenate([small, theta(5, 1, 1.0)])
    together = rotation_blocks(large, LEGACY)
    np.testing.assert_allclose(together[:3], alone @ alone, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-6, 4.0),
    parametrization=st.sampled_from([EXP, CAYLEY]),
)
def test_results_are_rotations_and_negation_inverts(
    seed: int, scale: float, parametrization: Parametrization
) -> None:
    t = theta(seed, 3, scale)
    r = rotation_blocks(t, parametrization)
    gram = np.einsum("nji,njk->nik", r, r)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(8), gram.shape), atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(r), 1.0, atol=1e-12)
    np.testing.assert_array_equal(rotation_blocks(-t, parametrization), r.transpose(0, 2, 1))


@pytest.mark.parametrize("parametrization", [EXP, CAYLEY])
def test_a_block_does_not_depend_on_the_others(parametrization: Parametrization) -> None:
    t = np.concatenate([theta(6, 300, 0.3), theta(7, 3, 9.0)])
    together = rotation_blocks(t, parametrization)
    for i in (0, 255, 256, 301):
        np.testing.assert_array_equal(
            together[i], rotation_blocks(t[i : i + 1], parametrization)[0]
        )


def test_exp_and_cayley_turn_in_the_same_direction() -> None:
    t = theta(8, 4, 0.01)
    np.testing.assert_allclose(rotation_blocks(t, EXP), rotation_blocks(t, CAYLEY), atol=5e-5)


def test_matrix_is_taken_as_it_is() -> None:
    t = theta(9, 2, 1.0)
    np.testing.assert_array_equal(rotation_blocks(t, MATRIX), t)


@pytest.mark.parametrize("parametrization", list(Parametrization))
def test_no_blocks_and_overflow_pass_silently(parametrization: Parametrization) -> None:
    assert rotation_blocks(np.zeros((0, 8, 8)), parametrization).shape == (0, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rotation_blocks(theta(10, 2, 1e300), parametrization)


def test_legacy_taylor_of_nothing_learned_is_no_rotation() -> None:
    """A_r = 1e-6·I has n = 1e-6·√8, so R is e^(1/√8)·I: the reader must refuse it."""
    r = rotation_blocks(np.zeros((1, 8, 8)), LEGACY)[0]
    np.testing.assert_allclose(r, np.exp(1 / np.sqrt(8)) * np.eye(8), rtol=2e-3)

"""The nearest rotation against scipy's polar decomposition and against its definition."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.polar import nearest_rotations


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 8, 32]),
    drift=st.floats(1e-12, 0.3),
    scale=st.sampled_from([1e-200, 0.1, 1.0, 1e200]),
)
def test_it_agrees_with_scipy(seed: int, size: int, drift: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    r = rotation_blocks(generator.normal(size=(3, size, size)), Parametrization.EXP)
    blocks = r + drift / size * generator.normal(size=r.shape)
    nearest, exists = nearest_rotations(blocks * scale)
    assert exists.all()
    expected = np.stack([scipy.linalg.polar(block)[0] for block in blocks])
    np.testing.assert_allclose(nearest, expected, rtol=0, atol=1e-13)


def test_it_is_the_exact_value_rounded_once() -> None:
    generator = np.random.default_rng(0)
    blocks = np.stack([np.eye(8) + generator.normal(size=(8, 8)) * s for s in (1e-6, 0.01, 0.3)])
    nearest, _ = nearest_rotations(blocks)
    for block, ours in zip(blocks, nearest, strict=True):
        with mpmath.workdps(60):
            u, _, v = mpmath.svd_r(mpmath.matrix(block.tolist()))
            exact = np.array((u * v).tolist(), dtype=np.float64)
        np.testing.assert_array_equal(ours, exact)


def test_nothing_orthogonal_is_nearer() -> None:
    generator = np.random.default_rng(1)
    block = generator.normal(size=(1, 8, 8))
    nearest, _ = nearest_rotations(block)
    distance = np.linalg.norm(block - nearest)
    for _ in range(50):
        step = rotation_blocks(generator.normal(size=(1, 8, 8)) * 0.05, Parametrization.EXP)
        assert np.linalg.norm(block - nearest @ step) > distance


def test_a_block_does_not_depend_on_the_others() -> None:
    generator = np.random.default_rng(2)
    blocks = np.eye(8) + generator.normal(size=(300, 8, 8)) * 0.1
    together, _ = nearest_rotations(blocks)
    for i in (0, 255, 256, 299):
        np.testing.assert_array_equal(together[i], nearest_rotations(blocks[i : i + 1])[0][0])


@pytest.mark.parametrize("diagonal", [[0.0] * 8, [1.0] * 7 + [0.0]])
def test_a_singular_block_has_none(diagonal: list[float]) -> None:
    _, exists = nearest_rotations(np.stack([np.eye(8), np.diag(diagonal)]))
    assert exists.tolist() == [True, False]


def test_a_reflection_stays_one() -> None:
    nearest, exists = nearest_rotations(np.diag([-2.0, 1.0, 1.0])[None])
    assert exists.all()
    np.testing.assert_allclose(nearest[0], np.diag([-1.0, 1.0, 1.0]), atol=1e-15)

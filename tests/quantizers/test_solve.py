"""Solved codes: what they cost, against a dense float64 oracle and against ggml's own encoders."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.errors import ShapeError
from so8tqc.quantizers import kernels
from so8tqc.quantizers.grids import GRIDS, Grid
from so8tqc.quantizers.packing import decode, unpack
from so8tqc.quantizers.solve import (
    ROWS_AT_ONCE,
    Solved,
    chosen_rows,
    damped,
    independent,
    solve,
)

N = 512


def correlated(n: int = N, seed: int = 0, tokens: int = 2048) -> npt.NDArray[np.float64]:
    """Second moments of inputs that depend on one another, of widely different sizes."""
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(n, n)) * (1 + np.arange(n))[:, None] ** -0.6
    inputs = draw.normal(size=(tokens, n)) @ mixing * np.exp(draw.normal(size=n))
    moments: npt.NDArray[np.float64] = inputs.T @ inputs / tokens
    return moments


def matrix(rows: int = 96, n: int = N, seed: int = 1) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(rows, n)) * 0.05).astype(np.float32)


def weights_of(stored: npt.NDArray[np.uint8], grid: Grid) -> npt.NDArray[np.float32]:
    blocks = unpack(stored.reshape(-1, grid.bytes), grid)
    return decode(blocks, grid).reshape(len(stored), -1)


def costs(
    weights: npt.NDArray[np.float32], solved: Solved, grid: Grid, hessian: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    delta = weights.astype(np.float64) - weights_of(solved.stored, grid)
    found: npt.NDArray[np.float64] = np.einsum("ri,ij,rj->r", delta, hessian, delta)
    return found


def by_ggml(
    weights: npt.NDArray[np.float32], grid: Grid, importance: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """What ``llama-quantize --imatrix`` stores."""
    pytest.importorskip("llama_cpp")
    from so8tqc.llama.ggml import ggml

    chunk = ggml().ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    rows, n = weights.shape
    stored = np.empty((rows, n // grid.block * grid.bytes), np.uint8)
    means = importance.astype(np.float32)
    kind = int(gguf.GGMLQuantizationType[grid.name])
    chunk(kind, weights.ctypes.data, stored.ctypes.data, 0, rows, n, means.ctypes.data)
    return stored


def test_the_factors_are_those_of_the_matrix() -> None:
    """H = P Pᵀ: conditional weights are those of columns whose followers are free."""
    hessian = damped(correlated(70), 0.01)
    assert hessian.feedback is not None
    assert hessian.hessian is not None
    upper = (hessian.feedback.T + np.eye(70)) * np.sqrt(hessian.conditional)
    np.testing.assert_allclose(upper @ upper.T, hessian.hessian, rtol=1e-9, atol=1e-12)
    for column in (0, 33, 69):
        free = hessian.hessian[column:, column:]
        np.testing.assert_allclose(
            hessian.conditional[column], 1 / np.linalg.inv(free)[0, 0], rtol=1e-8
        )


@settings(max_examples=300, deadline=None)
@given(st.floats(-70000, 70000, allow_nan=False))
def test_halves_are_ieee(number: float) -> None:
    found = kernels.half(number)
    clipped = np.clip(number, -65504, 65504)
    assert np.float16(found) == found
    assert abs(found - clipped) <= abs(float(np.float16(clipped)) - clipped)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_losses_are_those_of_the_bytes(grid: Grid) -> None:
    weights, curvature = matrix(), damped(correlated(), 0.01)
    assert curvature.hessian is not None
    swept = solve(weights, curvature, grid.name, passes=0)
    np.testing.assert_allclose(
        costs(weights, swept, grid, curvature.hessian), swept.descended, rtol=1e-4
    )
    solved = solve(weights, curvature, grid.name)
    np.testing.assert_allclose(
        costs(weights, solved, grid, curvature.hessian), solved.descended, rtol=1e-4
    )
    np.testing.assert_array_equal(solved.swept, swept.swept)
    assert (solved.descended <= solved.swept).all()
    assert solved.descended.sum() < 0.98 * solved.swept.sum()


@pytest.mark.llama
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_outputs_move_far_less_than_with_importance(grid: Grid) -> None:
    weights, curvature = matrix(), damped(correlated(), 0.01)
    hessian = curvature.hessian
    assert hessian is not None
    theirs = by_ggml(weights, grid, np.diagonal(hessian).copy())
    delta = weights.astype(np.float64) - weights_of(theirs, grid)
    importance = np.einsum("ri,ij,rj->", delta, hessian, delta)
    solved = solve(weights, curvature, grid.name)
    assert costs(weights, solved, grid, hessian).sum() < 0.5 * importance


@pytest.mark.llama
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_without_second_moments_the_fit_is_about_as_good_as_ggmls(grid: Grid) -> None:
    weights = matrix()
    importance = np.exp(np.random.default_rng(4).normal(size=N))
    theirs = weights_of(by_ggml(weights, grid, importance), grid)
    ours = weights_of(solve(weights, independent(importance), grid.name).stored, grid)
    lost, own = (float((importance * (weights - q) ** 2).sum()) for q in (theirs, ours))
    assert own < 1.05 * lost


@pytest.mark.parametrize("name", ["Q5_0", "Q4_K", "Q3_K", "IQ4_XS"])
def test_threads_and_company_do_not_change_a_row(name: str) -> None:
    weights, curvature = matrix(2 * ROWS_AT_ONCE + 5), damped(correlated(), 0.01)
    alone = solve(weights, curvature, name).stored
    np.testing.assert_array_equal(alone, solve(weights, curvature, name, threads=3).stored)
    few = solve(weights[70:73], curvature, name).stored
    np.testing.assert_array_equal(alone[70:73], few)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_what_lies_on_a_grid_stays(grid: Grid) -> None:
    """Rows that the format can say exactly are not moved by what they are weighed with."""
    curvature = damped(correlated(), 0.01)
    first = weights_of(solve(matrix(16), curvature, grid.name).stored, grid)
    again = solve(first, curvature, grid.name)
    moved = costs(first, again, grid, np.asarray(curvature.hessian))
    before = costs(
        matrix(16), solve(matrix(16), curvature, grid.name), grid, np.asarray(curvature.hessian)
    )
    assert moved.sum() < 0.5 * before.sum()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("fill", [0.0, 0.25, -3.0, 1e-7, 3e4])
def test_rows_of_one_value(grid: Grid, fill: float) -> None:
    weights = np.full((3, N), fill, np.float32)
    weights[1, ::7] = 0
    found = weights_of(solve(weights, damped(np.eye(N), 0.01), grid.name).stored, grid)
    assert np.isfinite(found).all()
    # a grid without a zero, or with the min elsewhere, says zeros by its nearest level
    np.testing.assert_allclose(found, weights, rtol=0.05, atol=0.01 * abs(fill) + 1e-7)


def test_dead_columns_are_damped() -> None:
    hessian = correlated()
    hessian[:, 40:50] = 0
    hessian[40:50] = 0
    weights = matrix()
    found = weights_of(solve(weights, damped(hessian, 0.01), "Q4_K").stored, GRIDS["Q4_K"])
    assert np.abs(found - weights).max() < 0.2


@pytest.mark.parametrize(
    ("hessian", "said"),
    [
        (np.zeros((N, N)), "every input was zero"),
        (np.full((N, N), np.nan), "not finite"),
        (np.ones((N, 3)), "not square"),
        (-np.eye(N), "every input was zero"),
        (np.diag([1.0] * (N - 1) + [-9.0]), "singular at column 511"),
    ],
)
def test_what_is_no_second_moment_is_refused(hessian: npt.NDArray[np.float64], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        damped(hessian, 0.01)


def test_fewer_tokens_than_columns_need_damping() -> None:
    inputs = np.random.default_rng(0).normal(size=(40, N))
    hessian = inputs.T @ inputs / 40
    with pytest.raises(ShapeError, match="singular"):
        damped(hessian, 0.0)
    solved = solve(matrix(), damped(hessian, 0.01), "Q4_0")
    assert np.isfinite(solved.descended).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    curvature = damped(correlated(), 0.01)
    with pytest.raises(ShapeError, match="no multiple"):
        solve(matrix(n=N + 32), damped(correlated(N + 32), 0.01), "Q4_K")
    with pytest.raises(ShapeError, match="second moments of"):
        solve(matrix(n=N - 32), curvature, "Q4_0")
    broken = matrix()
    broken[3, 3] = np.inf
    with pytest.raises(ShapeError, match="not finite"):
        solve(broken, curvature, "Q4_0")


def test_rows_are_chosen_evenly() -> None:
    assert list(chosen_rows(5, 8)) == [0, 1, 2, 3, 4]
    assert list(chosen_rows(10, 4)) == [0, 2, 5, 7]

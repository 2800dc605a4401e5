"""The fold against exact rational arithmetic, and every orientation against dense float64."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import special_ortho_group

from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.enums import Site
from so8tqc.rotations.fold import fold, orient, round_once

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rotations(count: int, seed: int, size: int = 8) -> np.ndarray:
    return special_ortho_group(size, seed=seed).rvs(count).reshape(count, size, size)


def dense(blocks: np.ndarray) -> np.ndarray:
    count, size, _ = blocks.shape
    matrix = np.zeros((count * size, count * size))
    for k in range(count):
        matrix[k * size : (k + 1) * size, k * size : (k + 1) * size] = blocks[k]
    return matrix


def all_finite_values(dtype: torch.dtype) -> list[Fraction]:
    """Every finite number of a 16-bit format, from its bit patterns."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).double()
    return sorted({Fraction(v) for v in values[torch.isfinite(values)].tolist()})


def reference_round(exact: Fraction, dtype: torch.dtype, table: list[Fraction]) -> Fraction:
    """Nearest value of a 16-bit format by looking through all of them; ties by the bit pattern."""
    import bisect

    at = bisect.bisect_left(table, exact)
    near = table[max(0, at - 1) : at + 1]
    best = min(abs(v - exact) for v in near)
    nearest = [v for v in near if abs(v - exact) == best]
    if len(nearest) == 1:
        return nearest[0]
    even = [
        v
        for v in nearest
        if torch.tensor([float(v)], dtype=dtype).view(torch.int16).item() % 2 == 0
    ]
    return even[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_agrees_with_a_search_through_every_value(dtype: torch.dtype) -> None:
    table = all_finite_values(dtype)
    generator = np.random.default_rng(0)
    cases = [Fraction(float(v)) for v in generator.normal(size=100)]
    cases += [Fraction(float(v)) * Fraction(2) ** -140 for v in generator.normal(size=30)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]
    cases += [middles[i] for i in generator.integers(0, len(middles), 100)]
    cases += [middles[i] + Fraction(1, 10**80) for i in generator.integers(0, len(middles), 50)]
    for exact in cases:
        assert Fraction(round_once(exact, dtype)) == reference_round(exact, dtype, table), exact


@given(st.fractions(min_value=-1000, max_value=1000))
def test_rounding_to_float32_agrees_with_numpy_when_float64_is_exact(exact: Fraction) -> None:
    value = float(exact)
    assert round_once(Fraction(value), torch.float32) == float(np.float32(value))


def test_rounding_at_the_end_of_the_range() -> None:
    largest, ulp = Fraction(65504), Fraction(32)
    assert round_once(largest + ulp / 2 - Fraction(1, 10**30), torch.float16) == 65504
    assert round_once(largest + ulp / 2, torch.float16) == float("inf")
    assert round_once(-largest - ulp, torch.float16) == float("-inf")


def adversarial(dtype: torch.dtype, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal values mixed with subnormals, signed zeros, huge values and cancelling pairs."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, columns))
    info = torch.finfo(dtype)
    kinds = generator.integers(0, 6, size=(rows, columns))
    values[kinds == 1] *= info.tiny
    values[kinds == 2] = 0.0
    values[kinds == 3] = -0.0
    values[kinds == 4] *= info.max / 64
    matrix = torch.from_numpy(values).to(dtype)
    matrix[:, 1::2][kinds[:, 1::2] == 5] = -matrix[:, ::2][kinds[:, 1::2] == 5]
    return matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_element_is_the_exact_product_rounded_once(dtype: torch.dtype, seed: int) -> None:
    blocks = rotations(3, seed)
    # exact ties and cancellations need rotations with short significands
    blocks[1] = np.eye(8)[:, [1, 0, 3, 2, 5, 4, 7, 6]]
    half = np.kron(
        np.eye(2), 0.5 * np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    )
    blocks[2] = half
    matrix = adversarial(dtype, 6, 24, seed)
    folded = fold(matrix, blocks, dtype)
    for i in range(6):
        for j in range(24):
            k = j // 8
            exact = sum(
                (
                    Fraction(float(matrix[i, 8 * k + m])) * Fraction(float(blocks[k, m, j % 8]))
                    for m in range(8)
                ),
                Fraction(0),
            )
            expected = round_once(exact, dtype) + 0.0
            stored = float(folded[i, j])
            assert struct.pack("<d", stored) == struct.pack("<d", expected), (i, j)


def test_rounding_boundaries_are_found_and_decided_exactly() -> None:
    """A float64 sum that lands on a tie although the exact sum does not."""
    blocks = np.eye(8)[None].copy()
    blocks[0, 0, 0], blocks[0, 1, 0] = 1.0, 2.0**-60  # not a rotation: only the rounding matters
    matrix = torch.zeros(2, 8, dtype=torch.float32)
    matrix[0, 0] = 1 + 2**-8  # halfway between two bfloat16 values
    matrix[0, 1] = 1.0  # pushes the exact sum above the tie, below float64's resolution
    matrix[1, 0], matrix[1, 1] = 1 + 2**-8, -1.0
    folded = fold(matrix, blocks, torch.bfloat16)
    assert float(folded[0, 0]) == 1 + 2**-7
    assert float(folded[1, 0]) == 1.0


def exactly(matrix: torch.Tensor, blocks: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """M·B by rational arithmetic, rounded once: the slow oracle."""
    size = blocks.shape[1]
    result = np.empty(matrix.shape)
    for (i, j), _ in np.ndenumerate(result):
        k = j // size
        row = matrix[i, size * k : size * (k + 1)].tolist()
        exact = sum(
            (Fraction(m) * Fraction(c) for m, c in zip(row, blocks[k, :, j % size], strict=True)),
            Fraction(0),
        )
        result[i, j] = round_once(exact, dtype) + 0.0
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ties_among_the_subnormals_are_decided_exactly(dtype: torch.dtype) -> None:
    """Below the normal range halfway points lie where float32's last bits do not show them."""
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    blocks = np.eye(8)[None].copy()
    blocks[0, 0] = [0.5, 1.5, 2.5, 0.25, 0.75, 1.25, -0.5, -1.5]  # odd multiples of unit/2: ties
    blocks[0, 1, :3] = 2.0**-45  # just beside the tie, closer than float32 resolves
    matrix = torch.zeros(4, 8, dtype=dtype)
    matrix[0, 0] = unit
    matrix[1, :2] = torch.tensor([unit, unit])
    matrix[2, :2] = torch.tensor([unit, -unit])
    matrix[3, :2] = torch.tensor([3 * unit, unit])
    folded = fold(matrix, blocks, dtype)
    np.testing.assert_array_equal(folded.double().numpy(), exactly(matrix, blocks, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_left_of_a_cancellation_is_rounded_exactly(dtype: torch.dtype) -> None:
    """Two large products cancel; the float64 sum of the rest has lost its last bits."""
    generator = np.random.default_rng(0)
    blocks = np.eye(8)[None].copy()
    blocks[0, :, 0] = [1 / 3, -1 / 3, *generator.normal(size=6) * 2.0**-50]
    blocks[0, :, 1] = [0.1, np.nextafter(-0.1, -1), *generator.normal(size=6) * 2.0**-54]
    matrix = torch.from_numpy(generator.normal(size=(64, 8))).to(dtype)
    matrix[:, 1] = matrix[:, 0]
    folded = fold(matrix, blocks, dtype)
    np.testing.assert_array_equal(folded.double().numpy(), exactly(matrix, blocks, dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_threads_or_chunks(threads: int) -> None:
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    blocks = rotations(8, 5)
    whole = fold(matrix, blocks, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        parts = torch.cat([fold(part, blocks, torch.float32) for part in matrix.split(7)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole.view(torch.int32), parts.view(torch.int32))


@pytest.mark.parametrize("site", [Site.INPUT, Site.OUTPUT])
@pytest.mark.parametrize("transposed", [False, True])
def test_folded_projection_equals_gate_and_projection(site: Site, transposed: bool) -> None:
    """y from the folded tensors equals y with a separate gate, by dense numpy float64."""
    generator = np.random.default_rng(3)
    out, inside = 24, 16
    weight, bias = generator.normal(size=(out, inside)), generator.normal(size=out)
    blocks = rotations((inside if site is Site.INPUT else out) // 8, 7)
    x = generator.normal(size=(5, inside))
    gate = dense(blocks)
    if site is Site.INPUT:
        expected = x @ gate.T @ weight.T + bias
    else:
        expected = (x @ weight.T + bias) @ gate.T

    stored = torch.from_numpy(np.ascontiguousarray(weight.T if transposed else weight))
    matrix, oriented = orient(stored, blocks, site, transposed=transposed)
    matrix.copy_(fold(matrix, oriented, torch.float64))
    new_bias = torch.from_numpy(bias)
    if site is Site.OUTPUT:
        view, oriented = orient(new_bias, blocks, site)
        view.copy_(fold(view, oriented, torch.float64))
    w = stored.numpy().T if transposed else stored.numpy()
    np.testing.assert_allclose(x @ w.T + new_bias.numpy(), expected, atol=1e-12)


def test_overflow_names_the_element() -> None:
    matrix = torch.full((1, 8), 60000.0, dtype=torch.float16)
    block = np.full((8, 8), 1 / np.sqrt(8))[None]
    with pytest.raises(RotationError, match=r"row 0, column 0.*does not fit torch.float16"):
        fold(matrix, block, torch.float16)


def test_blocks_must_cover_the_columns() -> None:
    with pytest.raises(ShapeError, match="do not cover 24"):
        fold(torch.zeros(2, 24), rotations(2, 0), torch.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8, 16]))
def test_folding_back_restores_the_weight(seed: int, size: int) -> None:
    blocks = rotations(2, seed % 2**31, size)
    matrix = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 2 * size)))
    there = fold(matrix, blocks, torch.float64)
    back = fold(there, blocks.transpose(0, 2, 1), torch.float64)
    torch.testing.assert_close(back, matrix, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_matrix_is_rounded_once_as_rational_arithmetic_has_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block as wide as the matrix, as in front of an output head."""
    from so8tqc.rotations import fold as module

    generator = np.random.default_rng(11)
    matrix = torch.from_numpy(generator.normal(size=(40, 96))).to(dtype)
    blocks = np.eye(96)[None] + 0.3 * generator.normal(size=(1, 96, 96))
    monkeypatch.setattr(module, "_error_bound", lambda absolute, terms: 1e-2 * absolute)
    exact = [
        [
            module.round_once(
                module._exact_dot(matrix[i].double().tolist(), blocks[0, :, j].tolist()), dtype
            )
            for j in range(96)
        ]
        for i in range(0, 40, 13)
    ]
    tried = []
    monkeypatch.setattr(
        module, "_exact_dot", lambda *sides: tried.append(sides) or 1 / 0
    )  # the long sum decides all of them: no rational arithmetic is needed
    got = fold(matrix, blocks, dtype)
    assert tried == []
    np.testing.assert_array_equal(got[::13].double().numpy(), np.array(exact))

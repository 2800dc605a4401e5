"""Bounds hold, and what is stored is the exact value rounded once: rational arithmetic says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.boft.layer import BOFTLayer

from so8tqc.adapters.dyadic import dyadic
from so8tqc.adapters.methods.orthogonal import butterfly, reflections, span_reflection
from so8tqc.adapters.methods.road import cos_sin
from so8tqc.adapters.patterns import (
    AddCirculants,
    AddPlaces,
    AddTiles,
    AddTimesBase,
    AddWaves,
    MixBlocks,
)
from so8tqc.adapters.products import Factor
from so8tqc.adapters.rounding import rounded
from so8tqc.adapters.steps import (
    AddLowRank,
    BlockColumns,
    BlockRows,
    MixRowPairs,
    NormalisedAdd,
    ScaleRows,
    Step,
    Steps,
    root_of,
)
from so8tqc.rotations.fold import round_once

OUT, INTO, RANK = 8, 16, 3
Matrix = list[list[Fraction]]


def fractions(values: np.ndarray) -> Matrix:
    return [[Fraction(float(x)) for x in row] for row in values]


def times(a: Matrix, b: Matrix) -> Matrix:
    return [
        [sum((x * b[k][j] for k, x in enumerate(row)), Fraction(0)) for j in range(len(b[0]))]
        for row in a
    ]


def plus(a: Matrix, b: Matrix, scale: Fraction = Fraction(1)) -> Matrix:
    return [[x + scale * y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def dense(blocks: np.ndarray) -> np.ndarray:
    n, b, _ = blocks.shape
    out = np.zeros((n * b, n * b))
    for k in range(n):
        out[k * b : k * b + b, k * b : k * b + b] = blocks[k]
    return out


Oracle = Callable[[Matrix, Matrix], Matrix]
"""(W so far, W as stored) → W after the step, in rational numbers."""


def pattern_of(kind: str, rng: np.random.Generator) -> tuple[Step, Oracle] | None:
    """Steps of small tensors that are spread over a weight; the change here is made densely."""
    if kind == "tiles":
        tile = rng.normal(size=(4, 5))
        delta = fractions(np.tile(tile, (2, 4))[:, :INTO])
        return AddTiles(tile), lambda w, _: plus(w, delta)
    if kind == "circulants":
        kernel = rng.normal(size=(2, 4, 4))
        blocks = [[[np.roll(w, i) for i in range(4)] for w in row] for row in kernel]
        delta = fractions(np.block([[np.array(b) for b in row] for row in blocks]))
        return AddCirculants(kernel), lambda w, _: plus(w, delta)
    if kind == "places":
        places = np.sort(rng.permutation(OUT * INTO)[:20])
        full = np.zeros(OUT * INTO)
        full[places] = rng.normal(size=20)
        delta = fractions(full.reshape(OUT, INTO))
        return AddPlaces(places, full[places], INTO), lambda w, _: plus(w, delta)
    if kind == "times base":
        b, a = rng.normal(size=(OUT, RANK)), rng.normal(size=(RANK, INTO))
        product = times(fractions(b), fractions(a))
        return AddTimesBase(Factor(b, a)), lambda w, base: [
            [x + y * z for x, y, z in zip(*rows, strict=True)]
            for rows in zip(w, base, product, strict=True)
        ]
    if kind == "blocks":
        m = rng.normal(size=(OUT // 4, 4, 4))

        def mixed(w: Matrix, _: Matrix) -> Matrix:
            found = []
            for i, row in enumerate(w):
                block = fractions(m[i // 4])
                grown = times([row], fractions(dense(np.stack([m[i // 4]] * (INTO // 4)))))[0]
                found.append(
                    [
                        x + y + block[i % 4][j % 4]
                        for j, (x, y) in enumerate(zip(row, grown, strict=True))
                    ]
                )
            return found

        return MixBlocks(m), mixed
    if kind == "waves":
        turn = [rng.normal(size=OUT), rng.normal(size=OUT)]
        across = [rng.normal(size=INTO), rng.normal(size=INTO)]
        u, v = rng.integers(OUT, size=3), rng.integers(INTO, size=3)
        step = AddWaves(rng.normal(size=3), u, v, (turn[0], turn[1]), (across[0], across[1]))
        left = np.concatenate([
            np.stack([step.amplitudes[k] * sign * part[np.arange(OUT) * u[k] % OUT]
                      for k in range(3)], axis=1)
            for sign, part in ((1.0, turn[0]), (-1.0, turn[1]))
        ], axis=1)  # fmt: skip
        right = np.array([part[np.arange(INTO) * v[k] % INTO] for part in across for k in range(3)])
        delta = times(fractions(left), fractions(right))
        return step, lambda w, _: plus(w, delta)
    return None


def step_of(kind: str, rng: np.random.Generator) -> tuple[Step, Oracle]:
    if (pattern := pattern_of(kind, rng)) is not None:
        return pattern
    b, a = rng.normal(size=(OUT, RANK)), rng.normal(size=(RANK, INTO))
    if kind == "add":
        scale = float(rng.normal())
        delta = times(fractions(b), fractions(a))
        return AddLowRank(b, a, scale), lambda w, _: plus(w, delta, Fraction(scale))
    if kind == "columns":
        blocks = rng.normal(size=(INTO // 4, 4, 4))
        return BlockColumns(blocks), lambda w, _: times(w, fractions(dense(blocks)))
    if kind == "ordered columns":
        blocks, order = rng.normal(size=(INTO // 4, 4, 4)), rng.permutation(INTO)
        p = np.eye(INTO)[:, order]
        full = times(times(fractions(p), fractions(dense(blocks))), fractions(p.T))
        return BlockColumns(blocks, order), lambda w, _: times(w, full)
    if kind == "rows":
        blocks = rng.normal(size=(OUT // 4, 4, 4))
        return BlockRows(blocks), lambda w, _: times(fractions(dense(blocks)), w)
    if kind == "scale":
        d = rng.normal(size=OUT)
        return ScaleRows(d), lambda w, _: times(fractions(np.diag(d)), w)
    if kind == "pairs":
        p, q = rng.normal(size=OUT), rng.normal(size=OUT)
        step = MixRowPairs(p, q, 4)
        full = np.diag(p)
        for i in range(OUT):
            full[i, step.partner(i)] += q[i]
        return step, lambda w, _: times(fractions(full), w)
    u = rng.normal(size=(INTO, RANK))
    reflection = reflections(u) if kind == "reflections" else span_reflection(u)
    assert reflection is not None
    middle = times(fractions(reflection.v), fractions(reflection.z.T))
    return reflection, lambda w, _: plus(w, times(w, middle), Fraction(-1))


KINDS = ["add", "columns", "ordered columns", "rows", "scale", "pairs", "reflections", "span",
         "tiles", "circulants", "places", "times base", "blocks", "waves"]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_composition(seed: int, kinds: list[str], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(OUT, INTO)) * 0.1).to(dtype)
    exact = stored = fractions(weight.double().numpy())
    steps: list[Step] = []
    for kind in kinds:
        step, oracle = step_of(kind, rng)
        exact = oracle(exact, stored)
        steps.append(step)
    whole = Steps(tuple(steps))
    chunk = whole.apply(slice(0, OUT), weight)
    for i in range(OUT):
        for j in range(INTO):
            off = abs(Fraction(float(chunk.value[i, j])) - exact[i][j])
            assert off <= Fraction(chunk.error), (kinds, i, j)
    # the bound is one of float64, not a licence
    assert chunk.error < 1e-9 * max(1.0, float(chunk.value.abs().max()))
    value = whole.exact(lambda r, c, _: dyadic(weight[r, torch.from_numpy(c)].double().numpy()))
    for i, j in ((0, 0), (OUT - 1, INTO - 1), (3, 7)):
        found = value(i, np.array([j]), 100)
        assert found.radius == 0
        assert found.fraction() == exact[i][j]
    got = rounded(whole, weight, slice(0, OUT), dtype)
    for i in range(OUT):
        for j in range(INTO):
            assert float(got[i, j]) == round_once(exact[i][j], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_and_near_ties_are_decided_exactly(dtype: torch.dtype) -> None:
    """W + s·B·A exactly between two stored values, and 2⁻¹⁰⁰ beside it."""
    half = torch.finfo(dtype).eps / 2
    weight = torch.tensor([[1.0, 1.0 + 2 * half, 1.0, 1.0]], dtype=dtype)
    left = np.array([[1.0, 2.0**-60]])
    right = np.array([[half, half, half, half], [0.0, 0.0, 2.0**-40, -(2.0**-40)]])
    got = rounded(Steps((AddLowRank(left, right),)), weight, slice(0, 1), dtype)
    up = 1.0 + 2 * half
    assert got.double().tolist() == [[1.0, 1.0 + 4 * half, up, 1.0]]  # even, even, above, below


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_dora_norms_are_roots_decided_by_their_squares(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(OUT, INTO)) * 0.1).to(dtype)
    b, a = rng.normal(size=(OUT, RANK)), rng.normal(size=(RANK, INTO))
    magnitude = rng.normal(size=OUT) * 2
    branch = AddLowRank(b, a, 0.5)
    step = NormalisedAdd(branch, magnitude)
    v = plus(fractions(weight.double().numpy()), times(fractions(b), fractions(a)), Fraction(1, 2))
    got = rounded(Steps((step,)), weight, slice(0, OUT), dtype)
    chunk = Steps((step,)).apply(slice(0, OUT), weight)
    for i in range(OUT):
        square = sum((x * x for x in v[i]), Fraction(0))
        for j in range(INTO):
            # m·v/√N to 200 bits: floor of the root of its square
            target = (Fraction(float(magnitude[i])) * v[i][j]) ** 2 / square
            scaled = math.isqrt((target.numerator << 400) // target.denominator)
            size = Fraction(scaled, 1 << 200)
            value = size if (magnitude[i] > 0) == (v[i][j] > 0) else -size
            assert float(got[i, j]) == round_once(value, dtype)
            assert abs(Fraction(float(chunk.value[i, j])) - value) <= Fraction(chunk.error)


def test_a_rational_norm_is_exact() -> None:
    """‖(3, 4)‖ = 5: with m = 5 the row stays, ties and all."""
    weight = torch.tensor([[3.0, 4.0]])
    step = NormalisedAdd(AddLowRank(np.zeros((1, 1)), np.zeros((1, 2))), np.array([5.0]))
    assert rounded(Steps((step,)), weight, slice(0, 1), torch.bfloat16).tolist() == [[3.0, 4.0]]
    found = root_of(Fraction(25, 4), 100, negative=True)
    assert found.radius == 0
    assert found.fraction() == Fraction(-5, 2)
    assert root_of(Fraction(2), 100, negative=False).radius > 0


@pytest.mark.parametrize("factor", [2, 3])
def test_butterflies_are_pefts(factor: int) -> None:
    features, size = 32, 4
    blocks = features // size
    for i in range(factor):
        perm = BOFTLayer.block_butterfly_perm(
            BOFTLayer, features, int(blocks / 2**i), size // 2, factor - 1
        )
        ours = butterfly(features, blocks >> i, size // 2)
        np.testing.assert_array_equal(ours, perm.numpy())
        assert sorted(ours.tolist()) == list(range(features))


def test_boft_with_butterflies_is_pefts_product() -> None:
    """PEFT multiplies its factors with a CUDA extension alone; its formula in float64 here."""
    rng = np.random.default_rng(0)
    features, size, factors = 32, 4, 3
    blocks = features // size
    weight = rng.normal(size=(6, features))
    total = np.eye(features)
    steps = []
    for i in range(factors):
        x = rng.normal(size=(blocks, size, size)) * 0.2
        skew = (x - x.transpose(0, 2, 1)) / 2
        eye = np.eye(size)
        q = np.stack([(eye - s) @ np.linalg.inv(eye + s) for s in skew])
        perm = BOFTLayer.block_butterfly_perm(
            BOFTLayer, features, int(blocks / 2**i), size // 2, factors - 1
        ).numpy()
        p = np.zeros((features, features))
        p[np.arange(features), perm] = 1
        total = p @ dense(q) @ p.T @ total
        taken = np.argsort(butterfly(features, blocks >> i, size // 2))
        steps.append(BlockColumns(np.ascontiguousarray(q.transpose(0, 2, 1)), taken))
    got = Steps(tuple(steps)).apply(slice(0, 6), torch.from_numpy(weight)).value.numpy()
    np.testing.assert_allclose(got, weight @ total.T, atol=1e-13)


@settings(max_examples=50, deadline=None)
@given(angles=st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_cosine_and_sine_in_double_double(angles: list[float]) -> None:
    import mpmath

    mpmath.mp.prec = 200
    cosine, sine = cos_sin(np.array(angles))
    for i, angle in enumerate(angles):
        c = mpmath.mpf(float(cosine.hi[i])) + mpmath.mpf(float(cosine.lo[i]))
        s = mpmath.mpf(float(sine.hi[i])) + mpmath.mpf(float(sine.lo[i]))
        assert abs(c - mpmath.cos(angle)) < mpmath.mpf(2) ** -85
        assert abs(s - mpmath.sin(angle)) < mpmath.mpf(2) ** -85

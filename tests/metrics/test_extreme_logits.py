"""Statistics of a token against their definitions in extended precision, whatever the logits.

numpy's ``longdouble`` has 64 bits of precision on x86, so that a reference computed in it by the
textbook is good to 1e-15 of the largest logit, where one in float64 would not be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.distributions import Workspace, distribution
from so8tqc.metrics.divergence import token_rows

Extended = np.longdouble
RELATIVE = 1e-9
OF_THE_LARGEST_LOGIT = 4e-15
"""Log-probabilities are differences of logits, and no better than these are stored in float64."""

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 60, reason="longdouble is float64 on this machine"
)


def token_statistics(
    z: np.ndarray, w: np.ndarray, targets: np.ndarray, step: int | None = None
) -> dict[str, np.ndarray]:
    """Ours, a few rows at a time."""
    memories = (Workspace(), Workspace())
    parts = []
    for start in range(0, len(z), step or len(z)):
        some = slice(start, start + (step or len(z)))
        goal = torch.from_numpy(targets[some])
        sides = (
            distribution(torch.from_numpy(side[some]), goal, memory)
            for side, memory in zip((z, w), memories, strict=True)
        )
        parts.append(token_rows(*sides).numpy())
    table = np.concatenate(parts)
    return {name: table[:, i] for i, name in enumerate(COLUMNS)}


def textbook(z: np.ndarray, w: np.ndarray, target: int) -> dict[str, Any]:
    """One token, by the definitions."""
    z, w = z.astype(Extended), w.astype(Extended)
    log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (z, w))
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(log_p, log_q) - np.log(Extended(2))

    def kl(of: np.ndarray, log_of: np.ndarray, log_to: np.ndarray) -> Any:
        return np.where(of > 0, of * (log_of - log_to), 0).sum()

    one_hot = np.arange(z.size) == target
    return {
        "kl": kl(p, log_p, log_q),
        "kl_reverse": kl(q, log_q, log_p),
        "js": (kl(p, log_p, log_m) + kl(q, log_q, log_m)) / 2,
        "nll_reference": -log_p[target],
        "nll_candidate": -log_q[target],
        "entropy_reference": -np.where(p > 0, p * log_p, 0).sum(),
        "entropy_candidate": -np.where(q > 0, q * log_q, 0).sum(),
        "max_prob_reference": p.max(),
        "max_prob_candidate": q.max(),
        "max_logit_reference": z.max(),
        "max_logit_candidate": w.max(),
        "brier_reference": np.square(p - one_hot).sum(),
        "brier_candidate": np.square(q - one_hot).sum(),
        "delta_p": q[target] - p[target],
        "max_abs_logit": np.abs(w - z).max(),
        "sum_abs_logit": np.abs(w - z).sum(),
        "sum_square_logit": np.square(w - z).sum(),
    }


def draw(kind: str, size: tuple[int, int], scale: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "equal":
        return np.full(size, scale)
    if kind == "one-hot":
        z = np.full(size, -1e4)
        z[np.arange(size[0]), generator.integers(0, size[1], size[0])] = 1e4
        return z
    return generator.normal(size=size) * scale


def assert_as_in_the_textbook(
    z: np.ndarray, w: np.ndarray, targets: np.ndarray, got: dict[str, np.ndarray]
) -> None:
    for row in range(len(z)):
        largest = max(1.0, float(np.abs(z[row]).max()), float(np.abs(w[row]).max()))
        for name, exact in textbook(z[row], w[row], int(targets[row])).items():
            tolerance = RELATIVE * abs(float(exact)) + OF_THE_LARGEST_LOGIT * largest
            assert abs(got[name][row] - float(exact)) <= tolerance, (name, row, float(exact))


KINDS = ("normal", "normal", "equal", "one-hot")


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    vocabulary=st.sampled_from([2, 3, 5, 64, 1279, 5000]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 299.0, 1e4]),
    noise=st.sampled_from([0.0, 1e-6, 1e-3, 0.02, 0.04, 1.0, 1e4, None]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
@example(  # q gives tokens 6e-7 that are impossible in p: p e^e is not zero where p is
    kinds=("one-hot", "normal"), vocabulary=2, scale=30.0, noise=None, dtype=np.float32, seed=0
)
@example(  # KL 2e-4: the powers of e − KL need every term of the binomial
    kinds=("normal", "normal"), vocabulary=64, scale=30.0, noise=1.0, dtype=np.float32, seed=2
)
def test_extreme_logits(
    kinds: tuple[str, str],
    vocabulary: int,
    scale: float,
    noise: float | None,
    dtype: type,
    seed: int,
) -> None:
    size = (3, vocabulary)
    z = draw(kinds[0], size, scale, seed)
    other = draw(kinds[1], size, noise or scale, seed + 1)
    w = other if noise is None else z + noise * np.clip(other, -1e4, 1e4) / max(noise, 1.0)
    z, w = z.astype(dtype), w.astype(dtype)
    targets = np.random.default_rng(seed).integers(0, vocabulary, 3)
    targets[0] = z[0].argmax()
    assert_as_in_the_textbook(z, w, targets, token_statistics(z, w, targets))


@pytest.mark.parametrize("noise", [1e-3, 0.03, 3.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_vocabulary_of_a_quarter_million(scale: float, noise: float) -> None:
    z = draw("normal", (3, 262_144), scale, 0).astype(np.float32)
    w = (z + draw("normal", z.shape, noise, 1)).astype(np.float32)
    z[2], w[2] = draw("one-hot", z.shape, 0, 2)[0], 0.0
    targets = np.array([7, z[1].argmax(), 262_143])
    assert_as_in_the_textbook(z, w, targets, token_statistics(z, w, targets))


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(1, 9),
    order=st.permutations(list(range(9))),
    vocabulary=st.sampled_from([3, 64, 1300, 5000]),
    noise=st.sampled_from([1e-5, 1e-2, 1.0, 1e3]),
)
def test_a_token_does_not_depend_on_its_neighbours(
    step: int, order: list[int], vocabulary: int, noise: float
) -> None:
    """Alone or among others, in any order and any block: the same to the bit."""
    z = draw("normal", (9, vocabulary), 5.0, 0)
    z[4] *= 1e3  # such a row among ordinary ones
    w = z + draw("normal", z.shape, noise, 1)
    targets = np.random.default_rng(2).integers(0, vocabulary, 9)
    whole = token_statistics(z, w, targets)
    parts = token_statistics(z[order], w[order], targets[order], step)
    for name in COLUMNS:
        np.testing.assert_array_equal(parts[name], whole[name][order], err_msg=name)

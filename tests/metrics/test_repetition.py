"""Repetition of token sequences whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from so8tqc.metrics.repetition import first_loop, repetition


def test_loops_and_fresh_text() -> None:
    loop = repetition([1, 2, 3, 4] * 50)
    fresh = repetition(list(range(200)))
    assert loop.repeated == pytest.approx(193 / 197)
    assert fresh.repeated == 0.0
    assert loop.compression < 0.2 < fresh.compression
    assert (loop.tokens, loop.loop_period, loop.loop_start) == (200, 4, 0)
    assert (fresh.loop_period, fresh.loop_start) == (0, -1)


def test_nothing_and_next_to_nothing() -> None:
    assert repetition([]) == (0, 0.0, 1.0, 0, -1)
    assert repetition([5, 5, 5]).repeated == 0.0


def test_compression_sees_repetition_that_n_grams_do_not() -> None:
    """Every fourth token of a repeated text is another each time: no 4-gram occurs twice."""
    generator = np.random.default_rng(0)
    text = np.tile(generator.integers(0, 40_000, size=64), 8)
    text[::4] = np.arange(text[::4].size) + 50_000
    almost = repetition(text.tolist())
    fresh = repetition(generator.integers(0, 40_000, size=512).tolist())
    assert almost.repeated == fresh.repeated == 0.0
    assert almost.loop_period == 0
    assert almost.compression < 0.7 * fresh.compression


@pytest.mark.parametrize("period", [1, 5, 70])
def test_a_loop_begins_with_its_first_copy(period: int) -> None:
    head = list(range(1000, 1100))
    body = list(range(period))
    assert first_loop(head + body * (4 + 80 // period)) == (period, 100)

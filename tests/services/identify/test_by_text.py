"""What may be concluded from likelihoods: the rule, on tables whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from so8tqc.metrics.divergence import COLUMNS, TokenTable
from so8tqc.services.identify.by_text import EFFICIENCY_RATIO, Differences, weigh_by_text

TEXTS, TOKENS = 24, 50
BASE = "none"


def table(
    gain: float, kl: float, noise: float = 0.2, seed: int = 0, tokens: int = TOKENS
) -> TokenTable:
    """A reading that lowers the NLL by ``gain`` in the mean, at KL ``kl`` from the base."""
    draw = np.random.default_rng(100)  # the base is the same in every table
    size = TEXTS * tokens
    reference = draw.gamma(3.0, 1.0, size)
    text = np.repeat(np.arange(TEXTS, dtype=np.int32), tokens)
    spread = np.random.default_rng(seed).normal(0, noise * max(abs(gain), 1e-3), size)
    spread -= spread.mean()
    columns = dict.fromkeys(COLUMNS, np.zeros(size))
    columns |= {
        "nll_reference": reference,
        "nll_candidate": reference - gain + spread,
        "kl": np.full(size, kl),
    }
    position = np.tile(np.arange(tokens, dtype=np.int32), TEXTS)
    return TokenTable(columns, text, position, 512, tuple(f"t{i}" for i in range(TEXTS)))


def path(turn: float, best: float, seed: int = 0) -> TokenTable:
    """A reading on the trained path: a parabola of the turn, KL its square (see the module)."""
    x = turn / best
    return table(0.4 * (2 * x - x * x), 0.3 * turn**2, seed=seed)


def weighed(tables: dict[str, TokenTable]) -> tuple[set[str], tuple[str, ...]]:
    found = weigh_by_text(tables, BASE, resamples=500, seed=0)
    return set(found.refuted), found.remaining


@pytest.mark.parametrize("best", [1.0, 1.3, 3.0, 10.0])
def test_no_turn_along_the_path_up_to_the_best_refutes_another(best: float) -> None:
    """However short the training was: the trained one at 1, readings that turn less and more."""
    turns = [turn for turn in (0.4, 0.98, 1.0, 1.02, 2.5, 8.0) if turn <= best]
    refuted, remaining = weighed({f"x{t}": path(t, best, seed=i) for i, t in enumerate(turns)})
    assert refuted == set()
    assert set(remaining) == {f"x{t}" for t in turns}


def test_a_turn_far_beyond_the_best_is_refuted() -> None:
    refuted, remaining = weighed({"right": path(1.0, 1.0), "far": path(1.9, 1.0, seed=1)})
    assert refuted == {"far"}
    assert remaining == ("right",)


def test_what_does_harm_is_refuted() -> None:
    refuted, _ = weighed({"right": path(1.0, 1.0), "mirrored": table(-0.3, 0.3, seed=1)})
    assert refuted == {"mirrored"}


def test_a_wrong_reading_that_gains_more_by_going_far_refutes_nothing() -> None:
    """Along the right one the training had just begun; the wrong one turns a lot, and was lucky."""
    right = table(0.01, 1e-5)  # efficiency 3.2
    lucky = table(0.2, 1.0, seed=1)  # efficiency 0.2
    refuted, remaining = weighed({"right": right, "lucky": lucky})
    assert refuted == set()
    assert remaining == ("lucky", "right")  # the likelihood alone would name the wrong one


def test_better_and_more_efficient_refutes() -> None:
    right, other = table(0.3, 0.2), table(0.1, 0.2 * (EFFICIENCY_RATIO / 3) ** 2 * 1.3, seed=1)
    refuted, _ = weighed({"right": right, "other": other})
    assert refuted == {"other"}


def test_without_texts_enough_nothing_is_refuted() -> None:
    tables = {"right": path(1.0, 1.0), "mirrored": table(-0.3, 0.3, seed=1)}
    few = {
        name: TokenTable(
            {k: v[: 4 * TOKENS] for k, v in t.columns.items()},
            t.text[: 4 * TOKENS],
            t.position[: 4 * TOKENS],
            t.vocab_size,
            t.texts[:4],
        )
        for name, t in tables.items()
    }
    assert weighed(few)[0] == set()


def test_the_tokens_that_are_told_to_be_needed_are_enough() -> None:
    """A difference of 0.01 ± noise: with the tokens named, four of five samples tell it."""
    draw = np.random.default_rng(0)
    noise, mean, texts = 0.05, 0.01, 20

    def sample(count: int) -> Differences:
        counts = np.full(count, 100.0)
        sums = {"a": counts * draw.normal(mean, noise, count), "b": np.zeros(count)}
        return Differences(sums, counts, resamples=500, seed=1)

    needed = [r.needed for r in (sample(texts).of("a", "b") for _ in range(200)) if r.needed]
    typical = int(np.median(needed)) // 100
    told = [sample(2 * typical).less("b", "a") for _ in range(100)]
    assert np.mean(told) >= 0.5
    assert np.mean([sample(texts).less("b", "a") for _ in range(100)]) < 0.4


def test_differences_are_the_same_from_both_sides() -> None:
    draw = np.random.default_rng(3)
    sums = {name: draw.normal(i, 1.0, 30) * 10 for i, name in enumerate("abc")}
    found = Differences(sums, np.full(30, 10.0), resamples=300, seed=0)
    one, other = found.of("a", "c"), found.of("c", "a")
    assert one.difference == -other.difference
    assert one.ci95 is not None
    assert other.ci95 == (-one.ci95[1], -one.ci95[0])
    assert found.less("a", "c")
    assert not found.less("c", "a")
    assert found.critical is not None

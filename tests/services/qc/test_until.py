"""Stopping where an interval is narrow, and intervals that hold all the same."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from so8tqc.metrics.bootstrap import paired_bootstrap, ratio_of_sums, texts_to_halve
from so8tqc.metrics.divergence import TokenTable, joined
from so8tqc.services.qc.judging import Bootstrap
from so8tqc.services.qc.until import (
    compare_until,
    in_drawn_order,
    planned_looks,
    sequential_notice,
)
from so8tqc.sources.protocol import EncodedText

PAIR = ("reference", "a")


def texts(count: int, tokens: int = 5) -> list[EncodedText]:
    return [EncodedText(f"t{i}", np.arange(tokens)) for i in range(count)]


def table(some: list[EncodedText], value) -> TokenTable:
    rows = [text.tokens.size - 1 - text.first for text in some]
    names = list(dict.fromkeys(text.id for text in some))
    owner = [names.index(text.id) for text, n in zip(some, rows, strict=True) for _ in range(n)]
    kl = [value(text.id) for text, n in zip(some, rows, strict=True) for _ in range(n)]
    position = np.concatenate([np.arange(n) for n in rows])
    return TokenTable(
        {"kl": np.array(kl)}, np.array(owner, np.int32), position.astype(np.int32), 9, tuple(names)
    )


def walk(count: int, until: float, value, seed: int = 0, resamples: int = 400):
    def compare(some):
        return {PAIR: table(list(some), value)}

    return compare_until(compare, [PAIR], texts(count), until, Bootstrap(resamples, seed))


def test_the_looks_are_fixed_before_the_first() -> None:
    assert planned_looks(3) == [3]
    assert planned_looks(20) == [20]
    assert planned_looks(21) == [20, 21]
    assert planned_looks(100) == [20, 40, 80, 100]


def test_it_ends_where_the_interval_is_narrow() -> None:
    values = {f"t{i}": float(v) for i, v in enumerate(np.random.default_rng(0).normal(1, 0.1, 99))}
    tables, used, found = walk(99, 0.06, values.__getitem__)
    assert found.reached
    assert found.texts in (40, 80)
    assert found.looks[-1]["width"] <= 0.06 < found.looks[0]["width"]
    assert found.level == 1 - 0.05 / 4
    assert len(tables[PAIR].texts) == len({text.id for text in used}) == found.texts
    exact = np.mean([values[text.id] for text in used])
    assert tables[PAIR].columns["kl"].mean() == pytest.approx(exact)
    low, high = paired_bootstrap(
        tables[PAIR].per_text("kl"), ratio_of_sums, resamples=400, seed=0, looks=4
    )
    assert high - low == found.looks[-1]["width"]
    assert "98.75 %" in sequential_notice(found)


def test_all_texts_are_taken_where_it_never_is() -> None:
    _, used, found = walk(33, 1e-9, lambda name: float(len(name) + int(name[1:]) % 7))
    assert (found.reached, found.texts, len(used)) == (False, 33, 33)
    assert [look["texts"] for look in found.looks] == found.planned == [20, 33]
    assert "give more text" in sequential_notice(found)


def test_too_few_texts_have_no_interval_and_reach_nothing() -> None:
    _, _, found = walk(3, 10.0, lambda _name: 1.0)
    assert (found.reached, found.looks) == (False, [{"texts": 3, "width": None}])
    assert "is none" in sequential_notice(found)


def test_windows_of_a_text_stay_together() -> None:
    some = [EncodedText("a", np.arange(4)), EncodedText("b", np.arange(4)),
            EncodedText("a", np.arange(4), start=3)]  # fmt: skip
    groups = in_drawn_order(some, 1)
    assert sorted((group[0].id, len(group)) for group in groups) == [("a", 2), ("b", 1)]
    names = [[g[0].id for g in in_drawn_order(texts(30), seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_the_interval_holds_wherever_the_walk_ends() -> None:
    """A skewed mean, stopped at a narrow interval: the intervals of all planned looks miss the true
    mean as rarely as they say; an interval of one look alone, taken there, misses it more often."""
    truth, walks, missed = 4.0, 120, {True: 0, False: 0}
    for seed in range(walks):
        values = np.random.default_rng(seed).gamma(truth, size=160)
        tables, _, found = walk(160, 1.5, lambda name, v=values: v[int(name[1:])], seed, 200)
        for planned in missed:
            low, high = paired_bootstrap(
                tables[PAIR].per_text("kl"),
                ratio_of_sums,
                resamples=200,
                seed=seed,
                looks=len(found.planned) if planned else 1,
            )
            missed[planned] += not low <= truth <= high
    assert missed[True] <= 0.075 * walks
    assert missed[True] < missed[False]


@pytest.mark.parametrize("count", [5, 6, 12, 25, 200])
def test_texts_that_halve_an_interval(count: int) -> None:
    more = texts_to_halve(count)
    width = [t.ppf(0.975, n - 1) / np.sqrt(n) for n in (count, more - 1, more)]
    assert width[2] <= width[0] / 2 < width[1]
    assert 2 * count <= more <= 4 * count


def test_tables_behind_one_another() -> None:
    a, b = table(texts(3), lambda n: float(n[1:])), table(texts(2, 9), lambda n: 9.0)
    both = joined([a, b])
    assert len(both) == len(a) + len(b)
    assert both.texts == (*a.texts, *b.texts)
    np.testing.assert_array_equal(
        both.per_text("kl"), np.concatenate([a.per_text("kl"), b.per_text("kl")])
    )

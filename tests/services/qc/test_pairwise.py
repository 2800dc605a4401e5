"""Candidate against candidate: who wins, and when nobody does."""

from __future__ import annotations

import numpy as np
import pytest

from so8tqc.metrics.divergence import TokenTable
from so8tqc.services.qc.judging import Bootstrap
from so8tqc.services.qc.pairwise import compare_candidates

TEXTS, LENGTH = 12, 40


def table(kl: float, top1: float, seed: int, texts: int = TEXTS) -> TokenTable:
    """Tokens whose KL is ``kl`` on average and whose top token is kept with ``top1``."""
    generator = np.random.default_rng(seed)
    count = texts * LENGTH
    columns = {
        "kl": generator.gamma(2, kl / 2, size=count),
        "nll_candidate": generator.gamma(2, 1.5, size=count),
        "same_top": (generator.random(count) < top1).astype(float),
    }
    return TokenTable(
        columns,
        np.repeat(np.arange(texts, dtype=np.int32), LENGTH),
        np.tile(np.arange(LENGTH, dtype=np.int32), texts),
        64,
        tuple(f"t{i}" for i in range(texts)),
    )


def test_the_nearer_one_wins_whatever_the_order() -> None:
    near, far = table(0.02, 0.98, 0), table(0.08, 0.8, 1)
    for names in (("near", "far"), ("far", "near")):
        tables = {"near": near, "far": far}
        found = compare_candidates({name: tables[name] for name in names}, Bootstrap(400, 0))
        assert found is not None
        (pair,) = found["pairs"]
        assert (pair["a"], pair["b"]) == names
        assert pair["winner"] == pair["kl"]["better"] == pair["top1"]["better"] == "near"
        assert pair["nll"]["better"] is None
        expected = tables[names[0]].columns["kl"].mean() - tables[names[1]].columns["kl"].mean()
        assert pair["kl"]["difference"] == pytest.approx(expected)
        low, high = pair["kl"]["ci95"] or (0, 0)
        assert low < expected < high
        assert pair["sentence"].startswith("near is nearer to the reference than far: its mean KL")


def test_all_pairs_are_compared_and_equal_ones_are_not_told_apart() -> None:
    tables = {"a": table(0.05, 0.9, 0), "b": table(0.05, 0.9, 1), "c": table(0.2, 0.5, 2)}
    found = compare_candidates(tables, Bootstrap(400, 0))
    assert found is not None
    winners = {(pair["a"], pair["b"]): pair["winner"] for pair in found["pairs"]}
    assert winners == {("a", "b"): None, ("a", "c"): "a", ("b", "c"): "b"}
    assert "do not tell a from b" in found["pairs"][0]["sentence"]
    # three pairs at once need wider intervals than one
    alone = compare_candidates({k: tables[k] for k in "ab"}, Bootstrap(400, 0))
    assert alone is not None
    assert (found["critical"] or 0) > (alone["critical"] or 0) > 1.96


def test_a_winner_in_kl_that_keeps_fewer_top_tokens_is_said_to() -> None:
    found = compare_candidates(
        {"a": table(0.02, 0.5, 0), "b": table(0.2, 0.9, 1)}, Bootstrap(400, 0)
    )
    assert found is not None
    assert found["pairs"][0]["winner"] == "a"
    assert "though b has the reference's top token more often" in found["pairs"][0]["sentence"]


def test_too_few_texts_have_no_winner() -> None:
    found = compare_candidates(
        {"a": table(0.02, 0.9, 0, texts=4), "b": table(5.0, 0.1, 1, texts=4)}, Bootstrap(400, 0)
    )
    assert found is not None
    (pair,) = found["pairs"]
    assert pair["winner"] is None
    assert pair["kl"]["ci95"] is None
    assert found["critical"] is None
    assert pair["sentence"] == "Fewer than 5 texts differ: a and b cannot be told apart."


def test_one_candidate_is_compared_with_none() -> None:
    assert compare_candidates({"a": table(0.1, 0.9, 0)}, Bootstrap(400, 0)) is None

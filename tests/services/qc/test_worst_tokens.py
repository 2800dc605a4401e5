"""The worst tokens are those of the table, and the words are those that the model had read."""

from __future__ import annotations

import numpy as np
import pytest

from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.services.qc.worst_tokens import CONTEXT_TOKENS, worst_tokens
from so8tqc.sources.inputs.windows import overlapping_windows
from so8tqc.sources.protocol import EncodedText


def table(texts: tuple[EncodedText, ...], kl: np.ndarray) -> TokenTable:
    """Rows in the order in which windows are scored."""
    names = tuple(dict.fromkeys(text.id for text in texts))
    rows = [
        (names.index(text.id), text.start + row)
        for text in texts
        for row in range(text.first, text.tokens.size - 1)
    ]
    columns = {name: np.zeros(len(rows)) for name in COLUMNS}
    columns |= {"kl": kl[: len(rows)], "nll_reference": np.full(len(rows), np.log(4.0))}
    columns["nll_candidate"] = np.full(len(rows), np.log(8.0))
    text, position = np.array(rows, dtype=np.int32).T
    return TokenTable(columns, text, position, 100, names)


def spelled(ids: list[int]) -> str:
    """Each id as a word; like sentencepiece, without the space before the first."""
    return "".join(f" {i}" for i in ids).removeprefix(" ")


def test_each_token_is_the_one_that_follows_what_was_read() -> None:
    """Token i of a text is i, in windows that overlap: so position and words must agree."""
    whole = [EncodedText("a", np.arange(40)), EncodedText("b", np.arange(100, 130))]
    texts = overlapping_windows(whole, 16, 8, None)
    kl = np.random.default_rng(0).random(200)
    found = table(texts, kl)
    rows = worst_tokens(found, texts, spelled, count=10)
    assert [row["kl"] for row in rows] == sorted(found.columns["kl"])[::-1][:10]
    for row in rows:
        follows = row["position"] + 1 + (100 if row["text"] == "b" else 0)
        assert row["token"] == f" {follows}"
        read = [int(word) for word in row["before"].split()]
        assert read == list(range(follows - len(read), follows))
        assert 0 < len(read) <= CONTEXT_TOKENS
        assert (row["p_reference"], row["p_candidate"]) == pytest.approx((0.25, 0.125))
        assert row["same_top"] is False


def test_without_a_tokenizer_the_places_are_known_all_the_same() -> None:
    texts = (EncodedText("a", np.arange(9)),)
    kl = np.array([0.0, 0, 0, 5, 0, 0, 7, 0])
    rows = worst_tokens(table(texts, kl), texts, None, count=2)
    assert [(row["position"], row["before"], row["token"]) for row in rows] == [
        (6, "", ""),
        (3, "", ""),
    ]

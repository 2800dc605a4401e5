"""A source's temperature table, against float64 log-softmax of all its logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from so8tqc.sources import temperatures
from so8tqc.sources.protocol import EncodedText, TokenIds
from so8tqc.sources.temperatures import frequent_tokens, walk_temperatures

V = 700


class Drawn:
    """Logits of a text from its first token, and the blocks that were asked for."""

    vocab_size = V
    name = "drawn"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def all_of(self, tokens: TokenIds) -> np.ndarray:
        z = np.random.default_rng(int(tokens[0])).normal(0, 3, (tokens.size, V))
        return z.astype(np.float32)

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        self.asked.append(rows)
        yield from torch.from_numpy(self.all_of(tokens)[first:]).split(rows)

    def close(self) -> None:
        pass


def _texts(*lengths: int) -> list[EncodedText]:
    draw = np.random.default_rng(5)
    return [
        EncodedText(f"t{i}", draw.integers(0, 40, n).astype(np.int64))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("most", [7, 512])
def test_every_score_is_that_of_the_logits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temperatures, "MOST_ROWS", most)
    texts, source = _texts(2, 7, 8, 30), Drawn()
    classes = frequent_tokens(texts, 5)
    table = walk_temperatures(source, texts, (0.5, 2.0), classes=classes)
    z = np.concatenate([source.all_of(text.tokens)[:-1] for text in texts]).astype(np.float64)
    y = np.concatenate([text.tokens[1:] for text in texts])
    each = np.arange(y.size)
    assert table.correct.tolist() == (z.argmax(axis=1) == y).tolist()
    assert table.texts == ("t0", "t1", "t2", "t3")
    assert np.bincount(table.text).tolist() == [1, 6, 7, 29]
    for temperature in (0.5, 1.0, 2.0):  # knots: nothing is interpolated
        scores, logp = table.at(temperature), log_softmax(z / temperature, axis=1)
        p = np.exp(logp)
        expected = {
            "nll": -logp[each, y],
            "entropy": -(p * logp).sum(axis=1),
            "confidence": p.max(axis=1),
            "brier": ((p - np.eye(V)[y]) ** 2).sum(axis=1),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(scores, name), values, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(scores.classes, p[:, classes], rtol=1e-5)  # float32


def test_a_text_is_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temperatures, "MOST_ROWS", 7)
    source = Drawn()
    walk_temperatures(source, _texts(2, 7, 8, 30), (1.0, 1.0))
    assert source.asked == [2, 7, 4, 6]

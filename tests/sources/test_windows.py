"""Which tokens are scored: against numpy re-implementations of the two schemes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.errors import DataError
from so8tqc.metrics.bootstrap import paired_bootstrap, ratio_of_sums
from so8tqc.metrics.divergence import summarise
from so8tqc.sources.compare import compare
from so8tqc.sources.inputs.windows import llama_perplexity_windows, overlapping_windows
from so8tqc.sources.protocol import EncodedText, TokenIds

BOS = 1


class Causal:
    """Logits are pseudo-random in the model's name and the last ``memory`` tokens read."""

    def __init__(self, name: str, vocab_size: int, memory: int = 10_000) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self._memory = memory

    def row(self, read: TokenIds) -> np.ndarray:
        """[V] logits of what follows."""
        seed = [ord(self.name[0]), *(int(token) for token in read[-self._memory :])]
        return np.random.default_rng(seed).normal(size=self.vocab_size) * 2

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`."""
        wanted = [self.row(tokens[: i + 1]) for i in range(first, tokens.size)]
        yield from torch.from_numpy(np.stack(wanted)).split(rows)

    def close(self) -> None:
        """Nothing to release."""


def text(length: int, name: str = "t", bos: bool = False) -> EncodedText:
    tokens = np.random.default_rng(length).integers(2, 50, length)
    if bos:
        tokens[0] = BOS
    return EncodedText(name, tokens, language="en", category="c")


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 90), context=st.integers(3, 40), data=st.data())
def test_every_token_is_scored_once_with_enough_context(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    whole = text(length, bos=data.draw(st.booleans()))
    windows = overlapping_windows([whole], context, stride, BOS)
    scored = [(w.start + row + 1, w) for w in windows for row in range(w.first, w.tokens.size - 1)]
    assert [target for target, _ in scored] == list(range(1, length))
    for target, window in scored:
        assert window.tokens[target - window.start] == whole.tokens[target]
        before = target - window.start
        assert before >= (context - stride if window.start else min(target, 1))
    for window in windows:
        assert window.tokens.size <= context
        expected = whole.tokens[window.start : window.start + window.tokens.size].copy()
        if whole.tokens[0] == BOS:
            expected[0] = BOS
        np.testing.assert_array_equal(window.tokens, expected)
        assert (window.id, window.language, window.category) == ("t", "en", "c")
    if length <= context:
        assert len(windows) == 1


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 90), context=st.integers(3, 40), data=st.data())
def test_windows_are_those_of_transformers_perplexity_guide(
    length: int, context: int, data: st.DataObject
) -> None:
    """The guide's loop: begin, end, and how many labels are not masked."""
    stride = data.draw(st.integers(1, context - 1))
    expected = []
    previous_end = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        labelled = np.full(end - begin, -100)
        labelled[-(end - previous_end) :] = np.arange(previous_end, end)
        # the model shifts the labels by one: row i is scored on label i + 1
        rows = np.flatnonzero(labelled[1:] != -100)
        expected.append((begin, end, rows.tolist()))
        previous_end = end
        if end == length:
            break
    windows = overlapping_windows([text(length)], context, stride, None)
    assert expected == [
        (w.start, w.start + w.tokens.size, list(range(w.first, w.tokens.size - 1))) for w in windows
    ]


def scored_by_llama_perplexity(
    tokens: np.ndarray, context: int, bos: int | None
) -> list[tuple[np.ndarray, int]]:
    """(what the model has read, token it is scored on): the tool's loops, written out."""
    pairs = []
    first = context // 2
    for chunk in range(len(tokens) // context):
        start = chunk * context
        read: list[int] = []
        for position in range(context):
            token = int(tokens[start + position])
            read.append(bos if bos is not None and position == 0 else token)
            if first <= position < context - 1:
                pairs.append((np.array(read), int(tokens[start + position + 1])))
    return pairs


@settings(max_examples=30, deadline=None)
@given(length=st.integers(16, 120), context=st.integers(3, 40), bos=st.sampled_from([None, BOS]))
def test_llama_perplexity_scores_the_second_halves(
    length: int, context: int, bos: int | None
) -> None:
    tokens = np.random.default_rng(length).integers(2, 50, length)
    before = tokens.copy()
    if length < 2 * context:
        with pytest.raises(DataError, match=f"{length} tokens are too few"):
            llama_perplexity_windows(tokens, context, bos)
        return
    windows = llama_perplexity_windows(tokens, context, bos)
    reference, candidate = Causal("p", 50), Causal("q", 50)
    table = compare([reference, candidate], [("p", "q")], windows)[("p", "q")]
    expected = scored_by_llama_perplexity(tokens, context, bos)
    assert len(table) == len(expected)
    log_p, log_q = (
        scipy.special.log_softmax(np.stack([source.row(read) for read, _ in expected]), axis=1)
        for source in (reference, candidate)
    )
    at = (np.arange(len(expected)), np.array([target for _, target in expected]))
    np.testing.assert_allclose(table.columns["nll_reference"], -log_p[at], rtol=1e-9)
    np.testing.assert_allclose(table.columns["nll_candidate"], -log_q[at], rtol=1e-9)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    np.testing.assert_allclose(table.columns["kl"], kl, rtol=1e-9)
    positions = [
        chunk * context + context // 2 + i
        for chunk in range(length // context)
        for i in range(context - 1 - context // 2)
    ]
    assert table.position.tolist() == positions
    np.testing.assert_array_equal(tokens, before)


def test_windows_of_a_text_are_one_text_and_score_what_the_whole_scores() -> None:
    """With a model that looks one token back, a window changes nothing."""
    texts = [text(70, "long"), text(12, "short"), text(41, "longer")]
    sources = [Causal("p", 50, memory=1), Causal("q", 50, memory=1)]
    whole = compare(sources, [("p", "q")], texts)[("p", "q")]
    windows = overlapping_windows(texts, 16, 5, None)
    assert len(windows) > 3
    cut = compare(sources, [("p", "q")], windows)[("p", "q")]
    assert cut.texts == ("long", "short", "longer")
    np.testing.assert_array_equal(cut.text, whole.text)
    np.testing.assert_array_equal(cut.position, whole.position)
    for name, values in whole.columns.items():
        np.testing.assert_allclose(cut.columns[name], values, rtol=1e-9, atol=1e-13, err_msg=name)


def test_the_unit_of_resampling_is_the_text_or_the_window() -> None:
    sources = [Causal("p", 50), Causal("q", 50)]
    tokens = np.random.default_rng(0).integers(2, 50, 12 * 16)
    windows = llama_perplexity_windows(tokens, 16, None)
    table = compare(sources, [("p", "q")], windows)[("p", "q")]
    assert summarise(table)["texts"] == 12
    per_window = table.per_text("kl")
    assert per_window.shape == (12, 2)
    kl = table.columns["kl"].reshape(12, -1)
    np.testing.assert_allclose(per_window[:, 0], kl.sum(axis=1))
    # every window's tokens repeated tenfold hold no more information
    repeated = np.stack([kl.sum(axis=1) * 10, np.full(12, kl.shape[1] * 10.0)], axis=1)
    once, ten = (
        paired_bootstrap(sums, ratio_of_sums, resamples=500, seed=0)
        for sums in (per_window, repeated)
    )
    np.testing.assert_allclose(once, ten)

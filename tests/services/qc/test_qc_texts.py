"""Which tokens are scored: by the protocol, the window, and the limit of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from so8tqc.config import QCConfig
from so8tqc.errors import DataError
from so8tqc.services.qc.texts import TOKENS_OF_A_TEXT, evaluation_texts
from so8tqc.sources.inputs.texts import load_tokenizer
from so8tqc.sources.protocol import EncodedText

LONG = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 60


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (LONG, LONG[7:], "A dog."))
    )
    return path


def encoded(model: Path, data: Path, **options: Any) -> tuple[EncodedText, ...]:
    config = QCConfig.model_validate(
        {"reference": model, "candidates": [model], "out": "o", "data": [str(data)], **options}
    )
    return evaluation_texts(config, lambda: load_tokenizer(model))


def test_without_a_window_each_text_is_cut_at_256_tokens(llama: Path, data: Path) -> None:
    found = encoded(llama, data)
    assert [text.tokens.size for text in found[:2]] == [TOKENS_OF_A_TEXT] * 2
    assert 1 < found[2].tokens.size < TOKENS_OF_A_TEXT
    assert [text.tokens.size for text in encoded(llama, data, max_tokens=10)[:2]] == [10, 10]
    np.testing.assert_array_equal(
        encoded(llama, data, max_tokens=10)[0].tokens, found[0].tokens[:10]
    )


def test_windows_score_every_token_but_the_first_once(llama: Path, data: Path) -> None:
    whole = encoded(llama, data, max_tokens=500)
    windows = encoded(llama, data, max_tokens=500, ctx=64, stride=16)
    assert max(window.tokens.size for window in windows) <= 64
    assert len(windows) > len(whole)
    scored = sum(window.tokens.size - 1 - window.first for window in windows)
    assert scored == sum(text.tokens.size - 1 for text in whole)


def test_llama_perplexity_needs_two_windows_of_its_own_length(llama: Path, data: Path) -> None:
    found = encoded(llama, data, protocol="llama-perplexity", ctx=128)
    assert {window.tokens.size for window in found} == {128}
    with pytest.raises(DataError):
        encoded(llama, data, protocol="llama-perplexity", ctx=128, max_tokens=200)

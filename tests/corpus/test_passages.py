"""Passages: prose of sane length, whole sentences, each once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.corpus.manifest import Domain
from so8tqc.corpus.passages import (
    CHARACTERS_JA,
    NEAR_DUPLICATE,
    WORDS_EN,
    Passage,
    is_prose,
    length,
    pack,
    shingles,
    without_duplicates,
)

EN = "The river of the valley was wide in spring and narrow in the dry months of the year."
JA = "谷を流れる川は、春になると雪どけの水で広くなり、夏の終わりにはまた細くなりました。"


def passage(name: str, text: str, language: str = "en") -> Passage:
    return Passage(name, text, language, Domain.LANGUAGE, "s", "MIT")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [EN, JA])
def test_prose(text: str) -> None:
    assert is_prose(text, "en" if text is EN else "ja")
    assert not is_prose(text, "ja" if text is EN else "en")


@pytest.mark.parametrize(
    "text",
    [
        "", "See https://address for the rest of the story and of the year.",
        "x = {1: 2} is the value of the map in the code.",
        "Apples, pears, oranges, cherries, plums, grapes.", "The title of the page",
        "In 1901, 1902, 1903, 1904 and 1905 it was 17 to 19 of the 23.",
        "int main ( void ) return 0 ; the end .",
    ],
)  # fmt: skip
def test_not_english_prose(text: str) -> None:
    assert not is_prose(text, "en")


@pytest.mark.parametrize(
    "text",
    [
        "関数、変数、定数、配列、行列、集合。", "ファイルを開くには open(path) を使います",
        "という値が設定されたことを示しているのでした。",
        "このメソッドは BrowserWindow class の webContents property を returns します。",
    ],
)  # fmt: skip
def test_not_japanese_prose(text: str) -> None:
    assert not is_prose(text, "ja")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.sampled_from(["en", "ja"]))
@settings(max_examples=60, deadline=None)
def test_packed_passages_are_whole_sentences_in_order(counts: list[int], language: str) -> None:
    kind = "en" if language == "en" else "ja"
    sentence, glue = (EN, " ") if kind == "en" else (JA, "")
    paragraphs = [glue.join([sentence] * count) for count in counts]
    least, most = WORDS_EN if kind == "en" else CHARACTERS_JA
    packed = list(pack(paragraphs, kind))
    assert all(least <= length(text.replace("\n\n", glue), kind) <= most for text in packed)
    assert all(text.replace("\n\n", glue).replace(sentence, "").strip() == "" for text in packed)
    total = sum(text.count(sentence) for text in packed)
    # at most the last, unfinished passage is lost
    assert sum(counts) - total <= least // length(sentence, kind) + 1


def test_what_is_not_prose_ends_a_passage() -> None:
    half = " ".join([EN] * 2)
    assert list(pack([half, half], "en")) == [f"{half}\n\n{half}"]
    assert list(pack([half, "x = 1", half], "en")) == []


def test_equal_after_normalisation_is_a_duplicate() -> None:
    text = " ".join([EN, "A second sentence makes it longer than a shingle."])
    kept = without_duplicates([passage("1", text), passage("2", text.upper().replace(" ", "  "))])
    assert [p.id for p in kept] == ["1"]
    wide = JA.replace("、", "，").replace("春", "春 ")
    assert [
        p.id for p in without_duplicates([passage("1", JA, "ja"), passage("2", wide, "ja")])
    ] == ["1"]


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_those_that_brute_force_finds(seed: int) -> None:
    """Every pair is compared by its sets; the index must keep and drop the same."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(draw.sample(words, draw.randrange(40, 120))) for _ in range(12)]
    for _ in range(24):  # with a part of an earlier one
        base = draw.choice(texts).split()
        cut = draw.randrange(5, len(base))
        texts.append(" ".join(base[:cut] + draw.sample(words, draw.randrange(90))))
    draw.shuffle(texts)
    kept: list[int] = []
    sets = [shingles(text, "en") for text in texts]
    for i, own in enumerate(sets):
        if all(len(own & sets[j]) < NEAR_DUPLICATE * min(len(own), len(sets[j])) for j in kept):
            kept.append(i)
    found = without_duplicates(passage(str(i), text) for i, text in enumerate(texts))
    assert [int(p.id) for p in found] == kept
    assert len(kept) < len(texts)

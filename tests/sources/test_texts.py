"""Reading texts of every kind, and the data that comes along."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from so8tqc.errors import DataError, MissingToolError, ModelError
from so8tqc.resources import data_file
from so8tqc.sources.inputs.texts import (
    Text,
    concatenated,
    encode,
    encode_plain,
    load_texts,
    load_tokenizer,
)


def test_the_shipped_texts_are_what_they_should_be() -> None:
    texts = load_texts(["builtin:validation"])
    english = [t for t in texts if t.language == "en"]
    japanese = [t for t in texts if t.language == "ja"]
    assert (len(english), len(japanese)) == (10, 15)
    assert all(150 <= len(t.text.split()) <= 400 for t in english)
    assert all(t.prompt and t.category and t.description for t in texts)
    assert len({t.id for t in texts}) == 25
    long = load_texts(["builtin:longtext"])
    assert [t.id.split("/")[1] for t in long] == [
        "scientific_explanation",
        "mathematical_proof",
        "technical_implementation",
    ]


DOMAINS = (
    "mathematics_physics",
    "computing_ai",
    "language",
    "culture_history",
    "ethics_philosophy",
    "business_economics",
    "biology_chemistry",
    "engineering",
    "medicine",
    "literature",
)


def _units(text: Text) -> list[str]:
    """Words of a text in English, characters of one in Japanese."""
    return text.text.split() if text.language == "en" else list("".join(text.text.split()))


@pytest.mark.parametrize(
    ("name", "language", "each", "shortest", "longest"),
    [
        ("calibration_ja_long", "ja", 5, 500, 900),
        ("calibration_written_en", "en", 10, 70, 120),
        ("calibration_written_ja", "ja", 10, 150, 260),
    ],
)
def test_calibration_texts_are_what_the_readme_says(
    name: str, language: str, each: int, shortest: int, longest: int
) -> None:
    path = data_file(f"{name}.json")
    texts = load_texts([str(path)])
    assert json.loads(path.read_text(encoding="utf-8"))["licence"].startswith("Apache-2.0")
    assert Counter(t.category for t in texts) == dict.fromkeys(DOMAINS, each)
    assert all(t.language == language for t in texts)
    assert all(t.id.startswith(f"{language}/{t.category}_") for t in texts)
    assert all(t.prompt.endswith(("。", "?", ".")) for t in texts)
    lengths = [len(_units(t)) if language == "en" else len(t.text) for t in texts]
    assert shortest <= min(lengths)
    assert max(lengths) <= longest
    kana = [bool(re.search("[\u3041-\u3096]", t.text)) for t in texts]
    assert kana == [language == "ja"] * len(texts)


def test_no_shipped_text_repeats_another() -> None:
    names = ("calibration_ja_long", "calibration_written_en", "calibration_written_ja")
    texts = load_texts([*(str(data_file(f"{n}.json")) for n in names), "builtin:validation"])
    assert not [t.id for t in texts if "#" in t.id]  # load_texts renames what is there twice
    assert len({t.prompt for t in texts}) == len(texts) == 275
    for language in ("en", "ja"):
        fives = []
        for text in (t for t in texts if t.language == language):
            units = _units(text)
            fives.append({tuple(units[i : i + 5]) for i in range(len(units) - 4)})
        for one, other in combinations(fives, 2):
            assert len(one & other) <= 0.08 * min(len(one), len(other))


@pytest.mark.parametrize("name", ["validation_en", "validation_ja", "longtext_en"])
def test_expected_tokens_are_smollm2s(name: str) -> None:
    from so8tqc.sources.inputs.builtin import demo_gguf

    try:
        gguf = demo_gguf()
    except MissingToolError:
        pytest.skip("the demo model is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    path = data_file(f"{name}.json")
    expected = json.loads(path.read_text(encoding="utf-8"))["expected_tokens"]
    encoded = encode(load_texts([str(path)]), tokenizer, None)
    assert [e.tokens.size for e in encoded] == expected


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["one text", "another"]))
    (tmp_path / "b.jsonl").write_text(
        '{"text": "x", "id": "own", "category": "c"}\n\n{"text": "y", "prompt": "p"}\n'
    )
    (tmp_path / "c.txt").write_text("plain\ntext", encoding="utf-8-sig")
    texts = load_texts([str(tmp_path / n) for n in ("a.json", "b.jsonl", "c.txt", "c.txt")])
    assert [t.id for t in texts] == ["a-1", "a-2", "own", "b-3", "c", "c#2"]
    assert texts[3].full == "p\n\ny"
    assert texts[4].full == "plain\ntext"
    assert texts[2].category == "c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not JSON"),
        ("a.json", b'{"texts": "x"}', "list of strings"),
        ("a.json", b'{"texts": ["x"], "ids": []}', "'ids' must be a list of 1"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}', "a.jsonl:2"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.txt", b"  \n", "no text"),
        ("a.json", b"[" * 100_000, "not JSON"),
    ],
)
def test_unusable_data(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_texts([str(tmp_path / name)])


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        load_texts([str(tmp_path / "absent.txt")])
    with pytest.raises(DataError, match="no built-in data set"):
        load_texts(["builtin:nothing"])


def test_several_texts_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "prompt": "p"}\n{"text": "y\\n"}\n')
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\n\n")
    assert concatenated(load_texts([str(tmp_path / "a.jsonl")])) == "p\n\nx\n\ny"
    # as llama.cpp reads a file: its bytes, less one line end
    assert concatenated(load_texts([str(tmp_path / "b.txt")])) == "one\r\ntwo\n"


def test_special_tokens_in_a_text_are_text(llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(llama)
    tokens, bos = encode_plain("a </s> b", tokenizer)
    assert bos is None
    assert 2 not in tokens
    assert 2 in tokenizer("a </s> b")["input_ids"]
    adding = AutoTokenizer.from_pretrained(str(llama), add_bos_token=True)
    more, bos = encode_plain("a </s> b", adding)
    assert bos == 1
    np.testing.assert_array_equal(more, [1, *tokens])


def test_encoding_cuts_and_refuses(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama)
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog.")
    texts = load_texts([str(tmp_path / "t.txt")])
    whole = encode(texts, tokenizer, None)[0].tokens
    np.testing.assert_array_equal(encode(texts, tokenizer, 5)[0].tokens, whole[:5])
    with pytest.raises(ModelError, match="not a model directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 as it is, and U+0085; only a newline ends a line of JSONL."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n\n{"text": "four"}\n', encoding="utf-8")
    assert [text.text for text in load_texts([str(path)])] == ["one\u2028two\x85three", "four"]
    path.write_text('{"text": "one\u2028two"}\n{\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"texts.jsonl:2: not JSON"):
        load_texts([str(path)])


def test_a_name_made_for_a_second_text_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    names = ["a", "a#2", "a", "a"]
    path.write_text("\n".join(f'{{"id": "{name}", "text": "x"}}' for name in names))
    assert [text.id for text in load_texts([str(path)])] == ["a", "a#2", "a#3", "a#4"]


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"id": "a", "text": "x\\ud800"}')
    with pytest.raises(DataError, match=r"texts.jsonl, a: character 1 is half of a surrogate"):
        load_texts([str(path)])

"""What is said of texts: blank rows, texts that a chat template has been through, two BOS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from so8tqc.errors import DataError
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.rendered import bos_notice, rendered_notice
from so8tqc.sources.inputs.texts import Text, encode, load_tokenizer, read_texts

BLANK = ("", "   ", "\n\t\u3000")


def rows(path: Path, *lines: str) -> list[str]:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [str(path)]


def test_blank_rows_of_a_jsonl_file_are_counted(tmp_path: Path) -> None:
    blank = [json.dumps({"text": text}) for text in BLANK]
    lines = ['{"text": "one"}', "", *blank, '{"text": null}', "   ", '{"text": "two"}']
    texts, notices = read_texts(rows(tmp_path / "wiki.jsonl", *lines))
    assert [text.text for text in texts] == ["one", "two"]
    assert notices == ("wiki.jsonl: 6 blank rows were skipped, 2 are used.",)
    texts, notices = read_texts(rows(tmp_path / "one.jsonl", '{"text": "a"}', '{"text": ""}'))
    assert (len(texts), notices) == (1, ("one.jsonl: 1 blank row was skipped, 1 are used.",))
    assert read_texts(rows(tmp_path / "none.jsonl", '{"text": "a"}')).notices == ()


def test_blank_texts_of_a_json_file_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"texts": ["", "a", None], "ids": ["x", "y", "z"]}))
    texts, notices = read_texts([str(path)])
    assert [(text.id, text.text) for text in texts] == [("y", "a")]
    assert notices == ("t.json: 2 blank rows were skipped, 1 are used.",)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": ""}\n\n'), ("a.json", '["", " "]'), ("a.txt", " \n")],
)
def test_nothing_but_blank_rows_is_no_data(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"no text in the data.*blank row.*Give a file"):
        read_texts([str(tmp_path / name)])


@pytest.mark.parametrize("item", ['{"text": 3}', '{"texts": "a"}', '["a"]', '{"txt": null}'])
def test_a_row_of_another_shape_is_not_blank(item: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an object with a string 'text'"):
        read_texts(rows(tmp_path / "a.jsonl", '{"text": "one"}', item))


def test_a_text_of_no_tokens_says_what_to_do(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    with pytest.raises(DataError, match=r"at least two\. Take this text out"):
        encode([Text("one", "a")], tokenizer, None)


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nHello<|im_end|>\n",
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
        "<start_of_turn>user\nHello<end_of_turn>\n",
        "<s>[INST] Hello [/INST] Good day",
        "<｜User｜>Hello<｜Assistant｜>",
    ],
)
def test_text_that_a_template_has_been_through(text: str, llama: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": each}) for each in (text, "Plain words.")]
    _, notices = prepare(rows(tmp_path / "a.jsonl", *lines), load_tokenizer(llama), None)
    (told,) = notices
    assert told.startswith("1 of 2 texts have been through a chat template (they hold ")
    assert "another model's template" in told


def test_marks_of_the_tokenizers_own_template(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn/>", "<other/>"]})
    text = [Text("a", "<turn/> Hello")]
    assert rendered_notice(text, tokenizer) == ""  # no template writes it
    tokenizer.chat_template = "{% for m in messages %}<turn/>{{ m.content }}</s>{% endfor %}"
    told = rendered_notice(text, tokenizer)
    assert "they hold <turn/>" in told
    assert "another model's" not in told
    # what ends every text is no mark, nor is a special token that the template does not write
    assert rendered_notice([Text("a", "Hello</s> <other/>")], tokenizer) == ""


def test_two_bos_tokens_are_told(llama: Path) -> None:
    from transformers import AutoTokenizer

    adding = AutoTokenizer.from_pretrained(str(llama), add_bos_token=True)
    texts = [Text("a", "<s>Hello there"), Text("b", "Hello there")]
    told = bos_notice(encode(texts, adding, None), adding)
    assert told.startswith("1 of 2 texts begin with <s> twice")
    assert bos_notice(encode(texts, load_tokenizer(llama), None), load_tokenizer(llama)) == ""

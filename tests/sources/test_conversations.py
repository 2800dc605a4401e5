"""Conversations and which of their tokens are answers: transformers' own marks are the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chat_templates import HEAD, MARKED, PLAIN
from so8tqc.errors import DataError, ModelError
from so8tqc.sources.inputs.conversations import encode_conversations, same_rendering
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import Text, concatenated, load_tokenizer, read_texts
from so8tqc.sources.inputs.windows import overlapping_windows

LAST_ALONE = (
    HEAD + "{% if m.role == 'assistant' and not loop.last %}(left out){% else %}"
    "{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
REFUSING = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"


def text(*turns: str, name: str = "a") -> Text:
    roles = ("user", "assistant") * len(turns)
    return Text(name, "", messages=tuple(
        {"role": r, "content": c} for r, c in zip(roles, turns, strict=False)
    ))  # fmt: skip


TALK = text("Where is the river?", "Behind the old mill.\n\nIt is cold.", "And deep?", "Very deep.")


@pytest.fixture
def tokenizer(llama: Path):
    return load_tokenizer(llama)


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


def answers(tokenizer, encoded) -> str:
    return tokenizer.decode(encoded.tokens[encoded.answers])


def test_both_ways_mark_the_same_tokens(tokenizer) -> None:
    (marked,), told = encode_conversations([TALK], with_template(tokenizer, MARKED), None)
    (plain,), told_too = encode_conversations([TALK], with_template(tokenizer, PLAIN), None)
    np.testing.assert_array_equal(marked.tokens, plain.tokens)
    np.testing.assert_array_equal(marked.answers, plain.answers)
    said = answers(tokenizer, plain).replace(" ", "")
    assert said == "Behindtheoldmill.\n\nItiscold.</s>Verydeep.</s>"
    assert "the template marks them" in told[0]
    assert "with and without" in told_too[0]
    assert plain.scored.size == plain.answers.sum()


def test_an_answer_that_is_written_otherwise_later_is_not_scored(tokenizer) -> None:
    (found,), told = encode_conversations([TALK], with_template(tokenizer, LAST_ALONE), None)
    assert answers(tokenizer, found).replace(" ", "") == "Verydeep.</s>"
    assert told[1].startswith("1 of 2 answers are not scored")


def test_conversations_without_an_answer_are_counted(tokenizer) -> None:
    with_template(tokenizer, PLAIN)
    found, told = encode_conversations([TALK, text("Hello?", name="b")], tokenizer, None)
    assert [item.id for item in found] == ["a"]
    assert told[-1].startswith("1 conversations have no answer")
    with pytest.raises(DataError, match="none of 1 conversations has an answer"):
        encode_conversations([text("Hello?")], tokenizer, None)
    with pytest.raises(DataError, match="none of 1"):
        encode_conversations([TALK], tokenizer, 3)


def test_what_no_template_takes_is_bad_input(tokenizer) -> None:
    with pytest.raises(DataError, match=r"a: the chat template refuses .*roles must alternate"):
        encode_conversations([TALK], with_template(tokenizer, REFUSING), None)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template\. Give --tokenizer"):
        encode_conversations([TALK], tokenizer, None)


def test_two_bos_and_none_are_told(llama: Path) -> None:
    from transformers import AutoTokenizer

    adding = AutoTokenizer.from_pretrained(str(llama), add_bos_token=True)
    (_,), told = encode_conversations([TALK], with_template(adding, PLAIN), None)
    assert "the chat template writes none" in told[-1]
    (_,), told = encode_conversations([TALK], with_template(adding, "<s><s>" + PLAIN), None)
    assert told[-1] == "1 conversations begin with <s> twice."
    (one,), told = encode_conversations([TALK], with_template(adding, "<s>" + PLAIN), None)
    assert one.tokens[:2].tolist().count(1) == 1
    assert len(told) == 1


def test_rows_of_every_kind(tokenizer, tmp_path: Path) -> None:
    with_template(tokenizer, PLAIN)
    path = tmp_path / "chat.jsonl"
    share = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Yes."},
            ]
        },
        {"conversations": share},
        {"prompt": "Hi?", "text": "Yes."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}]))
    found = prepare([str(path)], tokenizer, None, chat=True)
    assert len(found.texts) == 3
    for item in found.texts[1:]:
        np.testing.assert_array_equal(item.tokens, found.texts[0].tokens)
        np.testing.assert_array_equal(item.answers, found.texts[0].answers)
    assert "1 blank row" in found.notices[0]
    with pytest.raises(DataError, match=r"holds messages.*--chat"):
        concatenated(read_texts([str(path)]).texts)
    path.write_text('{"text": "A passage alone."}')
    with pytest.raises(DataError, match="neither messages nor a prompt"):
        prepare([str(path)], tokenizer, None, chat=True)


@pytest.mark.parametrize(
    "row",
    [{"messages": "hi"}, {"messages": [{"content": "x"}]},
     {"messages": [{"role": "user", "content": 3}]}, {"conversations": [{"value": "x"}]},
     {"messages": [["user", "x"]]}],
)  # fmt: skip
def test_messages_of_another_shape(row: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match="expected messages"):
        read_texts([str(path)])


def test_windows_keep_their_answers(tokenizer) -> None:
    (whole,), _ = encode_conversations([TALK], with_template(tokenizer, PLAIN), None)
    windows = overlapping_windows([whole], 16, 8, None)
    scored = np.zeros(whole.tokens.size, dtype=int)
    for window in windows:
        rows = window.scored + 1 + window.start
        scored[rows] += 1
    np.testing.assert_array_equal(scored, whole.answers.astype(int))


def test_another_template_is_found_by_what_it_renders(tokenizer) -> None:
    with_template(tokenizer, PLAIN)
    assert same_rendering([TALK], tokenizer, PLAIN + "{# a comment #}") == (0, "")
    differing, first = same_rendering([TALK, TALK], tokenizer, "x" + PLAIN)
    assert differing == 2
    assert first.startswith("a, character 0: ")
    assert same_rendering([TALK], tokenizer, REFUSING)[0] == 1

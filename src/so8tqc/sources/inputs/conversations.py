"""Conversations, through the model's own chat template, and which of their tokens are answers.

A model is used through its template, so that is where it is scored: on the tokens that it would
have to write itself, the words of an answer and what ends it. Which those are the template says, if
it marks its generation; else they are what a rendering with an answer has more than one that only
asks for it. Both must be beginnings of the whole, as text and as tokens, or the answer is not
scored: a template that writes it otherwise once more follows never gave the model that text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import DataError, ModelError
from so8tqc.sources.inputs.texts import Text
from so8tqc.sources.protocol import EncodedText, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
BoolArray = npt.NDArray[np.bool_]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWERS = "assistant"


class Conversations(NamedTuple):
    """Conversations as token ids with their answers marked, and what is to be said of them."""

    texts: tuple[EncodedText, ...]
    notices: tuple[str, ...]


class _Rendered(NamedTuple):
    """A conversation: [T] ids, [T] whether a token is of an answer; answers found and all."""

    tokens: TokenIds
    answers: BoolArray
    found: int
    all: int


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template for conversations.

    Raises:
        ModelError: it has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, TypeError) as error:
        raise ModelError(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            remedy="Give --tokenizer DIRECTORY of a model that has one, or leave --chat out.",
        ) from error


def messages_of(text: Text) -> list[Message]:
    """A row's messages; of a passage with a prompt, the question and the answer.

    Raises:
        DataError: the row is a passage alone.
    """
    if text.messages:
        return list(text.messages)
    if not text.prompt:
        raise DataError(
            "is no conversation: it has neither messages nor a prompt",
            where=text.id,
            remedy="Give rows with messages, or leave --chat out.",
        )
    asked = {"role": "user", "content": text.prompt}
    return [asked, {"role": _ANSWERS, "content": text.text}]


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    *,
    asking: bool = False,
    template: str | None = None,
) -> str:
    """A conversation as text; ``asking``: and the beginning of an answer.

    Raises:
        DataError: the template refuses it.
    """
    options = {"tokenize": False, "add_generation_prompt": asking, "chat_template": template}
    return str(_applied(tokenizer, messages, where, **options))


def encode_conversations(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> Conversations:
    """Token ids of conversations, cut to ``max_tokens``, their answers marked.

    Special tokens are the template's alone: the tokenizer adds none.

    Raises:
        ModelError: no chat template.
        DataError: a row that is no conversation, one that the template refuses, or no answer that
            can be scored at all.
    """
    marked = _GENERATION.search(chat_template(tokenizer)) is not None
    encoded: list[EncodedText] = []
    found = whole = unscored = 0
    for text in texts:
        messages = messages_of(text)
        one = (
            _marked(tokenizer, messages, text.id)
            if marked
            else _by_difference(tokenizer, messages, text.id)
        )
        found, whole = found + one.found, whole + one.all
        item = EncodedText(text.id, one.tokens, text.language, text.category, answers=one.answers)
        item = item.upto(max_tokens)
        if item.scored.size:
            encoded.append(item)
        else:
            unscored += 1
    if not encoded:
        raise DataError(
            f"none of {len(texts)} conversations has an answer that can be scored",
            remedy="Give conversations with messages of the role assistant, or more tokens of each "
            "(--set max_tokens=N).",
        )
    return Conversations(
        tuple(encoded), _notices(tokenizer, encoded, marked, whole - found, whole, unscored)
    )


def _notices(
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedText],
    marked: bool,
    lost: int,
    whole: int,
    unscored: int,
) -> tuple[str, ...]:
    scored = sum(text.scored.size for text in encoded)
    how = "the template marks them" if marked else "by renderings with and without each of them"
    notices = [f"{scored:,} tokens of answers are scored, found {how}."]
    if lost:
        notices.append(
            f"{lost} of {whole} answers are not scored: the template writes them otherwise where "
            "more follows, or joins them with what is before."
        )
    if unscored:
        notices.append(f"{unscored} conversations have no answer within their tokens.")
    bos = tokenizer.bos_token_id
    if bos is not None:
        first = [text.tokens[:2].tolist() for text in encoded]
        if twice := sum(tokens == [bos, bos] for tokens in first):
            notices.append(f"{twice} conversations begin with {tokenizer.bos_token} twice.")
        adds = tokenizer("a")["input_ids"][:1] == [bos]
        if adds and not any(tokens[:1] == [bos] for tokens in first):
            notices.append(
                f"The tokenizer puts {tokenizer.bos_token} in front of a text, and the chat "
                "template writes none: conversations are scored without, as transformers does."
            )
    return tuple(notices)


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str
) -> _Rendered:
    """By the template's ``{% generation %}``."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    made = _applied(tokenizer, messages, where, **options)
    answers = np.asarray(made["assistant_masks"], dtype=bool)
    whole = sum(message.get("role") == _ANSWERS for message in messages)
    return _Rendered(np.asarray(made["input_ids"], dtype=np.int64), answers, whole, whole)


def _by_difference(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str
) -> _Rendered:
    """By what each answer adds to a rendering that asks for it."""

    def ids(text: str) -> TokenIds:
        made = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(made, dtype=np.int64)

    text = rendered(tokenizer, messages, where)
    tokens = ids(text)
    answers = np.zeros(tokens.size, dtype=bool)
    found = whole = 0
    for i, message in enumerate(messages):
        if message.get("role") != _ANSWERS:
            continue
        whole += 1
        before = rendered(tokenizer, messages[:i], where, asking=True) if i else ""
        # what stands behind the end of an answer, a line's end mostly, nobody writes
        after = rendered(tokenizer, messages[: i + 1], where).rstrip()
        if not before or not (text.startswith(after) and after.startswith(before)):
            continue
        start, stop = ids(before), ids(after)
        if _begins(tokens, start) and _begins(tokens, stop):
            answers[start.size : stop.size] = True
            found += 1
    return _Rendered(tokens, answers, found, whole)


def _begins(tokens: TokenIds, start: TokenIds) -> bool:
    return bool(np.array_equal(tokens[: start.size], start))


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], **options)
    except Exception as error:  # noqa: BLE001  a template may raise whatever jinja2 does
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"the chat template refuses the conversation: {reason[0][:300]}", where=where
        ) from None


def same_rendering(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, other: str
) -> tuple[int, str]:
    """How many conversations another template renders otherwise, and where the first differs."""
    differing, first = 0, ""
    for text in texts:
        messages = messages_of(text)
        ours = rendered(tokenizer, messages, text.id)
        try:
            theirs = rendered(tokenizer, messages, text.id, template=other)
        except DataError as error:
            theirs = f"({error.what})"
        if ours == theirs:
            continue
        differing += 1
        if not first:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            first = (
                f"{text.id}, character {at}: {ours[at : at + 30]!r} and {theirs[at : at + 30]!r}"
            )
    return differing, first

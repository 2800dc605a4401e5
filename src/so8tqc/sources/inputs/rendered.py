"""Texts that a chat template has been through before they came here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from so8tqc.sources.inputs.texts import Text
from so8tqc.sources.protocol import EncodedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KNOWN_MARKS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|START_OF_TURN_TOKEN|>",
    "<|start_of_role|>",
    "<|turn>",
    "<|user|>",
    "<|assistant|>",
    "<|User|>",
    "<|Assistant|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|start|>assistant",
    "[INST]",
    "### Instruction:",
)
"""What chat templates of public models write in front of a turn."""


def rendered_notice(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> str:
    """What to say of texts that hold the marks of a chat template; "" where none does."""
    marks = tuple(dict.fromkeys((*_KNOWN_MARKS, *_own_marks(tokenizer))))
    found = [mark for text in texts for mark in marks if mark in text.full]
    count = sum(any(mark in text.full for mark in marks) for text in texts)
    if not found:
        return ""
    mark = max(dict.fromkeys(found), key=found.count)
    known = mark in tokenizer.get_vocab()
    foreign = "" if known else f" This tokenizer has no token {mark}: another model's template."
    return (
        f"{count} of {len(texts)} texts have been through a chat template (they hold {mark}): "
        f"questions, marks and answers are scored alike.{foreign}"
    )


def bos_notice(encoded: Sequence[EncodedText], tokenizer: PreTrainedTokenizerBase) -> str:
    """What to say of texts that begin with two BOS tokens; "" where none does."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ""
    count = sum(text.tokens[:2].tolist() == [bos, bos] for text in encoded)
    if not count:
        return ""
    return (
        f"{count} of {len(encoded)} texts begin with {tokenizer.bos_token} twice: they have one of "
        "their own, and the tokenizer adds another. No model was trained on two: take it out of "
        "the text."
    )


def _own_marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that the tokenizer's chat template writes, but for those of every text."""
    template = tokenizer.chat_template
    if not template:
        return []
    written = template if isinstance(template, str) else "".join(map(str, template.values()))
    plain = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return [mark for mark in special if mark in written and mark not in plain]

"""Texts made ready for models: token ids, and what is to be said of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from so8tqc.sources.inputs.conversations import encode_conversations
from so8tqc.sources.inputs.rendered import bos_notice, rendered_notice
from so8tqc.sources.inputs.texts import encode, read_texts
from so8tqc.sources.protocol import EncodedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prepared(NamedTuple):
    """Token ids of the texts, and what is to be said of these."""

    texts: tuple[EncodedText, ...]
    notices: tuple[str, ...]


def prepare(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    *,
    chat: bool = False,
) -> Prepared:
    """Read texts and encode them, as ``texts.read_texts`` and ``texts.encode`` do.

    ``chat``: they are conversations, through the tokenizer's chat template, of which the answers
    alone are scored (``conversations``).

    Raises:
        DataError: unreadable data; a text of fewer than two tokens.
        ModelError: a malformed tokenizer.
    """
    texts, notices = read_texts(specs)
    if chat:
        told_of = encode_conversations(texts, tokenizer, max_tokens)
        return Prepared(told_of.texts, (*notices, *told_of.notices))
    encoded = encode(texts, tokenizer, max_tokens)
    told = (rendered_notice(texts, tokenizer), bos_notice(encoded, tokenizer))
    return Prepared(encoded, (*notices, *(notice for notice in told if notice)))

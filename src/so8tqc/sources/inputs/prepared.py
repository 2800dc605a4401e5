"""Texts made ready for models: token ids, and what is to be said of the texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from so8tqc.errors import DataError
from so8tqc.sources.inputs.conversations import encode_conversations
from so8tqc.sources.inputs.pictures import Renderer
from so8tqc.sources.inputs.rendered import bos_notice, rendered_notice
from so8tqc.sources.inputs.texts import Text, encode, read_texts
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
    images: int | None = None,
    chat: bool = False,
) -> Prepared:
    """Read texts and encode them, as ``texts.read_texts`` and ``texts.encode`` do.

    Texts with pictures are rendered by the processor of the tokenizer's directory.

    Args:
        specs: of the data.
        tokenizer: of the model directory.
        max_tokens: tokens used of each text; positions of pictures do not count.
        images: pictures used at most, None for all.
        chat: they are conversations, through the tokenizer's chat template, of which the answers
            alone are scored (``conversations``).

    Raises:
        DataError: unreadable data; a text of fewer than two tokens; pictures that cannot be used.
        ModelError: a malformed tokenizer; pictures, and no processor.
        MissingToolError: pictures, and a library that they need is missing.
    """
    texts, notices = read_texts(specs)
    used, left = _within(texts, images)
    if not used:
        raise DataError(
            "there is no text in the data but those with pictures, and none of these is wanted",
            where=", ".join(specs),
            remedy="Give a larger --images.",
        )
    if left:
        notices = (*notices, f"{left} texts with pictures are left out: --images {images}.")
    if chat:
        if seeing := next((text for text in used if text.images), None):
            raise DataError(
                "a text with pictures is no conversation that --chat renders",
                where=seeing.where,
                remedy="Leave --chat out, the model's processor renders such texts; or --images 0.",
            )
        told_of = encode_conversations(used, tokenizer, max_tokens)
        return Prepared(told_of.texts, (*notices, *told_of.notices))
    encoded = tuple(_encoded(used, tokenizer, max_tokens))
    written = tuple(text for text in used if not text.images)
    told = (rendered_notice(written, tokenizer), bos_notice(encoded, tokenizer))
    return Prepared(encoded, (*notices, *(notice for notice in told if notice)))


def _within(texts: Sequence[Text], images: int | None) -> tuple[list[Text], int]:
    """The texts with at most so many pictures in all, and how many are left out."""
    if images is None:
        return list(texts), 0
    used: list[Text] = []
    for text in texts:
        if not text.images or len(text.images) <= images:
            used.append(text)
            images -= len(text.images)
    return used, len(texts) - len(used)


def _encoded(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> Iterator[EncodedText]:
    renderer: Renderer | None = None
    for text in texts:
        if not text.images:
            yield from encode([text], tokenizer, max_tokens)
            continue
        renderer = renderer or Renderer(Path(tokenizer.name_or_path), text.where)
        yield renderer.render(text, max_tokens)

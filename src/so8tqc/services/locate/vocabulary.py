"""Whether the candidate's tokens are the reference's: the same ids are given to both."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from so8tqc.errors import ModelError
from so8tqc.gguf.file import is_gguf
from so8tqc.gguf.rewrite import key_values
from so8tqc.services.qc.compatibility import ids_of, require_same_tokens
from so8tqc.sources.inputs.texts import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = "tokenizer.ggml.tokens"
_STRING, _ARRAY = 8, 9


def require_same_vocabulary(
    candidate: Path, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Refuse a candidate that has another id for a token of the reference.

    Args:
        candidate: a model directory, which need not have a tokenizer, or a GGUF file.
        tokenizer: of the reference.
        directory: that it is from, for the message.

    Raises:
        ModelError: it has.
    """
    whose = f"the tokenizer of {directory}"
    known = tokenizer.get_vocab()
    if is_gguf(candidate):
        packed = key_values(candidate).get(_TOKENS)
        if packed is not None:
            require_same_tokens(candidate, list(_strings(packed)), known, whose)
        return
    try:
        own = load_tokenizer(candidate).get_vocab()
    except ModelError:  # the reference's is used for both
        return
    if moved := [piece for piece, i in ids_of_vocabulary(own).items() if known.get(piece, i) != i]:
        raise ModelError(
            f"{len(moved)} tokens have other ids than in {whose}, first {moved[0]!r}",
            where=str(candidate),
            remedy="Give the candidate that was made from the reference.",
        )


def ids_of_vocabulary(vocabulary: dict[str, int]) -> dict[str, int]:
    """As :func:`ids_of`, of a tokenizer's vocabulary."""
    pieces: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for piece, number in vocabulary.items():
        pieces[number] = piece
    return ids_of(pieces)


def _strings(packed: bytes) -> Iterator[str]:
    """The strings of a packed array of a GGUF."""
    kind, inner, count = struct.unpack_from("<IIQ", packed)
    if (kind, inner) != (_ARRAY, _STRING):
        return
    at = 16
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", packed, at)
        yield packed[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length

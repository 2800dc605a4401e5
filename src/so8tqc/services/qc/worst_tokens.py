"""The tokens where a candidate is furthest from the reference, with the words before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_kinds.qc import WorstToken
from so8tqc.sources.protocol import EncodedText

WORST_TOKENS = 8
"""How many are shown of each candidate."""

CONTEXT_TOKENS = 16
"""Tokens of context shown before each worst token."""


def worst_tokens(
    table: TokenTable,
    texts: Sequence[EncodedText],
    decode: Callable[[list[int]], str] | None,
    count: int = WORST_TOKENS,
) -> list[WorstToken]:
    """The rows of a token table with the largest KL, the largest first.

    Args:
        table: of one candidate against the reference.
        texts: the texts and windows that were scored.
        decode: token ids → text; None leaves the words out.
        count: how many.
    """
    order = np.argsort(-table.columns["kl"], kind="stable")[:count]
    return [_row(table, int(i), texts, decode) for i in order]


def _row(
    table: TokenTable,
    row: int,
    texts: Sequence[EncodedText],
    decode: Callable[[list[int]], str] | None,
) -> WorstToken:
    name, position = table.texts[table.text[row]], int(table.position[row])
    before, token = "", ""
    if decode is not None:
        window = _window(texts, name, position)
        at = position - window.start + 1
        known = window.tokens[max(0, at - CONTEXT_TOKENS) : at + 1].tolist()
        before = decode(known[:-1])
        # decoded together, since a token alone loses the space before it
        both = decode(known)
        token = both[len(before) :] if both.startswith(before) else decode(known[-1:])
    c = {column: float(values[row]) for column, values in table.columns.items()}
    return WorstToken(
        text=name,
        position=position,
        before=before,
        token=token,
        kl=c["kl"],
        p_reference=float(np.exp(-c["nll_reference"])),
        p_candidate=float(np.exp(-c["nll_candidate"])),
        same_top=bool(c["same_top"]),
    )


def _window(texts: Sequence[EncodedText], name: str, position: int) -> EncodedText:
    """The window in which a position of a text was scored."""
    return next(
        text
        for text in texts
        if text.id == name and text.first <= position - text.start < text.tokens.size - 1
    )

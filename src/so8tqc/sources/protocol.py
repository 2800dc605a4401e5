"""The logit source: anything that yields next-token logits for token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from so8tqc.sources.seen import beginning, scored_positions

if TYPE_CHECKING:
    import torch

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedText:
    """One text, or a window of one, as token ids.

    Attributes:
        id: of the text, unique within a run, e.g. ``en/ethics``; its windows share it.
        tokens: [T] ids, T ≥ 2; a BOS token is included only if the tokenizer adds one. Pictures,
            if there are any, travel with them (``sources.seen``).
        language: ISO 639-1 code, "" if unknown.
        category: domain of the text, "" if unknown.
        first: row of the window's first prediction that is scored; the rows before it
            are context.
        start: position of the window's first token in its text.
        answers: [T] which tokens are scored, if not all: those of a conversation's answers.
    """

    id: str
    tokens: TokenIds
    language: str = ""
    category: str = ""
    first: int = 0
    start: int = 0
    answers: npt.NDArray[np.bool_] | None = None

    @property
    def scored(self) -> npt.NDArray[np.int32]:
        """[n] positions in the window whose next token is scored: an answer's, and no picture."""
        positions = scored_positions(self.tokens, self.first)
        return positions if self.answers is None else positions[self.answers[positions + 1]]

    def upto(self, count: int | None) -> EncodedText:
        """The first ``count`` tokens; positions of pictures do not count."""
        tokens = beginning(self.tokens, count)
        answers = None if self.answers is None else self.answers[: tokens.size]
        return replace(self, tokens=tokens, answers=answers)


@runtime_checkable
class LogitSource(Protocol):
    """Yields logits block by block, so that no [T, V] array ever exists.

    Attributes:
        name: short label for reports.
        vocab_size: V, the width of every block.
    """

    name: str
    vocab_size: int

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """Teacher-forced logits of one text.

        Args:
            tokens: [T] ids.
            rows: block height t; every block but the last has exactly this many rows,
                so that several sources can be walked in step.
            first: the first row that is wanted; logits of earlier ones are not computed.

        Yields:
            [t, V] in order, in the dtype and on the device that the model computes with (see
            ``placement.on_cpu``). Row i of the whole holds the
            logits of the token that follows ``tokens[: first + i + 1]``; T − first rows in
            all. A block is valid until the next one is requested (its memory may be reused).

        Raises:
            DataError: T exceeds the context that the model supports.
        """

    def close(self) -> None:
        """Release the model. Safe to call twice."""

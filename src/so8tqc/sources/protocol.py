"""The logit source: anything that yields next-token logits for token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedText:
    """One text as token ids.

    Attributes:
        id: unique within a run, e.g. ``en/ethics``.
        tokens: [T] ids, T ≥ 2; a BOS token is included only if the tokenizer adds one.
        language: ISO 639-1 code, "" if unknown.
        category: domain of the text, "" if unknown.
    """

    id: str
    tokens: TokenIds
    language: str = ""
    category: str = ""


@runtime_checkable
class LogitSource(Protocol):
    """Yields logits block by block, so that no [T, V] array ever exists.

    Attributes:
        name: short label for reports.
        vocab_size: V, the width of every block.
    """

    name: str
    vocab_size: int

    def logits(self, tokens: TokenIds, rows: int) -> Iterator[torch.Tensor]:
        """Teacher-forced logits of one text.

        Args:
            tokens: [T] ids.
            rows: block height t; every block but the last has exactly this many rows,
                so that several sources can be walked in step.

        Yields:
            [t, V] float32 or float64 on the CPU, in order. Row i of the whole holds the
            logits of the token that follows ``tokens[: i + 1]``; T rows in all. A block
            is valid until the next one is requested (its memory may be reused).

        Raises:
            DataError: T exceeds the context that the model supports.
        """

    def close(self) -> None:
        """Release the model. Safe to call twice."""

"""Walking several logit sources in step: one pass over the text, no logits kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.errors import DataError, InputError
from so8tqc.metrics.divergence import (
    COLUMNS,
    Distribution,
    TokenTable,
    distribution,
    rows_per_block,
    token_rows,
)
from so8tqc.progress import SILENT, Progress
from so8tqc.sources.protocol import EncodedText, LogitSource

if TYPE_CHECKING:
    import torch

HEAD_ROWS = 128
"""Rows asked of a source at once: large enough for an efficient matrix product."""


Pair = tuple[str, str]
"""Names of a reference and of a candidate."""


def compare(
    sources: Sequence[LogitSource],
    pairs: Sequence[Pair],
    texts: Sequence[EncodedText],
    progress: Progress = SILENT,
    description: str = "comparing",
) -> dict[Pair, TokenTable]:
    """Token tables of every pair, in a single pass over the texts.

    Each source's logits are computed once, however many pairs it is part of. Every
    position but a text's last is scored, on the token that follows it.

    Args:
        sources: all models, with distinct names; each name in ``pairs`` is one of them.
        pairs: which candidate is compared with which reference.
        texts: token ids, each at least two.
        progress: told about each text, in tokens.
        description: what the progress says.

    Returns:
        pair → token table.

    Raises:
        InputError: vocabulary sizes differ, or two sources share a name.
        DataError: a source yields non-finite logits, naming text and position.
    """
    _check_sources(sources)
    parts: dict[Pair, list[torch.Tensor]] = {pair: [] for pair in pairs}
    total = sum(text.tokens.size for text in texts)
    with progress.task(description, total=total, unit="tokens") as task:
        for text in texts:
            for pair, rows in _compare_text(sources, pairs, text).items():
                parts[pair].append(rows)
            task.advance(text.tokens.size, item=text.id)
    return {pair: _table(rows, texts, sources[0].vocab_size) for pair, rows in parts.items()}


def _compare_text(
    sources: Sequence[LogitSource], pairs: Sequence[Pair], text: EncodedText
) -> dict[Pair, torch.Tensor]:
    import torch

    targets = torch.from_numpy(text.tokens[1:])
    step = rows_per_block(sources[0].vocab_size)
    rows: dict[Pair, list[torch.Tensor]] = {pair: [] for pair in pairs}
    walks = [source.logits(text.tokens, HEAD_ROWS) for source in sources]
    start = 0
    for blocks in zip(*walks, strict=True):
        height = min(blocks[0].shape[0], targets.shape[0] - start)
        for row in range(0, height, step):
            stop = min(row + step, height)
            goal = targets[start + row : start + stop]
            sides = {
                source.name: _side(block[row:stop], goal, source, text, start + row)
                for source, block in zip(sources, blocks, strict=True)
            }
            for pair in pairs:
                rows[pair].append(token_rows(sides[pair[0]], sides[pair[1]], goal))
        start += blocks[0].shape[0]
    return {pair: torch.cat(parts) for pair, parts in rows.items()}


def _side(
    block: torch.Tensor,
    targets: torch.Tensor,
    source: LogitSource,
    text: EncodedText,
    position: int,
) -> Distribution:
    import torch

    side = distribution(block, targets)
    # a NaN anywhere in a row, or an infinity, leaves its mark on the row's entropy
    finite = torch.isfinite(side.entropy) & torch.isfinite(side.nll)
    if not bool(finite.all()):
        at = position + int((~finite).nonzero()[0, 0])
        raise DataError(
            f"{source.name} yields non-finite logits at position {at}",
            where=text.id,
            remedy="The weights hold NaN or infinity, or overflow in the compute dtype.",
        )
    return side


def _table(parts: list[torch.Tensor], texts: Sequence[EncodedText], vocab_size: int) -> TokenTable:
    import torch

    values = torch.cat(parts).numpy()
    lengths = [text.tokens.size - 1 for text in texts]
    return TokenTable(
        columns={name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(COLUMNS)},
        text=np.repeat(np.arange(len(texts), dtype=np.int32), lengths),
        position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        vocab_size=vocab_size,
        texts=tuple(text.id for text in texts),
    )


def _check_sources(sources: Sequence[LogitSource]) -> None:
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise InputError(f"two models share a name: {', '.join(sorted(names))}")
    first = sources[0]
    for source in sources[1:]:
        if source.vocab_size != first.vocab_size:
            raise InputError(
                f"{source.name} has {source.vocab_size} vocabulary entries, "
                f"{first.name} has {first.vocab_size}: they cannot be compared",
                remedy="Give models that share a tokenizer.",
            )

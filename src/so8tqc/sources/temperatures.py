"""One pass of a logit source over the texts, for every temperature at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import numpy.typing as npt

from so8tqc.errors import DataError
from so8tqc.metrics.temperature.table import (
    BoolArray,
    ClassLogits,
    FloatArray,
    IntArray,
    TemperatureTable,
    knots,
    partition_rows,
    temperature_table,
)
from so8tqc.progress import SILENT, Progress
from so8tqc.sources.placement import on_cpu
from so8tqc.sources.protocol import EncodedText, LogitSource, TokenIds

MOST_ROWS = 512
"""As many as libllama computes in one pass: cut in two, a text of 256 tokens takes it a tenth
longer."""

MOST_THREADS = 16
"""Threads that work on a block's rows, if torch uses as many."""

BLOCK_BYTES = 64 << 20
"""A block asked of a source has at most this many bytes of float32 logits, and MOST_ROWS rows."""


def frequent_tokens(texts: Sequence[EncodedText], most: int) -> IntArray:
    """Ids of the at most ``most`` tokens that follow most often; of equal ones the lower."""
    following = [np.asarray(text.tokens)[text.scored + 1] for text in texts]
    ids, counts = np.unique(np.concatenate(following), return_counts=True)
    order = np.lexsort((ids, -counts))[:most]
    return ids[order].astype(np.intp)


def walk_temperatures(
    source: LogitSource,
    texts: Sequence[EncodedText],
    bounds: tuple[float, float],
    progress: Progress = SILENT,
    description: str = "measuring",
    classes: IntArray | None = None,
) -> TemperatureTable:
    """The temperature table of a source: every position but a text's last is scored.

    Args:
        source: the model.
        texts: token ids, each at least two.
        bounds: temperatures that will be asked for.
        progress: told about each text, in tokens.
        description: what the progress says.
        classes: [k] token ids whose probabilities are wanted at every position.

    Raises:
        DataError: a token id is outside the vocabulary, or logits are not finite; both name
            text and position.
    """
    import torch

    betas = knots(bounds)
    total = sum(text.tokens.size for text in texts)
    rows: list[FloatArray] = []
    targets: list[FloatArray] = []
    correct: list[BoolArray] = []
    chosen: list[ClassLogits] = []
    threads = min(torch.get_num_threads(), MOST_THREADS)
    with (
        progress.task(description, total=total, unit="tokens") as task,
        ThreadPoolExecutor(max_workers=threads) as pool,
    ):
        for text in texts:
            _check_ids(text, source)
            for positions, logits in _blocks(source, text):
                start = int(positions[0])
                following = np.asarray(text.tokens)[positions + 1]
                part, top = _partition(logits, betas, pool, threads)
                _check_finite(part, text, start, source)
                each = np.arange(following.size)
                rows.append(part)
                gap = logits[each, following].astype(np.float64) - logits[each, top]
                targets.append(gap)
                correct.append(top == following)
                if classes is not None:
                    chosen.append(_class_logits(logits, top, following, classes))
            task.advance(text.tokens.size, item=text.id)
    lengths = [text.scored.size for text in texts]
    return temperature_table(
        np.concatenate(rows),
        np.concatenate(targets),
        np.concatenate(correct),
        np.repeat(np.arange(len(texts)), lengths),
        tuple(text.id for text in texts),
        bounds,
        _joined(chosen) if chosen else None,
    )


def _partition(
    logits: npt.NDArray[np.floating], betas: FloatArray, pool: ThreadPoolExecutor, threads: int
) -> tuple[FloatArray, IntArray]:
    """:func:`partition_rows` of a block, a thread for some of its rows."""
    shares = np.array_split(logits, min(threads, logits.shape[0]))
    rows, tops = zip(*pool.map(partition_rows, shares, repeat(betas)), strict=True)
    return np.concatenate(rows), np.concatenate(tops)


def _class_logits(
    logits: npt.NDArray[np.floating], top: IntArray, following: TokenIds, classes: IntArray
) -> ClassLogits:
    each = np.arange(top.size)
    matches = following[:, None] == classes
    return ClassLogits(
        u=(logits[:, classes] - logits[each, top][:, None]).astype(np.float32),
        target=np.where(matches.any(axis=1), matches.argmax(axis=1), -1),
    )


def _joined(parts: Sequence[ClassLogits]) -> ClassLogits:
    return ClassLogits(
        np.concatenate([part.u for part in parts]), np.concatenate([part.target for part in parts])
    )


def _blocks(
    source: LogitSource, text: EncodedText
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.floating]]]:
    """(positions, logits) of the scored positions of each block."""
    most = max(1, min(MOST_ROWS, BLOCK_BYTES // (4 * source.vocab_size)))
    rows = -(-text.tokens.size // -(-text.tokens.size // most))  # a small rest is a slow pass
    start, scored = 0, text.scored
    for block in source.logits(text.tokens, rows):
        stop = start + block.shape[0]
        here = scored[(scored >= start) & (scored < stop)]
        if here.size:
            whole = here.size == here[-1] - here[0] + 1  # a view, not a copy
            rows_here = slice(here[0] - start, here[-1] - start + 1) if whole else here - start
            yield here, on_cpu(block).numpy()[rows_here]
        start = stop


def _check_ids(text: EncodedText, source: LogitSource) -> None:
    outside = np.flatnonzero((text.tokens < 0) | (text.tokens >= source.vocab_size))
    if outside.size:
        raise DataError(
            f"token {int(text.tokens[outside[0]])} at position {int(outside[0])} is outside the "
            f"vocabulary of {source.name} ({source.vocab_size} entries)",
            where=text.id,
            remedy="Give the tokenizer that belongs to the model.",
        )


def _check_finite(rows: FloatArray, text: EncodedText, start: int, source: LogitSource) -> None:
    # a NaN anywhere in a row, or an infinity of either sign, leaves its mark on the moments
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2)))
    if broken.size:
        raise DataError(
            f"{source.name} yields non-finite logits at position {start + int(broken[0])}",
            where=text.id,
            remedy="The weights hold NaN or infinity, or overflow in the compute dtype.",
        )

"""How repetitive a generated text is.

A text that repeats itself is calm in every index of oscillation, so it is looked at by itself:

* repeated n-grams: the share of n-grams that occurred before (1 − distinct-n of Li et al., 2016,
  arXiv:1510.03055, but over tokens of one text);
* compression: bytes that LZ77 with Huffman codes (zlib) needs for the token ids over the raw
  bytes; it sees repetition with changes between, and of any length up to 8,192 tokens;
* loop: the text ends in, or passes, one piece written several times in a row
  (:class:`so8tqc.metrics.sequential.LoopWatch`).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from so8tqc.metrics.sequential import LoopWatch


class Repetition(NamedTuple):
    """How much one text repeats itself.

    Attributes:
        tokens: its length.
        repeated: share of n-grams that occurred before.
        compression: small when the text repeats itself; 1 or more for an empty or very short one.
        loop_period: tokens of the first loop, 0 if there is none.
        loop_start: token from which that loop was counted, −1 if there is none.
    """

    tokens: int
    repeated: float
    compression: float
    loop_period: int
    loop_start: int


def repetition(tokens: Sequence[int], n: int = 4) -> Repetition:
    """Measure a text of token ids, each in 0 … 2³² − 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = sum(count - 1 for count in Counter(grams).values())
    raw = np.asarray(tokens, dtype="<u4").tobytes()
    period, start = first_loop(tokens)
    return Repetition(
        tokens=len(tokens),
        repeated=repeated / len(grams) if grams else 0.0,
        compression=len(zlib.compress(raw, 9)) / len(raw) if raw else 1.0,
        loop_period=period,
        loop_start=start,
    )


def first_loop(tokens: Sequence[int]) -> tuple[int, int]:
    """Period of the first loop and the token where it begins, (0, −1) without one.

    The beginning is that of the first copy: as far back as tokens equal those one period later.
    """
    watch = LoopWatch()
    for i, token in enumerate(tokens):
        if watch.update(int(token)):
            start = i - watch.period
            while start > 0 and tokens[start - 1] == tokens[start - 1 + watch.period]:
                start -= 1
            return watch.period, start
    return 0, -1

"""Captures: the logits that were recorded."""

from __future__ import annotations

from so8tqc.record_kinds.base import Metrics


class CaptureMetrics(Metrics):
    """Of kind ``capture``; ``rounding``: largest |Δlogit| between what was computed and stored."""

    texts: int
    tokens: int
    vocab_size: int
    dtype: str
    bytes: int
    rounding: float

"""What gets the tools and texts that others work with: ``data`` and ``vendor``."""

from __future__ import annotations

from so8tqc.record_kinds.base import Metrics


class DataMetrics(Metrics):
    """Of kind ``data``; ``counts``: language → category → samples."""

    samples: int
    bytes: int
    gzip_bytes: int
    counts: dict[str, dict[str, int]]


class VendorMetrics(Metrics):
    """Of kind ``vendor``: the converter's revision and its script's path."""

    revision: str
    script: str

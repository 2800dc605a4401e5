"""Exports: the file and how it was made."""

from __future__ import annotations

from so8tqc.record_kinds.base import Metrics


class ExportMetrics(Metrics):
    """Of kind ``export``.

    Attributes:
        types: GGML type → tensors.
        tensors: how many.
        rearranged: what was done to their values → tensors.
        baked: whether the model directory says that it was baked.
        kept: tensors that ``keep_f32`` left unrounded.
        converter: its revision.
    """

    architecture: str | None
    file_type: str | None
    types: dict[str, int]
    tensors: int | None
    bytes: int | None
    bits_per_weight: float | None
    rearranged: dict[str, int]
    baked: bool | None
    kept: list[str]
    converter: str | None

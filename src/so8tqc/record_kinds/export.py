"""Exports: the file and how it was made."""

from __future__ import annotations

from so8tqc.record_kinds.base import Entry, Metrics


class MmprojMetrics(Entry):
    """The file of a vision tower and its projector.

    Attributes:
        projector: which of llama.cpp's projectors.
        types: GGML type → tensors.
        tensors: how many.
    """

    projector: str
    file_type: str
    types: dict[str, int]
    tensors: int
    bytes: int


class ExportMetrics(Metrics):
    """Of kind ``export``.

    Attributes:
        types: GGML type → tensors.
        tensors: how many.
        rearranged: what was done to their values → tensors.
        baked: whether the model directory says that it was baked.
        kept: tensors that ``keep_f32`` left unrounded.
        converter: its revision.
        mmproj: the file of the vision tower beside it; None where none was written.
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
    mmproj: MmprojMetrics | None = None

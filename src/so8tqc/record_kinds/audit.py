"""An audit of one GGUF file: what it is, how it was quantized, what cannot be explained."""

from __future__ import annotations

from typing import Literal

from so8tqc.record_kinds.base import Entry, Metrics
from so8tqc.record_kinds.qc import LayerWeight
from so8tqc.record_kinds.tensors import TensorRow

How = Literal["rounded", "plain", "nearest", "importance", "compensated", "unexplained"]
"""How most quantized weights of a file were made: the honest verdicts of tensors; ``rounded`` of a
file of plain types, ``unexplained`` where no honest encoder explains any."""


class AuditedFile(Entry):
    """What a file is.

    Attributes:
        name: of the file; the first of several.
        architecture: ``general.architecture``.
        declared: its own type by its key, e.g. ``Q4_K_M``; "" if it does not say.
        bytes: of all its parts.
        weights: number of them.
        bits: stored bits of a weight, on average.
        says: what it says of itself: key → value of ``general.*`` and ``quantize.*``.
    """

    name: str
    architecture: str
    declared: str
    bytes: int
    weights: int
    bits: float
    says: dict[str, str]


class TypeUse(Entry):
    """One GGML type in a file: how many tensors and weights have it, and their verdicts."""

    tensors: int
    weights: int
    bits: float
    verdicts: dict[str, int]


class AuditMetrics(Metrics):
    """Of kind ``audit``.

    Attributes:
        file: what it is.
        how: how most of its quantized weights were made.
        types: GGML type → its use, the most weights first.
        tensors: every tensor, in the file's order.
        survival: layer → its attention output, where rotations were given.
    """

    file: AuditedFile
    how: How
    types: dict[str, TypeUse]
    tensors: list[TensorRow]
    survival: dict[str, LayerWeight]

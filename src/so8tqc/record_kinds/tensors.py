"""What was found of the tensors of a GGUF file, one by one."""

from __future__ import annotations

from typing import Literal

from so8tqc.record_kinds.base import Entry

TensorVerdict = Literal[
    "exact",
    "plain",
    "nearest",
    "importance",
    "compensated",
    "coarser source",
    "edited",
    "other tensor",
    "damaged",
    "unexplained",
    "not looked at",
]
"""``exact``: the rounded weight itself, in a type that only rounds. ``plain``: what ggml's encoder
stores. ``nearest``: every code is the nearest, whether plain or with importance was not looked at.
``importance``: likewise under scales that were fitted with an importance matrix. ``compensated``:
errors of one column were made up for in others."""

HONEST: frozenset[str] = frozenset({"exact", "plain", "nearest", "importance", "compensated"})
"""Verdicts of an honest encoder."""


class TensorRow(Entry):
    """One tensor Q of a GGUF beside the weights X that it must stand for.

    Attributes:
        name: in the file.
        source: the source tensors that it is made of.
        layer: None outside the layers.
        type: GGML type.
        elements: number of weights.
        bits: stored bits of a weight.
        verdict: see :data:`TensorVerdict`.
        detail: what was found, "" of an honest tensor.
        error: ‖Q − X‖ / ‖X‖.
        over_grid: mean square deviation in units of the codes' cells over 1/12; None where codes
            are not rounded one by one.
        over_plain: ‖Q − X‖² over that of ggml's plain encoder, on a few rows.
        outside: weights outside their codes' cells.
        together: how many σ the errors of its columns go together, where that was asked.
        shows: smallest relative change of the whole tensor, of a row and of a block that would
            show; None in plain types, where one unit in the last place does.
    """

    name: str
    source: tuple[str, ...] = ()
    layer: int | None = None
    type: str
    elements: int
    bits: float
    verdict: TensorVerdict
    detail: str = ""
    error: float | None = None
    over_grid: float | None = None
    over_plain: float | None = None
    outside: int | None = None
    together: float | None = None
    shows: tuple[float, float, float] | None = None

    @property
    def honest(self) -> bool:
        """Whether an honest encoder explains it."""
        return self.verdict in HONEST

    @property
    def role(self) -> str:
        """Its name without the layer: ``attn_q.weight``."""
        return self.name.split(".", 2)[2] if self.layer is not None else self.name

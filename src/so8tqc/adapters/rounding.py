"""W' stored: each element the exact value, rounded once (Ziv's strategy, as in ``rotations.fold``).

A float64 value v within e of the exact one decides the stored value wherever v − e and v + e round
alike. Elsewhere, a handful of elements, the exact value decides, as a rational number; where it is
a root, more of its bits are computed until both ends of its interval round alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.adapters.dyadic import Dyadic, dyadic
from so8tqc.adapters.steps import AddLowRank, Chunk, Columns, Exact, Steps
from so8tqc.errors import ModelError, RotationError
from so8tqc.rotations.fold import round_once, rounded_suspects, to_storage

if TYPE_CHECKING:
    import torch

_LEFT = 1024
"""Room for elements that only exact arithmetic decides: so many, or one in 256."""

_BITS = (160, 640, 2560, 10240)
"""Of a root, one after the other. A value that is not told from a tie by the last is one."""


def rounded(steps: Steps, weight: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of W', each element rounded once to ``dtype``.

    Args:
        steps: what makes W' of W.
        weight: [out, in], the logical weight as stored, any floating dtype.
        rows: which rows; whole groups of ``steps.row_multiple``.
        dtype: storage dtype of the result.

    Returns:
        [rows, in] in ``dtype``.

    Raises:
        ModelError: the weight holds a NaN or an infinity.
        RotationError: a finite value does not fit the dtype.
    """
    import torch

    done = merged(steps, weight, rows, dtype)
    if done is not None:
        return done
    chunk = Chunk(rows, weight)
    if not math.isfinite(chunk.largest):
        base = chunk.value
        row, column = torch.isfinite(base).logical_not_().nonzero()[0].tolist()
        raise ModelError(
            "the weights hold a NaN or an infinity: "
            f"element [{rows.start + row}, {column}] is {float(base[row, column])}"
        )
    steps.finish(chunk)
    reach = chunk.largest
    value = chunk.value.contiguous()
    stored, suspects = rounded_suspects(value, chunk.error, dtype)
    if suspects.shape[0]:
        where = suspects.unbind(1)
        ends = (to_storage(value[where] + e, dtype) for e in (-chunk.error, chunk.error))
        below, above = ends
        stored[where] = below
        exact = steps.exact(_stored_values(weight))
        for i, j in suspects[below.ne(above)].tolist():
            stored[i, j] = exactly_rounded(exact, rows.start + i, j, dtype)
    if reach + chunk.error >= torch.finfo(dtype).max and bool(torch.isinf(stored).any()):
        row, column = torch.isinf(stored).nonzero()[0].tolist()
        raise RotationError(
            f"element [{rows.start + row}, {column}]: {float(value[row, column]):.6g} does not fit "
            f"{dtype}",
            remedy="Use --baked-dtype bfloat16 or float32.",
        )
    return stored.add_(0.0)  # −0 becomes +0


def merged(
    steps: Steps, weight: torch.Tensor, rows: slice, dtype: torch.dtype
) -> torch.Tensor | None:
    """As :func:`rounded` of a LoRA alone in bfloat16, in one pass; None: it is something else.

    What is not finite is also left to the general way, which names the element.
    """
    import torch

    step = steps.steps[0] if len(steps.steps) == 1 else None
    if not isinstance(step, AddLowRank) or not step.narrow:
        return None
    if {weight.dtype, dtype} != {torch.bfloat16} or weight.stride(1) != 1:
        return None
    from so8tqc.adapters.fused import add_and_round

    some = weight[rows]
    out = torch.empty(some.shape, dtype=dtype)
    left = np.empty((max(_LEFT, some.numel() >> 8), 2), dtype=np.int64)
    factors, a, norms = step.parts(rows)
    words = (tensor.view(torch.uint16).numpy() for tensor in (some, out))
    count = add_and_round(next(words), factors, a, norms, next(words), left)
    if count < 0:
        return None
    exact = steps.exact(_stored_values(weight))
    for i, j in left[:count].tolist():
        out[i, j] = exactly_rounded(exact, rows.start + i, j, dtype) + 0.0
    return out


def exactly_rounded(exact: Exact, row: int, column: int, dtype: torch.dtype) -> float:
    """One element, from its exact value."""
    low = 0.0
    for bits in _BITS:
        value = exact(row, np.array([column]), bits)
        middle = value.fraction()
        low, high = (round_once(middle + end, dtype) for end in (-value.radius, value.radius))
        if low == high:
            return low
    return round_once(middle, dtype)


def _stored_values(weight: torch.Tensor) -> Exact:
    import torch

    def values(row: int, columns: Columns, _bits: int) -> Dyadic:
        return dyadic(weight[row, torch.from_numpy(columns)].to(torch.float64).numpy())

    return values

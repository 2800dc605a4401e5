"""What the block formats can say: w = (d · scale) · level − (dmin · min), in float32.

A *block* of 32 or 256 weights holds one or two half-precision numbers, ``d`` and ``dmin``, and is
cut into *groups* of 16 or 32 weights. In blocks of 256 each group has an integer scale and, in some
formats, an integer min; in blocks of 32 the only group has scale 1. A weight's code is an index
into the format's levels. (llama.cpp, ``ggml-common.h`` and ``ggml-quants.c``; the values of the
non-linear formats are its ``kvalues_iq4nl``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """One format.

    Attributes:
        name: GGML type.
        block: weights of a block.
        group: weights that share a scale.
        bytes: of a block.
        levels: what a code stands for, ascending.
        lowest_code: smallest code that is used; below it readers differ.
        scales: (smallest, largest) integer scale; None: the scale is ``d`` itself.
        mins: (smallest, largest) integer min; None where there are none, or ``dmin`` is itself the
            min, with integer −1 (w = d·level + m).
        has_min: whether anything is subtracted.
    """

    name: str
    block: int
    group: int
    bytes: int
    levels: tuple[int, ...]
    lowest_code: int = 0
    scales: tuple[int, int] | None = None
    mins: tuple[int, int] | None = None
    has_min: bool = False

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // self.group

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The levels as numbers."""
        return np.array(self.levels, dtype=np.float64)


def _range(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


_SIX_BITS, _SIGNED_SIX_BITS = (0, 63), (-32, 31)

_ALL = (
    Grid("Q4_0", 32, 32, 18, _range(-8, 7)),
    Grid("Q4_1", 32, 32, 20, _range(0, 15), has_min=True),
    Grid("Q5_0", 32, 32, 22, _range(-16, 15)),
    Grid("Q5_1", 32, 32, 24, _range(0, 31), has_min=True),
    # −128 has no counterpart, and no encoder writes it
    Grid("Q8_0", 32, 32, 34, _range(-128, 127), lowest_code=1),
    Grid("IQ4_NL", 32, 32, 18, NON_LINEAR),
    Grid("IQ4_XS", 256, 32, 136, NON_LINEAR, scales=_SIGNED_SIX_BITS),
    Grid("Q2_K", 256, 16, 84, _range(0, 3), scales=(0, 15), mins=(0, 15), has_min=True),
    Grid("Q3_K", 256, 16, 110, _range(-4, 3), scales=_SIGNED_SIX_BITS),
    Grid("Q4_K", 256, 32, 144, _range(0, 15), scales=_SIX_BITS, mins=_SIX_BITS, has_min=True),
    Grid("Q5_K", 256, 32, 176, _range(0, 31), scales=_SIX_BITS, mins=_SIX_BITS, has_min=True),
    Grid("Q6_K", 256, 16, 210, _range(-32, 31), scales=(-128, 127)),
)

GRIDS: Mapping[str, Grid] = MappingProxyType({grid.name: grid for grid in _ALL})
"""GGML type → its grid, for every type that is solved for."""

"""How far values lie apart, and how far rounding alone explains.

With a reference's value r and a candidate's c of one operation on one input, over all tokens:

    error   ‖c − r‖ / ‖r‖
    gain    ⟨c, r⟩ / ⟨r, r⟩

The honest side's error h is what plain rounding to the candidate's types makes on the same input.
Other honest encoders (with an importance matrix, compensated) differ from it by less than one bit,
which doubles an error; so an error is explained up to 2h and a few units in the last place.

A factor that all of a projection's weights were multiplied by does not hide in that: errors of
rounding have no direction. Of independent errors n_i of the output's channels,
Σ⟨n_i, r_i⟩ / Σ‖r_i‖² has a standard deviation of at most √(Σ‖n_i‖²‖r_i‖²) / Σ‖r_i‖², which the
honest side tells; and the nearest point of a grid lies nearer to 0 by a share of h² (a quantizer
of least error has ⟨c, r⟩ = ⟨c, c⟩). A gain further from 1 is not explained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from so8tqc.services.tensors.judge import ONE_BIT
from so8tqc.services.tensors.verdict import SIGMAS

if TYPE_CHECKING:
    import torch

FACTOR = math.sqrt(ONE_BIT)
"""Of an honest error: what one bit less costs."""

UNITS = 4.0
"""Units in the last place of the compute dtype that are explained always."""


@dataclass
class Difference:
    """Sums over all tokens of candidate and reference, in float64.

    Attributes:
        apart: Σ‖c − r‖².
        size: Σ‖r‖².
        along: Σ⟨c, r⟩.
        finite: whether all values are.
    """

    apart: float = 0.0
    size: float = 0.0
    along: float = 0.0
    finite: bool = True
    _apart_by_channel: list[torch.Tensor] = field(default_factory=list)
    _size_by_channel: list[torch.Tensor] = field(default_factory=list)

    def add(self, found: torch.Tensor, reference: torch.Tensor) -> None:
        """Count some tokens' values in; both of one shape, channels last."""
        c, r = found.detach().double(), reference.detach().double()
        if c.shape != r.shape:
            self.finite = False
            return
        self.finite = self.finite and bool(c.isfinite().all())
        away = (c - r).reshape(-1, c.shape[-1] if c.ndim else 1).square().sum(0)
        there = r.reshape(-1, r.shape[-1] if r.ndim else 1).square().sum(0)
        self.apart += float(away.sum())
        self.size += float(there.sum())
        self.along += float((c * r).sum())
        self._apart_by_channel.append(away)
        self._size_by_channel.append(there)

    @property
    def error(self) -> float:
        """‖c − r‖ / ‖r‖; infinite where a value is not finite."""
        if not (self.finite and math.isfinite(self.apart)):
            return math.inf
        if self.size == 0:
            return 0.0 if self.apart == 0 else math.inf
        return math.sqrt(self.apart / self.size)

    @property
    def gain(self) -> float:
        """⟨c, r⟩ / ⟨r, r⟩; 1 where r is nothing."""
        return self.along / self.size if self.size else 1.0

    @property
    def spread(self) -> float:
        """Standard deviation, at most, of the gain of independent errors of this size."""
        if not self.size or not self._apart_by_channel:
            return 0.0
        away, there = sum(self._apart_by_channel), sum(self._size_by_channel)
        assert not isinstance(away, int)
        return math.sqrt(float((away * there).sum())) / self.size


@dataclass(frozen=True)
class Limits:
    """What rounding explains of one operation.

    Attributes:
        error: up to here.
        gain: so far from 1; None: not asked, the operation is no product with a weight.
    """

    error: float
    gain: float | None = None

    def explain(self, found: Difference) -> bool:
        """Whether they explain a difference."""
        if not found.error <= self.error:
            return False
        return self.gain is None or abs(found.gain - 1) <= self.gain


def floor_of(eps: float) -> float:
    """What arithmetic alone may make, of a compute dtype's unit."""
    return UNITS * eps


def limits(honest: Difference, eps: float, *, product: bool) -> Limits:
    """What an honest difference explains.

    Args:
        honest: of the honest side.
        eps: of the compute dtype.
        product: whether the operation is a product with a weight.
    """
    floor = floor_of(eps)
    away = FACTOR * honest.error + floor
    if not product:
        return Limits(away)
    return Limits(away, SIGMAS * honest.spread + FACTOR * honest.error**2 + floor)

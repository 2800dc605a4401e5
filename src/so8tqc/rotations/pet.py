"""PET: a penalty on the second difference of hidden states along a text, and its schedules.

With h_t ∈ R^D the hidden state at position t, Δ²h_t = h_{t+1} − 2h_t + h_{t−1} is large where the
representation oscillates from token to token. Divided by the energy of h itself the
penalty is a pure number, comparable between layers and models: for white noise it is 6,
for a slowly varying signal near 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


def second_difference(hidden: Tensor) -> Tensor:
    """Δ²h: [..., T, D] → [..., T − 2, D]."""
    return hidden[..., 2:, :] - 2 * hidden[..., 1:-1, :] + hidden[..., :-2, :]


def pet_penalty(
    hidden: Tensor, *, kind: Literal["l2", "huber"] = "l2", delta: float = 1.0
) -> Tensor:
    """Relative second-difference energy of one layer: a scalar.

    ``l2``: mean(Δ²h²) / mean(h²). ``huber``: the same with the Huber function of Δ²h/√mean(h²)
    (Huber, 1964; quadratic up to ``delta``, then linear), scaled so that both agree for
    small differences; single outlying positions then weigh less.

    Args:
        hidden: [..., T, D] with T ≥ 3.
        kind: which function.
        delta: where the Huber function turns linear, in units of the rms of h.

    Raises:
        ValueError: fewer than three positions have no second difference.
    """
    if hidden.shape[-2] < 3:
        raise ValueError(f"PET needs at least 3 positions, got {hidden.shape[-2]}")
    energy = hidden.square().mean()
    difference = second_difference(hidden)
    if kind == "l2":
        return difference.square().mean() / energy
    scaled = difference / energy.sqrt()
    return 2 * torch.nn.functional.huber_loss(scaled, torch.zeros_like(scaled), delta=delta)


class Schedule(Protocol):
    """Weight of the penalty over training."""

    def weight(self, fraction: float) -> float:
        """Weight at a fraction of training in [0, 1]."""


@dataclass(frozen=True)
class ThreePhaseSchedule:
    """Exploration → transition → stabilisation.

    The weight is ``exploration`` up to the first boundary, ``stabilisation`` from the second
    on, and moves linearly between them in the transition.

    Attributes:
        exploration, stabilisation: weights of the outer phases.
        boundaries: fractions of training where the transition begins and ends.
    """

    exploration: float
    stabilisation: float
    boundaries: tuple[float, float] = (0.3, 0.7)

    def __post_init__(self) -> None:
        first, second = self.boundaries
        if not 0 <= first < second <= 1:
            raise ValueError(f"boundaries must satisfy 0 ≤ first < second ≤ 1, got {first, second}")

    def weight(self, fraction: float) -> float:
        """See :class:`Schedule`."""
        first, second = self.boundaries
        share = min(max((fraction - first) / (second - first), 0.0), 1.0)
        return self.exploration + share * (self.stabilisation - self.exploration)


@dataclass(frozen=True)
class WarmupAnnealSchedule:
    """Warm-up from 0 to ``peak``, main phase at ``peak``, annealing down to ``final``.

    Attributes:
        peak: weight of the main phase.
        final: weight at the end of training.
        boundaries: fractions where warm-up ends and annealing begins.
    """

    peak: float
    final: float = 0.0
    boundaries: tuple[float, float] = (0.1, 0.8)

    def __post_init__(self) -> None:
        first, second = self.boundaries
        if not 0 < first <= second < 1:
            raise ValueError(f"boundaries must satisfy 0 < first ≤ second < 1, got {first, second}")

    def weight(self, fraction: float) -> float:
        """See :class:`Schedule`."""
        first, second = self.boundaries
        if fraction < first:
            return self.peak * fraction / first
        if fraction <= second:
            return self.peak
        return self.peak + (fraction - second) / (1 - second) * (self.final - self.peak)

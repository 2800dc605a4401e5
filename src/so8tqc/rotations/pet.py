"""PET: a penalty on the second difference of hidden states along a text, and its schedules.

With h_t ∈ R^D the hidden state at position t, Δ²h_t = h_{t+1} − 2h_t + h_{t−1} is large where the
representation oscillates from token to token. Divided by the energy of h itself the
penalty is a pure number, comparable between layers and models: for white noise it is 6,
for a slowly varying signal near 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


def second_difference(hidden: Tensor) -> Tensor:
    """Δ²h: [..., T, D] → [..., T − 2, D]."""
    return hidden[..., 2:, :] - 2 * hidden[..., 1:-1, :] + hidden[..., :-2, :]


def pet_penalty(
    hidden: Tensor,
    *,
    kind: Literal["l2", "huber"] = "l2",
    delta: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Relative second-difference energy of one layer: a scalar, differentiable.

    ``l2``: mean(Δ²h²) / mean(h²). ``huber``: the same with the Huber function of Δ²h/√mean(h²)
    (Huber, Annals of Mathematical Statistics 35, 1964; quadratic up to ``delta``, then linear),
    scaled so that both agree for small differences; single outlying positions then weigh less.

    Many models store a huge hidden state at the first token (an attention sink): in SmolLM2-135M
    it holds up to 93 % of a layer's energy, and the quotient hardly depends on the text. A mask
    can leave it out.

    Args:
        hidden: [..., T, D] with T ≥ 3; 16-bit values are computed with in float32.
        kind: which function.
        delta: where the Huber function turns linear, in units of the rms of h; positive.
        mask: [..., T] bool, True for positions that count; None: all. A second difference counts
            if its three positions do. Padding must be masked.

    Raises:
        ValueError: fewer than three positions, no second difference left by the mask, an
            unknown kind, or a ``delta`` that is not positive.
    """
    if hidden.shape[-2] < 3:
        raise ValueError(f"PET needs at least 3 positions, got {hidden.shape[-2]}")
    if kind not in ("l2", "huber") or not delta > 0:
        raise ValueError(f"no penalty: kind = {kind!r}, delta = {delta}")
    h = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    difference = second_difference(h)
    if mask is not None:
        mask = mask.expand(h.shape[:-1])
        inner = mask[..., 2:] & mask[..., 1:-1] & mask[..., :-2]
        h, difference = h[mask], difference[inner]
        if difference.shape[0] == 0:
            raise ValueError("the mask leaves no three positions in a row")
    energy = h.square().mean()
    if kind == "l2":
        return difference.square().mean() / energy
    scaled = difference / energy.sqrt()
    return 2 * torch.nn.functional.huber_loss(scaled, torch.zeros_like(scaled), delta=delta)


class Schedule(Protocol):
    """Weight of the penalty over training.

    A training loop adds ``schedule.weight(step / (steps - 1)) * penalty`` to its loss.
    """

    def weight(self, fraction: float) -> float:
        """Weight at a fraction of training in [0, 1].

        Raises:
            ValueError: the fraction lies outside.
        """


@dataclass(frozen=True)
class ThreePhaseSchedule:
    """Exploration → transition → stabilisation.

    The weight is ``exploration`` up to the first boundary, ``stabilisation`` from the second
    on, and moves linearly between them in the transition.

    Attributes:
        exploration, stabilisation: weights of the outer phases.
        boundaries: fractions of training where the transition begins and ends.

    Raises:
        ValueError: a weight is negative or not finite, or not 0 ≤ first < second ≤ 1.
    """

    exploration: float
    stabilisation: float
    boundaries: tuple[float, float] = (0.3, 0.7)

    def __post_init__(self) -> None:
        _check_weights(self.exploration, self.stabilisation)
        first, second = self.boundaries
        if not 0 <= first < second <= 1:
            raise ValueError(f"boundaries must satisfy 0 ≤ first < second ≤ 1, got {first, second}")

    def weight(self, fraction: float) -> float:
        """See :class:`Schedule`."""
        _check_fraction(fraction)
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

    Raises:
        ValueError: a weight is negative or not finite, or not 0 < first ≤ second < 1.
    """

    peak: float
    final: float = 0.0
    boundaries: tuple[float, float] = (0.1, 0.8)

    def __post_init__(self) -> None:
        _check_weights(self.peak, self.final)
        first, second = self.boundaries
        if not 0 < first <= second < 1:
            raise ValueError(f"boundaries must satisfy 0 < first ≤ second < 1, got {first, second}")

    def weight(self, fraction: float) -> float:
        """See :class:`Schedule`."""
        _check_fraction(fraction)
        first, second = self.boundaries
        if fraction < first:
            return self.peak * fraction / first
        if fraction <= second:
            return self.peak
        return self.peak + (fraction - second) / (1 - second) * (self.final - self.peak)


def _check_weights(*weights: float) -> None:
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights must be finite and not negative, got {weights}")


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of training lies in [0, 1], got {fraction}")

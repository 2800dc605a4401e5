"""Which reading made recorded logits: its KL from them is rounding, everybody else's is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from so8tqc.metrics.bootstrap import paired_bootstrap, ratio_of_sums
from so8tqc.metrics.divergence import TokenTable
from so8tqc.services.identify.by_text import Differences

ROUNDING = 1e-7
"""nats; float32 arithmetic alone stays well below it."""

FLOOR_FACTOR = 10.0
"""How many times the KL that storing the logits costs a right reading may have."""

COARSE_SHARE = 0.01
"""A reading that leaves less than this share of the gates' effect unexplained is the recorded one
up to its arithmetic: 16-bit forwards leave about 1e-4 to 1e-3 of it."""

FARTHER = 4.0
"""How many times as far as the nearest another reading must be, beside its interval."""

BEYOND_CHANCE = 100.0
"""How many times as far needs no interval: the recorded logits are a computation, no sample, and
what arithmetic leaves of the right reading varies less than that from text to text."""


@dataclass(frozen=True)
class Distance:
    """One source against the recorded logits.

    Attributes:
        kl: mean KL(recorded‖it), nats per token.
        ci95: its interval; None with too few texts.
    """

    kl: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class CaptureEvidence:
    """What recorded logits say of the readings.

    Attributes:
        distances: name → its distance, the base's too.
        differences: of KL, of every pair.
        nearest: the nearest source, which may be the base.
        alike: sources that the capture does not tell from the nearest.
        agrees: whether the nearest explains the logits, at least up to 16-bit arithmetic.
        coarse: it does, but by more than float32 and the capture's own rounding.
        limit: nats, up to which a KL is rounding.
    """

    distances: Mapping[str, Distance]
    differences: Differences
    nearest: str
    alike: tuple[str, ...]
    agrees: bool
    coarse: bool
    limit: float


def weigh_by_capture(
    tables: Mapping[str, TokenTable],
    base: str,
    rounding: Callable[[str], float],
    *,
    resamples: int,
    seed: int,
) -> CaptureEvidence:
    """Which source made the recorded logits.

    Args:
        tables: source → its table against the recorded logits, over the same tokens; the base is
            among them.
        base: name of the base without gates.
        rounding: source → mean KL that storing its own logits as the capture does would cost;
            asked for the nearest alone.
        resamples, seed: of the bootstrap.
    """
    per_text = {name: table.per_text("kl") for name, table in tables.items()}
    counts = next(iter(per_text.values()))[:, -1]
    sums = {name: values[:, 0] for name, values in per_text.items()}
    differences = Differences(sums, counts, resamples=resamples, seed=seed)
    distances = {}
    for name, values in per_text.items():
        low, high = paired_bootstrap(values, ratio_of_sums, resamples=resamples, seed=seed)
        interval = None if np.isnan(low) else (low, high)
        distances[name] = Distance(float(values[:, 0].sum() / counts.sum()), interval)
    nearest = min(distances, key=lambda name: distances[name].kl)
    kl = distances[nearest].kl
    limit = max(ROUNDING, FLOOR_FACTOR * rounding(nearest))
    within = kl <= limit
    coarse = not within and nearest != base and kl <= COARSE_SHARE * distances[base].kl
    alike = tuple(
        name
        for name in sorted(distances, key=lambda name: distances[name].kl)
        if name != nearest and not _farther(name, nearest, distances, differences)
    )
    return CaptureEvidence(distances, differences, nearest, alike, within or coarse, coarse, limit)


def _farther(
    name: str, nearest: str, distances: Mapping[str, Distance], differences: Differences
) -> bool:
    """Whether a source is farther from the recorded logits, by more than chance and arithmetic."""
    kl, least = distances[name].kl, distances[nearest].kl
    if kl >= BEYOND_CHANCE * least and kl > 0:
        return True
    return kl >= FARTHER * least and differences.less(nearest, name)

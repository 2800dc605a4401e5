"""Which readings a text supports: likelihood, and what can be concluded from it.

A gate was trained to lower the negative log-likelihood of some text. That is all that is known,
and it is less than it seems: after a few steps of training *any* larger turn along the trained
path lowers it further (so exp beats cayley although cayley was trained), and a wrong reading that
turns far may by chance gain more than a right one that turns little. Hence two measures of each
reading r against the base without gates:

* the gain G_r, in nats of NLL per token;
* the *efficiency* G_r / √KL_r, KL_r the mean divergence of the reading from the base. KL grows with
  the square of a small turn, so that near the base the efficiency does not depend on how far a
  reading turns, only on its direction: it is the slope of the likelihood along that path, per unit
  of length in the Fisher metric (Amari, Natural Gradient Works Efficiently in Learning, Neural
  Computation 10:2, 1998). Training follows the slope; a direction at random has next to none.

A reading is refuted if

1. the base is better than it: no training ends there; or
2. another reading is better, *and* at least ``EFFICIENCY_RATIO`` times as efficient: it does not
   merely turn further along the same path, or far into another one.

All differences have intervals over texts that hold together (``metrics.paired``). Readings that
remain together are not told apart by this text, whatever their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.divergence import TokenTable
from so8tqc.metrics.paired import simultaneous_differences

FloatArray = npt.NDArray[np.float64]

EFFICIENCY_RATIO = 2.5
"""By what factor a reading must be the more efficient one to refute another.

Along one path the efficiency falls from its value at the base to 0, where the gain is spent (at
twice the best turn, of a parabola), and to half of it at the best turn: so of two readings of one
path, neither of which turns beyond the best, the ratio is at most 2; the rest is margin."""


@dataclass(frozen=True)
class Measured:
    """One source over all texts.

    Attributes:
        nll: mean of the text, nats per token.
        gain: how much lower than the base's, nats per token.
        gain_ci95: its interval; None with too few texts.
        kl_base: mean KL(base‖it), nats.
        efficiency: gain / √kl_base; 0 where nothing is turned.
    """

    nll: float
    gain: float
    gain_ci95: tuple[float, float] | None
    kl_base: float
    efficiency: float


@dataclass(frozen=True)
class Rival:
    """Two sources: how far apart they are, and whether the text tells.

    Attributes:
        difference: mean of the first minus that of the second, nats per token.
        ci95: its interval, which holds together with all others; None with too few texts.
        needed: tokens from which on such a difference would be told from 0; None where it is
            already, or where there is none.
    """

    difference: float
    ci95: tuple[float, float] | None
    needed: int | None


class Differences:
    """All pairwise differences of means, with intervals that hold all at once.

    Args:
        sums: name → [texts] summed measure of each text.
        counts: [texts] tokens.
        resamples, seed: of the bootstrap.
    """

    def __init__(
        self, sums: Mapping[str, FloatArray], counts: FloatArray, *, resamples: int, seed: int
    ) -> None:
        self._pairs = {pair: i for i, pair in enumerate(combinations(sums, 2))}
        self._tokens = int(counts.sum())
        columns = [sums[a] - sums[b] for a, b in self._pairs]
        self._found = simultaneous_differences(
            np.stack(columns, axis=1), counts, resamples=resamples, seed=seed
        )
        critical = self._found.critical
        self.critical = None if np.isnan(critical) else critical

    def of(self, a: str, b: str) -> Rival:
        """The mean of ``a`` minus that of ``b``."""
        if (a, b) not in self._pairs:
            other = self.of(b, a)
            ci95 = None if other.ci95 is None else (-other.ci95[1], -other.ci95[0])
            return Rival(-other.difference, ci95, other.needed)
        i = self._pairs[(a, b)]
        value, low, high = (
            float(x[i]) for x in (self._found.values, self._found.low, self._found.high)
        )
        if np.isnan(low):
            return Rival(value, None, None)
        undecided = low <= 0 <= high and value != 0
        # an interval's half width falls with the root of the tokens
        factor = ((high - low) / 2 / value) ** 2 if undecided else 0.0
        return Rival(value, (low, high), int(self._tokens * factor) + 1 if undecided else None)

    def less(self, a: str, b: str) -> bool:
        """Whether the mean of ``a`` is lower, with its whole interval."""
        ci95 = self.of(a, b).ci95
        return ci95 is not None and ci95[1] < 0


@dataclass(frozen=True)
class TextEvidence:
    """What a text says of the readings.

    Attributes:
        measured: name → its numbers, the base's too.
        differences: of NLL, of every pair.
        refuted: name → why, of the readings that cannot have been trained.
        remaining: the others, the most likely first.
    """

    measured: Mapping[str, Measured]
    differences: Differences
    refuted: Mapping[str, str]
    remaining: tuple[str, ...]


def weigh_by_text(
    tables: Mapping[str, TokenTable], base: str, *, resamples: int, seed: int
) -> TextEvidence:
    """Which readings could have been trained on this text.

    Args:
        tables: reading → its table against the base, over the same tokens; at least one.
        base: name of the base without gates.
        resamples, seed: of the bootstrap.
    """
    per_text = {
        name: table.per_text("nll_candidate", "nll_reference", "kl")
        for name, table in tables.items()
    }
    first = next(iter(per_text.values()))
    counts = first[:, -1]
    sums = {base: first[:, 1], **{name: values[:, 0] for name, values in per_text.items()}}
    differences = Differences(sums, counts, resamples=resamples, seed=seed)
    tokens = counts.sum()
    measured = {base: Measured(float(first[:, 1].sum() / tokens), 0.0, None, 0.0, 0.0)}
    for name, values in per_text.items():
        gain = differences.of(base, name)
        divergence = float(values[:, 2].sum() / tokens)
        measured[name] = Measured(
            nll=float(values[:, 0].sum() / tokens),
            gain=gain.difference,
            gain_ci95=gain.ci95,
            kl_base=divergence,
            efficiency=gain.difference / divergence**0.5 if divergence > 0 else 0.0,
        )
    by_nll = sorted(tables, key=lambda name: measured[name].nll)
    refuted = {
        name: why
        for name in by_nll
        if (why := _refuted(name, base, by_nll, measured, differences)) is not None
    }
    remaining = tuple(name for name in by_nll if name not in refuted)
    return TextEvidence(measured, differences, refuted, remaining)


def _refuted(
    name: str,
    base: str,
    by_nll: Sequence[str],
    measured: Mapping[str, Measured],
    differences: Differences,
) -> str | None:
    """Why a reading cannot have been trained on this text; None if it may have been."""
    if differences.less(base, name):
        return "the base without gates is better"
    for other in by_nll:
        much = measured[other].efficiency >= EFFICIENCY_RATIO * measured[name].efficiency
        if other != name and much and differences.less(other, name):
            return f"{other} is better, and not by turning further"
    return None

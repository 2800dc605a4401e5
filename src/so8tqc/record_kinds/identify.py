"""Identifications: every reading of a gate file, and which was trained."""

from __future__ import annotations

from so8tqc.record_kinds.base import Entry, Interval, Metrics


class ReadingRow(Entry):
    """One reading, or the base without gates.

    Attributes:
        state: ``identified``, ``possible``, ``refuted``; "" of the base.
        why: why it is refuted.
        same: readings with the same rotations, which were run as this one.
        parametrization, convention, site: not of the base.
        nll, gain, kl_base: nats per token, by text: NLL, how far below the base's, KL from it.
        efficiency: gain / √kl_base.
        kl: nats per token, from recorded logits.
        difference: of NLL or KL, to the best reading.
        needed: tokens from which on that difference would be told from none.
    """

    state: str
    why: str
    same: list[str]
    parametrization: str | None = None
    convention: str | None = None
    site: str | None = None
    nll: float | None = None
    gain: float | None = None
    gain_ci95: Interval | None = None
    kl_base: float | None = None
    efficiency: float | None = None
    kl: float | None = None
    kl_ci95: Interval | None = None
    difference: float | None = None
    difference_ci95: Interval | None = None
    needed: int | None = None


class IdentifyMetrics(Metrics):
    """Of kind ``identify``.

    Attributes:
        identified: the reading; None if it was not found.
        sentence: what was found.
        by: ``capture`` or ``text``, and ``statement`` where the file's word decided.
        certain: fact → word, where all supported readings agree.
        stated: the reading that the file states, None if it leaves a fact open.
        best: the reading that differences are to.
        readings: reading, or ``none``, → its numbers, the best first.
        impossible: reading → why no rotations come of it.
        still: readings that turn nothing.
        critical: factor of the standard errors; None with too few texts.
        limit: with a capture: the KL up to which it is rounding, nats.
    """

    identified: str | None
    sentence: str
    by: list[str]
    certain: dict[str, str]
    stated: str | None
    best: str
    readings: dict[str, ReadingRow]
    impossible: dict[str, str]
    still: list[str]
    texts: int
    tokens: int
    critical: float | None
    limit: float | None = None

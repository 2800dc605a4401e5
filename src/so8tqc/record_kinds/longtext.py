"""Long texts: divergence, oscillation, hidden states, attention and repetition of each."""

from __future__ import annotations

from so8tqc.record_kinds.base import Entry, Interval, Metrics


class Indices(Entry):
    """Oscillation of one series (see ``metrics.oscillation``)."""

    index: float | None
    von_neumann: float | None
    high_frequency: float | None


class Oscillation(Entry):
    """Of one model; ``high_variance`` is the share of positions."""

    max_logit: Indices | None
    entropy: Indices | None
    high_variance: float | None


class RelativeChange(Entry):
    """Relative to the base model."""

    relative: float
    ci95: Interval


class FromBase(Entry):
    """What the gates did to the base's hidden states; ``reading`` is a sentence."""

    energy: RelativeChange
    high_frequency: RelativeChange
    reading: str


class Repeated(Entry):
    """How repetitive a generated text is, see ``metrics.repetition.Repetition``."""

    tokens: int | None
    repeated: float | None
    compression: float | None
    loop_period: int | None
    loop_start: int | None


class CaseMetrics(Entry):
    """One text. Mappings are from ``candidate``, ``reference``, ``base``; lists are by layer.

    Attributes:
        energy, high_frequency: of the hidden states.
        energy_relative_to_base: mean over layers.
        significant_periods: of entropy dips, tokens.
        generation: model, and model with ``_sampled`` → its text.
    """

    tokens: int | None
    kl_mean: float | None
    indices: dict[str, Oscillation]
    energy: dict[str, list[float]] | None = None
    high_frequency: dict[str, list[float]] | None = None
    attention_entropy: dict[str, list[float]] | None = None
    energy_relative_to_base: float | None = None
    hidden_states_from_base: FromBase | None = None
    significant_periods: list[float] | None = None
    generation: dict[str, Repeated]


class LongTextMetrics(Metrics):
    """Of kind ``longtext``: text → its case; ``gates_pet``: the gate file's PET record."""

    cases: dict[str, CaseMetrics]
    gates_pet: str | None

"""Calibrations: the temperature, what it does on held-out text, and what it was judged by."""

from __future__ import annotations

from so8tqc.record_kinds.base import Entry, Interval, Metrics


class Difference(Entry):
    """A measure's change, and its 95 % interval."""

    difference: float
    ci95: Interval | None


class Fit(Entry):
    """The temperature that one objective asks for."""

    temperature: float
    ci95: Interval | None
    at_bound: bool
    converged: bool


class GroupFit(Entry):
    """The temperature of one group, see ``metrics.temperature.groups.GroupTemperature``."""

    temperature: float
    own: float | None
    weight: float
    texts: int


class Gain(Entry):
    """What more than one number changes on held-out text, against the best single temperature."""

    nll: Difference
    ece: Difference


class GroupTemperatures(Entry):
    """Of one axis; ``temperatures`` (label → fit) only where held-out text supports them."""

    significant: bool
    against: float
    change: Gain
    temperatures: dict[str, GroupFit] | None


class EntropyTemperature(Entry):
    """T(H) = a + b·H within ``bounds``; ``held_at_bounds``: share of the fit tokens."""

    significant: bool
    a: float
    b: float
    bounds: tuple[float, float]
    converged: bool
    at_bound: bool
    held_at_bounds: float
    against: float
    change: Gain


class AgainstReference(Entry):
    """A measure's distance from the unquantized model's, at T = 1 and with the one in use.

    ``back``: the interval reaches down to zero; None without an interval.
    """

    reference: float
    before: Difference
    after: Difference
    back: bool | None


class Sides(Entry):
    """Scored tokens of either side."""

    fit: int
    holdout: int


class TemperatureSummary(Entry):
    """What ``temperature_config.json`` and the record share.

    Attributes:
        temperature: to use; 1 where the gain is not significant.
        before, after, at_fitted: held-out measures at T = 1, at the temperature to use, and at the
            fitted one.
        change: from T = 1 to the fitted one.
        objectives: what each asks for, on the fit texts.
        against_reference: None without a reference.
    """

    temperature: float | None
    fitted: float | None
    ci95: Interval | None
    significant: bool | None
    objective: str | None
    judged_by: str | None
    at_bound: bool | None
    converged: bool | None
    bounds: tuple[float, float] | None
    before: dict[str, float]
    after: dict[str, float]
    at_fitted: dict[str, float]
    change: dict[str, Difference]
    objectives: dict[str, Fit]
    group_temperatures: dict[str, GroupTemperatures]
    entropy_temperature: EntropyTemperature | None
    against_reference: dict[str, AgainstReference] | None
    tokens: Sides | None


class AppliedTemperature(Entry):
    """The file that carries the temperature: how, and its divergence from what was asked."""

    file: str | None
    how: str
    reader_temperature: float | None
    scale: float | None
    kl: float | None


class MeanEntropy(Entry):
    """Of held-out predictions, nats."""

    before: float
    fitted: float
    reference: float | None


class Curve(Entry):
    """The objective and the NLL of both sides, against temperature."""

    temperature: list[float]
    objective: list[float]
    nll_fit: list[float]
    nll_holdout: list[float]


class Bins(Entry):
    """Tokens by confidence; the means of an empty bin are None."""

    edges: list[float]
    count: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]


class Reliability(Entry):
    """At T = 1, at the fitted temperature, and of the reference, if there is one."""

    before: Bins
    fitted: Bins
    reference: Bins | None = None


class GroupRow(Entry):
    """Held-out measures of one language and category."""

    language: str
    category: str
    texts: int
    tokens: int
    before: dict[str, float]
    fitted: dict[str, float]


class SplitTexts(Entry):
    """Names of the texts of either side."""

    fit: list[str]
    holdout: list[str]


class TemperatureDetails(Entry):
    """What only the record holds; ``reference``: its held-out measures, None without one."""

    entropy: MeanEntropy | None
    reference: dict[str, float] | None
    curve: Curve | None
    reliability: Reliability | None
    groups: list[GroupRow]
    split: SplitTexts | None


class CalibrateMetrics(Metrics, TemperatureDetails, TemperatureSummary):
    """Of kind ``calibrate``; ``applied``: the file that ships, None if none does."""

    applied: AppliedTemperature | None
    vocab_size: int | None

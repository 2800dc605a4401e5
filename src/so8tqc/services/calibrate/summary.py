"""What a calibration puts on record: the summary that ships, and the details for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import JsonValue

from so8tqc.config import CalibrateOptions
from so8tqc.metrics.calibration import reliability_bins
from so8tqc.metrics.temperature.fit import Change, TemperatureFit, scored
from so8tqc.metrics.temperature.measures import NLL, SHARPNESS
from so8tqc.metrics.temperature.table import FloatArray, TemperatureTable
from so8tqc.record_kinds.calibrate import (
    AgainstReference,
    Bins,
    Curve,
    Difference,
    EntropyTemperature,
    Fit,
    Gain,
    GroupFit,
    GroupRow,
    GroupTemperatures,
    MeanEntropy,
    Reliability,
    Sides,
    SplitTexts,
    TemperatureDetails,
    TemperatureSummary,
)
from so8tqc.services.calibrate.beyond import JudgedEntropy, JudgedGroups
from so8tqc.services.calibrate.holdout import Split
from so8tqc.services.calibrate.verdict import (
    Calibration,
    changes,
    chosen_classes,
    held_out_measures,
)
from so8tqc.sources.protocol import EncodedText


def temperature_summary(
    calibration: Calibration, options: CalibrateOptions
) -> dict[str, JsonValue]:
    """What ``temperature_config.json`` and the record share."""
    fit = calibration.fit
    fitted, used = calibration.fitted, calibration.used
    return TemperatureSummary(
        temperature=calibration.temperature,
        fitted=fit.temperature,
        ci95=fit.ci95,
        significant=calibration.significant,
        objective=options.objective,
        judged_by=calibration.judged_by,
        at_bound=fit.at_bound,
        converged=fit.converged,
        bounds=options.bounds,
        before={name: used[name].before for name in used},
        after={name: used[name].after for name in used},
        at_fitted={name: fitted[name].after for name in fitted},
        change={name: _change(fitted[name]) for name in fitted},
        objectives={name: _fit(other) for name, other in calibration.objectives.items()},
        group_temperatures={
            axis: _judged_groups(groups) for axis, groups in calibration.groups.items()
        },
        entropy_temperature=_judged_entropy(calibration.entropy),
        against_reference=_against_reference(calibration, options),
        tokens=Sides(fit=len(calibration.fit_table), holdout=len(calibration.holdout_table)),
    ).as_json()


def _change(change: Change) -> Difference:
    return Difference(difference=change.difference, ci95=change.ci95)


def _fit(fit: TemperatureFit) -> Fit:
    return Fit(
        temperature=fit.temperature,
        ci95=fit.ci95,
        at_bound=fit.at_bound,
        converged=fit.converged,
    )


def _judged_groups(groups: JudgedGroups) -> GroupTemperatures:
    """Group temperatures for the record; those that held-out text does not support are left out."""
    return GroupTemperatures(
        significant=groups.significant,
        against=groups.against,
        change=Gain(nll=_change(groups.nll), ece=_change(groups.ece)),
        temperatures={
            label: GroupFit(
                temperature=group.temperature,
                own=group.own,
                weight=group.weight,
                texts=group.texts,
            )
            for label, group in groups.temperatures.items()
        }
        if groups.significant
        else None,
    )


def _judged_entropy(judged: JudgedEntropy) -> EntropyTemperature:
    return EntropyTemperature(
        significant=judged.significant,
        a=judged.rule.a,
        b=judged.rule.b,
        bounds=judged.rule.bounds,
        converged=judged.rule.converged,
        at_bound=judged.at_bound,
        held_at_bounds=judged.rule.held,
        against=judged.against,
        change=Gain(nll=_change(judged.nll), ece=_change(judged.ece)),
    )


def _against_reference(
    calibration: Calibration, options: CalibrateOptions
) -> dict[str, AgainstReference] | None:
    """How far each measure is from the reference's, before and with the temperature in use.

    ``back``: the interval of the difference reaches down to zero, so that the model cannot be told
    to be worse than the reference; null without an interval.
    """
    if calibration.reference is None:
        return None
    reference = scored(calibration.reference)
    before = changes(reference, scored(calibration.holdout_table), options)
    after = changes(reference, calibration.in_use, options)
    return {
        name: AgainstReference(
            reference=after[name].before,
            before=_change(before[name]),
            after=_change(after[name]),
            back=_back(after[name]),
        )
        for name in after
        if name != SHARPNESS.name  # neither more nor less of it is worse
    }


def _back(change: Change) -> bool | None:
    return None if change.ci95 is None else change.ci95[0] <= 0.0


def temperature_details(
    calibration: Calibration, texts: Sequence[EncodedText], split: Split, options: CalibrateOptions
) -> dict[str, JsonValue]:
    """Details for the record and the report that ``temperature_config.json`` does not have."""
    held, fit = calibration.holdout_table, calibration.fit
    reference = calibration.reference
    return TemperatureDetails(
        entropy=MeanEntropy(
            before=float(held.at(1.0).entropy.mean()),
            fitted=float(held.at(fit.temperature).entropy.mean()),
            reference=None if reference is None else float(reference.at(1.0).entropy.mean()),
        ),
        reference=None if reference is None else _values(reference, 1.0, options.bins),
        curve=Curve(
            temperature=fit.grid.tolist(),
            objective=fit.curve.tolist(),
            nll_fit=[NLL.at(calibration.fit_table, float(t)) for t in fit.grid],
            nll_holdout=[NLL.at(held, float(t)) for t in fit.grid],
        ),
        reliability=Reliability(
            before=_reliability(held, 1.0, options.bins),
            fitted=_reliability(held, fit.temperature, options.bins),
            reference=None if reference is None else _reliability(reference, 1.0, options.bins),
        ),
        groups=_group_rows(calibration, texts, split, options.bins),
        split=SplitTexts(fit=list(calibration.fit_table.texts), holdout=list(held.texts)),
    ).as_json()


def _reliability(table: TemperatureTable, temperature: float, bins: int) -> Bins:
    data = reliability_bins(table.at(temperature).confidence, table.correct, bins)
    return Bins(
        edges=data.edges.tolist(),
        count=data.count.tolist(),
        confidence=_or_null(data.confidence),
        accuracy=_or_null(data.accuracy),
    )


def _or_null(means: FloatArray) -> list[float | None]:
    """Means of empty bins are NaN, which JSON does not have."""
    return [None if np.isnan(mean) else float(mean) for mean in means]


def _group_rows(
    calibration: Calibration, texts: Sequence[EncodedText], split: Split, bins: int
) -> list[GroupRow]:
    """Held-out measures of each language and category, before and at the fitted temperature."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, index in enumerate(split.holdout):
        text = texts[int(index)]
        groups.setdefault((text.language, text.category), []).append(number)
    rows: list[GroupRow] = []
    for (language, category), members in sorted(groups.items()):
        table = calibration.holdout_table.select(np.array(members, dtype=np.intp))
        rows.append(
            GroupRow(
                language=language,
                category=category,
                texts=len(members),
                tokens=len(table),
                before=_values(table, 1.0, bins),
                fitted=_values(table, calibration.fit.temperature, bins),
            )
        )
    return rows


def _values(table: TemperatureTable, temperature: float, bins: int) -> dict[str, float]:
    """Every held-out measure of a table at a temperature, by name."""
    measures = held_out_measures(bins, chosen_classes(table))
    return {measure.name: measure.at(table, temperature) for measure in measures}

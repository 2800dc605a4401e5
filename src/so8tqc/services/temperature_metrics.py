"""What a calibration puts on record: the summary that ships, and the details for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from so8tqc.config import CalibrateOptions
from so8tqc.metrics.calibration import reliability_bins
from so8tqc.metrics.temperature import FloatArray, TemperatureTable
from so8tqc.metrics.temperature_fit import Change
from so8tqc.metrics.temperature_measures import NLL
from so8tqc.services.holdout import Split
from so8tqc.services.temperature_verdict import Calibration, held_out_measures
from so8tqc.sources.protocol import EncodedText


def temperature_summary(calibration: Calibration, options: CalibrateOptions) -> dict[str, object]:
    """What ``temperature_config.json`` and the record share."""
    fit = calibration.fit
    fitted, used = calibration.fitted, calibration.used
    return {
        "temperature": calibration.temperature,
        "fitted": fit.temperature,
        "ci95": fit.ci95,
        "significant": calibration.significant,
        "objective": options.objective,
        "judged_by": calibration.judged_by,
        "at_bound": fit.at_bound,
        "converged": fit.converged,
        "bounds": options.bounds,
        "before": {name: used[name].before for name in used},
        "after": {name: used[name].after for name in used},
        "at_fitted": {name: fitted[name].after for name in fitted},
        "change": {name: _change(fitted[name]) for name in fitted},
        "tokens": {"fit": len(calibration.fit_table), "holdout": len(calibration.holdout_table)},
    }


def _change(change: Change) -> dict[str, object]:
    return {"difference": change.difference, "ci95": change.ci95}


def temperature_details(
    calibration: Calibration, texts: Sequence[EncodedText], split: Split, options: CalibrateOptions
) -> dict[str, object]:
    """What only the record holds."""
    held, fit = calibration.holdout_table, calibration.fit
    reference = calibration.reference
    return {
        "entropy": {
            "before": float(held.at(1.0).entropy.mean()),
            "fitted": float(held.at(fit.temperature).entropy.mean()),
            "reference": None if reference is None else float(reference.at(1.0).entropy.mean()),
        },
        "reference": None if reference is None else _values(reference, 1.0, options.bins),
        "curve": {
            "temperature": fit.grid,
            "objective": fit.curve,
            "nll_fit": [NLL.at(calibration.fit_table, float(t)) for t in fit.grid],
            "nll_holdout": [NLL.at(held, float(t)) for t in fit.grid],
        },
        "reliability": {
            "before": _reliability(held, 1.0, options.bins),
            "fitted": _reliability(held, fit.temperature, options.bins),
        },
        "groups": _group_rows(calibration, texts, split, options.bins),
        "split": {
            "fit": list(calibration.fit_table.texts),
            "holdout": list(held.texts),
        },
    }


def _reliability(table: TemperatureTable, temperature: float, bins: int) -> dict[str, object]:
    data = reliability_bins(table.at(temperature).confidence, table.correct, bins)
    return {
        "edges": data.edges,
        "count": data.count,
        "confidence": _or_null(data.confidence),
        "accuracy": _or_null(data.accuracy),
    }


def _or_null(means: FloatArray) -> list[float | None]:
    """Means of empty bins are NaN, which JSON does not have."""
    return [None if np.isnan(mean) else float(mean) for mean in means]


def _group_rows(
    calibration: Calibration, texts: Sequence[EncodedText], split: Split, bins: int
) -> list[dict[str, object]]:
    """Held-out measures of each language and category, before and at the fitted temperature."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, index in enumerate(split.holdout):
        text = texts[int(index)]
        groups.setdefault((text.language, text.category), []).append(number)
    rows: list[dict[str, object]] = []
    for (language, category), members in sorted(groups.items()):
        table = calibration.holdout_table.select(np.array(members, dtype=np.intp))
        rows.append(
            {
                "language": language,
                "category": category,
                "texts": len(members),
                "tokens": len(table),
                "before": _values(table, 1.0, bins),
                "fitted": _values(table, calibration.fit.temperature, bins),
            }
        )
    return rows


def _values(table: TemperatureTable, temperature: float, bins: int) -> dict[str, float]:
    """Every held-out measure of a table at a temperature, by name."""
    return {measure.name: measure.at(table, temperature) for measure in held_out_measures(bins)}

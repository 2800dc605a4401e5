"""Fit a temperature on some texts, judge it on others: numbers in, verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from so8tqc.config import CalibrateOptions
from so8tqc.errors import InputError
from so8tqc.metrics.temperature import FloatArray, TemperatureTable
from so8tqc.metrics.temperature_fit import Change, TemperatureFit, change, fit_temperature
from so8tqc.metrics.temperature_measures import (
    BRIER,
    CONFIDENCE_VARIANCE,
    NLL,
    Measure,
    adaptive_ece,
    ece,
    entropy_mismatch,
)
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, judge
from so8tqc.services.holdout import Split
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.temperatures import walk_temperatures

JUDGED = ("nll", "ece", "brier")
"""Measures that a temperature in use may not make worse."""

_UNITS = {"nll": "nats"}


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature and what held-out texts say about it.

    Attributes:
        fit: on the fit texts.
        temperature: the one to use: the fitted one if significant, else 1.
        significant: the held-out gain's interval excludes zero, and no bound chose the fit.
        judged_by: the measure whose gain decides.
        fitted: measure → its change from T = 1 to the fitted temperature, held-out.
        used: the same for the temperature to use.
        fit_table, holdout_table: per-token data of either side.
        reference: the reference model's held-out tokens at T = 1, None if there is none.
    """

    fit: TemperatureFit
    temperature: float
    significant: bool
    judged_by: str
    fitted: Mapping[str, Change]
    used: Mapping[str, Change]
    fit_table: TemperatureTable
    holdout_table: TemperatureTable
    reference: TemperatureTable | None


def held_out_measures(bins: int) -> tuple[Measure, ...]:
    """What is reported of held-out texts."""
    return (NLL, ece(bins), adaptive_ece(bins), BRIER)


def calibrate_source(
    source: LogitSource,
    texts: Sequence[EncodedText],
    split: Split,
    options: CalibrateOptions,
    *,
    reference: LogitSource | None = None,
    progress: Progress = SILENT,
) -> Calibration:
    """Fit and judge a temperature for any logit source, in one pass over it.

    The gain that decides is in the objective's own measure for ``nll``, ``ece`` and ``brier``;
    matching entropies or confidences has no optimum in the data, so ``nll`` decides there.

    Args:
        source: the model whose temperature is fitted.
        texts: token ids of all texts.
        split: which of them are fitted on and which judge.
        options: objective, bounds, bins, resampling.
        reference: a model over the same vocabulary; needed by the objective ``entropy``.
        progress: told about tokens.

    Raises:
        InputError: the vocabularies differ.
        DataError: non-finite logits or token ids outside the vocabulary.
    """
    if reference is not None and reference.vocab_size != source.vocab_size:
        raise InputError(
            f"{source.name} has {source.vocab_size} vocabulary entries, {reference.name} has "
            f"{reference.vocab_size}: they cannot be compared",
            remedy="Give the model that the GGUF file was made from.",
        )
    table = walk_temperatures(source, texts, options.bounds, progress, f"measuring {source.name}")
    original = (
        walk_temperatures(reference, texts, (1.0, 1.0), progress, f"measuring {reference.name}")
        if reference is not None
        else None
    )
    fit_table, holdout = table.select(split.fit), table.select(split.holdout)
    entropies = original.select(split.fit).at(1.0).entropy if original is not None else None
    fit = fit_temperature(
        fit_table,
        _objective(options, entropies),
        resamples=options.resamples,
        seed=options.seed,
    )
    fitted = _changes(holdout, fit.temperature, options)
    judged_by = options.objective if options.objective in fitted else "nll"
    significant = fitted[judged_by].better and not fit.at_bound
    return Calibration(
        fit=fit,
        temperature=fit.temperature if significant else 1.0,
        significant=significant,
        judged_by=judged_by,
        fitted=fitted,
        used=fitted if significant else _changes(holdout, 1.0, options),
        fit_table=fit_table,
        holdout_table=holdout,
        reference=original.select(split.holdout) if original is not None else None,
    )


def temperature_checks(calibration: Calibration) -> list[Check]:
    """``calibration.nll``, ``.ece``, ``.brier``: using the temperature makes nothing worse.

    The value is the held-out change, after − before, of the temperature *in use*; the target is
    zero, the limit the distance from the value to the lower end of its interval: what the
    choice of texts alone could add to a change of zero. So a check fails exactly when the whole
    interval is above zero. A fit that is not significant is not used, changes nothing, and passes.
    """
    return [_check(name, calibration) for name in JUDGED]


def _check(name: str, calibration: Calibration) -> Check:
    used = calibration.used[name]
    label = "Brier score" if name == "brier" else name.upper()
    if calibration.significant:
        detail = (
            f"Held-out {label} {used.before:.4f} → {used.after:.4f} at T = "
            f"{calibration.temperature:.3f}; it fails if the whole interval of the change is above "
            "zero."
        )
    else:
        detail = (
            f"Held-out {label} stays {used.before:.4f}: T = 1 is used, the fitted "
            f"{calibration.fit.temperature:.3f} is not."
        )
    return judge(
        f"calibration.{name}",
        used.difference,
        used.margin,
        unit=_UNITS.get(name, ""),
        ci95=used.ci95,
        target=0.0,
        detail=detail,
    )


def _objective(options: CalibrateOptions, reference_entropy: FloatArray | None) -> Measure:
    match options.objective:
        case "nll":
            return NLL
        case "brier":
            return BRIER
        case "ece":
            return ece(options.bins)
        case "confidence-variance":
            return CONFIDENCE_VARIANCE
        case "entropy":
            if reference_entropy is None:
                raise InputError(
                    "the objective entropy matches the entropy of a reference, and none is given",
                    remedy="Give --reference MODEL.",
                )
            return entropy_mismatch(reference_entropy)


def _changes(
    table: TemperatureTable, temperature: float, options: CalibrateOptions
) -> dict[str, Change]:
    return {
        measure.name: change(
            table, measure, temperature, resamples=options.resamples, seed=options.seed
        )
        for measure in held_out_measures(options.bins)
    }

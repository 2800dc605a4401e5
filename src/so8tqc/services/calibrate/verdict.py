"""Fit a temperature on some texts, judge it on others: numbers in, verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from so8tqc.config import CalibrateOptions, Objective
from so8tqc.errors import InputError
from so8tqc.metrics.temperature.fit import (
    Change,
    Scored,
    TemperatureFit,
    fit_temperature,
    paired_change,
    scored,
)
from so8tqc.metrics.temperature.measures import (
    BRIER,
    CONFIDENCE_VARIANCE,
    NLL,
    SHARPNESS,
    Measure,
    adaptive_ece,
    classwise_ece,
    ece,
    entropy_mismatch,
)
from so8tqc.metrics.temperature.table import FloatArray, TemperatureTable
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, judge
from so8tqc.services.calibrate.beyond import (
    JudgedEntropy,
    JudgedGroups,
    judge_entropy,
    judge_groups,
)
from so8tqc.services.calibrate.holdout import Split
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.temperatures import frequent_tokens, walk_temperatures

JUDGED = ("nll", "ece", "brier")
"""Measures that a temperature in use may not make worse."""

_CHECKS = {
    "nll": "calibration.nll",
    "ece": "calibration.ece",
    "brier": "calibration.brier",
}
_UNITS = {"nll": "nats"}


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature and what held-out texts say about it.

    Attributes:
        fit: on the fit texts, by the objective that was asked for.
        objectives: the same by every objective that the data allow.
        temperature: the one to use: the fitted one if significant, else 1.
        significant: the held-out gain's interval excludes zero, and no bound chose the fit.
        judged_by: the measure whose gain decides.
        fitted: measure → its change from T = 1 to the fitted temperature, held-out.
        used: the same for the temperature to use; of the file that ships, once it is measured.
        in_use: held-out tokens at the temperature to use; of the file that ships, likewise.
        groups: by language and by category.
        entropy: T(H) = a + b·H.
        fit_table, holdout_table: per-token data of either side.
        reference: the reference model's held-out tokens at T = 1, None if there is none.
    """

    fit: TemperatureFit
    objectives: Mapping[Objective, TemperatureFit]
    temperature: float
    significant: bool
    judged_by: str
    fitted: Mapping[str, Change]
    used: Mapping[str, Change]
    in_use: Scored
    groups: Mapping[str, JudgedGroups]
    entropy: JudgedEntropy
    fit_table: TemperatureTable
    holdout_table: TemperatureTable
    reference: TemperatureTable | None


def held_out_measures(bins: int, classes: int) -> tuple[Measure, ...]:
    """What is reported of held-out texts.

    Args:
        bins: of every ECE.
        classes: how many vocabulary entries the tables chose.
    """
    return (NLL, ece(bins), adaptive_ece(bins), classwise_ece(bins, classes), BRIER, SHARPNESS)


def changes(before: Scored, after: Scored, options: CalibrateOptions) -> dict[str, Change]:
    """Every held-out measure of two sides over the same texts, by name."""
    return {
        measure.name: paired_change(
            before, after, measure, resamples=options.resamples, seed=options.seed
        )
        for measure in held_out_measures(options.bins, chosen_classes(before.table))
    }


def chosen_classes(table: TemperatureTable) -> int:
    """How many vocabulary entries a table chose."""
    return 0 if table.classes is None else table.classes.u.shape[1]


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
    classes = frequent_tokens(texts, options.classes)
    table = walk_temperatures(
        source, texts, options.bounds, progress, f"measuring {source.name}", classes
    )
    original = (
        walk_temperatures(
            reference, texts, (1.0, 1.0), progress, f"measuring {reference.name}", classes
        )
        if reference is not None
        else None
    )
    return judge_tables(table, original, texts, split, options)


def judge_tables(
    table: TemperatureTable,
    original: TemperatureTable | None,
    texts: Sequence[EncodedText],
    split: Split,
    options: CalibrateOptions,
) -> Calibration:
    """Fit and judge temperatures from per-token data of all texts.

    Args:
        table: of the model whose temperature is fitted.
        original: of the reference over the same tokens, if there is one.
        texts: what the tables are of.
        split: which texts are fitted on and which judge.
        options: as in :func:`calibrate_source`.
    """
    fit_table, holdout = table.select(split.fit), table.select(split.holdout)
    entropies = original.select(split.fit).at(1.0).entropy if original is not None else None
    objectives = {
        name: fit_temperature(fit_table, measure, resamples=options.resamples, seed=options.seed)
        for name, measure in _objectives(options, entropies).items()
    }
    if options.objective not in objectives:
        raise InputError(
            "the objective entropy matches the entropy of a reference, and none is given",
            remedy="Give --reference MODEL.",
        )
    fit = objectives[options.objective]
    fitted = changes(scored(holdout), scored(holdout, fit.temperature), options)
    judged_by = options.objective if options.objective in fitted else "nll"
    significant = fitted[judged_by].better and not fit.at_bound
    temperature = fit.temperature if significant else 1.0
    in_use = scored(holdout, temperature)
    overall = objectives["nll"].temperature
    return Calibration(
        fit=fit,
        objectives=objectives,
        temperature=temperature,
        significant=significant,
        judged_by=judged_by,
        fitted=fitted,
        used=fitted if significant else changes(scored(holdout), in_use, options),
        in_use=in_use,
        groups={
            axis: judge_groups(
                fit_table,
                holdout,
                [getattr(texts[i], axis) for i in split.fit],
                [getattr(texts[i], axis) for i in split.holdout],
                overall,
                options,
            )
            for axis in ("language", "category")
        },
        entropy=judge_entropy(fit_table, holdout, overall, options),
        fit_table=fit_table,
        holdout_table=holdout,
        reference=original.select(split.holdout) if original is not None else None,
    )


def shipped(calibration: Calibration, applied: Scored, options: CalibrateOptions) -> Calibration:
    """The same calibration with the numbers of the file that ships in place of predicted ones."""
    return replace(
        calibration,
        in_use=applied,
        used=changes(scored(calibration.holdout_table), applied, options),
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
        _CHECKS[name],
        used.difference,
        used.margin,
        unit=_UNITS.get(name, ""),
        ci95=used.ci95,
        target=0.0,
        detail=detail,
    )


def _objectives(
    options: CalibrateOptions, reference_entropy: FloatArray | None
) -> dict[Objective, Measure]:
    """Every objective that can be computed, in the order of the option's choices."""
    measures: dict[Objective, Measure] = {
        "nll": NLL,
        "brier": BRIER,
        "ece": ece(options.bins),
        "confidence-variance": CONFIDENCE_VARIANCE,
    }
    if reference_entropy is not None:
        measures["entropy"] = entropy_mismatch(reference_entropy)
    return {name: measures[name] for name in get_args(Objective) if name in measures}

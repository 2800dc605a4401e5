"""Calibrate: fit one temperature on a GGUF's own logits, judge it, write it down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from pydantic import JsonValue

from so8tqc.artifacts import file_ref, make_directory, remove_leftovers, write_text
from so8tqc.config import CalibrateConfig
from so8tqc.errors import ConfigError, DataError, ModelError
from so8tqc.llama.gguf_rewrite import (
    CALIBRATION_TEMPERATURE,
    SAMPLING_TEMPERATURE,
    set_float_values,
)
from so8tqc.metrics.bootstrap import LEAST_TEXTS
from so8tqc.progress import SILENT, Progress
from so8tqc.records import FileRef, Record, Stopwatch, jsonable, overall, versions
from so8tqc.reports.reliability import write_reliability
from so8tqc.services.holdout import Split, split_texts
from so8tqc.services.temperature_metrics import temperature_details, temperature_summary
from so8tqc.services.temperature_verdict import (
    Calibration,
    calibrate_source,
    temperature_checks,
)
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.texts import encode, load_texts, load_tokenizer

CONFIG_FILE = "temperature_config.json"
REPORT_FILE = "reliability.html"
LEAST_TOKENS = 500


def calibrate(config: CalibrateConfig, progress: Progress = SILENT) -> Record:
    """Fit a temperature on some texts, judge it on the others, write ``temperature_config.json``.

    Also writes ``reliability.html`` and, with ``apply=metadata`` and a significant gain,
    ``NAME-calibrated.gguf``: the same file with the temperature among its key-values.

    Record metrics: ``temperature`` (to use), ``fitted``, ``ci95``, ``objective``, ``judged_by``,
    ``significant``, ``at_bound``, ``converged``, ``bounds``; held-out ``before``, ``after`` (at the
    temperature to use), ``at_fitted``, each {nll, ece, adaptive_ece, brier}; ``change`` (measure →
    {difference, ci95} from T = 1 to the fitted one); ``entropy``; ``reference`` (its held-out
    values, or null); ``curve`` {temperature, objective, nll_fit, nll_holdout}; ``reliability``
    {before, fitted}, each {edges, count, confidence, accuracy}; ``groups`` (held-out rows by
    language and category); ``tokens`` and ``split`` {fit, holdout}; ``vocab_size``.

    Raises:
        ConfigError: the objective ``entropy`` without a reference.
        ModelError: model or tokenizer are unusable.
        DataError: too little text, non-finite logits, or another model's tokenizer.
        ToolError: no libllama, or nothing can be written.
    """
    watch = Stopwatch()
    _preflight(config)
    texts = encode(load_texts(config.data), load_tokenizer(config.tokenizer), config.max_tokens)
    split = split_texts(texts, config.holdout, config.seed)
    _refuse_small(texts, split, config)
    with ExitStack() as stack:
        source = stack.enter_context(closing(_open(config.gguf, config)))
        reference = (
            stack.enter_context(closing(_open(config.reference, config)))
            if config.reference is not None
            else None
        )
        calibration = calibrate_source(
            source, texts, split, config, reference=reference, progress=progress
        )
        vocab_size = source.vocab_size
    summary = temperature_summary(calibration, config)
    details = temperature_details(calibration, texts, split, config)
    inputs = {"gguf": file_ref(config.gguf)}
    if config.reference is not None:
        inputs["reference"] = file_ref(config.reference)
    outputs = _write(config, calibration, summary, inputs["gguf"], progress)
    checks = temperature_checks(calibration)
    record = Record(
        kind="calibrate",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics={
            key: jsonable(value)
            for key, value in {**summary, **details, "vocab_size": vocab_size}.items()
        },
        notices=tuple(_notices(calibration, config)),
        inputs=inputs,
        outputs=outputs,
        config=config.model_dump(mode="json"),
        versions=versions("llama-cpp-python", "numpy", "scipy", "gguf"),
        run=watch.info(),
    )
    report = config.out / REPORT_FILE
    write_reliability(record, report)
    return record.model_copy(update={"outputs": {**outputs, "reliability": file_ref(report)}})


def _preflight(config: CalibrateConfig) -> None:
    if config.objective == "entropy" and config.reference is None:
        raise ConfigError(
            "the objective entropy matches the entropy of a reference, and none is given",
            where="reference",
            remedy="Give --reference MODEL.",
        )
    if not config.gguf.is_file():
        raise ModelError("no such GGUF file", where=str(config.gguf))
    make_directory(config.out)
    remove_leftovers(config.out)


def _tokens(texts: Sequence[EncodedText], indices: Sequence[int]) -> int:
    """Scored tokens: all but the first of each text."""
    return sum(texts[i].tokens.size - 1 for i in indices)


def _refuse_small(texts: Sequence[EncodedText], split: Split, config: CalibrateConfig) -> None:
    held = _tokens(texts, split.holdout.tolist())
    if held < LEAST_TOKENS and not config.allow_small:
        raise DataError(
            f"{held} held-out tokens are too few to judge a temperature ({LEAST_TOKENS} at least)",
            where=", ".join(config.data),
            remedy="Give more text, or --allow-small.",
        )


def _open(path: Path, config: CalibrateConfig) -> LogitSource:
    if path.is_dir():
        return HFSource(HFModel.load(path), path.name)
    return GGUFSource(path, path.name, context=config.max_tokens)


def _write(
    config: CalibrateConfig,
    calibration: Calibration,
    summary: dict[str, object],
    gguf: FileRef,
    progress: Progress,
) -> dict[str, FileRef]:
    outputs: dict[str, FileRef] = {}
    calibrated = config.out / f"{config.gguf.stem}-calibrated.gguf"
    if config.apply == "metadata":
        calibrated.unlink(missing_ok=True)  # of an earlier run: it may not outlive its verdict
        if calibration.significant:
            keys = {CALIBRATION_TEMPERATURE: calibration.temperature}
            if config.sampling_temp:
                keys[SAMPLING_TEMPERATURE] = calibration.temperature
            set_float_values(config.gguf, calibrated, keys, progress)
            outputs["calibrated"] = file_ref(calibrated)
    document: JsonValue = jsonable(
        {
            "schema_version": 1,
            **summary,
            "model": {"file": config.gguf.name, "sha256": gguf.sha256},
            "applied_to": calibrated.name if "calibrated" in outputs else None,
        }
    )
    path = config.out / CONFIG_FILE
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
    outputs["temperature_config"] = file_ref(path)
    return outputs


def _notices(calibration: Calibration, config: CalibrateConfig) -> list[str]:
    fit, notices = calibration.fit, []
    if fit.at_bound:
        notices.append(
            f"The fit ended at the bound T = {fit.temperature:g}: the bound chose it, not the data."
        )
    elif calibration.fitted[calibration.judged_by].ci95 is None:
        notices.append(
            f"T = {fit.temperature:.3f} is not used: its gain cannot be told from chance."
        )
    elif not calibration.significant:
        notices.append(
            f"T = {fit.temperature:.3f} is not used: on held-out text it does not improve "
            f"{calibration.judged_by} beyond what the choice of texts could do."
        )
    if not calibration.significant and config.apply == "metadata":
        notices.append("No calibrated GGUF was written, since there is no temperature to apply.")
    for role, table in (
        ("to fit on", calibration.fit_table),
        ("held out", calibration.holdout_table),
    ):
        count = len(table.texts)
        if count < LEAST_TEXTS:
            notices.append(f"{count} text(s) {role}; an interval needs at least {LEAST_TEXTS}.")
    if not fit.converged:
        notices.append("The minimiser did not converge.")
    return notices

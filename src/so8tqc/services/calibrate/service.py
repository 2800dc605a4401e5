"""Calibrate: fit a temperature on a GGUF's own logits, judge it, write it down, ship it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from pydantic import JsonValue

from so8tqc.closure import versions_of
from so8tqc.config import CalibrateConfig
from so8tqc.disk.atomic import remove_leftovers, write_text
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.disk.temperature_file import TEMPERATURE_FILE
from so8tqc.errors import ConfigError, DataError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.norm import require_scalable_norm
from so8tqc.metrics.bootstrap import LEAST_TEXTS
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.calibrate import AppliedTemperature
from so8tqc.records import FileRef, Record, Stopwatch, jsonable, overall
from so8tqc.services.calibrate.apply import (
    Applied,
    applied_checks,
    applied_path,
    measure_applied,
    proof_logits,
    write_applied,
)
from so8tqc.services.calibrate.beyond import JudgedGroups
from so8tqc.services.calibrate.holdout import Split, split_texts
from so8tqc.services.calibrate.summary import temperature_details, temperature_summary
from so8tqc.services.calibrate.verdict import (
    Calibration,
    calibrate_source,
    shipped,
    temperature_checks,
)
from so8tqc.services.chat_template import template_checks
from so8tqc.services.halves import with_halves
from so8tqc.sources.embedding import with_embedded
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.hub import with_local_paths
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import load_tokenizer
from so8tqc.sources.layerwise.choice import ModelLoader, plain_source
from so8tqc.sources.protocol import EncodedText, LogitSource

LEAST_TOKENS = 500


@exclusive(claim_folder)
def calibrate(config: CalibrateConfig, progress: Progress = SILENT) -> Record:
    """Fit a temperature on some texts, judge it on the others, write ``temperature_config.json``.

    With ``apply`` and a significant gain it also writes ``NAME-calibrated.gguf``, which is then run
    again: what is reported as ``after`` is that file's. ``reliability.html`` and ``.png`` are drawn
    from the record (``services.pages``).

    Record metrics: :class:`so8tqc.record_kinds.calibrate.CalibrateMetrics`.

    Raises:
        ConfigError: the objective ``entropy`` without a reference.
        ModelError: model or tokenizer are unusable, or the final norm cannot carry a temperature.
        DataError: too little text, non-finite logits, or another model's tokenizer.
        ToolError: no libllama, or nothing can be written.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    _preflight(config)
    tokenizer = load_tokenizer(config.tokenizer)
    texts, notices = prepare(
        config.data, tokenizer, config.max_tokens, images=config.images, chat=config.chat
    )
    told = list(notices)
    split = split_texts(texts, config.holdout, config.seed)
    _refuse_small(texts, split, config)
    calibration, applied, vocab_size = _measure(config, texts, split, told, progress)
    inputs = {"gguf": file_ref(config.gguf)}
    if config.reference is not None:
        inputs["reference"] = file_ref(config.reference)
    summary = {
        **temperature_summary(calibration, config),
        "applied": jsonable(_applied(applied, config)),
    }
    outputs = _write(config, summary, inputs["gguf"], applied)
    held = calibration.holdout_table
    checks = with_halves(temperature_checks(calibration), len(held.texts), len(held))
    if config.chat:
        checks += template_checks(config.data, tokenizer, {config.gguf.name: config.gguf})
    if applied is not None:
        checks += applied_checks(applied, calibration.temperature)
    return Record(
        kind="calibrate",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics={
            **summary,
            **temperature_details(calibration, texts, split, config),
            "vocab_size": vocab_size,
        },
        notices=(*told, *_notices(calibration, config)),
        inputs=inputs,
        outputs=outputs,
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _measure(
    config: CalibrateConfig,
    texts: Sequence[EncodedText],
    split: Split,
    told: list[str],
    progress: Progress,
) -> tuple[Calibration, Applied | None, int]:
    """Fit and judge; then write the file that ships and measure it.

    Args:
        config, texts, split, progress: as of :func:`calibrate`.
        told: what is to be said of the reference is added.
    """
    with ExitStack() as stack:
        source = stack.enter_context(closing(_open(config.gguf, config)))
        reference = stack.enter_context(_reference(config, texts, told, progress))
        sources = [source, *([reference] if reference is not None else [])]
        texts = with_embedded(texts, sources, lambda: HFModel.load(config.tokenizer))
        held_out = [texts[i] for i in split.holdout]
        calibration = calibrate_source(
            source, texts, split, config, reference=reference, progress=progress
        )
        vocab_size = source.vocab_size
        if config.apply == "none" or not calibration.significant:
            return calibration, None, vocab_size
        originals = proof_logits(source, held_out)
    path = write_applied(config, calibration.temperature, progress)
    applied = measure_applied(
        path, lambda p: _open(p, config), texts, held_out, calibration, originals, progress
    )
    return shipped(calibration, applied.scored, config), applied, vocab_size


def _applied(applied: Applied | None, config: CalibrateConfig) -> AppliedTemperature | None:
    if applied is None:
        return None
    return AppliedTemperature(
        file=applied.path.name,
        how=config.apply,
        reader_temperature=applied.reader_temperature,
        scale=applied.scale,
        kl=applied.kl,
    )


def _preflight(config: CalibrateConfig) -> None:
    if config.objective == "entropy" and config.reference is None:
        raise ConfigError(
            "the objective entropy matches the entropy of a reference, and none is given",
            where="reference",
            remedy="Give --reference MODEL.",
        )
    file = open_gguf(config.gguf)  # what it cannot read is told before anything is measured
    if config.apply == "norm":
        require_scalable_norm(file)
    remove_leftovers(config.out)
    if config.apply != "none":  # an earlier run's file may not outlive its verdict
        applied_path(config).unlink(missing_ok=True)


def _tokens(texts: Sequence[EncodedText], indices: Sequence[int]) -> int:
    """Scored tokens: all but the first of each text and pictures, or those of its answers."""
    return sum(texts[i].scored.size for i in indices)


def _refuse_small(texts: Sequence[EncodedText], split: Split, config: CalibrateConfig) -> None:
    held = _tokens(texts, split.holdout.tolist())
    if held < LEAST_TOKENS and not config.allow_small:
        raise DataError(
            f"{held} held-out tokens are too few to judge a temperature ({LEAST_TOKENS} at least)",
            where=", ".join(config.data),
            remedy="Give more text, or --allow-small.",
        )


@contextmanager
def _reference(
    config: CalibrateConfig, texts: Sequence[EncodedText], told: list[str], progress: Progress
) -> Iterator[LogitSource | None]:
    """The reference, its layers run where they are run one at a time."""
    path = config.reference
    if path is None:
        yield None
        return
    if not path.is_dir():
        with closing(_open(path, config)) as source:
            yield source
        return
    loader = ModelLoader(config.out / ".layers", stream=config.stream, directories=(path,))
    made = loader.built(
        lambda: plain_source(loader.load(path), path.name), lambda m: (m,), texts, progress
    )
    told += loader.notices
    with closing(made):
        yield made
    loader.finished()


def _open(path: Path, config: CalibrateConfig) -> LogitSource:
    return GGUFSource(path, path.name, context=config.max_tokens)


def _write(
    config: CalibrateConfig,
    summary: dict[str, JsonValue],
    gguf: FileRef,
    applied: Applied | None,
) -> dict[str, FileRef]:
    outputs: dict[str, FileRef] = {}
    if applied is not None:
        outputs["calibrated"] = file_ref(applied.path)
    document: JsonValue = jsonable(
        {
            "schema_version": 1,
            **summary,
            "model": {"file": config.gguf.name, "sha256": gguf.sha256},
            "applied_to": None if applied is None else applied.path.name,
            "applied_sha256": None if applied is None else outputs["calibrated"].sha256,
        }
    )
    path = config.out / TEMPERATURE_FILE
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
    if not calibration.significant and config.apply != "none":
        notices.append("No calibrated GGUF was written, since there is no temperature to apply.")
    for role, table in (
        ("to fit on", calibration.fit_table),
        ("held out", calibration.holdout_table),
    ):
        count = len(table.texts)
        if count < LEAST_TEXTS:
            notices.append(f"{count} text(s) {role}; an interval needs at least {LEAST_TEXTS}.")
    failed = [name for name, other in calibration.objectives.items() if not other.converged]
    if failed:
        notices.append(f"The minimiser did not converge: {', '.join(failed)}.")
    return [*notices, *_beyond_notices(calibration)]


def _ends(groups: JudgedGroups) -> str:
    """The groups with the lowest and the highest temperature."""
    ordered = sorted(groups.temperatures.items(), key=lambda item: item[1].temperature)
    ends = (ordered[0], ordered[-1])
    return " … ".join(f"{group.temperature:.3f} ({label or 'unnamed'})" for label, group in ends)


def _beyond_notices(calibration: Calibration) -> list[str]:
    notices = [
        f"Temperatures by {axis} gain a further {-groups.nll.difference:.4f} nats a token on "
        f"held-out text: {_ends(groups)} (group_temperatures)."
        for axis, groups in calibration.groups.items()
        if groups.significant
    ]
    if calibration.entropy.significant:
        rule = calibration.entropy.rule
        notices.append(
            f"T(H) = {rule.a:.3f} {rule.b:+.3f}·H gains a further "
            f"{-calibration.entropy.nll.difference:.4f} nats a token on held-out text: "
            "so8tqc.AdaptiveTemperature applies it."
        )
    return notices

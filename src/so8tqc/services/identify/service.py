"""Identify: which reading of a gate file is the trained one, by recorded logits or by its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from so8tqc.config import IdentifyConfig
from so8tqc.disk.digests import file_ref
from so8tqc.errors import ConfigError
from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.identify import IdentifyMetrics
from so8tqc.records import Check, FileRef, Record, Stopwatch, judge, versions
from so8tqc.rotations.enums import Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.read import open_raw
from so8tqc.rotations.readings import Reading
from so8tqc.rotations.rotation_set import HEAD
from so8tqc.services.identify.answer import Answer, answer_by_capture, answer_by_text, certain_facts
from so8tqc.services.identify.by_capture import CaptureEvidence, weigh_by_capture
from so8tqc.services.identify.by_text import TextEvidence, weigh_by_text
from so8tqc.services.identify.candidates import (
    Candidate,
    Candidates,
    candidates,
    some_reading,
)
from so8tqc.services.identify.commands import reading_flags, shell
from so8tqc.services.identify.walk import (
    NONE,
    against_base,
    against_capture,
    extent,
    recorded_texts,
    storage_rounding,
    training_windows,
)
from so8tqc.services.trained_base import trained_base
from so8tqc.sources.capture import Capture, check_same_tokens, open_capture
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.builtin import resolve_model, resolve_rotations
from so8tqc.sources.inputs.hub import with_local_paths
from so8tqc.sources.inputs.texts import data_paths, encode, load_texts, load_tokenizer
from so8tqc.sources.protocol import EncodedText

Rows = dict[str, dict[str, object]]


def identify(config: IdentifyConfig, progress: Progress = SILENT) -> Record:
    """Find the reading that was trained, and write it as a gate file that states its facts.

    Record metrics: ``record_kinds.identify.IdentifyMetrics``.

    Raises:
        ConfigError: ``out`` is no .safetensors, or ``orthogonalize`` is asked for.
        InputError: model, rotations, capture or data are unusable or do not belong together.
    """
    watch = Stopwatch()
    if config.out is not None and config.out.suffix != ".safetensors":
        raise ConfigError("a gate file's name ends in .safetensors", where=str(config.out))
    if config.rotation_options.orthogonalize != "as-trained":
        raise ConfigError("gates are identified as they were trained", where="orthogonalize")
    config = with_local_paths(config, progress)
    base = resolve_model(str(config.base), progress)
    rotations = resolve_rotations(str(config.rotations), progress)
    capture = None if config.capture is None else open_capture(config.capture)
    raw = open_raw(rotations, config.rotation_options)
    settled = some_reading(raw, config.rotation_options)
    near = (config.report or config.out or Path("identify")).with_suffix(".trained")
    with trained_base(base, rotations, settled, near) as trained:
        known = candidates(trained.directory, raw, rotations, config.rotation_options)
        texts = _texts(config, trained.directory, capture)
        model = HFModel.load(
            trained.directory, dtype=config.compute_dtype, device_map=config.device_map
        )
        try:
            if capture is None:
                answer, rows, extra = _by_text(config, model, known, texts, progress)
            else:
                answer, rows, extra = _by_capture(config, model, known, capture, texts, progress)
        finally:
            model.close()
        beside = trained.directory != base and (settled.site is not Site.HEAD or bool(raw.weights))
    outputs = _written(config, known, answer, rotations)
    check = _check(answer)
    metrics = IdentifyMetrics.model_validate({**_facts(answer, known), **extra, "readings": rows})
    return Record(
        kind="identify",
        verdict=check.verdict,
        checks=(check,),
        metrics=metrics.as_json(),
        notices=(
            *trained.notices,
            *_notices(known, answer),
            *_what_to_type(config, answer, beside, base, rotations),
        ),
        inputs=_inputs(config, base, rotations),
        outputs=outputs,
        config=config.model_dump(mode="json"),
        versions=versions("torch", "transformers", "numpy", "numba"),
        run=watch.info(),
    )


def _texts(config: IdentifyConfig, base: Path, capture: Capture | None) -> tuple[EncodedText, ...]:
    if capture is None:
        tokenizer = load_tokenizer(config.tokenizer or base)
        return training_windows(config.data, tokenizer, config.ctx, config.windows)
    if "data" in config.model_fields_set:
        tokenizer = load_tokenizer(config.tokenizer or base)
        check_same_tokens(capture, encode(load_texts(config.data), tokenizer, None))
    return recorded_texts(capture, config.ctx, config.windows)


def _by_text(
    config: IdentifyConfig,
    model: HFModel,
    known: Candidates,
    texts: tuple[EncodedText, ...],
    progress: Progress,
) -> tuple[Answer, Rows, dict[str, object]]:
    tables = against_base(model, known.different, texts, progress)
    found = weigh_by_text(tables, NONE, resamples=config.resamples, seed=config.seed)
    answer = answer_by_text(found, known)
    names = sorted(found.measured, key=lambda name: found.measured[name].nll)
    best = answer.identified.name if answer.identified else names[0]
    rows = {
        name: {
            **_row(name, known, answer),
            **asdict(found.measured[name]),
            **_to(best, name, found),
        }
        for name in names
    }
    return answer, rows, {"best": best, "critical": found.differences.critical, **_extent(tables)}


def _by_capture(
    config: IdentifyConfig,
    model: HFModel,
    known: Candidates,
    capture: Capture,
    texts: tuple[EncodedText, ...],
    progress: Progress,
) -> tuple[Answer, Rows, dict[str, object]]:
    tables = against_capture(model, known.different, capture, texts, progress)
    by_name = {candidate.name: candidate.rotations for candidate in known.different}
    found = weigh_by_capture(
        tables,
        NONE,
        lambda name: storage_rounding(model, by_name.get(name), capture, texts, progress),
        resamples=config.resamples,
        seed=config.seed,
    )
    answer = answer_by_capture(found, known)
    names = sorted(found.distances, key=lambda name: found.distances[name].kl)
    best = answer.identified.name if answer.identified else found.nearest
    rows = {
        name: {
            **_row(name, known, answer),
            "kl": found.distances[name].kl,
            "kl_ci95": found.distances[name].ci95,
            **_to(best, name, found),
        }
        for name in names
    }
    more = {"critical": found.differences.critical, "limit": found.limit}
    return answer, rows, {"best": best, **more, **_extent(tables)}


def _to(best: str, name: str, found: TextEvidence | CaptureEvidence) -> dict[str, object]:
    """How much larger than that of the best its measure is."""
    if name == best:
        return {}
    rival = found.differences.of(name, best)
    return {
        "difference": rival.difference,
        "difference_ci95": rival.ci95,
        "needed": rival.needed,
    }


def _extent(tables: Mapping[str, TokenTable]) -> dict[str, object]:
    texts, tokens = extent(tables)
    return {"texts": texts, "tokens": tokens}


def _row(name: str, known: Candidates, answer: Answer) -> dict[str, object]:
    candidate = next((c for c in known.different if c.name == name), None)
    if candidate is None:
        return {"state": "", "why": "", "same": []}
    return {
        **{k: str(v) for k, v in asdict(candidate.reading).items()},
        "state": answer.states[name],
        "why": answer.reasons.get(name, ""),
        "same": [str(reading) for reading in candidate.same],
    }


def _facts(answer: Answer, known: Candidates) -> dict[str, object]:
    return {
        "identified": answer.identified.name if answer.identified else None,
        "sentence": answer.sentence,
        "by": list(answer.by),
        "certain": certain_facts(answer, known),
        "stated": None if known.stated is None else str(known.stated),
        "impossible": {str(reading): why for reading, why in known.impossible.items()},
        "still": [str(reading) for reading in known.still],
    }


def _check(answer: Answer) -> Check:
    return judge("identify.reading", answer.supported, 1, comparison="==", detail=answer.sentence)


def _notices(known: Candidates, answer: Answer) -> list[str]:
    notices = list(known.raw.notices)
    for candidate in known.different:
        if candidate.same:
            same = "; ".join(map(str, candidate.same))
            notices.append(f"{candidate.name} gives the same rotations as {same}: run once.")
    if known.still:
        notices.append(f"These readings turn nothing: {'; '.join(map(str, known.still))}.")
    for why, readings in _by_reason(known.impossible).items():
        notices.append(f"No rotations come of {'; '.join(readings)}: {why}.")
    found = answer.identified
    if found is not None and known.stated is not None and not found.means(known.stated):
        notices.append(f"The file states {known.stated}: that is not what was trained.")
    return notices


def _what_to_type(
    config: IdentifyConfig, answer: Answer, beside: bool, base: Path, rotations: Path
) -> list[str]:
    """How to bake what was found.

    Args:
        config: of ``identify``.
        answer: what was found.
        beside: whether other weights may matter, too, which a gate file leaves out.
        base, rotations: where they are on this machine.
    """
    if answer.identified is None:
        return []
    flags = reading_flags(answer.identified.reading, config.rotation_options)
    command: list[object] = ["bake", base, rotations, "--out", "baked", *flags]
    if config.out is not None and not beside:
        command = ["bake", base, config.out, "--out", "baked"]
    left_out = f"{config.out} holds the gates alone; what lies beside them is in {rotations.name}."
    told = [left_out] if config.out is not None and beside else []
    return [*told, f"To bake it: {shell(*command)}"]


def _by_reason(impossible: Mapping[Reading, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for reading, why in impossible.items():
        reasons.setdefault(why, []).append(str(reading))
    return reasons


def _written(
    config: IdentifyConfig, known: Candidates, answer: Answer, rotations: Path
) -> dict[str, FileRef]:
    if config.out is None or answer.identified is None:
        return {}
    write_identified(config.out, known, answer.identified, answer.by, rotations)
    return {"rotations": file_ref(config.out)}


def write_identified(
    out: Path, known: Candidates, found: Candidate, by: tuple[str, ...], source: Path
) -> None:
    """Write a gate file that states what was found, and by what.

    theta keeps its bits: float32 where that holds every value, else float64.
    """
    from importlib.metadata import version

    theta = {
        target: narrow if np.array_equal(narrow := value.astype(np.float32), value) else value
        for target, value in known.raw.theta.items()
    }
    if len({value.dtype for value in theta.values()}) > 1:
        theta = dict(known.raw.theta)
    reading = found.reading
    identified = {
        "by": list(by),
        "source": source.name,
        "sha256": file_ref(source).sha256,
        "so8tqc": version("so8tqc"),
    }
    write_native(
        out,
        theta,
        parametrization=reading.parametrization,
        convention=reading.convention,
        site=reading.site,
        pet=_pet(known.raw.metadata),
        strength=known.raw.strength.get(HEAD),
        metadata={"so8t.identified": json.dumps(identified, sort_keys=True)},
    )


def _pet(metadata: Mapping[str, str]) -> Mapping[str, JsonValue] | None:
    """The PET record that the source declares."""
    declared = metadata.get("pet", "none")
    return None if declared == "none" else json.loads(declared)


def _inputs(config: IdentifyConfig, base: Path, rotations: Path) -> dict[str, FileRef]:
    inputs = {"base": file_ref(base), "rotations": file_ref(rotations)}
    if config.capture is not None:
        return inputs | {"capture": file_ref(config.capture)}
    return inputs | {f"data: {path.name}": file_ref(path) for path in data_paths(config.data)}

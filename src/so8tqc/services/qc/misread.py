"""When base and rotations do not give the recorded logits: which reading of the rotations does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from so8tqc.check_guide import AS_TRAINED, DIAGNOSES, JUDGE_AGAIN, SEE_READINGS
from so8tqc.config import QCConfig, RotationOptions
from so8tqc.disk.parts import model_stem
from so8tqc.gguf.file import is_gguf
from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import Progress
from so8tqc.records import Diagnosis
from so8tqc.rotations.read import open_raw
from so8tqc.rotations.readings import Reading
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.identify.answer import Answer, answer_by_capture
from so8tqc.services.identify.by_capture import weigh_by_capture
from so8tqc.services.identify.candidates import candidates
from so8tqc.services.identify.commands import NOT_FACTS, reading_flags, shell
from so8tqc.services.identify.walk import (
    NONE,
    against_capture,
    recorded_texts,
    storage_rounding,
)
from so8tqc.services.qc.capture import disagrees
from so8tqc.services.qc.models import Reference, load_model
from so8tqc.services.qc.planned import base_of
from so8tqc.sources.capture import Capture

MISREAD = DIAGNOSES["misread"].finding
NOT_THESE = "No reading of the rotations gives the recorded logits"

_TEXTS = 16
_TOKENS = 128
"""Of each text; a wrong reading shows in the first."""


def read_anew(
    reference: Reference,
    capture: Capture,
    to_gated: TokenTable | None,
    floor: TokenTable | None,
    progress: Progress,
) -> Answer | None:
    """What the capture says of all readings, where it disagrees with the one in use.

    Args:
        reference: base and rotations as they are read.
        capture: the recorded logits.
        to_gated: base plus rotations against the capture; None without rotations.
        floor: the candidates' noise floor.
        progress: told about the texts.
    """
    config = reference.config
    if to_gated is None or config.rotations is None or not disagrees(to_gated, floor):
        return None
    told = config.rotation_options
    options = RotationOptions(**{name: getattr(told, name) for name in NOT_FACTS})
    raw = open_raw(config.rotations, options)
    known = candidates(base_of(config), raw, config.rotations, options)
    texts = recorded_texts(capture, min(config.max_tokens or _TOKENS, _TOKENS), _TEXTS)
    model = load_model(config, base_of(config))
    by_name = {candidate.name: candidate.rotations for candidate in known.different}
    try:
        found = weigh_by_capture(
            against_capture(model, known.different, capture, texts, progress),
            NONE,
            lambda name: storage_rounding(model, by_name.get(name), capture, texts, progress),
            resamples=config.resamples,
            seed=config.seed,
        )
    finally:
        model.close()
    return answer_by_capture(found, known)


def diagnose_reading(
    answer: Answer, config: QCConfig, rotations: RotationSet, failed: Sequence[str]
) -> Diagnosis | None:
    """What a capture says of the rotations' reading; None if it confirms it.

    Args:
        answer: see :func:`read_anew`.
        config: as the user gave it.
        rotations: as they were read.
        failed: candidates that are not what was recorded; the others need no other bake.
    """
    if answer.identified is None:
        command = ["identify", base_of(config), config.rotations, "--capture", config.reference]
        return Diagnosis(
            code="misread",
            text=f"{NOT_THESE}: {answer.sentence}",
            remedy=f"{SEE_READINGS} {shell(*command)}",
        )
    if answer.identified.means(reading_of(rotations)):
        return None
    used = f"{reading_of(rotations)} was used. {answer.sentence}"
    reading = answer.identified.reading
    remedy = (
        f"{AS_TRAINED} {bake_command(config, reading, failed[0])}"
        if failed
        else (f"{JUDGE_AGAIN} {_judge_command(config, reading)}")
    )
    return Diagnosis(code="misread", text=f"{MISREAD}: {used}", remedy=remedy)


def with_commands(
    found: Sequence[Diagnosis], config: QCConfig, reading: Reading, names: dict[str, Path]
) -> list[Diagnosis]:
    """Diagnoses whose remedy is a bake as in training, with the command that makes it."""

    def filled(diagnosis: Diagnosis) -> Diagnosis:
        name = next((name for name in names if f" of {name})" in diagnosis.text), "")
        command = bake_command(config, reading, str(names.get(name, "baked")))
        return diagnosis.model_copy(update={"remedy": f"{AS_TRAINED} {command}"})

    return [filled(each) if each.remedy == AS_TRAINED else each for each in found]


def reading_of(rotations: RotationSet) -> Reading:
    """How a set was read."""
    return Reading(rotations.parametrization, rotations.convention, rotations.site)


def bake_command(config: QCConfig, reading: Reading, candidate: str) -> str:
    """One line that bakes the base by a reading, beside a candidate."""
    path = Path(candidate)
    out = path.with_name(f"{model_stem(path) if is_gguf(path) else path.name}-again")
    flags = reading_flags(reading, config.rotation_options)
    return shell("bake", *_base_and_rotations(config), "--out", out, *flags)


def _judge_command(config: QCConfig, reading: Reading) -> str:
    given = ["--reference", config.reference]
    given += [] if config.base is None else ["--base", config.base]
    given += [] if config.rotations is None else ["--rotations", config.rotations]
    for candidate in config.candidates:
        given += ["--candidate", candidate]
    flags = reading_flags(reading, config.rotation_options)
    return shell("qc", *given, "--out", f"{config.out}-again", *flags)


def _base_and_rotations(config: QCConfig) -> list[Path]:
    base, rotations = base_of(config), config.rotations
    return [base] if rotations is None or rotations == base else [base, rotations]

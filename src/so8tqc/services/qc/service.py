"""QC: judge candidates against a reference, from files and from logits, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from so8tqc.adapters.plan import AdapterPlan
from so8tqc.checkpoints.plan import PlannedTensor, plan_bake
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint, torch_dtype
from so8tqc.closure import versions_of
from so8tqc.config import QCConfig
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.errors import ConfigError, InputError
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.metrics.divergence import TokenTable, summarise
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.pairs import Comparisons
from so8tqc.record_kinds.qc import (
    Candidate,
    GGUFReading,
    LayerWeight,
    QCMetrics,
    Recorded,
    RecoveredLayer,
    Sequential,
    Split,
    Statistics,
)
from so8tqc.record_kinds.tensors import TensorRow
from so8tqc.records import (
    Check,
    Diagnosis,
    FileRef,
    Record,
    Stopwatch,
    Verdict,
    judge,
    overall,
    skipped,
)
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.halves import with_halves
from so8tqc.services.identify.answer import Answer
from so8tqc.services.qc.capture import capture_metrics, capture_notices, vocabulary_checks
from so8tqc.services.qc.compatibility import require_same_architecture
from so8tqc.services.qc.conversion import conversion_fault, is_plain
from so8tqc.services.qc.evaluations import kept_notice
from so8tqc.services.qc.judging import (
    Bootstrap,
    calibration_summary,
    confidence_buckets,
    effect_check,
    fidelity_checks,
    floor_check,
    image_checks,
    kl_histogram,
    survival_check,
)
from so8tqc.services.qc.merged_files import diagnose_merged_file
from so8tqc.services.qc.misread import diagnose_reading, read_anew, reading_of, with_commands
from so8tqc.services.qc.models import (
    Comparison,
    Reference,
    chat_checks,
    decoder,
    opened_reference,
    recorded_pictures,
    run_models,
)
from so8tqc.services.qc.pairwise import compare_candidates
from so8tqc.services.qc.pictures import (
    apart,
    diagnose_images,
    gates_off_images,
    mmproj_checks,
    sections_checks,
)
from so8tqc.services.qc.planned import (
    BASE,
    GATED,
    REFERENCE,
    base_of,
    names_of,
    with_kv_types,
)
from so8tqc.services.qc.profiles import Profile, load_profile
from so8tqc.services.qc.quantization_floor import quantization_check, quantization_floors
from so8tqc.services.qc.readings import reading_metrics
from so8tqc.services.qc.ties import judged, routing, routing_notice
from so8tqc.services.qc.token_file import TOKENS_FILE, write_tokens
from so8tqc.services.qc.tuning import tuned
from so8tqc.services.qc.until import sequential_notice
from so8tqc.services.qc.worst_tokens import worst_tokens
from so8tqc.services.tensors.expected import Expected, expected_of, history_of
from so8tqc.services.tensors.metadata import metadata_checks
from so8tqc.services.tensors.service import diagnose_tensors, judge_tensors, tensor_checks
from so8tqc.services.weights.adapters import adapter_algebra, adapter_checks
from so8tqc.services.weights.diagnose import diagnose, diagnose_logits, diagnose_structure
from so8tqc.services.weights.gguf import judge_gguf
from so8tqc.services.weights.merges import diagnose_merge
from so8tqc.services.weights.projection import projection_check
from so8tqc.services.weights.recover import recover
from so8tqc.services.weights.structure import (
    HasEntry,
    algebra,
    algebra_checks,
    rotation_checks,
    structure_checks,
)
from so8tqc.sources import ranks
from so8tqc.sources.capture import Capture, capture_if_one
from so8tqc.sources.compare import Pair
from so8tqc.sources.inputs.hub import with_local_paths
from so8tqc.sources.inputs.texts import input_paths

FIDELITY = ("kl.mean", "kl.top1", "logits.max_abs", "logits.mean_abs", "logits.rms")
"""Checks of a candidate's logits against the reference's."""

_UNRUNNABLE = (
    "structure.missing",
    "structure.shapes",
    "structure.finite",
    "algebra.finite",
)
"""Checks after whose failure a model cannot be loaded or yields NaN."""


@dataclass(frozen=True)
class _Logits:
    """What the models' logits have shown, if they were run; see ``record_kinds.qc.QCMetrics``."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    effect: Statistics | None = None
    noise_floor: Statistics | None = None
    arithmetic: Statistics | None = None
    readings: dict[str, GGUFReading] = field(default_factory=dict)
    capture: Recorded | None = None
    comparisons: Comparisons | None = None
    sequential: Sequential | None = None
    kept: dict[str, str] = field(default_factory=dict)


@dataclass
class _Findings:
    """Checks, metrics and notices found so far."""

    checks: list[Check] = field(default_factory=list)
    diagnosis: list[Diagnosis] = field(default_factory=list)
    split: dict[str, Split] = field(default_factory=dict)
    survival: dict[str, dict[str, LayerWeight]] = field(default_factory=dict)
    tensors: dict[str, list[TensorRow]] = field(default_factory=dict)
    expected: dict[str, Expected] = field(default_factory=dict)
    """What the tensors of GGUF candidates must stand for."""
    recovered: dict[str, RecoveredLayer] = field(default_factory=dict)
    logits: _Logits = _Logits()
    notices: list[str] = field(default_factory=list)
    coarse: set[str] = field(default_factory=set)
    """Candidates that were merged in 16-bit arithmetic."""
    named: set[str] = field(default_factory=set)
    """Candidates that have a diagnosis from their files."""
    answer: Answer | None = None
    """What a capture says of the rotations' readings, where it disagrees with the one in use."""
    unrunnable: dict[str, str] = field(default_factory=dict)
    """Candidates whose logits would mean nothing, and why."""

    def name(self, subject: str, diagnosis: Sequence[Diagnosis]) -> None:
        """Add what is wrong with a candidate."""
        self.diagnosis += diagnosis
        if diagnosis:
            self.named.add(subject)

    def failed(self, subject: str, *ids: str) -> list[Check]:
        """The checks of a candidate that failed, of those with these ids (all if none)."""
        return [
            check
            for check in self.checks
            if check.subject == subject
            and check.verdict is Verdict.FAIL
            and (not ids or check.id in ids)
        ]


def _claim(folder: Path) -> AbstractContextManager[None]:
    """Claim the output; of processes that work together the first claims it for all."""
    return claim_folder(folder) if ranks.is_first() else nullcontext()


@exclusive(_claim)
def qc(config: QCConfig, progress: Progress = SILENT) -> Record:
    """Judge every candidate against the reference.

    With ``rotations`` the reference is the gated model (base plus gates); model directories
    are then also checked tensor by tensor, and the gate's effect, the noise floor and the
    survival in GGUF files are measured in the same pass. A capture as reference brings its own
    texts; ``base`` and ``rotations`` beside it add all that needs them, and it stays the judge.

    Record metrics: :class:`so8tqc.record_kinds.qc.QCMetrics`.
    Writes ``tokens.npz`` (the token table) to ``config.out``.

    Raises:
        InputError: models, rotations or data are unusable or do not belong together.
        ToolError: a GGUF is given and libllama is missing.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    profile = load_profile(config.profile)
    capture = recorded_pictures(config, capture_if_one(config.reference))
    with opened_reference(config, capture) as reference:
        config = config.model_copy(update={"rotations": reference.config.rotations})
        found = _judged(reference, capture, profile, progress)
        if reference.rotations is not None and reference.plan is None:
            _name_the_reading(found, config, reference.rotations)
    if not found.checks:
        raise InputError(
            "nothing can be judged from files alone without rotations, but a GGUF file against a "
            "model directory",
            remedy="Give --rotations, or use --level full.",
        )
    checks, notices = tuned(found.checks, profile, config.fail_on, config.allow)
    return Record(
        kind="qc",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=_metrics(found, config.profile).as_json(),
        diagnosis=tuple(found.diagnosis),
        notices=tuple(dict.fromkeys((*found.notices, *notices))),
        inputs=_inputs(config, capture),
        outputs=_outputs(config),
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _judged(
    reference: Reference, capture: Capture | None, profile: Profile, progress: Progress
) -> _Findings:
    """Everything that is found about the candidates."""
    config, rotations = reference.config, reference.rotations
    names = names_of(config.candidates)
    if capture is None or config.base is not None:
        require_same_architecture(base_of(config), config.candidates)
    found = _Findings(notices=list(rotations.notices) if rotations else [])
    dtypes: dict[str, str] = {}
    plan = reference.plan
    if plan is None and config.trained_on is not None:
        raise ConfigError("trained_on is for adapters", where="trained_on")
    if plan is not None:
        found.notices += plan.notices
        dtypes = _judge_adapted(names, plan, found, progress)
    elif rotations is not None:
        dtypes = _judge_files(reference, names, rotations, found, progress)
    _judge_tensors(reference, names, found, progress)
    found.checks += sections_checks(base_of(config), names)
    if config.mmproj is not None:
        found.checks += mmproj_checks(config.mmproj, base_of(config), names, progress)
    if config.save_recovered is not None:
        _save_recovered(config, names, rotations, found)
    if config.level == "full":
        _judge_logits(reference, names, capture, profile, dtypes, found, progress)
    else:
        _require_judged(names, found)
    found.notices += _not_looked_at(names, found)
    return found


def _name_the_reading(found: _Findings, config: QCConfig, rotations: RotationSet) -> None:
    """Say which reading the capture confirms, and bake commands by that one.

    Args:
        found: what was found; its diagnoses are completed.
        config: as the user gave it.
        rotations: as they were read.
    """
    reading, names = reading_of(rotations), names_of(config.candidates)
    if found.answer is not None:
        wrong = [str(path) for name, path in names.items() if found.failed(name, *FIDELITY)]
        if told := diagnose_reading(found.answer, config, rotations, wrong):
            found.diagnosis.insert(0, told)  # the others take the wrong reading for granted
        if found.answer.identified is not None:
            reading = found.answer.identified.reading
    found.diagnosis = with_commands(found.diagnosis, config, reading, names)


def _judge_files(
    reference: Reference,
    names: Mapping[str, Path],
    rotations: RotationSet,
    found: _Findings,
    progress: Progress,
) -> dict[str, str]:
    """Everything that needs no forward pass; seconds.

    Returns:
        Model directory among the candidates → torch name of the dtype it stores the fold in.
    """
    base = open_checkpoint(base_of(reference.config))
    planned = plan_bake(
        base,
        rotations,
        dtype="keep",
        all_layers=reference.config.rotation_options.layers is None,
        kept=reference.kept,
    )
    found.checks += rotation_checks(rotations)
    found.checks.append(projection_check(base, planned, rotations))
    dtypes: dict[str, str] = {}
    for name, path in names.items():
        if is_gguf(path):
            checks, diagnosis, found.survival[name] = judge_gguf(
                path, planned, rotations, name, progress
            )
            found.checks += checks
            found.name(name, diagnosis)
            continue
        baked = open_checkpoint(path)
        dtypes[name] = _storage_dtype(baked, planned)
        found.checks += structure_checks(base, baked, planned, name)
        results = algebra(baked, planned, rotations, progress)
        found.checks += algebra_checks(results, name)
        found.name(name, diagnose(results, baked, rotations, name))
        found.name(name, diagnose_structure(found.failed(name), name))
        if broken := found.failed(name, *_UNRUNNABLE):
            found.unrunnable[name] = ", ".join(check.id for check in broken)
        found.split[name] = Split(
            algebra_relative_error=max(
                (r.comparison.relative_error for r in results), default=None
            ),
            storage=dtypes[name],
        )
    return dtypes


def _judge_tensors(
    reference: Reference, names: Mapping[str, Path], found: _Findings, progress: Progress
) -> None:
    """Every tensor of the GGUF candidates, where the reference is made of a model directory."""
    base = base_of(reference.config)
    files = {name: path for name, path in names.items() if is_gguf(path)}
    if not files or not base.is_dir():
        return
    checkpoint = open_checkpoint(base)
    planned = (
        ()
        if reference.rotations is None or reference.plan is not None
        else plan_bake(
            checkpoint, reference.rotations, dtype="keep", all_layers=False, kept=reference.kept
        )
    )
    history = history_of(checkpoint)
    for name, path in files.items():
        gguf = open_gguf(path)
        expected = expected_of(
            checkpoint,
            gguf,
            rotations=reference.rotations,
            planned=planned,
            plan=reference.plan,
            history=history,
        )
        rows = judge_tensors(gguf, expected, progress)
        found.tensors[name], found.expected[name] = rows, expected
        found.checks += tensor_checks(rows, gguf, expected, name)
        keys = None if history.conversion is None else history.conversion.keys
        found.checks += metadata_checks(gguf, keys, name)
        folded = _named_already(found.diagnosis, name, planned)
        rest = [row for row in rows if (row.layer, *row.source) not in folded]
        if reference.plan is not None:
            told, explained = diagnose_merged_file(rows, gguf, expected, reference.plan, name)
            found.name(name, told)
            rest = [row for row in rest if row.name not in explained]
        found.name(name, diagnose_tensors(rest, name))


def _named_already(
    diagnosis: Sequence[Diagnosis], name: str, planned: Sequence[PlannedTensor]
) -> set[tuple[int | None, str]]:
    """(layer, source) of tensors of which it was said what was folded instead."""
    layers = {layer for d in diagnosis if f" of {name})" in d.text for layer in d.layers}
    return {
        (plan.site.target.layer, plan.entry.name)
        for plan in planned
        if plan.site.target.layer in layers
    }


def _require_judged(names: Mapping[str, Path], found: _Findings) -> None:
    """Refuse to call a candidate good that nothing has looked at.

    Raises:
        InputError: every check of a candidate was skipped.
    """
    for name, path in names.items():
        checks = [check for check in found.checks if check.subject == name]
        if checks and all(check.verdict is Verdict.SKIP for check in checks):
            raise InputError(
                f"nothing of it could be judged from files alone: {checks[0].detail}",
                where=str(path),
                remedy="Use --level full, which runs it.",
            )


def _not_looked_at(names: Mapping[str, Path], found: _Findings) -> list[str]:
    """A sentence for each check of a candidate's files that was skipped."""
    return [
        f"Not looked at: {check.subject}, {check.id}. {check.detail}"
        for check in found.checks
        if check.subject in names and check.verdict is Verdict.SKIP
    ]


def _judge_adapted(
    names: Mapping[str, Path], plan: AdapterPlan, found: _Findings, progress: Progress
) -> dict[str, str]:
    """Everything that needs no forward pass, where the reference has adapters; see above."""
    if plan.gates is not None:
        found.checks += rotation_checks(plan.gates)
    found.checks += adapter_checks(plan)
    dtypes: dict[str, str] = {}
    for name, path in names.items():
        if is_gguf(path):
            continue  # see _judge_tensors
        baked = open_checkpoint(path)
        dtypes[name] = _storage_dtype(baked, plan.changed)
        found.checks += structure_checks(plan.checkpoint, baked, plan.changed, name)
        results = adapter_algebra(baked, plan, progress)
        found.checks += algebra_checks(results, name)
        told = diagnose_merge(results, baked, plan, name)
        found.coarse |= {name} if any(d.code == "coarse_merge" for d in told) else set()
        found.name(name, told)
        found.name(name, diagnose_structure(found.failed(name), name))
        if broken := found.failed(name, *_UNRUNNABLE):
            found.unrunnable[name] = ", ".join(check.id for check in broken)
        errors = [r.comparison.relative_error for r in results]
        found.split[name] = Split(
            algebra_relative_error=max(errors, default=None), storage=dtypes[name]
        )
    return dtypes


def _save_recovered(
    config: QCConfig,
    names: Mapping[str, Path],
    rotations: RotationSet | None,
    found: _Findings,
) -> None:
    if len(names) != 1 or is_gguf(config.reference):
        raise ConfigError(
            "rotations are recovered from one candidate, whose base is a model directory",
            where="save_recovered",
        )
    assert config.save_recovered is not None  # the caller's condition
    ((name, path),) = names.items()
    base = open_checkpoint(config.reference)
    check, found.recovered = recover(path, base, rotations, config.save_recovered, name)
    found.checks.append(check)


def _judge_logits(
    reference: Reference,
    names: Mapping[str, Path],
    capture: Capture | None,
    profile: Profile,
    dtypes: Mapping[str, str],
    found: _Findings,
    progress: Progress,
) -> None:
    """Everything that needs the models to be run, once over the texts."""
    config, rotations = reference.config, reference.rotations
    for name, why in found.unrunnable.items():
        reason = f"Not run, since {why} failed."
        found.checks.append(skipped("logits.run", reason, subject=name))
    names = {name: path for name, path in names.items() if name not in found.unrunnable}
    dtypes = {name: dtype for name, dtype in dtypes.items() if name in names}
    if not names:
        return
    if capture is not None:
        found.checks += vocabulary_checks(capture, names)
    found.checks += chat_checks(config, names, capture)
    plain = names
    names = with_kv_types(names, config)
    other_keys = [name for name in plain if found.failed(name, "tensors.keys")]
    beside = quantization_floors(
        plain, found.expected, other_keys, progress, wanted=config.quantization_floor
    )
    ran = run_models(config, names, rotations, capture, dtypes, progress, reference.plan, beside)
    found.notices += [*beside.notices, *_told(ran, names)]
    for name, why in ran.failed.items():
        found.checks.append(judge("logits.run", 0, 1, comparison=">=", subject=name, detail=why))
    names = {name: path for name, path in names.items() if name not in ran.failed}
    looks = 1 if ran.sequential is None else len(ran.sequential.planned)
    bootstrap = Bootstrap(config.resamples, config.seed, looks)
    before = len(found.checks)
    floors: list[Check] = []
    if rotations is not None or reference.plan is not None:
        effect = ran.tables[(BASE, REFERENCE)]
        found.checks.append(effect_check(effect, ran.worst_floor, bootstrap))
        floors = [floor_check(effect, floor, name) for name in names if (floor := ran.floor(name))]
        found.checks += floors
    implausible = {check.subject for check in floors if check.verdict is Verdict.FAIL}
    for name in names:
        found.checks += _candidate_checks(name, ran, profile, bootstrap, name in implausible)
        if name in found.coarse and (floor := ran.floor(name)) is not None:
            found.notices.append(_cost(name, ran.tables[(REFERENCE, name)], floor))
    if config.trained_on is not None and ran.arithmetic is not None:
        found.notices.append(_moved(config.trained_on, ran.arithmetic))
    tables = {name: ran.tables[(REFERENCE, name)] for name in names}
    found.logits = _Logits(
        candidates=_candidates(tables, ran, decoder(config), bootstrap),
        effect=_statistics(ran.tables.get((BASE, REFERENCE))),
        noise_floor=_statistics(ran.worst_floor),
        arithmetic=_statistics(ran.arithmetic),
        readings={
            name: reading_metrics(ran.tables, REFERENCE, name, ran.by_weights[name])
            for name in names
            if name in ran.by_weights
        },
        capture=None
        if capture is None
        else capture_metrics(capture, ran.tables.get((REFERENCE, GATED))),
        comparisons=compare_candidates(tables, bootstrap),
        sequential=ran.sequential,
        kept={f"{a} → {b}": f"{kept.made:%Y-%m-%dT%H:%M:%SZ}" for (a, b), kept in ran.kept.items()},
    )
    for table in list(tables.values())[:1]:  # all are of the same tokens
        if (told := routing_notice(table)) is not None:
            found.notices.append(told)
        found.checks[before:] = with_halves(found.checks[before:], len(table.texts), len(table))
    if capture is not None:
        _look_into_the_capture(reference, capture, ran, found, progress)
    found.diagnosis += diagnose_images(found.checks, tables)
    found.diagnosis += diagnose_logits(
        [check for check in found.checks if check.subject not in ran.kv_types],
        found.named,
        _wrongly_converted(config, plain, rotations, found),
    )
    if ranks.is_first():
        write_tokens(config.out / TOKENS_FILE, tables)


def _look_into_the_capture(
    reference: Reference,
    capture: Capture,
    ran: Comparison,
    found: _Findings,
    progress: Progress,
) -> None:
    """What the recorded logits say of the rotations' readings, and of where gates acted."""
    to_gated, floor = ran.tables.get((REFERENCE, GATED)), ran.worst_floor
    found.notices += capture_notices(to_gated, floor)
    if reference.plan is not None:
        return
    if reference.rotations is not None:
        base = base_of(reference.config)
        told = gates_off_images(base, reference.rotations, capture, to_gated)
        found.diagnosis += told
        if told:  # the readings are told apart by the same distance, which has its reason now
            return
    found.answer = read_anew(reference, capture, to_gated, floor, progress)


def _wrongly_converted(
    config: QCConfig,
    names: Mapping[str, Path],
    rotations: RotationSet | None,
    found: _Findings,
) -> dict[str, str]:
    """Failed GGUF candidate whose types only round → what is wrong with its conversion."""
    base = base_of(config)
    suspects = [
        name
        for name, path in names.items()
        if is_gguf(path)
        and name not in found.named
        and is_plain(path)
        and any(check.group in ("kl", "logits") for check in found.failed(name))
    ]
    if not suspects or is_gguf(base) or not base.is_dir():
        return {}
    checkpoint = open_checkpoint(base)
    baked: set[str] = set()
    if rotations is not None:
        planned = plan_bake(checkpoint, rotations, dtype="keep", all_layers=False)
        baked = {plan.entry.name for plan in planned}
    return {name: conversion_fault(names[name], checkpoint, baked) for name in suspects}


def _moved(trained_on: str, table: TokenTable) -> str:
    """What merging into the full-precision base changes, if another was trained on."""
    mean = float(table.columns["kl"].mean())
    return (
        f"The adapter was trained on a quantized base ({trained_on}). Merging it exactly into the "
        f"full-precision base changes the model by a mean KL of {mean:.2e} nats per token; that "
        "change is part of every merge, so the noise floors here contain it."
    )


def _cost(name: str, table: TokenTable, floor: TokenTable) -> str:
    """What merging in 16-bit arithmetic cost, beside an exact merge of the same storage dtype."""
    theirs, ours = (float(t.columns["kl"].mean()) for t in (table, floor))
    return (
        f"{name} was merged in 16-bit arithmetic: mean KL {theirs:.2e} nats per token from the "
        f"unmerged model; an exact merge, rounded once to the same dtype, has {ours:.2e}."
    )


def _told(ran: Comparison, names: Mapping[str, Path]) -> list[str]:
    """What is to be said of the texts, how many were taken, and what quantized caches cost."""
    notices = list(ran.notices)
    if ran.kept:
        notices.append(kept_notice(ran.kept, len(ran.tables)))
    if ran.sequential is not None:
        notices.append(sequential_notice(ran.sequential))
    return notices + [
        _cost_of_cache(name, kind, ran.tables)
        for name, kind in ran.kv_types.items()
        if name in names and name not in ran.failed
    ]


def _cost_of_cache(name: str, kind: str, tables: Mapping[Pair, TokenTable]) -> str:
    """What a quantized cache costs, beside the same file with the usual one."""
    plain = name.removesuffix(f" (kv {kind})")
    ours, theirs = (float(tables[(REFERENCE, n)].columns["kl"].mean()) for n in (name, plain))
    return (
        f"A cache of keys and values in {kind} takes {plain} from a mean KL of {theirs:.3g} to "
        f"{ours:.3g} nats per token; whether that can be told from chance is in the pairs."
    )


def _candidate_checks(
    name: str, ran: Comparison, profile: Profile, bootstrap: Bootstrap, no_floor: bool
) -> list[Check]:
    """``no_floor``: the candidate's noise floor is implausible, and widens nothing."""
    table = judged(ran.tables[(REFERENCE, name)])
    if name not in ran.file_types:
        floor = None if no_floor else ran.floor(name)
        floor = None if floor is None else judged(floor)
        return [
            *fidelity_checks(table, profile.models, name, bootstrap, floor),
            *image_checks(table, profile.models, name, bootstrap, floor),
        ]
    limits = profile.for_gguf(ran.file_types[name])
    floor = ran.quantization_floor(name)
    floor = None if floor is None else judged(floor)
    checks = fidelity_checks(table, limits, name, bootstrap, floor)
    checks += image_checks(table, limits, name, bootstrap, floor)
    if floor is not None:
        checks.append(quantization_check(table, floor, name, bootstrap))
    if (to_base := ran.tables.get((BASE, name))) is not None:
        checks.append(survival_check(table, judged(to_base), name, bootstrap))
    return checks


def _metrics(found: _Findings, profile: str) -> QCMetrics:
    logits = found.logits
    return QCMetrics(
        profile=profile,
        split=found.split,
        survival=found.survival,
        tensors=found.tensors,
        recovered=found.recovered,
        effect=logits.effect,
        noise_floor=logits.noise_floor,
        arithmetic=logits.arithmetic,
        readings=logits.readings,
        candidates=logits.candidates,
        capture=logits.capture,
        comparisons=logits.comparisons,
        sequential=logits.sequential,
        kept=logits.kept,
    )


def _statistics(table: TokenTable | None) -> Statistics | None:
    return None if table is None else Statistics.model_validate(summarise(table))


def _candidates(
    tables: Mapping[str, TokenTable],
    ran: Comparison,
    decode: Callable[[list[int]], str] | None,
    bootstrap: Bootstrap,
) -> dict[str, Candidate]:
    """Name → its statistics against the reference."""
    return {
        name: Candidate.model_validate(
            {
                **summarise(table),
                **calibration_summary(table),
                "kl_histogram": kl_histogram(table),
                "worst_tokens": worst_tokens(table, ran.texts, decode),
                "confidence": confidence_buckets(table, bootstrap),
                "kv_type": ran.kv_types.get(name),
                "apart": apart(table),
                "routing": routing(table),
            }
        )
        for name, table in tables.items()
    }


def _storage_dtype(baked: Checkpoint, planned: Sequence[HasEntry]) -> str:
    """torch name of the dtype the folded weights are stored in."""
    for plan in planned:
        if plan.entry.name in baked.tensors:
            return str(torch_dtype(baked.tensors[plan.entry.name].dtype)).removeprefix("torch.")
    raise InputError("none of the rotated tensors is in the candidate", where=str(baked.directory))


def _outputs(config: QCConfig) -> dict[str, FileRef]:
    if config.save_recovered is None:
        return {}
    return {"recovered": file_ref(config.save_recovered)}


def _inputs(config: QCConfig, capture: Capture | None) -> dict[str, FileRef]:
    inputs = {"reference": file_ref(config.reference)}
    if config.base is not None:
        inputs["base"] = file_ref(config.base)
    if config.rotations is not None:
        inputs["rotations"] = file_ref(config.rotations)
    if config.mmproj is not None:
        inputs["mmproj"] = file_ref(config.mmproj)
    for i, path in enumerate(config.rotation_options.adapters):
        inputs[f"adapter_{i + 1}"] = file_ref(path)
    for i, path in enumerate(config.candidates):
        inputs[f"candidate_{i + 1}"] = file_ref(path)
    if config.level == "full" and capture is None:
        inputs |= {f"data: {path.name}": file_ref(path) for path in input_paths(config.data)}
    return inputs

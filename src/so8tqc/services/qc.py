"""QC: judge candidates against a reference, from files and from logits, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.artifacts import atomic_file, file_ref
from so8tqc.checkpoints.plan import PlannedTensor, plan_bake
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint, torch_dtype
from so8tqc.config import QCConfig
from so8tqc.errors import ConfigError, InputError
from so8tqc.llama.gguf_file import is_gguf
from so8tqc.metrics.divergence import TokenTable, summarise
from so8tqc.progress import SILENT, Progress
from so8tqc.records import (
    Check,
    Diagnosis,
    FileRef,
    Record,
    Stopwatch,
    Verdict,
    jsonable,
    overall,
    versions,
)
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.capture import capture_metrics, capture_notices, vocabulary_checks
from so8tqc.services.diagnose import diagnose
from so8tqc.services.evaluation_texts import evaluation_texts
from so8tqc.services.judging import (
    Bootstrap,
    calibration_summary,
    effect_check,
    fidelity_checks,
    kl_histogram,
    survival_check,
)
from so8tqc.services.profiles import Profile, load_profile
from so8tqc.services.reference import reference_rotations
from so8tqc.services.structure import (
    algebra,
    algebra_checks,
    rotation_checks,
    structure_checks,
)
from so8tqc.sources.capture import (
    Capture,
    CaptureSource,
    RoundedSource,
    check_same_tokens,
    cut,
    is_capture,
    open_capture,
)
from so8tqc.sources.compare import Pair, compare
from so8tqc.sources.folded import FoldedSource
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.texts import encode, load_texts, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE, BASE, FLOOR, ARITHMETIC = "reference", "base", "noise floor", "arithmetic"
GATED = "gated"
"""Base plus gates, beside a recorded reference: noise floors are measured from it."""

TOKENS_FILE = "tokens.npz"


@dataclass
class _Findings:
    """What has been found so far."""

    checks: list[Check] = field(default_factory=list)
    diagnosis: list[Diagnosis] = field(default_factory=list)
    metrics: dict[str, object] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def qc(config: QCConfig, progress: Progress = SILENT) -> Record:
    """Judge every candidate against the reference.

    With ``rotations`` the reference is the gated model (base plus gates); model directories
    are then also checked tensor by tensor, and the gate's effect, the noise floor and the
    survival in GGUF files are measured in the same pass. A capture as reference brings its own
    texts; ``base`` and ``rotations`` beside it add all that needs them, and it stays the judge.

    Record metrics: ``candidates``: name → statistics of ``metrics.divergence.summarise`` and
    calibration; ``effect``, ``noise_floor``: the same statistics of base and of our own
    rounded fold; ``capture``: what was recorded, and ``gated``: the same statistics of base plus
    gates against it; ``split``: {algebra, storage, arithmetic}; ``profile``; ``texts``, ``tokens``.
    Writes ``tokens.npz`` (the token table) to ``config.out``.

    Raises:
        InputError: models, rotations or data are unusable or do not belong together.
        ToolError: a GGUF is given and libllama is missing.
    """
    watch = Stopwatch()
    profile = load_profile(config.profile)
    names = _names(config.candidates)
    capture = open_capture(config.reference) if is_capture(config.reference) else None
    rotations = _rotations(config)
    found = _Findings(notices=list(rotations.notices) if rotations else [])
    found.metrics["profile"] = config.profile
    dtypes: dict[str, str] = {}
    if rotations is not None:
        dtypes = _judge_files(config, names, rotations, found, progress)
    if config.level == "full":
        _judge_logits(config, names, rotations, capture, profile, dtypes, found, progress)
    if not found.checks:
        raise InputError(
            "nothing can be judged from files alone without rotations",
            remedy="Give --rotations, or use --level full.",
        )
    return Record(
        kind="qc",
        verdict=overall(found.checks),
        checks=tuple(found.checks),
        metrics={key: jsonable(value) for key, value in found.metrics.items()},
        diagnosis=tuple(found.diagnosis),
        notices=tuple(dict.fromkeys(found.notices)),
        inputs=_inputs(config),
        config=config.model_dump(mode="json"),
        versions=versions("torch", "transformers", "llama-cpp-python", "numpy"),
        run=watch.info(),
    )


def _rotations(config: QCConfig) -> RotationSet | None:
    if config.base is not None and not (is_capture(config.reference) and config.rotations):
        raise ConfigError("base is for a capture as reference, together with rotations")
    if config.rotations and is_capture(config.reference) and config.base is None:
        raise InputError(
            "rotations are applied to a model directory, not to a capture",
            where=str(config.reference),
            remedy="Give that directory too: --base MODEL.",
        )
    return reference_rotations(_base(config), config.rotations, config.rotation_options)


def _base(config: QCConfig) -> Path:
    """What the rotations are applied to."""
    return config.base or config.reference


def _names(candidates: Sequence[Path]) -> dict[str, Path]:
    """A short distinct name for each candidate."""
    names: dict[str, Path] = {}
    for path in candidates:
        short = path.name if path.name not in names else str(path)
        if short in names:
            raise InputError("the same candidate is given twice", where=str(path))
        names[short] = path
    return names


def _judge_files(
    config: QCConfig,
    names: Mapping[str, Path],
    rotations: RotationSet,
    found: _Findings,
    progress: Progress,
) -> dict[str, str]:
    """Everything that needs no forward pass; seconds.

    Returns:
        Model directory among the candidates → torch name of the dtype it stores the fold in.
    """
    base = open_checkpoint(_base(config))
    planned = plan_bake(
        base, rotations, dtype="keep", all_layers=config.rotation_options.layers is None
    )
    found.checks += rotation_checks(rotations)
    split: dict[str, object] = {}
    dtypes: dict[str, str] = {}
    for name, path in names.items():
        if is_gguf(path):
            continue
        baked = open_checkpoint(path)
        dtypes[name] = _storage_dtype(baked, planned)
        found.checks += structure_checks(base, baked, planned, name)
        results = algebra(baked, planned, rotations, progress)
        found.checks += algebra_checks(results, name)
        found.diagnosis += diagnose(results, baked, rotations, name)
        split[name] = {
            "algebra_relative_error": max(
                (r.comparison.relative_error for r in results), default=None
            ),
            "storage": dtypes[name],
        }
    if split:
        found.metrics["split"] = split
    return dtypes


def _judge_logits(
    config: QCConfig,
    names: Mapping[str, Path],
    rotations: RotationSet | None,
    capture: Capture | None,
    profile: Profile,
    dtypes: Mapping[str, str],
    found: _Findings,
    progress: Progress,
) -> None:
    """Everything that needs the models to be run, once over the texts."""
    texts = _texts(config, capture)
    if capture is not None:
        found.checks += vocabulary_checks(capture, names)
    sources, pairs = _sources(config, names, rotations, capture, dtypes)
    file_types = {s.name: s.file_type for s in sources if isinstance(s, GGUFSource)}
    try:
        tables = compare(sources, pairs, texts, progress, "comparing logits")
    finally:
        for source in sources:
            source.close()
    bootstrap = Bootstrap(config.resamples, config.seed)
    witness = REFERENCE if capture is None else GATED
    floors = {dtype: tables[(witness, _floor(dtype))] for dtype in set(dtypes.values())}
    worst_floor = max(floors.values(), key=lambda t: float(t.columns["kl"].mean()), default=None)
    if rotations is not None:
        found.checks.append(effect_check(tables[(BASE, REFERENCE)], worst_floor, bootstrap))
        found.metrics["effect"] = summarise(tables[(BASE, REFERENCE)])
    candidates: dict[str, object] = {}
    for name in names:
        table = tables[(REFERENCE, name)]
        if name in file_types:
            limits, floor = profile.for_gguf(file_types[name]), None
        else:
            limits, floor = profile.models, floors.get(dtypes.get(name, ""))
        found.checks += fidelity_checks(table, limits, name, bootstrap, floor)
        if name in file_types and rotations is not None:
            found.checks.append(survival_check(table, tables[(BASE, name)], name, bootstrap))
        candidates[name] = {
            **summarise(table),
            **calibration_summary(table),
            "kl_histogram": kl_histogram(table),
        }
    found.metrics["candidates"] = candidates
    if worst_floor is not None:
        found.metrics["noise_floor"] = summarise(worst_floor)
    if (witness, ARITHMETIC) in tables:
        found.metrics["arithmetic"] = summarise(tables[(witness, ARITHMETIC)])
    if capture is not None:
        to_gated = tables.get((REFERENCE, GATED))
        found.metrics["capture"] = capture_metrics(capture, to_gated)
        found.notices += capture_notices(to_gated, worst_floor)
    _diagnose_logits(found)
    _write_tokens(config.out / TOKENS_FILE, {n: tables[(REFERENCE, n)] for n in names})


def _texts(config: QCConfig, capture: Capture | None) -> tuple[EncodedText, ...]:
    """The texts to compare on: the recorded ones if the reference is a capture."""
    if capture is None:
        return evaluation_texts(config, lambda: _tokenizer(config))
    if config.protocol != "native" or config.ctx is not None:
        raise ConfigError(
            "a capture is compared on whole texts, as they were recorded",
            where="protocol, ctx",
            remedy="Leave --protocol and --ctx out, or give the model itself as reference.",
        )
    if "data" in config.model_fields_set:
        check_same_tokens(capture, encode(load_texts(config.data), _tokenizer(config), None))
    return cut(capture.texts, config.max_tokens)


def _sources(
    config: QCConfig,
    names: Mapping[str, Path],
    rotations: RotationSet | None,
    capture: Capture | None,
    dtypes: Mapping[str, str],
) -> tuple[list[LogitSource], list[Pair]]:
    """All sources of the pass, and which are compared with which."""
    sources: list[LogitSource] = []
    pairs: list[Pair] = []
    if capture is not None:
        sources.append(CaptureSource(capture, REFERENCE))
    if is_gguf(config.reference):
        sources.append(GGUFSource(config.reference, REFERENCE, threads=config.threads))
    elif rotations is not None:
        model = HFModel.load(_base(config))
        witness = REFERENCE
        gated: LogitSource = GatedSource(model, rotations, witness)
        if capture is not None:
            witness = GATED
            gated = RoundedSource(GatedSource(model, rotations, witness), capture.dtype)
            pairs.append((REFERENCE, witness))
        sources += [gated, HFSource(model, BASE)]
        pairs.append((BASE, REFERENCE))
        for dtype in dict.fromkeys(dtypes.values()):
            sources.append(FoldedSource(model, rotations, _floor(dtype), dtype))
            pairs.append((witness, _floor(dtype)))
        sources.append(FoldedSource(model, rotations, ARITHMETIC, None))
        pairs.append((witness, ARITHMETIC))
    elif capture is None:
        sources.append(HFSource(HFModel.load(config.reference), REFERENCE))
    for name, path in names.items():
        if is_gguf(path):
            sources.append(GGUFSource(path, name, threads=config.threads))
            if rotations is not None:
                pairs.append((BASE, name))
        else:
            sources.append(HFSource(HFModel.load(path), name))
        pairs.append((REFERENCE, name))
    return sources, pairs


def _floor(dtype: str) -> str:
    """Name of the source that gives a storage dtype's noise floor."""
    return f"{FLOOR} {dtype}"


def _storage_dtype(baked: Checkpoint, planned: Sequence[PlannedTensor]) -> str:
    """torch name of the dtype the folded weights are stored in."""
    for plan in planned:
        if plan.entry.name in baked.tensors:
            return str(torch_dtype(baked.tensors[plan.entry.name].dtype)).removeprefix("torch.")
    raise InputError("none of the rotated tensors is in the candidate", where=str(baked.directory))


def _diagnose_logits(found: _Findings) -> None:
    """Name what only logits can show: a GGUF in which the gate is not found."""
    for check in found.checks:
        if check.id == "effect.survival" and check.verdict is Verdict.FAIL:
            found.diagnosis.append(
                Diagnosis(
                    code="not_baked",
                    text=f"{check.subject} is no nearer to the gated model than to the base: "
                    "it was made from the unbaked model, or its quantization erased the gate.",
                    remedy="Export again from the baked directory: so8tqc export BAKED --out FILE "
                    "(or choose a finer quantization type).",
                )
            )


def _tokenizer(config: QCConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(config.tokenizer or _tokenizer_directory(config))


def _tokenizer_directory(config: QCConfig) -> Path:
    for path in (_base(config), *config.candidates):
        if not is_gguf(path) and not is_capture(path):
            return path
    raise InputError("these files give no tokenizer", remedy="Give --tokenizer MODEL_DIRECTORY.")


def _write_tokens(path: Path, tables: Mapping[str, TokenTable]) -> None:
    """The token tables as one npz: ``NAME/COLUMN``, ``text``, ``position``, ``texts``."""
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
    for name, table in tables.items():
        arrays |= {"text": table.text, "position": table.position}
        arrays["texts"] = np.array(table.texts)
        arrays |= {f"{name}/{column}": values for column, values in table.columns.items()}
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def _inputs(config: QCConfig) -> dict[str, FileRef]:
    inputs = {"reference": file_ref(config.reference)}
    if config.base is not None:
        inputs["base"] = file_ref(config.base)
    if config.rotations is not None:
        inputs["rotations"] = file_ref(config.rotations)
    for i, path in enumerate(config.candidates):
        inputs[f"candidate_{i + 1}"] = file_ref(path)
    return inputs

"""Long text: what only shows after thousands of tokens, teacher-forced and free-running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.closure import versions_of
from so8tqc.config import LongTextConfig
from so8tqc.disk.atomic import remove_leftovers
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.errors import DataError, InputError
from so8tqc.gguf.file import is_gguf
from so8tqc.metrics.spectra import rope_wavelengths, spectrum
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.longtext import LongTextMetrics
from so8tqc.records import (
    Record,
    Stopwatch,
    overall,
)
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.chat_template import template_checks
from so8tqc.services.halves import with_halves_of_a_text
from so8tqc.services.longtext.generation import generate, prompt_of, repetition_checks
from so8tqc.services.longtext.judging import (
    BASE,
    CANDIDATE,
    REFERENCE,
    Case,
    case_checks,
    case_metrics,
    effect_checks,
)
from so8tqc.services.longtext.pet import changes_from_base
from so8tqc.services.longtext.series import (
    SERIES_FILE,
    Arrays,
    attention_key,
    spectrum_arrays,
    write_series,
)
from so8tqc.services.trained_base import TrainedBase, trained_base
from so8tqc.sources.compare import compare
from so8tqc.sources.embedding import with_embedded
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.hub import with_local_paths
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import load_tokenizer
from so8tqc.sources.probe import ProbedSource, probe
from so8tqc.sources.protocol import LogitSource
from so8tqc.sources.seen import images_of
from so8tqc.sources.unmerged import load_unmerged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Models:
    """The models of a run; reference and base share one set of weights."""

    candidate: HFModel | GGUFSource
    base: HFModel | None
    rotations: RotationSet | None
    unmerged: HFModel | None = None
    """The reference, where it is base and adapters; else it is the base (with the gates)."""

    @property
    def reference(self) -> HFModel | None:
        """What the candidate is compared with."""
        return self.unmerged or self.base

    @property
    def is_trained(self) -> bool:
        """Whether the reference is more than its base."""
        return self.rotations is not None or self.unmerged is not None


@exclusive(claim_folder)
def longtext(config: LongTextConfig, progress: Progress = SILENT) -> Record:
    """Compare a model with its reference on long text.

    With ``reference`` and ``rotations`` the reference is the gated base model; with
    ``reference`` alone it is that model. Without, only the candidate's own statistics are
    reported and every comparing check is skipped. Attention entropy and hidden-state
    energies need a transformers candidate.

    Record metrics: :class:`so8tqc.record_kinds.longtext.LongTextMetrics`. Writes
    ``series.npz``; the plots of each text are drawn from it and the record (``services.pages``).

    Raises:
        DataError: a text is shorter than ``min_tokens``, or that exceeds a model's context.
        InputError: the models do not fit together.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    given = config.rotations is not None or bool(config.rotation_options.adapters)
    if given and config.reference is None:
        raise InputError("rotations need the base model they are applied to: give --reference")
    if config.reference is None:
        return _longtext(config, None, watch, progress)
    near = config.out / "trained"
    with trained_base(config.reference, config.rotations, config.rotation_options, near) as trained:
        return _longtext(config, trained, watch, progress)


def _longtext(
    config: LongTextConfig, trained: TrainedBase | None, watch: Stopwatch, progress: Progress
) -> Record:
    tokenizer = _tokenizer(config)
    cases, notices = _encode(config, tokenizer)
    models = _load(config, trained)
    notices += models.rotations.notices if models.rotations else ()
    try:
        _check_contexts(models, cases, config)
        wavelengths = _wavelengths(models)
        writers = _writers(models)
        for case in cases:
            _measure(case, models, config, progress)
            generate(case, writers, config.max_new_tokens, config.seed, progress)
    finally:
        _close(models)
    rope = wavelengths.size > 0
    checks = [
        check
        for case in cases
        for check in with_halves_of_a_text(
            case_checks(case, config, rope=rope), case.encoded.tokens.size
        )
    ]
    record = models.rotations.metadata.get("pet") if models.rotations else None
    checks += effect_checks(cases, record)
    checks += repetition_checks(cases)
    if config.chat:
        files = {config.model.name: config.model}
        checks += template_checks(config.data, tokenizer, files)
    remove_leftovers(config.out)
    series = config.out / SERIES_FILE
    write_series(series, {case.encoded.id: _series(case) for case in cases}, wavelengths)
    inputs = {"model": file_ref(config.model)}
    for name in ("reference", "rotations"):
        if (path := getattr(config, name)) is not None:
            inputs[name] = file_ref(path)
    for i, path in enumerate(config.rotation_options.adapters):
        inputs[f"adapter_{i + 1}"] = file_ref(path)
    return Record(
        kind="longtext",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=LongTextMetrics(
            cases={case.encoded.id: case_metrics(case) for case in cases}, gates_pet=record
        ).as_json(),
        notices=tuple(notices),
        inputs=inputs,
        outputs={SERIES_FILE: file_ref(series)},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _encode(
    config: LongTextConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Case], list[str]]:
    """The texts, and what is to be said of them."""
    encoded, notices = prepare(
        config.data, tokenizer, config.min_tokens, images=config.images, chat=config.chat
    )
    for item in encoded:
        if item.tokens.size < config.min_tokens:
            raise DataError(
                f"has {item.tokens.size} tokens, {config.min_tokens} are asked for",
                where=item.id,
                remedy="Give longer text, or a smaller --min-tokens.",
            )
    told = list(notices)
    if any(images_of(item.tokens) is not None for item in encoded):
        told.append("Texts with pictures are scored, and not continued freely.")
    return [Case(item) for item in encoded], told


def _tokenizer(config: LongTextConfig) -> PreTrainedTokenizerBase:
    directory = config.tokenizer or (config.reference if is_gguf(config.model) else config.model)
    if directory is None or is_gguf(directory):
        raise InputError("a GGUF file gives no tokenizer", remedy="Give --tokenizer MODEL_DIR.")
    return load_tokenizer(directory)


def _load(config: LongTextConfig, trained: TrainedBase | None) -> _Models:
    candidate: HFModel | GGUFSource
    if is_gguf(config.model):
        candidate = GGUFSource(
            config.model, CANDIDATE, threads=config.threads, context=config.min_tokens
        )
    else:
        candidate = HFModel.load(config.model)
    if trained is None:
        return _Models(candidate, None, None)
    rotations = trained.rotation_set()
    adapters = trained.adapters
    unmerged = load_unmerged(trained.directory, adapters) if adapters else None
    return _Models(candidate, HFModel.load(trained.directory), rotations, unmerged)


def _check_contexts(models: _Models, cases: Sequence[Case], config: LongTextConfig) -> None:
    """Refuse before the first pass what a model's context cannot hold.

    Raises:
        DataError: a text, or a prompt with its continuation, is longer.
    """
    forced = max(case.encoded.tokens.size for case in cases)
    generated = max(prompt_of(case).size for case in cases) + config.max_new_tokens
    for path, model in ((config.model, models.candidate), (config.reference, models.base)):
        if model is None:
            continue
        context = model.context if isinstance(model, HFModel) else model.context_length
        if forced > context:
            raise DataError(
                f"{forced} tokens are more than the model's context of {context}",
                where=str(path),
                remedy="Give a smaller --min-tokens.",
            )
        if config.max_new_tokens and generated > context:
            raise DataError(
                f"a prompt and {config.max_new_tokens} new tokens, {generated} in all, are more "
                f"than the model's context of {context}",
                where=str(path),
                remedy="Give a smaller --max-new-tokens.",
            )


def _writers(models: _Models) -> list[tuple[str, HFModel | GGUFSource, RotationSet | None]]:
    """Who continues the prompts: name, model, the rotations it runs with."""
    writers: list[tuple[str, HFModel | GGUFSource, RotationSet | None]] = [
        (CANDIDATE, models.candidate, None)
    ]
    if models.reference is not None:
        writers.append((REFERENCE, models.reference, models.rotations))
    return writers


def _close(models: _Models) -> None:
    models.candidate.close()
    for model in (models.base, models.unmerged):
        if model is not None:
            model.close()


def _measure(case: Case, models: _Models, config: LongTextConfig, progress: Progress) -> None:
    """One forward pass of each model, then the logits of both in step, and what compares runs."""
    tokens = case.encoded.tokens
    runs = 1 + (models.base is not None) * (1 + models.is_trained)
    sources: list[LogitSource] = []
    with progress.task(
        f"{case.encoded.id}: forward passes", total=runs * tokens.size, unit="tokens"
    ) as task:
        if isinstance(models.candidate, HFModel):
            case.candidate = probe(models.candidate, tokens)
            source = ProbedSource(models.candidate, CANDIDATE)
            source.hidden = case.candidate.hidden
            sources.append(source)
        else:
            sources.append(models.candidate)
        task.advance(tokens.size, item=CANDIDATE)
        if models.base is not None and models.reference is not None:
            if models.is_trained:
                case.base = probe(models.base, tokens)
                task.advance(tokens.size, item=BASE)
            case.reference = probe(models.reference, tokens, models.rotations)
            task.advance(tokens.size, item=REFERENCE)
            source = ProbedSource(models.reference, REFERENCE)
            source.hidden = case.reference.hidden
            sources.append(source)
    pair = (REFERENCE if len(sources) > 1 else CANDIDATE, CANDIDATE)
    texts = with_embedded([case.encoded], [*_seeing(models), *sources], _no_tower)
    case.table = compare(sources, [pair], texts, progress, f"{case.encoded.id}: logits")[pair]
    for name, run in ((CANDIDATE, case.candidate), (REFERENCE, case.reference)):
        if run is not None and run.entropy is not None:
            case.spectra[name] = spectrum(run.entropy.mean(axis=(0, 1)), seed=config.seed)
    # the gates' effect, seen in the candidate where it shows its hidden states
    shown = case.candidate if case.candidate is not None else case.reference
    if case.base is not None and shown is not None:
        case.from_base = changes_from_base(case.base, shown, config)


def _seeing(models: _Models) -> list[LogitSource]:
    """The transformers models, whose vision tower embeds pictures for a GGUF file."""
    found = [m for m in (models.candidate, models.base) if isinstance(m, HFModel)]
    return [HFSource(model, "seeing") for model in found]


def _no_tower() -> HFModel:
    raise InputError(
        "a GGUF file is shown pictures as a vision tower's embeddings, and no model directory is "
        "there to make them",
        remedy="Give --reference MODEL_DIRECTORY.",
    )


def _wavelengths(models: _Models) -> npt.NDArray[np.float64]:
    """RoPE wavelengths of the model, none if it has no RoPE or is a GGUF without reference.

    They are read from the frequencies that the model computes with, so that scaling, partial
    rotation and a base for each kind of layer (Gemma 3) need no knowledge here.
    """
    model = models.candidate if isinstance(models.candidate, HFModel) else models.base
    if model is None:
        return np.empty(0)
    found = [
        buffer.detach().double().cpu().numpy().ravel()
        for name, buffer in model.module.get_decoder().named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]
    return rope_wavelengths(np.concatenate([*found, np.empty(0)]))


def _series(case: Case) -> Arrays:
    """The arrays of a case in ``series.npz``."""
    assert case.table is not None
    arrays: Arrays = {**case.table.columns, "position": case.table.position}
    for name, run in ((CANDIDATE, case.candidate), (REFERENCE, case.reference)):
        if run is not None and run.entropy is not None:
            arrays[attention_key(name)] = run.entropy.mean(axis=1)
            arrays |= spectrum_arrays(name, case.spectra[name])
    for name, tokens in case.generated.items():
        arrays[f"generated_{name}"] = np.asarray(tokens, dtype=np.int64)
    return arrays

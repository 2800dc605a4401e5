"""Quantize: one GGUF to several types by libllama, each file read back and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from so8tqc.closure import versions_of
from so8tqc.config import QuantizeConfig
from so8tqc.disk.atomic import remove_leftovers
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.errors import ConfigError, ToolError
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.llama.imatrix import ImportanceMatrix, read_imatrix, tensors_without_importance
from so8tqc.llama.quantizer import Quantizer
from so8tqc.progress import SILENT, Progress
from so8tqc.quantizers.hessians import MomentsFile
from so8tqc.record_kinds.quantize import (
    Coverage,
    QuantizedFile,
    QuantizeMeasured,
    QuantizeMetrics,
    Recipe,
    Solver,
)
from so8tqc.records import Record, Stopwatch, overall, versions
from so8tqc.services.quantize.calibration import calibration_texts
from so8tqc.services.quantize.derivation import derivation
from so8tqc.services.quantize.files import PlannedFile, quantize_files, workers
from so8tqc.services.quantize.hessians import (
    Calibration,
    compute_moments,
    model_directory,
    require_fit,
)
from so8tqc.services.quantize.imatrix import compute_imatrix
from so8tqc.services.quantize.mixture import (
    RECIPE,
    Chooser,
    Plan,
    Room,
    choosable,
    mixture_notices,
    require_tools_to_choose,
    size_check,
)
from so8tqc.services.quantize.patterns import override_patterns
from so8tqc.services.quantize.proof import fallback_notices, fallbacks
from so8tqc.services.quantize.recipe import (
    Output,
    outputs,
    overrides,
    recipe,
    refuse_source,
    require_effect,
    require_importance,
    require_room,
    stem,
)
from so8tqc.services.quantize.solver import VERSION as SOLVER_VERSION
from so8tqc.services.quantize.solver import moments_notices
from so8tqc.sources.inputs.texts import data_paths

AUTO = "auto"

SOLVING = (
    "so8tqc.services.quantize.hessians",
    "so8tqc.services.quantize.solver",
    "so8tqc.quantizers",
)
"""What has no part in a file that libllama alone makes."""

CHOOSING = ("so8tqc.services.quantize.mixture",)
"""What has no part in a file of a recipe's types."""


@exclusive(claim_folder)
def quantize(config: QuantizeConfig, progress: Progress = SILENT) -> Record:
    """Quantize to every type asked for; each file appears complete or not at all.

    Record metrics: :class:`so8tqc.record_kinds.quantize.QuantizeMetrics`; ``run.measured``:
    :class:`so8tqc.record_kinds.quantize.QuantizeMeasured`.

    Raises:
        ModelError: the input is no GGUF, or is already quantized; or the
            importance matrix is none, or another model's; or a model directory or a file of
            second moments is.
        DataError: calibration text is text that judges, or too short.
        InputError: libllama does not know a type, a type needs an importance matrix, or a
            choice of a tensor's type has no effect.
        ConfigError: an output would replace the input, or no PATTERN=TYPE.
        ToolError: no libllama, it failed, or the disk is full.
    """
    watch = Stopwatch()
    if config.max_size is not None:
        config = _of_one_recipe(config)
    with ExitStack() as processes:
        quantizers = [processes.enter_context(closing(Quantizer()))]  # starts during what follows
        source = open_gguf(config.gguf)
        requantized = refuse_source(source, allow_requantize=config.allow_requantize)
        work = _prepare(config, source, quantizers[0], progress)
        hands = workers(config, source)
        while len(quantizers) < hands.count:
            quantizers.append(processes.enter_context(closing(Quantizer())))
        reference, results = quantize_files(
            source, work.files, quantizers, hands.threads, progress, work.moments
        )
    files = {Path(result.file.path).name: result.described for result in results.values()}
    checks = [check for result in results.values() for check in result.checks]
    mixture = None
    if work.mixed is not None:
        (result,) = results.values()
        mixture = work.mixed.chooser.confirmed(work.mixed.plan, Path(result.file.path))
        files = {name: _with_recipe(entry, work.mixed) for name, entry in files.items()}
        checks.append(size_check(mixture, Path(result.file.path).name))
    inputs = {"gguf": reference}
    written = {name: result.file for name, result in results.items()}
    metrics = QuantizeMetrics(
        files=files,
        derivation=derivation({Path(r.file.path).name: r.digests for r in results.values()}),
        library=versions("llama-cpp-python")["llama-cpp-python"],
    )
    notices = fallback_notices(files)
    if requantized:
        notices.append(
            f"The input was already quantized ({', '.join(sorted(requantized))}): its own errors "
            "stay, and those in this record are relative to it."
        )
    if work.matrix is not None:
        metrics = metrics.model_copy(update={"imatrix": _coverage(work.matrix, source)})
        notices += _importance_notices(work.matrix, source)
        (written if config.imatrix == AUTO else inputs)["imatrix"] = file_ref(work.matrix.path)
    if work.moments is not None:
        solved = {Path(r.file.path).name: r.solved for r in results.values() if r.solved}
        solver = Solver(version=SOLVER_VERSION, files=solved)
        metrics = metrics.model_copy(update={"solver": solver})
        notices += moments_notices(work.moments)
        computed = config.hessians == AUTO
        (written if computed else inputs)["hessians"] = file_ref(work.moments.path)
        if computed:
            inputs |= {
                f"hessian_data: {p.name}": file_ref(p) for p in data_paths(config.hessian_data)
            }
            inputs["model"] = file_ref(model_directory(config.model, config.gguf))
    if mixture is not None:
        metrics = metrics.model_copy(update={"mixture": mixture})
        notices += mixture_notices(mixture)
    if config.imatrix == AUTO:
        inputs |= {f"imatrix_data: {p.name}": file_ref(p) for p in data_paths(config.imatrix_data)}
    return Record(
        kind="quantize",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=metrics.as_json(),
        notices=tuple(notices),
        inputs=inputs,
        outputs=written,
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info().model_copy(update={"measured": QuantizeMeasured(workers=hands).as_json()}),
    )


class _Mixed(NamedTuple):
    """A file whose types were chosen, and the options that give it these."""

    chooser: Chooser
    plan: Plan
    tensor_types: tuple[str, ...]


class _Work(NamedTuple):
    files: tuple[PlannedFile, ...]
    matrix: ImportanceMatrix | None
    moments: MomentsFile | None
    mixed: _Mixed | None = None


def _prepare(
    config: QuantizeConfig, source: GGUFFile, quantizer: Quantizer, progress: Progress
) -> _Work:
    """Everything that can fail before the first expensive byte, then the importance matrix."""
    files = outputs(config)
    calibration = _calibration(config)
    remove_leftovers(config.out)
    given = None if config.imatrix in (None, AUTO) else Path(str(config.imatrix))
    matrix = None if given is None else read_imatrix(given)
    if matrix is not None:
        tensors_without_importance(matrix, source)
    planned = _plan(config, source, quantizer, files, given)
    if config.imatrix != AUTO:
        _require_importance(planned, source, matrix)
    require_room(config.out, source, [file.tensors for file in planned])
    if config.max_size is not None:  # with what is not known yet as small as it can be
        Room.of(
            int(config.max_size),
            source,
            planned[0].tensors,
            choosable(config, source, planned[0].tensors),
        )
        require_tools_to_choose(config)
    given_moments = None
    if config.solver == "hessian" and config.hessians != AUTO:
        given_moments = MomentsFile(Path(config.hessians))
        require_fit(given_moments, source)
    if config.imatrix == AUTO:
        matrix = compute_imatrix(
            source,
            config.imatrix_data,
            config.out / f"{stem(config.gguf)}-imatrix.gguf",
            threads=config.threads,
            progress=progress,
        )
        # mixtures depend on having one
        planned = _plan(config, source, quantizer, files, matrix.path)
        _require_importance(planned, source, matrix)
    if calibration is not None:
        place = config.out / f"{stem(config.gguf)}-hessians.npz"
        given_moments = compute_moments(calibration, source, place, progress)
        require_fit(given_moments, source)
    if config.max_size is None or given_moments is None:
        return _Work(planned, matrix, given_moments)
    mixed = _mixed(config, source, planned[0], given_moments, progress)
    told = config.model_copy(update={"tensor_types": mixed.tensor_types})
    planned = _plan(told, source, quantizer, files, None if matrix is None else matrix.path)
    _require_types(planned[0], mixed.plan)
    return _Work(planned, matrix, given_moments, mixed)


def _of_one_recipe(config: QuantizeConfig) -> QuantizeConfig:
    """The same with one type.

    Raises:
        ConfigError: who chooses types by size is not asked for.
    """
    if not config.chooses_types:
        raise ConfigError(
            "types of single tensors are chosen from second moments",
            where="max_size",
            remedy="Give --solver hessian; or so8tqc choose, which searches mixtures of two types.",
        )
    types = config.types if "types" in config.model_fields_set else (RECIPE,)
    return config.model_copy(update={"types": types})


def _mixed(
    config: QuantizeConfig,
    source: GGUFFile,
    planned: PlannedFile,
    moments: MomentsFile,
    progress: Progress,
) -> _Mixed:
    assert config.max_size is not None  # the caller's condition
    free = choosable(config, source, planned.tensors)
    directory = model_directory(config.model, config.gguf)
    chooser = Chooser(config, source, directory, moments, progress)
    plan = chooser.choose(int(config.max_size), planned.tensors, free)
    return _Mixed(chooser, plan, override_patterns(plan.types))


def _require_types(file: PlannedFile, plan: Plan) -> None:
    """See that libllama gives every tensor the type that was chosen for it.

    Raises:
        ToolError: it does not.
    """
    for name, type_ in plan.types.items():
        if (other := file.tensors[name].type) != type_:
            raise ToolError(f"libllama stores it as {other}, not as {type_}", where=name)


def _with_recipe(entry: QuantizedFile, mixed: _Mixed) -> QuantizedFile:
    words = ", ".join(f"{count} {type_}" for type_, count in entry.types.items())
    recipe = Recipe(
        type=str(entry.type), tensor_types=list(mixed.tensor_types), words=f"by curvature: {words}"
    )
    return entry.model_copy(update={"recipe": recipe})


def _calibration(config: QuantizeConfig) -> Calibration | None:
    """What second moments are to be computed from, None if they are not.

    Raises:
        InputError: nothing says which model directory the file was exported from.
    """
    if config.solver != "hessian" or config.hessians != AUTO:
        return None
    calibration_texts(config.hessian_data)
    model = model_directory(config.model, config.gguf)
    return Calibration(model, config.hessian_data, config.hessian_tokens)


def _plan(
    config: QuantizeConfig,
    source: GGUFFile,
    quantizer: Quantizer,
    files: Sequence[Output],
    imatrix: Path | None,
) -> tuple[PlannedFile, ...]:
    chosen = overrides(config, source)
    planned = []
    for output in files:
        how = recipe(config, output, chosen, imatrix)
        tensors = quantizer.plan(source.path, how)
        require_effect(output, chosen, tensors)
        head_type = chosen.head[0] if chosen.head else None
        fell = fallbacks(tensors, source, output.name, head_type)
        planned.append(PlannedFile(output, how, tensors, fell))
    return tuple(planned)


def _require_importance(
    planned: Sequence[PlannedFile], source: GGUFFile, matrix: ImportanceMatrix | None
) -> None:
    for file in planned:
        require_importance(file.output, file.tensors, source, matrix)


def _coverage(matrix: ImportanceMatrix, source: GGUFFile) -> Coverage:
    return Coverage(
        tensors=len(matrix.means),
        chunks=matrix.chunks,
        without=list(tensors_without_importance(matrix, source)),
        silent_columns=dict(matrix.silent_columns),
        unseen_experts=dict(matrix.unseen_experts),
    )


def _importance_notices(matrix: ImportanceMatrix, source: GGUFFile) -> list[str]:
    notices = []
    if without := tensors_without_importance(matrix, source):
        notices.append("No importance, so rounded without weights: " + ", ".join(without))
    if matrix.silent_columns:
        notices.append(
            "Columns whose inputs were all zero have their tensor's smallest importance: "
            + _numbers(matrix.silent_columns)
        )
    if matrix.unseen_experts:
        notices.append(
            "Experts that no token chose weigh all columns alike: "
            + _numbers(matrix.unseen_experts)
        )
    return notices


def _numbers(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in numbers.items())

"""The pipeline: every stage in order, each reused when nothing it depends on has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from so8tqc.closure import Closure, own_sources, versions_of
from so8tqc.config import (
    STAGES,
    BakeConfig,
    CalibrateConfig,
    ChooseAmongConfig,
    ExportConfig,
    LongTextConfig,
    QCConfig,
    QuantizeConfig,
    RunConfig,
)
from so8tqc.disk.atomic import remove_leftovers
from so8tqc.disk.digests import sha256_json
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.errors import ConfigError
from so8tqc.languages import Language
from so8tqc.llama.libllama import library
from so8tqc.llama.vendor import fetch_converter, find_converter, is_vendored
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import read_record, write_record
from so8tqc.record_kinds.run import RunMetrics
from so8tqc.records import Check, FileRef, Record, Stopwatch, overall, versions
from so8tqc.reports.summary import stage_row
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.bake import bake
from so8tqc.services.calibrate.service import calibrate
from so8tqc.services.choose.among import choose_among
from so8tqc.services.export.service import export
from so8tqc.services.longtext.service import longtext
from so8tqc.services.pages import draw_pages
from so8tqc.services.qc.profiles import profile_file
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.token_file import TOKENS_FILE
from so8tqc.services.quantize.service import CHOOSING, SOLVING, quantize
from so8tqc.services.report import report, write_stage_reports
from so8tqc.services.run.directory import RunDirectory
from so8tqc.services.trained_base import is_trained_directory
from so8tqc.sources.inputs.builtin import resolve_model, resolve_rotations
from so8tqc.sources.inputs.hub import with_local_paths
from so8tqc.sources.inputs.texts import data_paths, input_paths

_log = logging.getLogger(__name__)

_NEED_LIBLLAMA = ("quantize", "calibrate", "qc", "choose")

_SERVICES = {
    "bake": bake,
    "export": export,
    "quantize": quantize,
    "calibrate": calibrate,
    "qc": qc,
    "choose": choose_among,
    "longtext": longtext,
}
"""Whose modules, with all that they lean on, are the code of a stage."""

_DRAWING = ("so8tqc.services.report", "so8tqc.reports")
"""The code of all pages: templates and languages lie there, too."""

_DRAWN = {"png"}
"""Options that only say what is drawn: they change pages, and no stage."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: which.
        config: what the service is given; part of the fingerprint.
        inputs: files and directories it depends on.
        outputs: what it writes, besides its record.
        service: does the work.
        reports: whether Markdown, HTML and JUnit are written beside the record, besides the
            pages that a stage has of its own.
        after: earlier stages whose records it reads.
    """

    name: str
    config: BaseModel
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    service: Callable[[Progress], Record]
    reports: bool = False
    after: tuple[str, ...] = ()


@exclusive(claim_folder)
def run(
    config: RunConfig,
    progress: Progress = SILENT,
    *,
    only: str | None = None,
    from_stage: str | None = None,
) -> Record:
    """Run a pipeline in ``config.out``.

    Args:
        config: what to run.
        progress: told about every stage.
        only: run this stage alone; earlier ones must have been made.
        from_stage: run this stage and all later ones even if they could be reused.

    Returns:
        Record of kind ``run``; its checks are those of all stages, its verdict the worst,
        ``metrics.stages`` has a row for each stage.

    Raises:
        ConfigError: unknown stage name.
        BusyError: another run is at work in this directory.
        So8tqcError: whatever a stage raises; what was finished before it stays.
    """
    watch = Stopwatch()
    require_stages(only, from_stage)
    stages = prepare(config, progress, only)
    directory = RunDirectory(config.out)
    remove_leftovers(config.out)
    records: dict[str, Record] = {}
    for stage in stages:
        if only is not None and stage.name != only:
            continue
        forced = from_stage is not None and STAGES.index(stage.name) >= STAGES.index(from_stage)
        records[stage.name] = _perform(
            stage, directory, progress, forced or only is not None, config.report.language
        )
    summary = _summary(config, records, watch)
    write_record(config.out / "record.json", summary)
    if only is None or only == "report":
        page = report(config.out, progress, language=config.report.language)
        return summary.model_copy(update={"outputs": {**summary.outputs, **page.outputs}})
    return summary


def require_stages(*names: str | None) -> None:
    """See that each name, where there is one, is a stage's.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name is not None and name not in STAGES:
            raise ConfigError(f"no stage {name!r}", remedy=f"Stages are {', '.join(STAGES)}.")


def prepare(
    config: RunConfig, progress: Progress = SILENT, only: str | None = None
) -> Sequence[Stage]:
    """The stages of a run but the report, what they need looked for, nothing begun.

    Raises:
        So8tqcError: libllama, the converter, a built-in, the data or the profile is missing.
    """
    if only is None or only in _NEED_LIBLLAMA:
        library()
    local = {
        k: with_local_paths(getattr(config, k), progress) for k in ("rotation_options", "bake")
    }
    config = config.model_copy(update=local)
    base = resolve_model(config.base, progress)
    rotations = _resolved_rotations(config, base, progress)
    converter: tuple[Path, ...] = ()
    if only is None or only == "export":
        if config.llama_cpp is None and not is_vendored():
            fetch_converter(progress)
        converter = (find_converter(config.llama_cpp).script,)
    return _stages(config, base, rotations, converter)


def _resolved_rotations(config: RunConfig, base: Path, progress: Progress) -> Path | None:
    """Where the rotations are: given, or the base itself; None where there are only adapters."""
    if config.rotations is not None:
        return resolve_rotations(config.rotations, progress)
    alone = bool(config.rotation_options.adapters) and not is_trained_directory(base)
    return None if alone else base


def _stages(
    config: RunConfig, base: Path, rotations: Path | None, converter: tuple[Path, ...]
) -> Sequence[Stage]:
    """All stages but the report, with what each reads and writes."""
    out = config.out
    baked = out / "bake" / "baked_model"
    exported = out / "export" / f"{config.name}-{config.export.type.upper()}.gguf"
    folder = out / "quantize"
    quantized = {t: folder / f"{config.name}-{t.upper()}.gguf" for t in config.quantize.types}
    data = input_paths(config.data)
    long_data = input_paths(config.long_data)
    profile = profile_file(config.qc.profile)
    # The reference is the model that was trained: what the rotations are stated to be, never what
    # the bake was told. Else a wrong choice in the bake would be wrong on both sides, and pass.
    trained = config.rotation_options
    sources = (base, *((rotations,) if rotations else ()), *trained.adapters)

    bake_config = BakeConfig(base=base, rotations=rotations, out=baked, **_bake_options(config))
    bake_inputs = tuple(dict.fromkeys((*sources, *bake_config.adapters)))
    export_config = ExportConfig(
        model=baked, out=exported, llama_cpp=config.llama_cpp, **config.export.model_dump()
    )
    quantize_config = QuantizeConfig(
        gguf=exported,
        out=folder,
        model=baked if config.quantize.solver == "hessian" else None,
        **config.quantize.model_dump(),
    )
    calibrate_config = CalibrateConfig(
        gguf=quantized[config.calibrated_type],
        tokenizer=baked,
        data=config.data,
        out=out / "calibrate",
        reference=exported,
        **config.calibrate.model_dump(),
    )
    qc_config = QCConfig(
        reference=base,
        rotations=rotations,
        rotation_options=trained,
        candidates=(baked, exported, *quantized.values()),
        data=config.data,
        out=out / "qc",
        **config.qc.model_dump(),
    )
    choose_config = ChooseAmongConfig(
        gguf=exported,
        quantized=folder,
        judged=qc_config.out,
        threads=config.qc.threads,
        **config.choose.model_dump(),
    )
    long_config = LongTextConfig(
        model=baked,
        reference=base,
        rotations=rotations,
        rotation_options=trained,
        data=config.long_data,
        out=out / "longtext",
        **config.longtext.model_dump(),
    )
    return (
        Stage("bake", bake_config, bake_inputs, (baked,),
               lambda p: bake(bake_config, p), reports=True),
        Stage("export", export_config, (baked, *converter),
               (exported,), lambda p: export(export_config, p)),
        Stage("quantize", quantize_config, (exported, *_weighing_inputs(quantize_config)),
               tuple(quantized.values()), lambda p: quantize(quantize_config, p)),
        Stage("calibrate", calibrate_config, (calibrate_config.gguf, exported, baked, *data),
               (out / "calibrate" / "temperature_config.json",),
               lambda p: calibrate(calibrate_config, p)),
        Stage("qc", qc_config, (*sources, profile, *qc_config.candidates, *data),
               (out / "qc" / TOKENS_FILE,), lambda p: qc(qc_config, p), reports=True),
        Stage("choose", choose_config,
               (exported, *quantized.values(), out / "qc" / TOKENS_FILE), (),
               lambda p: choose_among(choose_config, p), reports=True, after=("quantize", "qc")),
        Stage("longtext", long_config, (*sources, baked, *long_data),
               (out / "longtext" / "series.npz",),
               lambda p: longtext(long_config, p), reports=True),
    )  # fmt: skip


def _weighing_inputs(config: QuantizeConfig) -> tuple[Path, ...]:
    """What the importance matrix and the second moments are, or are computed from."""
    found: tuple[Path, ...] = ()
    if config.imatrix is not None:
        auto = config.imatrix == "auto"
        found += data_paths(config.imatrix_data) if auto else (Path(config.imatrix),)
    if config.solver == "hessian" and config.hessians != "auto":
        found += (Path(config.hessians),)
    elif config.solver == "hessian":
        found += data_paths(config.hessian_data)
        found += () if config.model is None else (config.model,)
    return found


def _bake_options(config: RunConfig) -> dict[str, object]:
    """The bake's options: what the rotations are, overlaid with what the bake was told."""
    told = config.bake.model_dump(exclude_unset=True)
    return {
        **config.rotation_options.model_dump(),
        **config.bake.model_dump(exclude=set(RotationOptions.model_fields)),
        **told,
    }


def _perform(
    stage: Stage, directory: RunDirectory, progress: Progress, forced: bool, language: Language
) -> Record:
    """Reuse or run one stage, then draw its pages anew if anything about them has changed."""
    folder = directory.root / stage.name
    path = folder / "record.json"
    remove_leftovers(folder)
    fingerprint = _fingerprint(stage, directory)
    if not forced and directory.reusable(stage.name, fingerprint):
        record = read_record(path)
        _log.info("stage %s: reused, %s", stage.name, record.verdict)
        progress.message(f"{stage.name}: reused, nothing it depends on has changed")
        _tell(stage, record, directory, progress, language)
        return record.model_copy(update={"run": record.run.model_copy(update={"reused": True})})
    directory.forget(stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    _log.info("begin stage %s, fingerprint %s", stage.name, fingerprint)
    progress.message(f"{stage.name}:")
    record = stage.service(progress)
    write_record(path, record)
    written = [Path(reference.path) for reference in record.outputs.values()]
    directory.commit(stage.name, fingerprint, [path, *dict.fromkeys([*stage.outputs, *written])])
    _tell(stage, record, directory, progress, language)
    _log.info("end stage %s: %s, %.1f s", stage.name, record.verdict, record.run.seconds)
    return record


def _tell(
    stage: Stage, record: Record, directory: RunDirectory, progress: Progress, language: Language
) -> None:
    """Draw the pages of a stage, unless they are there as this code draws them.

    Pages that could not all be drawn are tried again in the next run.
    """
    wanted = stage.config.model_dump(mode="json", include=_DRAWN)
    fingerprint = sha256_json(
        {
            "stage": directory.manifest.stages[stage.name].fingerprint,
            "config": wanted,
            "language": language,
            **_code(own_sources().closure(*_DRAWING)),
        }
    )
    if directory.told(stage.name, fingerprint):
        return
    write = write_stage_reports if stage.reports else draw_pages
    told = record.model_copy(update={"config": {**record.config, **wanted}})
    pages = write(told, directory.root / stage.name, language, progress)
    if pages.files and pages.complete:
        directory.commit_pages(stage.name, fingerprint, pages.files)


def _code(closure: Closure) -> dict[str, object]:
    """What a fingerprint takes from code: sources, and the libraries that they name."""
    return {"code": closure.digest, "versions": versions(*closure.distributions)}


def _fingerprint(stage: Stage, directory: RunDirectory) -> str:
    made = directory.manifest.stages
    return sha256_json(
        {
            "stage": stage.name,
            "config": stage.config.model_dump(mode="json", exclude=_DRAWN),
            "inputs": [directory.ref(path).sha256 for path in stage.inputs],
            "after": [made[name].fingerprint for name in stage.after if name in made],
            **_code(
                own_sources().closure(_SERVICES[stage.name].__module__, without=_idle(stage.config))
            ),
        }
    )


def _idle(config: object) -> tuple[str, ...]:
    """Modules that a stage imports and that do nothing under its options."""
    if not isinstance(config, QuantizeConfig):
        return ()
    solving = SOLVING if config.solver == "libllama" else ()
    return (*solving, *(CHOOSING if config.max_size is None else ()))


def _summary(config: RunConfig, records: dict[str, Record], watch: Stopwatch) -> Record:
    checks: list[Check] = [check for record in records.values() for check in record.checks]
    outputs: dict[str, FileRef] = {}
    for record in records.values():
        if record.kind in ("bake", "quantize"):
            outputs |= record.outputs
    return Record(
        kind="run",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=RunMetrics(
            name=config.name,
            stages={name: stage_row(name, record) for name, record in records.items()},
        ).as_json(),
        diagnosis=tuple(d for record in records.values() for d in record.diagnosis),
        notices=tuple(dict.fromkeys(n for record in records.values() for n in record.notices)),
        outputs=outputs,
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )

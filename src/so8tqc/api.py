"""The commands as functions, for notebooks: ``so8tqc.bake``, ``so8tqc.qc`` and so on.

Each takes what its command takes, under the names that the config file has (docs/configuration.md),
writes what the command writes, prints nothing, and returns the record. A verdict that failed is no
exception: look at ``record.verdict``. What is wrong with the inputs is a ``So8tqcError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Protocol, TypeVar

from so8tqc.config import (
    AuditConfig,
    BakeConfig,
    CalibrateConfig,
    CaptureConfig,
    ExportConfig,
    IdentifyConfig,
    LocateConfig,
    LongTextConfig,
    QCConfig,
    QuantizeConfig,
)
from so8tqc.config.load import load_options
from so8tqc.disk.locks import claim_folder, claim_output
from so8tqc.languages import Language
from so8tqc.options import Options
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import read_record, record_beside, write_record
from so8tqc.records import Record
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.rotation_set import RotationSet

StrPath = str | PathLike[str]
_Config = TypeVar("_Config", bound=Options)


class _HasOut(Protocol):
    @property
    def out(self) -> Path: ...


_StageConfig = TypeVar("_StageConfig", bound=_HasOut)
_Tell = Callable[[Record, Path, Language, Progress], object]


def read_rotations(path: StrPath, **options: object) -> RotationSet:
    """Rotations of a gate file, a checkpoint or an adapter directory, or of a name on a hub.

    Args:
        path: where they are.
        options: ``parametrization``, ``convention`` and ``site``, where the file does not state
            them (nothing is assumed: a ``ConfigError`` lists the readings); ``key``,
            ``lora_alpha``, ``layers``, ``orthogonalize``.
    """
    from so8tqc.rotations.read import read_rotations as read
    from so8tqc.sources.inputs.hub import local_rotations

    return read(local_rotations(Path(path)), _config(RotationOptions, options))


def bake(
    base: StrPath,
    rotations: StrPath | None,
    out: StrPath,
    *,
    progress: Progress = SILENT,
    **options: object,
) -> Record:
    """Fold rotations into a checkpoint, as ``so8tqc bake``.

    Args:
        base: model directory, or a trained one that is base and gates in one.
        rotations: gate file, checkpoint or adapter; None: the base's own weights hold the gates.
        out: directory of the baked model.
        progress: told about bytes.
        options: ``parametrization``, ``convention`` and ``site`` where the rotations do not state
            them; ``key``, ``lora_alpha``, ``layers``, ``baked_dtype`` and so on.
    """
    from so8tqc.services.bake import bake as service

    config = _config(BakeConfig, options, base=base, rotations=rotations, out=out)
    return _single(service, config, progress)


def export(
    model: StrPath, out: StrPath, *, progress: Progress = SILENT, **options: object
) -> Record:
    """Convert a model directory to GGUF, as ``so8tqc export``."""
    from so8tqc.services.export.service import export as service

    config = _config(ExportConfig, options, model=model, out=out)
    return _single(service, config, progress)


def quantize(
    gguf: StrPath,
    types: Iterable[str],
    out: StrPath,
    *,
    progress: Progress = SILENT,
    **options: object,
) -> Record:
    """Quantize a GGUF file, as ``so8tqc quantize``."""
    from so8tqc.services.quantize.service import quantize as service

    config = _config(QuantizeConfig, options, gguf=gguf, types=list(types), out=out)
    return _stage(service, config, progress)


def calibrate(
    gguf: StrPath,
    tokenizer: StrPath,
    out: StrPath,
    *,
    progress: Progress = SILENT,
    **options: object,
) -> Record:
    """Fit a temperature on a GGUF's own logits, as ``so8tqc calibrate``."""
    from so8tqc.services.calibrate.service import calibrate as service
    from so8tqc.services.pages import draw_pages

    config = _config(CalibrateConfig, options, gguf=gguf, tokenizer=tokenizer, out=out)
    return _stage(service, config, progress, draw_pages)


def capture(
    model: StrPath, out: StrPath, *, progress: Progress = SILENT, **options: object
) -> Record:
    """Record a model's logits, as ``so8tqc capture``."""
    from so8tqc.services.capture import capture as service

    config = _config(CaptureConfig, options, model=model, out=out)
    return _single(service, config, progress)


def qc(
    reference: StrPath,
    candidates: StrPath | Iterable[StrPath],
    out: StrPath,
    *,
    progress: Progress = SILENT,
    **options: object,
) -> Record:
    """Judge candidates against a reference, as ``so8tqc qc``.

    Args:
        reference: what is trusted: model directory, GGUF file, capture, name on a hub.
        candidates: one, or several.
        out: directory for record and reports.
        progress: told about the texts.
        options: ``rotations``, ``data``, ``profile``, ``level`` and so on.
    """
    from so8tqc.services.qc.service import qc as service
    from so8tqc.services.report import write_stage_reports

    several = [candidates] if isinstance(candidates, (str, PathLike)) else list(candidates)
    config = _config(QCConfig, options, reference=reference, candidates=several, out=out)
    return _stage(service, config, progress, write_stage_reports)


def identify(
    base: StrPath,
    rotations: StrPath,
    out: StrPath | None = None,
    *,
    progress: Progress = SILENT,
    **options: object,
) -> Record:
    """Find out which reading of a gate file was trained, as ``so8tqc identify``.

    Args:
        base: the base model.
        rotations: the gate file.
        out: gate file to write, with the facts stated; its record lies beside.
        progress: told about the texts.
        options: ``capture``, ``data``, ``rotation_options`` (what is known), ``report``
            (a directory) and so on.
    """
    from so8tqc.services.identify.service import identify as service
    from so8tqc.services.report import write_stage_reports

    config = _config(IdentifyConfig, options, base=base, rotations=rotations, out=out)
    with claim_output(config.out) if config.out else nullcontext():
        record = service(config, progress)
        if config.out is not None:
            write_record(record_beside(config.out), record)
    if config.report is not None:
        with claim_folder(config.report):
            write_stage_reports(record, config.report)
            write_record(config.report / "record.json", record)
    return record


def longtext(
    model: StrPath, out: StrPath, *, progress: Progress = SILENT, **options: object
) -> Record:
    """Look for what only long text shows, as ``so8tqc longtext``."""
    from so8tqc.services.longtext.service import longtext as service
    from so8tqc.services.report import write_stage_reports

    config = _config(LongTextConfig, options, model=model, out=out)
    return _stage(service, config, progress, write_stage_reports)


def locate(
    reference: StrPath,
    candidate: StrPath,
    out: StrPath,
    *,
    progress: Progress = SILENT,
    **options: object,
) -> Record:
    """Where two models part, layer by layer and operation by operation, as ``so8tqc locate``.

    Args:
        reference: the model directory that is trusted.
        candidate: a model directory or GGUF file.
        out: directory for record and reports.
        progress: told about layers.
        options: ``rotations``, ``data``, ``max_tokens``, ``only_layers`` and so on.
    """
    from so8tqc.services.locate.service import locate as service
    from so8tqc.services.report import write_stage_reports

    config = _config(LocateConfig, options, reference=reference, candidate=candidate, out=out)
    return _stage(service, config, progress, write_stage_reports)


def audit(
    file: StrPath,
    base: StrPath,
    out: StrPath,
    *,
    progress: Progress = SILENT,
    **options: object,
) -> Record:
    """Whether a GGUF file is that model, honestly quantized, as ``so8tqc audit``.

    Args:
        file: the GGUF file, whoever made it.
        base: model directory that it claims to be made from.
        out: directory for record and reports.
        progress: told about weights.
        options: ``rotations``, ``rotation_options``, ``fail_on``, ``allow``.
    """
    from so8tqc.services.audit import audit as service
    from so8tqc.services.report import write_stage_reports

    config = _config(AuditConfig, options, file=file, base=base, out=out)
    return _stage(service, config, progress, write_stage_reports)


def compare(
    first: StrPath, second: StrPath, out: StrPath | None = None, *, progress: Progress = SILENT
) -> Record:
    """What changed between two runs or stages, as ``so8tqc report A B``."""
    from so8tqc.services.compare.run import require_two
    from so8tqc.services.compare.service import compare_runs

    a, b = Path(first), Path(second)
    require_two(a, b)
    return compare_runs(a, b, b / "comparison" if out is None else Path(out), progress)


def load_record(path: StrPath) -> Record:
    """The record that a command or one of these functions left: a file, or its directory."""
    found = Path(path)
    return read_record(found / "record.json" if found.is_dir() else found)


def _config(kind: type[_Config], options: Mapping[str, object], /, **paths: object) -> _Config:
    """A config of what was given; None means the default."""
    given = {name: value for name, value in {**options, **paths}.items() if value is not None}
    return load_options(kind, flags={name: _text(value) for name, value in given.items()})


def _text(value: object) -> object:
    """Paths as text, in lists too: the config makes paths of them, and keeps ``./`` in mind."""
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_text(item) for item in value]
    return value


def _single(
    service: Callable[[_StageConfig, Progress], Record], config: _StageConfig, progress: Progress
) -> Record:
    """Run a service that makes one file, or one directory as a whole; its record lies beside."""
    with claim_output(config.out):
        record = service(config, progress)
        write_record(record_beside(config.out), record)
    return record


def _stage(
    service: Callable[[_StageConfig, Progress], Record],
    config: _StageConfig,
    progress: Progress,
    tell: _Tell | None = None,
) -> Record:
    """Run a service that writes into a directory; record and pages lie in it."""
    with claim_folder(config.out):
        record = service(config, progress)
        write_record(config.out / "record.json", record)
        if tell is not None:
            tell(record, config.out, Language.ENGLISH, progress)
    return record

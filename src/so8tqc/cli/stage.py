"""What every stage command does: configure, call the service, save and show the record, exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import typer

from so8tqc.languages import Language
from so8tqc.progress import SILENT

if TYPE_CHECKING:
    from pydantic import BaseModel

    from so8tqc.config import ExportConfig, IdentifyConfig
    from so8tqc.progress import Progress
    from so8tqc.records import Record

    class _HasOut(Protocol):
        @property
        def out(self) -> Path: ...

    _Config = TypeVar("_Config", bound=BaseModel)
    _StageConfig = TypeVar("_StageConfig", bound=_HasOut)
    _Tell = Callable[[Record, Path, Language, Progress], object]


@dataclass(frozen=True)
class Output:
    """How a command talks: ``--json`` and ``--quiet``."""

    json: bool
    quiet: bool


def configure(
    model: type[_Config],
    flags: Mapping[str, object],
    file: Path | None,
    overrides: Sequence[str] | None,
) -> _Config:
    """The config of a command from its flags, ``--set``, environment and file."""
    from so8tqc.config.load import load_options

    return load_options(
        model, file=file, overrides=overrides or (), flags=flags, environment=os.environ
    )


def run_stage(
    service: Callable[[_StageConfig, Progress], Record], config: _StageConfig, output: Output
) -> None:
    """Run a service that writes into a directory, record and pages beside its files, and exit."""
    from so8tqc.disk.locks import claim_folder
    from so8tqc.services.pages import draw_pages

    path = config.out / "record.json"
    told = cast("BaseModel", config)  # a protocol cannot ask for a base class
    with claim_folder(config.out):
        record = _recorded(
            lambda progress: service(config, progress), told, output, path, draw_pages
        )
    finish(record, output, path)


def run_single_output(
    service: Callable[[_StageConfig, Progress], Record], config: _StageConfig, output: Output
) -> None:
    """As :func:`run_stage`, for a service that makes one file, or one directory, as a whole."""
    told = cast("BaseModel", config)  # a protocol cannot ask for a base class
    _run_beside(lambda progress: service(config, progress), told, config.out, output)


def _run_beside(
    service: Callable[[Progress], Record], config: BaseModel, out: Path, output: Output
) -> None:
    from so8tqc.disk.locks import claim_output
    from so8tqc.record_files import record_beside

    path = record_beside(out)
    with claim_output(out):
        record = _recorded(service, config, output, path)
    finish(record, output, path)


def _recorded(
    service: Callable[[Progress], Record],
    config: BaseModel,
    output: Output,
    path: Path,
    tell: _Tell | None = None,
) -> Record:
    """Run a service with a progress display; write its record, then what tells of it."""
    from so8tqc.record_files import write_record

    def recorded(progress: Progress) -> Record:
        record = service(progress)
        write_record(path, record)
        if tell is not None:
            tell(record, path.parent, Language.ENGLISH, progress)
        return record

    return work(recorded, config, path, output)


def work(
    service: Callable[[Progress], Record],
    config: BaseModel | None,
    record_path: Path,
    output: Output,
) -> Record:
    """Run a service with a progress display and a log.

    Args:
        service: told about the progress.
        config: of the service, for the log; None if the service tells it itself.
        record_path: where the record will be; the log lies beside it (see ``cli.log``).
        output: how the command talks.
    """
    from so8tqc.cli.log import log_beside, log_record, logged
    from so8tqc.cli.progress import terminal_progress

    with (
        terminal_progress(quiet=output.quiet) as shown,
        logged(log_beside(record_path), config, shown) as progress,
    ):
        record = service(progress)
        log_record(record)
    return record


def run_reported_stage(
    service: Callable[[_Config, Progress], Record],
    config: _Config,
    out: Path,
    output: Output,
    shown: str,
) -> None:
    """As :func:`run_stage`, with the stage's own reports; everything goes into ``out``.

    Of several processes that work together, only the first shows and writes anything. On GitHub
    (``GITHUB_STEP_SUMMARY``) the Markdown report is added to the step's summary.

    Args:
        shown: name of the report whose path is printed.
    """
    from so8tqc.disk.atomic import remove_leftovers
    from so8tqc.disk.locks import claim_folder
    from so8tqc.services.report import write_stage_reports
    from so8tqc.sources import ranks

    if not ranks.is_first():
        record = service(config, SILENT)
        ranks.wait_for_all()
        exit_by(record)
        return
    with claim_folder(out):
        remove_leftovers(out)
        path = out / "record.json"
        record = _recorded(
            lambda progress: service(config, progress), config, output, path, write_stage_reports
        )
    add_to_step_summary(out / "report.md")
    present(record, output, out / shown)
    ranks.wait_for_all()  # a launcher ends all of them as soon as one says that a verdict failed
    exit_by(record)


def run_identify(config: IdentifyConfig, output: Output) -> None:
    """Run ``identify``: its report goes to a directory, its record beside the gate file, or it is
    only shown."""
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.services.identify.service import identify

    if config.report is not None:
        run_reported_stage(identify, config, config.report, output, "report.html")
    elif config.out is not None:
        _run_beside(lambda progress: identify(config, progress), config, config.out, output)
    else:
        with terminal_progress(quiet=output.quiet) as progress:
            record = identify(config, progress)
        finish(record, output)


def with_converter(config: ExportConfig) -> ExportConfig:
    """Ask on a terminal whether to fetch the converter, where it is not here and none is given."""
    from so8tqc.errors import MissingToolError
    from so8tqc.llama.vendor import download, find_converter, vendor_directory

    if config.vendor == "auto" or not _somebody_answers():
        return config
    try:
        find_converter(config.llama_cpp)
    except MissingToolError:
        question = f"llama.cpp's converter is not here. Fetch {download()} to {vendor_directory()}?"
        if typer.confirm(question, default=True, err=True):
            return config.model_copy(update={"vendor": "auto"})
    return config


def _somebody_answers() -> bool:
    """Whether a question would be seen, and an answer come from a person."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def add_to_step_summary(report: Path) -> None:
    """Append a Markdown report to the summary of a GitHub step, if this is one."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary and report.is_file():
        with Path(summary).open("a", encoding="utf-8") as stream:
            stream.write(report.read_text(encoding="utf-8") + "\n")


def finish(record: Record, output: Output, path: Path | None = None) -> None:
    """Show a record and exit: 1 if its verdict failed."""
    present(record, output, path)
    exit_by(record)


def finish_check(record: Record, output: Output) -> None:
    """As :func:`finish`; what cannot be judged is bad input (exit code 3), and no verdict."""
    from so8tqc.errors import ExitCode
    from so8tqc.record_kinds.check import CheckMetrics
    from so8tqc.records import Verdict

    present(record, output)
    if not CheckMetrics.of(record).readable or record.verdict is Verdict.SKIP:
        raise typer.Exit(ExitCode.BAD_INPUT)
    exit_by(record)


def exit_by(record: Record) -> None:
    """Exit with 1 if a record's verdict failed."""
    from so8tqc.errors import ExitCode
    from so8tqc.records import Verdict

    if record.verdict is Verdict.FAIL:
        raise typer.Exit(ExitCode.VERDICT_FAILED)


def present(record: Record, output: Output, path: Path | None = None) -> None:
    """Show a record, as JSON, as tables or not at all."""
    from so8tqc.cli.show import show

    try:
        if output.json:
            typer.echo(record.model_dump_json(indent=2))
        elif not output.quiet:
            show(record, path)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone (`| head`); the verdict stands all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

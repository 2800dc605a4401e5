"""Report: from the records of a run to one HTML page, Markdown, JSON and JUnit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from pydantic import ValidationError

from so8tqc.closure import versions_of
from so8tqc.config import STAGES
from so8tqc.disk.atomic import remove_leftovers, write_text
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder
from so8tqc.errors import InputError
from so8tqc.languages import Language
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import read_record
from so8tqc.record_kinds.run import RunMetrics
from so8tqc.records import Record, Stopwatch, Verdict
from so8tqc.reports.html import page
from so8tqc.reports.junit import junit_xml
from so8tqc.reports.language import spoken
from so8tqc.reports.markdown import run_markdown, stage_markdown
from so8tqc.reports.model_card import model_card
from so8tqc.reports.sections import section, stage_tables
from so8tqc.reports.summary import Summary, summarise_run
from so8tqc.services.pages import Pages, draw_pages

_FOREIGN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What drawing raises where a record's metrics are not of the expected form."""

_FILES = {
    "html": "report.html",
    "markdown": "report.md",
    "json": "report.json",
    "junit": "junit.xml",
}


def report(
    directory: Path, progress: Progress = SILENT, *, language: Language | None = None
) -> Record:
    """Write ``report/report.{html,md,json}`` and ``report/junit.xml`` of a run directory.

    Args:
        directory: what ``run`` wrote.
        progress: told about each file.
        language: of the page and the Markdown; None takes what the run was configured with.
            JSON and JUnit, which machines read, are English always.

    Returns:
        Record of kind ``report``: the checks of all stages, the worst stage's verdict;
        ``metrics.stages`` has a row for each stage, as in the record of ``run``.

    Raises:
        InputError: the directory holds no stage's record, or one that cannot be read.
        BusyError: a run is at work in the directory.
    """
    with claim_folder(directory) if directory.is_dir() else nullcontext():
        return _report(directory, progress, language)


def _report(directory: Path, progress: Progress, language: Language | None) -> Record:
    watch = Stopwatch()
    records = read_stages(directory)
    language = language or configured_language(_run_record(directory))
    out = directory / "report"
    remove_leftovers(out)
    with progress.task("writing the report", total=len(_FILES)) as task:
        summary, texts = render(directory, records, language)
        paths = {kind: out / name for kind, name in _FILES.items()}
        for kind, text in texts.items():
            write_text(paths[kind], text)
            task.advance(1, item=paths[kind].name)
    return Record(
        kind="report",
        verdict=Verdict(summary["verdict"]),
        checks=tuple(check for record in records.values() for check in record.checks),
        metrics=RunMetrics(
            name=summary["name"],
            language=language,
            stages={row["name"]: row for row in summary["stages"]},
        ).as_json(),
        diagnosis=tuple(d for record in records.values() for d in record.diagnosis),
        outputs={kind: file_ref(path) for kind, path in paths.items()},
        versions=versions_of(__name__),
        run=watch.info(),
    )


def render(
    directory: Path, records: Mapping[str, Record], language: Language = Language.ENGLISH
) -> tuple[Summary, dict[str, str]]:
    """The summary of a run, and the text of each kind of report; nothing is written.

    Raises:
        InputError: a record's metrics are not those of its kind in this version.
    """
    name, note = _name(directory), _note(_run_record(directory))
    try:
        summary = summarise_run(name, records, note)
        return summary, {
            **_for_people(name, records, directory, language, note),
            "json": _json(summary, records),
            "junit": junit_xml(list(records.values())),
        }
    except _FOREIGN as error:
        raise _foreign(error, directory) from error


def _foreign(error: Exception, directory: Path) -> InputError:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{error.title}, {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return InputError(
        f"a stage's record holds what none of this version does ({reason})",
        where=str(directory),
        remedy="Run the stage again.",
    )


def write_model_card(directory: Path) -> Path:
    """Write ``report/model-card.md``, a section for a README, from a run's records.

    Raises:
        InputError: the directory holds no stage's record, no GGUF file was made, or a record is
            not of this version.
        BusyError: a run is at work in the directory.
    """
    with claim_folder(directory) if directory.is_dir() else nullcontext():
        records = read_stages(directory)
        if not any(name in records for name in ("export", "quantize", "choose")):
            raise InputError(
                "there is no file for a model card: nothing was exported or quantized",
                where=str(directory),
            )
        try:
            text = model_card(_name(directory), records)
        except _FOREIGN as error:
            raise _foreign(error, directory) from error
        path = directory / "report" / "model-card.md"
        write_text(path, text)
        return path


def _for_people(
    name: str, records: Mapping[str, Record], directory: Path, language: Language, note: str
) -> dict[str, str]:
    """The page and the Markdown of a run."""
    with spoken(language):
        summary = summarise_run(name, records, note)
        tables = {stage: stage_tables(stage, record) for stage, record in records.items()}
        sections = [
            section(stage, record, records, directory / stage, f"../{stage}/")
            for stage, record in records.items()
        ]
        return {
            "html": page(summary, sections),
            "markdown": run_markdown(records, tables, summary),
        }


def write_stage_reports(
    record: Record,
    out: Path,
    language: Language = Language.ENGLISH,
    progress: Progress = SILENT,
) -> Pages:
    """``report.md``, ``report.html`` and ``junit.xml`` of one stage, beside its record.

    Before them, as the page links to them, the pages of the stage's own (see ``services.pages``).
    """
    pages = draw_pages(record, out, language, progress)
    records = {record.kind: record}
    with spoken(language):
        summary = summarise_run(record.kind, records)
        tables = stage_tables(record.kind, record)
        write_text(out / "report.md", stage_markdown(record, tables, summary))
        sections = [section(record.kind, record, records, out, "")]
        write_text(out / "report.html", page(summary, sections))
    write_text(out / "junit.xml", junit_xml([record]))
    written = [out / name for name in ("report.md", "report.html", "junit.xml")]
    return Pages([*pages.files, *written], pages.complete)


def read_stages(directory: Path) -> dict[str, Record]:
    """Stage → record: the pipeline's stages in its order, then any other folder with a record.

    Raises:
        InputError: there is none, or one is not a record.
    """
    found = {path.parent.name: path for path in sorted(directory.glob("*/record.json"))}
    known = [stage for stage in STAGES if stage in found]
    others = [stage for stage in found if stage not in STAGES]
    records = {stage: read_record(found[stage]) for stage in (*known, *others)}
    if not records:
        raise InputError(
            "no stage has left a record here",
            where=str(directory),
            remedy="Give the run directory of so8tqc run.",
        )
    return records


def _name(directory: Path) -> str:
    """The run's name from its own record, else the directory's."""
    run = _run_record(directory)
    if run is None:
        return directory.resolve().name
    return RunMetrics.of(run).name or directory.name


def _run_record(directory: Path) -> Record | None:
    """What ``run`` itself wrote, if this is a run directory."""
    path = directory / "record.json"
    return read_record(path) if path.is_file() else None


def _note(run: Record | None) -> str:
    """The sentence that the run was configured with, "" if none."""
    note = run.config.get("note") if run else None
    return note if isinstance(note, str) else ""


def configured_language(run: Record | None) -> Language:
    """What the run was told; English for a code that this version does not know."""
    options = run.config.get("report") if run else None
    code = options.get("language") if isinstance(options, dict) else None
    known = [language for language in Language if language == code]
    return known[0] if known else Language.ENGLISH


def _json(summary: Summary, records: Mapping[str, Record]) -> str:
    content = {
        "schema_version": 1,
        "kind": "report",
        "verdict": summary["verdict"],
        "summary": summary,
        "stages": {name: record.model_dump(mode="json") for name, record in records.items()},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

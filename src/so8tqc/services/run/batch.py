"""Batch: the runs of a matrix one after another, and a table of all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from so8tqc.closure import versions_of
from so8tqc.config.batch import Batch, Combination
from so8tqc.disk.atomic import require_space, write_text
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.errors import ExitCode, So8tqcError, explained
from so8tqc.languages import Language
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import write_record
from so8tqc.record_kinds.batch import BatchFile, BatchMeasured, BatchMetrics, BatchRow
from so8tqc.record_kinds.run import RunMetrics
from so8tqc.records import Record, Stopwatch, Verdict
from so8tqc.reports.kinds.batch import batch_markdown
from so8tqc.reports.language import spoken
from so8tqc.services.run.pipeline import require_stages, run
from so8tqc.services.run.preflight import preflight

BATCH_RECORD, BATCH_REPORT = "batch.json", "batch.md"
NOT_RUN = "not run"

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # without a log, not to stderr: the record has the error


def language_of(batch: Batch) -> Language:
    """Of the batch's tables: what its runs agree on, else English."""
    said = {combination.config.report.language for combination in batch.combinations}
    return said.pop() if len(said) == 1 else Language.ENGLISH


@exclusive(claim_folder)
def run_batch(
    batch: Batch,
    progress: Progress = SILENT,
    *,
    only: str | None = None,
    from_stage: str | None = None,
) -> Record:
    """Run every combination in its own directory; one that fails does not stop the others.

    All are looked over before the first begins. ``batch.json`` and ``batch.md`` are written
    after each, so that an interrupted batch tells how far it came; the stages of a second one are
    reused as in single runs.

    Returns:
        Record of kind ``batch``; metrics and ``run.measured``: see ``so8tqc.record_kinds.batch``.
        ``exit_code`` is the worst of all, the largest number: a run that could not be judged (2, 3,
        4, 70) is worse than one that was and failed (1).

    Raises:
        So8tqcError: some combination could not be run; none was begun. KeyboardInterrupt
            ends the batch.
    """
    watch = Stopwatch()
    require_stages(only, from_stage)
    _look_over(batch, progress, only)
    rows = {c.name: _unrun(c) for c in batch.combinations}
    seconds: dict[str, float] = {}
    reused: dict[str, list[str]] = {}
    for i, combination in enumerate(batch.combinations):
        name = combination.name
        progress.message(f"[{i + 1}/{len(rows)}] {name}")
        _log.info("config %s", combination.config.model_dump_json(exclude_defaults=True))
        own = Stopwatch()
        rows[name], reused[name] = _run(combination, progress, only, from_stage)
        seconds[name] = own.info().seconds
        record = _record(batch, rows, seconds, reused, watch)
        write_record(batch.out / BATCH_RECORD, record)
        with spoken(language_of(batch)):
            write_text(batch.out / BATCH_REPORT, batch_markdown(record))
    return record


def _look_over(batch: Batch, progress: Progress, only: str | None) -> None:
    """Preflight of all combinations, and room for all baked models."""
    wrong: dict[str, So8tqcError] = {}
    size = 0
    for combination in batch.combinations:
        try:
            size += preflight(combination.config, progress, only=only)
        except So8tqcError as error:
            wrong[combination.name] = error
    if wrong:
        raise _together(wrong, len(batch.combinations))
    require_space(batch.out, size, "the baked models of all combinations need {}")


def _together(wrong: Mapping[str, So8tqcError], total: int) -> So8tqcError:
    """One error for all, of the worst kind; what several share is said once."""
    worst = max(wrong.values(), key=lambda error: error.exit_code)
    said: dict[str, list[str]] = {}
    for name, error in wrong.items():
        said.setdefault(str(error), []).append(name)
    if len(said) == 1 and len(wrong) == total:
        return worst
    listed = " ".join(f"[{'; '.join(names)}] {text}" for text, names in said.items())
    return type(worst)(
        f"{len(wrong)} of {total} combinations cannot be run, so none was begun", remedy=listed
    )


def _unrun(combination: Combination) -> BatchRow:
    return {
        "values": dict(combination.values),
        "directory": combination.name,
        "verdict": NOT_RUN,
        "exit_code": None,
    }


def _run(
    combination: Combination, progress: Progress, only: str | None, from_stage: str | None
) -> tuple[BatchRow, list[str]]:
    """The row of a run, and which of its stages were reused."""
    row = _unrun(combination)
    try:
        record = run(combination.config, progress, only=only, from_stage=from_stage)
    except Exception as error:  # noqa: BLE001  it is told, counts as the worst, and the next may do
        text, code = explained(error)
        _log.exception("%s stopped", combination.name)
        progress.message(f"{combination.name}: {text}")
        return row | {"verdict": "error", "exit_code": int(code), "error": text}, []
    failed = record.verdict is Verdict.FAIL
    verdicts = [check.verdict for check in record.checks]
    stages = RunMetrics.of(record).stages
    return row | {
        "verdict": str(record.verdict),
        "exit_code": int(ExitCode.VERDICT_FAILED if failed else ExitCode.OK),
        "passed": verdicts.count(Verdict.PASS),
        "failed": sum(check.failed for check in record.checks),
        "skipped": verdicts.count(Verdict.SKIP),
        "files": _files(record),
    }, [name for name, stage in stages.items() if stage["reused"]]


def _files(record: Record) -> dict[str, BatchFile]:
    sizes = {Path(ref.path).name: ref.bytes for ref in record.outputs.values()}
    found: dict[str, BatchFile] = {}
    for check in record.checks:
        if check.id == "kl.mean":
            same = [c for c in record.checks if (c.id, c.subject) == ("kl.top1", check.subject)]
            found[check.subject] = {
                "bytes": sizes.get(check.subject),
                "kl_mean": check.value,
                "kl_ci95": check.ci95,
                "top1": same[0].value if same else None,
                "verdict": str(check.verdict),
            }
    return found


def _record(
    batch: Batch,
    rows: Mapping[str, BatchRow],
    seconds: Mapping[str, float],
    reused: Mapping[str, list[str]],
    watch: Stopwatch,
) -> Record:
    codes = [row["exit_code"] for row in rows.values() if row["exit_code"] is not None]
    worst = max(codes)
    measured = BatchMeasured(seconds=dict(seconds), reused=dict(reused))
    return Record(
        kind="batch",
        verdict=Verdict.FAIL if worst else Verdict.PASS,
        metrics=BatchMetrics(combinations=dict(rows), exit_code=worst).as_json(),
        config={"out": str(batch.out)},
        versions=versions_of(__name__),
        run=watch.info().model_copy(update={"measured": measured.as_json()}),
    )

"""A batch as tables: how each combination ended, and every file it judged."""

from __future__ import annotations

from so8tqc.record_kinds.batch import BatchFile, BatchMeasured, BatchMetrics
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.language import say
from so8tqc.reports.tables import Table
from so8tqc.reports.templating import render_markdown
from so8tqc.wording import percent


def batch_tables(record: Record) -> list[Table]:
    """The combinations, then the files of all of them, where any were judged."""
    rows = BatchMetrics.of(record).combinations
    measured = BatchMeasured.of(record)
    seconds, reused = measured.seconds, measured.reused
    combinations = Table(
        say("Combinations"),
        [
            say("combination"),
            say("verdict"),
            say("exit code"),
            say("passed"),
            say("failed"),
            say("skipped"),
            say("reused"),
            say("seconds"),
        ],
        [
            [
                name,
                say(row["verdict"]).upper() if row["verdict"] == "fail" else say(row["verdict"]),
                _shown(row["exit_code"]),
                *map(_shown, (row.get("passed"), row.get("failed"), row.get("skipped"))),
                _shown(len(reused[name]) if name in reused else None),
                f"{seconds[name]:.1f}" if name in seconds else "",
            ]
            for name, row in rows.items()
        ],
    )
    files = [
        [name, file, *_file_cells(found)]
        for name, row in rows.items()
        for file, found in row.get("files", {}).items()
    ]
    header = [
        say("combination"),
        say("file"),
        say("size"),
        say("KL mean"),
        say("95 % interval"),
        say("same top"),
        say("verdict"),
    ]
    return [combinations, *([Table(say("Files"), header, files)] if files else [])]


def batch_markdown(record: Record) -> str:
    """``batch.md``."""
    found = BatchMetrics.of(record)
    errors = {name: row["error"] for name, row in found.combinations.items() if "error" in row}
    return render_markdown(
        "batch.md.j2",
        record=record,
        exit_code=found.exit_code,
        tables=batch_tables(record),
        errors=errors,
    )


def _file_cells(found: BatchFile) -> list[str]:
    interval = found["kl_ci95"]
    return [
        "" if found["bytes"] is None else fmt.size(found["bytes"]),
        fmt.number(found["kl_mean"]),
        "" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}",
        "" if found["top1"] is None else percent(found["top1"]),
        say(found["verdict"]),
    ]


def _shown(value: int | None) -> str:
    return "" if value is None else str(value)

"""A batch as tables: how each combination ended, and every file it judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.tables import Table, entries
from so8tqc.reports.templating import render_markdown
from so8tqc.wording import percent


def batch_tables(record: Record) -> list[Table]:
    """The combinations, then the files of all of them, where any were judged."""
    rows = entries(record, "combinations")
    seconds = _measured(record, "seconds")
    reused = _measured(record, "reused")
    combinations = Table(
        "Combinations",
        ["combination", "verdict", "exit code", "passed", "failed", "skipped", "reused", "seconds"],
        [
            [
                name,
                row["verdict"].upper() if row["verdict"] == "fail" else row["verdict"],
                _shown(row["exit_code"]),
                *(_shown(row.get(key)) for key in ("passed", "failed", "skipped")),
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
    header = ["combination", "file", "size", "KL mean", "95 % interval", "same top", "verdict"]
    return [combinations, *([Table("Files", header, files)] if files else [])]


def batch_markdown(record: Record) -> str:
    """``batch.md``."""
    errors = {
        name: row["error"]
        for name, row in entries(record, "combinations").items()
        if "error" in row
    }
    return render_markdown("batch.md.j2", record=record, tables=batch_tables(record), errors=errors)


def _file_cells(found: Mapping[str, Any]) -> list[str]:
    interval = found["kl_ci95"]
    return [
        "" if found["bytes"] is None else fmt.size(found["bytes"]),
        fmt.number(found["kl_mean"]),
        "" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}",
        "" if found["top1"] is None else percent(found["top1"]),
        found["verdict"],
    ]


def _measured(record: Record, key: str) -> dict[str, Any]:
    found = record.run.measured.get(key)
    return found if isinstance(found, dict) else {}


def _shown(value: object) -> str:
    return "" if value is None else str(value)

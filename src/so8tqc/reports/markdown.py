"""Records as Markdown, for pull requests and people without a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from so8tqc.records import Record
from so8tqc.reports.summary import Summary
from so8tqc.reports.tables import Table
from so8tqc.reports.templating import render_markdown


def stage_markdown(record: Record, tables: Sequence[Table], summary: Summary) -> str:
    """One stage: verdict, what to do next, tables, checks."""
    return render_markdown("stage.md.j2", record=record, tables=tables, summary=summary)


def run_markdown(
    records: Mapping[str, Record],
    tables: Mapping[str, Sequence[Table]],
    summary: Summary,
) -> str:
    """A whole run: the first screen, then each stage's tables and checks, folded."""
    return render_markdown("run.md.j2", records=records, tables=tables, summary=summary)

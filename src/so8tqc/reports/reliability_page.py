"""``reliability.html`` and its PNG: the page of a calibration by itself."""

from __future__ import annotations

from pathlib import Path

from so8tqc.disk.atomic import write_text
from so8tqc.records import Record
from so8tqc.reports.html import Section, page
from so8tqc.reports.kinds.calibrate import calibration_tables, reliability_plots, sentence
from so8tqc.reports.language import say
from so8tqc.reports.summary import summarise_run


def write_reliability(record: Record, path: Path) -> None:
    """Write a page of its own: verdict, figure and tables; plotly.js is inside."""
    section = Section(
        record.kind,
        record,
        notes=[sentence(record)],
        plots=reliability_plots(record),
        tables=calibration_tables(record),
    )
    write_text(path, page(summarise_run(say("Calibration"), {record.kind: record}), [section]))

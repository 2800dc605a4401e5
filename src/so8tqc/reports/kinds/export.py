"""An export: the tensors by type, and how they were written."""

from __future__ import annotations

from so8tqc.record_kinds.export import ExportMetrics
from so8tqc.records import Record
from so8tqc.reports.language import say
from so8tqc.reports.tables import Column, Table, counted_types, number_of, size_of, tabulate


def export_table(record: Record) -> Table | None:
    """The exported file."""
    columns: list[Column[ExportMetrics]] = [
        (say("type"), lambda row: row.file_type or ""),
        (say("tensors"), lambda row: counted_types(row.types)),
        (say("size"), size_of(lambda row: row.bytes)),
        (say("bits per weight"), number_of(lambda row: row.bits_per_weight)),
        (say("rearranged"), lambda row: counted_types(row.rearranged)),
    ]
    found = ExportMetrics.of(record)
    rows = {found.architecture: found} if found.architecture else {}
    return tabulate(say("File"), say("architecture"), columns, rows)

"""An export: the tensors by type, and how they were written."""

from __future__ import annotations

from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.language import say
from so8tqc.reports.tables import Column, Table, counted_types, number_of, tabulate, types_of


def export_table(record: Record) -> Table | None:
    """The exported file."""
    columns: list[Column] = [
        (say("type"), lambda row: str(row.get("file_type", ""))),
        (say("tensors"), types_of),
        (say("size"), lambda row: fmt.size(row["bytes"]) if "bytes" in row else ""),
        (say("bits per weight"), number_of("bits_per_weight")),
        (say("rearranged"), lambda row: counted_types(row.get("rearranged"))),
    ]
    name = str(record.metrics.get("architecture", ""))
    return tabulate(
        say("File"), say("architecture"), columns, {name: record.metrics} if name else {}
    )

"""Quantized files: size, types, and the tensors that fell back to another type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from so8tqc.record_kinds.quantize import QuantizedFile, QuantizeMetrics
from so8tqc.records import Record
from so8tqc.reports.language import say
from so8tqc.reports.tables import Column, Table, counted_types, number_of, size_of, tabulate


def file_table(record: Record) -> Table | None:
    """Quantized files with the types that their tensors really have."""
    return table_of(QuantizeMetrics.of(record).files)


def table_of(files: Mapping[str, QuantizedFile]) -> Table | None:
    """The same of files by name."""
    columns: list[Column[QuantizedFile]] = [
        (say("size"), size_of(lambda row: row.bytes)),
        (say("bits per weight"), number_of(lambda row: row.bits_per_weight)),
        (say("tensors by type"), lambda row: counted_types(row.types)),
        (say("fell back to"), _fallbacks),
    ]
    return tabulate(say("Files"), say("file"), columns, files)


def _fallbacks(row: QuantizedFile) -> str:
    if row.fallbacks is None:
        return ""
    return counted_types(Counter(row.fallbacks.values())) or say("none")

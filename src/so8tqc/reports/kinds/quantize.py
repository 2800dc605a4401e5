"""Quantized files: size, types, and the tensors that fell back to another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.language import say
from so8tqc.reports.tables import (
    Column,
    Table,
    counted_types,
    entries,
    number_of,
    tabulate,
    types_of,
)


def file_table(record: Record) -> Table | None:
    """Quantized files with the types that their tensors really have."""
    columns: list[Column] = [
        (say("size"), lambda row: fmt.size(row["bytes"]) if "bytes" in row else ""),
        (say("bits per weight"), number_of("bits_per_weight")),
        (say("tensors by type"), types_of),
        (say("fell back to"), _fallbacks),
    ]
    return tabulate(say("Files"), say("file"), columns, entries(record, "files"))


def _fallbacks(row: Mapping[str, Any]) -> str:
    fallbacks = row.get("fallbacks")
    if not isinstance(fallbacks, dict):
        return ""
    counts: dict[str, int] = {}
    for kind in fallbacks.values():
        counts[str(kind)] = counts.get(str(kind), 0) + 1
    return counted_types(counts) or say("none")

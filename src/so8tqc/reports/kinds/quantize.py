"""Quantized files: size, types, and the tensors that fell back to another type."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from so8tqc.record_kinds.quantize import QuantizedFile, QuantizeMetrics, SolvedFile
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


def solved_table(record: Record) -> Table | None:
    """Of each file what was solved for, and how far outputs move with and without.

    Errors are the root mean squares over tensors of ‖(W − Q) x‖ / ‖W x‖.
    """
    solver = QuantizeMetrics.of(record).solver
    if solver is None:
        return None
    columns: list[Column[SolvedFile]] = [
        (say("tensors solved for"), lambda row: str(len(row.tensors))),
        (say("output error, libllama"), number_of(lambda row: _error(row, "libllama"))),
        (say("output error, solved"), number_of(lambda row: _error(row, "solved"))),
        (say("left to libllama"), lambda row: counted_types(Counter(row.left.values()))),
    ]
    return tabulate(say("Second moments"), say("file"), columns, solver.files)


def _error(row: SolvedFile, whose: Literal["libllama", "solved"]) -> float | None:
    squares = [float(getattr(tensor, whose)) ** 2 for tensor in row.tensors.values()]
    return math.sqrt(sum(squares) / len(squares)) if squares else None


def _fallbacks(row: QuantizedFile) -> str:
    if row.fallbacks is None:
        return ""
    return counted_types(Counter(row.fallbacks.values())) or say("none")

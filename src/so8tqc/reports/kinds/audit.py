"""An audit: what the file is, how it was quantized, and all tensors, the unexplained first."""

from __future__ import annotations

from so8tqc.record_kinds.audit import AuditMetrics, TypeUse
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.html import Plot
from so8tqc.reports.kinds.qc import survival_table, tensor_plot, tensor_table
from so8tqc.reports.language import message, say
from so8tqc.reports.tables import Column, Table, tabulate

_HOW = {
    "rounded": message("rounded to a plain type"),
    "plain": message("quantized by plain rounding"),
    "nearest": message("quantized, every code the nearest"),
    "importance": message("quantized with an importance matrix"),
    "compensated": message("quantized by an encoder that makes up for errors"),
    "unexplained": message("quantized in no way that an honest encoder explains"),
}


def tables(record: Record) -> list[Table | None]:
    """What it is, its types, its tensors, the gates' survival."""
    found = AuditMetrics.of(record)
    return [
        _file_table(found),
        _type_table(found),
        tensor_table(found.file.name, found.tensors),
        survival_table(found.file.name, found.survival),
    ]


def _file_table(found: AuditMetrics) -> Table:
    file = found.file
    rows = [
        [say("architecture"), file.architecture],
        [say("type by its own word"), file.declared or "–"],
        [say("how"), say(_HOW[found.how])],
        [say("size"), fmt.size(float(file.bytes))],
        [say("weights"), f"{file.weights:,}"],
        [say("bits a weight"), f"{file.bits:.2f}"],
        *([key, value] for key, value in file.says.items()),
    ]
    return Table(say("What {name} is", name=file.name), ["", say("value")], rows)


def _type_table(found: AuditMetrics) -> Table | None:
    columns: list[Column[TypeUse]] = [
        (say("tensors"), lambda row: f"{row.tensors:,}"),
        (say("weights"), lambda row: f"{row.weights:,}"),
        (say("bits"), lambda row: f"{row.bits:.2f}"),
        (say("verdict"), lambda row: ", ".join(f"{n} {v}" for v, n in row.verdicts.items())),
    ]
    return tabulate(say("How it was quantized"), say("type"), columns, found.types)


def plots(record: Record) -> list[Plot]:
    """The map of layers and tensors."""
    found = AuditMetrics.of(record)
    return tensor_plot(found.file.name, found.tensors)

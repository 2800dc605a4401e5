"""Which tables, plots and links show which stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from so8tqc.records import Record
from so8tqc.reports.html import Plot, Section
from so8tqc.reports.kinds import audit, bake, calibrate, choose, identify, locate, qc
from so8tqc.reports.kinds.export import export_table
from so8tqc.reports.kinds.longtext import case_table
from so8tqc.reports.kinds.quantize import (
    chosen_table,
    file_table,
    prediction_table,
    solved_table,
)
from so8tqc.reports.tables import Table, generic_tables

_TABLES: Mapping[str, Callable[[Record], Iterable[Table | None]]] = {
    "audit": audit.tables,
    "bake": lambda _: [],
    "export": lambda record: [export_table(record)],
    "identify": lambda record: [identify.reading_table(record)],
    "locate": locate.tables,
    "quantize": lambda record: [
        file_table(record),
        solved_table(record),
        chosen_table(record),
        prediction_table(record),
    ],
    "calibrate": calibrate.tables,
    "qc": qc.tables,
    "choose": choose.tables,
    "longtext": lambda record: [case_table(record)],
}
"""Stages that have tables of their own; others are shown by ``tables.generic_tables``."""

_PLOTS: Mapping[str, Callable[[Record], list[Plot]]] = {
    "audit": audit.plots,
    "bake": bake.plots,
    "calibrate": calibrate.plots,
    "choose": choose.plots,
    "identify": identify.plots,
    "locate": locate.plots,
}
"""Stages whose plots need their own record alone."""

_SHOWN = {"audit": 3, "quantize": 2, "qc": 2, "locate": 3, "choose": 4}
"""How many tables are a stage's result, if not the first alone; the others are detail."""


def stage_tables(name: str, record: Record) -> list[Table]:
    """The tables of a stage, those that its record can fill."""
    make = _TABLES.get(name, generic_tables)
    return [table for table in make(record) if table is not None]


def section(
    name: str, record: Record, records: Mapping[str, Record], folder: Path, prefix: str
) -> Section:
    """One section of the page.

    Args:
        name: the stage.
        record: its record.
        records: all stages, for plots that need two of them.
        folder: where the stage's other files are.
        prefix: from the page to that folder, "" or ending in a slash.
    """
    tables = stage_tables(name, record)
    shown = _SHOWN.get(name, 1)
    folded = tables[shown:]
    if name == "bake" and (by_layer := bake.layer_table(record)):
        folded.append(by_layer)
    worst = qc.worst_token_tables(record) if name == "qc" else []
    return Section(
        name,
        record,
        plots=_plots(name, record, records),
        tables=tables[:shown],
        closeups=worst[:1],
        folded=[*folded, *worst[1:]],
        links=_links(folder, prefix),
        notes=bake.drift_notes(record) if name == "bake" else [],
    )


def _plots(name: str, record: Record, records: Mapping[str, Record]) -> list[Plot]:
    match name:
        case "qc":
            sizes = [] if "quantize" in records else qc.size_plots(records)
            return [*qc.tensor_plots(record), *qc.kl_plots(record), *sizes]
        case "quantize" if "choose" not in records:
            return qc.size_plots(records)
        case _:
            draw = _PLOTS.get(name)
            return draw(record) if draw else []


def _links(folder: Path, prefix: str) -> list[tuple[str, str]]:
    """The stage's other pages."""
    pages = sorted(folder.glob("*.html")) if folder.is_dir() else []
    return [
        (page.stem.replace("_", " "), prefix + quote(page.name))
        for page in pages
        if page.name != "report.html"
    ]

"""Which tables, plots and links show which stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from so8tqc.records import Record
from so8tqc.reports import choices as c
from so8tqc.reports import figures
from so8tqc.reports import tables as t
from so8tqc.reports.html import Plot, Section
from so8tqc.reports.language import say

if TYPE_CHECKING:
    import plotly.graph_objects as go


def _calibration_tables(record: Record) -> list[t.Table]:
    """The calibration's own tables; none where nothing was fitted."""
    from so8tqc.reports.reliability import calibration_tables

    if not {"change", "groups", "fitted", "objectives"} <= record.metrics.keys():
        return []
    return [t.Table(*table) for table in calibration_tables(record)]


_TABLES: Mapping[str, Callable[[Record], Iterable[t.Table | None]]] = {
    "bake": lambda _: [],
    "export": lambda record: [t.export_table(record)],
    "quantize": lambda record: [t.file_table(record)],
    "calibrate": _calibration_tables,
    "qc": lambda record: [
        t.candidate_table(record),
        c.pair_table(record),
        t.split_table(record),
        *t.survival_tables(record),
    ],
    "choose": lambda record: [
        c.row_table(record),
        c.pair_table(record),
        c.speed_table(record),
        c.tried_table(record),
        c.sensitivity_table(record),
        t.file_table(record),
    ],
    "longtext": lambda record: [t.case_table(record)],
}
"""Stages that have tables of their own; others are shown by ``tables.generic_tables``."""

_SHOWN = {"qc": 2, "choose": 4}
"""How many tables are a stage's result, if not the first alone; the others are detail."""


def stage_tables(name: str, record: Record) -> list[t.Table]:
    """The tables of a stage, those that its record can fill."""
    make = _TABLES.get(name, t.generic_tables)
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
    if name == "bake" and (by_layer := t.layer_table(record)):
        folded.append(by_layer)
    worst = t.worst_token_tables(record) if name == "qc" else []
    return Section(
        name,
        record,
        plots=_plots(name, record, records),
        tables=tables[:shown],
        closeups=worst[:1],
        folded=[*folded, *worst[1:]],
        links=_links(folder, prefix),
    )


def _plots(name: str, record: Record, records: Mapping[str, Record]) -> list[Plot]:
    match name:
        case "bake":
            return _bake_plots(record)
        case "calibrate" if "reliability" in record.metrics:
            from so8tqc.reports.reliability import reliability_plots

            return reliability_plots(record)
        case "qc":
            return [*_kl_plots(record), *([] if "quantize" in records else _size_plots(records))]
        case "quantize" if "choose" not in records:
            return _size_plots(records)
        case "choose":
            return _choice_plots(record)
        case _:
            return []


def _bake_plots(record: Record) -> list[Plot]:
    return _drawn(
        (
            say("Drift of every block"),
            say(
                "log₁₀ ‖RᵀR − I‖_F: how far each block is from a rotation. The scale ends at the "
                "limit, −3: an even dark field is what a sound gate looks like."
            ),
            figures.drift_heatmap(record),
        ),
        (
            say("Effect and fidelity by layer"),
            say(
                "What the rotation changed, and what rounding to the storage dtype cost, each "
                "relative to the weight."
            ),
            figures.layer_fidelity(record),
        ),
    )


def _kl_plots(qc: Record) -> list[Plot]:
    return _drawn(
        (
            say("KL of single tokens"),
            say("How the divergence is spread: a tail on the right is a few tokens gone wrong."),
            figures.kl_histogram(qc),
        )
    )


def _size_plots(records: Mapping[str, Record]) -> list[Plot]:
    if "qc" not in records:
        return []
    found = figures.quality_by_size(records["qc"], records.get("quantize"), records.get("export"))
    note = say("Mean KL to the reference with its 95 % interval.")
    return _drawn((say("Quality against size"), note, found))


def _choice_plots(record: Record) -> list[Plot]:
    return _drawn(
        (
            say("Quality against size"),
            say("Mean KL to the reference with its 95 % interval; the recommended file is orange."),
            c.quality_by_size(record),
        ),
        (
            say("Quality against speed"),
            say(
                "Tokens generated per second on this machine: the median, slowest and fastest "
                "repeat. Better is to the right and below."
            ),
            c.quality_by_speed(record),
        ),
    )


def _drawn(*candidates: tuple[str, str, go.Figure | None]) -> list[Plot]:
    """The plots that their record could fill."""
    return [Plot(title, note, figure) for title, note, figure in candidates if figure is not None]


def _links(folder: Path, prefix: str) -> list[tuple[str, str]]:
    """The stage's other pages."""
    pages = sorted(folder.glob("*.html")) if folder.is_dir() else []
    return [
        (page.stem.replace("_", " "), prefix + quote(page.name))
        for page in pages
        if page.name != "report.html"
    ]

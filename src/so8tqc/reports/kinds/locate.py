"""Where two models part: errors by layer, and the operations of the first wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from so8tqc.record_kinds.locate import LocateMetrics, OperationRow, RuntimeRow
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.figures import BLUE, GREY, ORANGE, SMALLEST, style
from so8tqc.reports.html import Plot, drawn
from so8tqc.reports.language import say
from so8tqc.reports.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST, _FEW = 40, 10
"""Rows of a table at most, and where nothing is wrong: of the rest the record tells."""


def tables(record: Record) -> list[Table | None]:
    """The operations where the models part first, then every layer."""
    return [operation_table(record), layer_table(record), runtime_table(record)]


def operation_table(record: Record) -> Table | None:
    """All operations of the first wrong layer and the wrong ones of others; of a model without any,
    those that come nearest to their limit."""
    found = LocateMetrics.of(record)
    first = found.first
    if first is None:
        rows = sorted(found.operations, key=_share, reverse=True)[:_FEW]
        title = say("Operations nearest to what rounding explains")
    else:
        rows = [r for r in found.operations if r.wrong or r.layer == first.layer][:_MOST]
        title = say("Where the models part")
    if not rows:
        return None
    header = [
        say("operation"), say("module"), say("error"), say("explained up to"), say("gain"),
        say("cause"),
    ]  # fmt: skip
    return Table(title, header, [_cells(row) for row in rows])


def _cells(row: OperationRow) -> list[str]:
    return [
        ("→ " if row.wrong else "") + _place(row.layer, row.operation),
        row.module,
        fmt.number(row.error),
        fmt.number(row.limit),
        "" if row.gain is None else f"{row.gain:.5f}",
        row.cause or (say("not known") if row.wrong else ""),
    ]


def _share(row: OperationRow) -> float:
    return row.error / row.limit if row.limit else 0.0


def layer_table(record: Record) -> Table | None:
    """The error after each layer, inherited and own."""
    rows = LocateMetrics.of(record).layers
    if not rows:
        return None
    header = [
        say("layer"), say("error"), say("of rounding"), say("own error"), say("explained up to"),
    ]  # fmt: skip
    body = [
        [
            ("→ " if row.wrong else "") + (say("logits") if row.layer is None else str(row.layer)),
            fmt.number(row.error),
            fmt.number(row.explained),
            "" if row.own is None else fmt.number(row.own),
            "" if row.limit is None else fmt.number(row.limit),
        ]
        for row in rows
    ]
    return Table(say("Error after each layer"), header, body)


def runtime_table(record: Record) -> Table | None:
    """libllama's values that are not explained; else those nearest to it."""
    rows = LocateMetrics.of(record).runtime or []
    if not rows:
        return None
    wrong = [row for row in rows if row.wrong][:_MOST]
    shown = wrong or sorted(rows, key=_runtime_share, reverse=True)[:_FEW]
    header = [
        say("operation"), say("module"), say("error"), say("of rounding"), say("explained up to"),
        say("from the reference"),
    ]  # fmt: skip
    body = [
        [
            ("→ " if row.wrong else "") + _place(row.layer, row.operation),
            row.node,
            fmt.number(row.error),
            fmt.number(row.explained),
            fmt.number(row.limit),
            "" if row.inherited is None else fmt.number(row.inherited),
        ]
        for row in shown
    ]
    return Table(say("libllama's own values beside the file's weights"), header, body)


def _runtime_share(row: RuntimeRow) -> float:
    return row.error / row.limit


def _place(layer: int | None, operation: str) -> str:
    where = "" if layer is None else say("layer {number}", number=layer) + say(", ")
    return f"{where}{operation}"


def layer_plot(record: Record) -> go.Figure | None:
    """Errors over layers: as the model runs, of each layer alone, and of rounding."""
    import plotly.graph_objects as go

    rows = [row for row in LocateMetrics.of(record).layers if row.layer is not None]
    if not rows:
        return None
    layers = [row.layer for row in rows]
    series = [
        (say("inherited and own"), GREY, "solid", [row.error for row in rows]),
        (say("rounding, inherited and own"), GREY, "dot", [row.explained for row in rows]),
        (say("own"), ORANGE, "solid", [row.own or 0.0 for row in rows]),
        (say("own, explained up to"), BLUE, "dot", [row.limit or 0.0 for row in rows]),
    ]
    figure = go.Figure(
        [
            go.Scatter(
                x=layers,
                y=[max(value, SMALLEST) for value in values],
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
            )
            for name, colour, dash, values in series
        ]
    )
    figure.update_xaxes(title=say("layer"))
    figure.update_yaxes(title=say("relative error"), type="log", exponentformat="power")
    return style(figure)


def plots(record: Record) -> list[Plot]:
    return drawn(
        (
            say("Error after each layer"),
            say(
                "Grey: as the candidate runs, what its layers before have made included. Orange: "
                "each layer given what the reference's is given. Dotted: what rounding to the "
                "stored types makes of it."
            ),
            layer_plot(record),
        )
    )

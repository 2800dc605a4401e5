"""A bake: what its layers turned, and how exactly it was folded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from so8tqc.record_kinds.bake import BakeMetrics, FoldedLayer
from so8tqc.records import Record
from so8tqc.reports.figures import BLUE, ORANGE, SMALLEST, legend_below, style, whole_ticks
from so8tqc.reports.html import Plot, deciding, drawn
from so8tqc.reports.language import say
from so8tqc.reports.tables import Column, Table, number_of, scientific_of, tabulate

if TYPE_CHECKING:
    import plotly.graph_objects as go


def layer_table(record: Record) -> Table | None:
    """A bake's folded tensors."""
    columns: list[Column[FoldedLayer]] = [
        (say("blocks"), number_of(lambda row: row.blocks)),
        (say("drift, largest"), scientific_of(lambda row: row.orthogonality_max)),
        (say("angle, mean (rad)"), number_of(lambda row: row.angle_mean)),
        (say("angle, largest"), number_of(lambda row: row.angle_max)),
        (say("effect"), number_of(lambda row: row.effect)),
        (say("rounding"), number_of(lambda row: row.relative_error)),
        (say("ulp, largest"), number_of(lambda row: row.max_ulp)),
        (say("sha256 after"), lambda row: (row.sha256_after or "")[:12]),
    ]
    rows = {str(row.layer): row for row in BakeMetrics.of(record).layers}
    return tabulate(say("Layers"), say("layer"), columns, rows)


_DRIFT_RANGE = (-16.0, -3.0)
"""log10 of ‖RᵀR − I‖_F: from float64's own rounding to the limit of a rotation."""


_DRIFT_COLOURS = (
    (0.0, "#26324a"),
    (0.5, "#33609e"),
    (0.75, "#4c8dff"),
    (0.9, "#ffb36b"),
    (1.0, "#ff5a4f"),
)


def drift_heatmap(record: Record) -> go.Figure | None:
    """‖RᵀR − I‖_F of every block, layer × block, on a logarithmic scale."""
    import numpy as np
    import plotly.graph_objects as go

    matrix = BakeMetrics.of(record).orthogonality
    if not matrix:
        return None
    width = max(len(row) for row in matrix)
    values = np.full((len(matrix), width), np.nan)
    for i, row in enumerate(matrix):
        values[i, : len(row)] = row
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(np.maximum(values, SMALLEST)),
            zmin=_DRIFT_RANGE[0],
            zmax=_DRIFT_RANGE[1],
            customdata=values,
            colorscale=_DRIFT_COLOURS,
            colorbar={"title": {"text": "log₁₀"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate=say("layer %{y}, block %{x}") + ": %{customdata:.2e}<extra></extra>",
        )
    )
    figure.update_xaxes(title=say("block"), **whole_ticks(width))
    figure.update_yaxes(title=say("layer"), **whole_ticks(len(matrix)))
    return style(figure, height=380)


def layer_fidelity(record: Record) -> go.Figure | None:
    """Effect and distance from the exact fold, layer by layer."""
    import plotly.graph_objects as go

    layers = BakeMetrics.of(record).layers
    effects = [(row.layer, row.effect) for row in layers if row.effect]
    errors = [(row.layer, row.relative_error) for row in layers if row.relative_error]
    series = (
        (effects, say("effect ‖W′ − W‖ / ‖W‖"), BLUE),
        (errors, say("rounding ‖W′ − W·R‖ / ‖W·R‖"), ORANGE),
    )
    figure = go.Figure()
    for points, name, colour in series:
        if points:
            figure.add_scatter(
                x=[layer for layer, _ in points],
                y=[value for _, value in points],
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 6},
            )
    if not figure.data:
        return None
    figure.update_yaxes(
        type="log", title=say("relative to the norm"), dtick=1, exponentformat="power"
    )
    figure.update_xaxes(title=say("layer"), **whole_ticks(len(layers)))
    return legend_below(style(figure))


def drift_notes(record: Record) -> list[str]:
    """Of sound gates one sentence is enough: a map of their drift is an even field."""
    blocks = [value for row in BakeMetrics.of(record).orthogonality or () for value in row]
    if not blocks or not _is_sound(record):
        return []
    return [
        say(
            "Every one of {blocks} blocks is a rotation: ‖RᵀR − I‖_F is at most {largest}, and "
            "{limit} is allowed.",
            blocks=f"{len(blocks):,}",
            largest=f"{max(blocks):.1e}",
            limit=f"{10.0 ** _DRIFT_RANGE[1]:g}",
        )
    ]


def _is_sound(record: Record) -> bool:
    """Whether no block is further from a rotation than is allowed."""
    rows = BakeMetrics.of(record).orthogonality or ()
    return all(value <= 10.0 ** _DRIFT_RANGE[1] for row in rows for value in row)


def plots(record: Record) -> list[Plot]:
    layers = drawn(
        (
            say("Effect and fidelity by layer"),
            say(
                "What the rotation changed, and what rounding to the storage dtype cost, each "
                "relative to the weight."
            ),
            layer_fidelity(record),
        )
    )
    if _is_sound(record):
        return deciding(layers)
    return deciding(layers) + drawn(
        (
            say("Drift of every block"),
            say(
                "log₁₀ ‖RᵀR − I‖_F: how far each block is from a rotation. The scale ends at the "
                "limit, −3."
            ),
            drift_heatmap(record),
        ),
    )

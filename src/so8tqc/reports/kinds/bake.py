"""A bake: what its layers turned, and how exactly it was folded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from so8tqc.records import Record
from so8tqc.reports.figures import BLUE, ORANGE, SMALLEST, legend_below, style, whole_ticks
from so8tqc.reports.html import Plot, drawn
from so8tqc.reports.language import say
from so8tqc.reports.tables import Column, Table, layers, number_of, scientific_of, tabulate

if TYPE_CHECKING:
    import plotly.graph_objects as go


def layer_table(record: Record) -> Table | None:
    """A bake's folded tensors."""
    columns: list[Column] = [
        (say("blocks"), number_of("blocks")),
        (say("drift, largest"), scientific_of("orthogonality_max")),
        (say("angle, mean (rad)"), number_of("angle_mean")),
        (say("angle, largest"), number_of("angle_max")),
        (say("effect"), number_of("effect")),
        (say("rounding"), number_of("relative_error")),
        (say("ulp, largest"), number_of("max_ulp")),
        (say("sha256 after"), lambda row: str(row.get("sha256_after", ""))[:12]),
    ]
    rows = {f"{row.get('layer', '')}": row for row in layers(record)}
    return tabulate(say("Layers"), say("layer"), columns, rows)


_DRIFT_RANGE = (-16.0, -3.0)
"""log10 of ‖RᵀR − I‖_F: from float64's own rounding to the limit of a rotation."""


_DRIFT_COLOURS = (
    (0.0, "#26324a"), (0.5, "#33609e"), (0.75, "#4c8dff"), (0.9, "#ffb36b"), (1.0, "#ff5a4f"),
)  # fmt: skip


def drift_heatmap(record: Record) -> go.Figure | None:
    """‖RᵀR − I‖_F of every block, layer × block, on a logarithmic scale."""
    import numpy as np
    import plotly.graph_objects as go

    matrix = record.metrics.get("orthogonality")
    if not isinstance(matrix, list) or not matrix:
        return None
    width = max(len(row) for row in matrix if isinstance(row, list))
    values = np.full((len(matrix), width), np.nan)
    for i, row in enumerate(matrix):
        assert isinstance(row, list)
        values[i, : len(row)] = np.asarray(row, dtype=float)
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

    series = (
        ("effect", say("effect ‖W′ − W‖ / ‖W‖"), BLUE),
        ("relative_error", say("rounding ‖W′ − W·R‖ / ‖W·R‖"), ORANGE),
    )
    figure = go.Figure()
    for key, name, colour in series:
        rows = [row for row in layers(record) if row.get(key)]
        if rows:
            figure.add_scatter(
                x=[row.get("layer", i) for i, row in enumerate(rows)],
                y=[row[key] for row in rows],
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 6},
            )
    if not figure.data:
        return None
    figure.update_yaxes(type="log", title=say("relative to the norm"), dtick=1,
                        exponentformat="power")  # fmt: skip
    figure.update_xaxes(title=say("layer"), **whole_ticks(len(layers(record))))
    return legend_below(style(figure))


def plots(record: Record) -> list[Plot]:
    return drawn(
        (
            say("Drift of every block"),
            say(
                "log₁₀ ‖RᵀR − I‖_F: how far each block is from a rotation. The scale ends at the "
                "limit, −3: an even dark field is what a sound gate looks like."
            ),
            drift_heatmap(record),
        ),
        (
            say("Effect and fidelity by layer"),
            say(
                "What the rotation changed, and what rounding to the storage dtype cost, each "
                "relative to the weight."
            ),
            layer_fidelity(record),
        ),
    )

"""Plots of records. Colours work on light and dark ground; text colours follow the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from so8tqc.records import Record
from so8tqc.reports.language import say
from so8tqc.reports.tables import entries, layers

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, ORANGE, GREEN, GREY = "#4c8dff", "#ff8b3d", "#2fb67c", "#8a94a6"
_SERIES = (BLUE, ORANGE, GREEN, "#b07cff", "#e05a8a", "#2bb3c0")
_DRIFT_RANGE = (-16.0, -3.0)
"""log10 of ‖RᵀR − I‖_F: from float64's own rounding to the limit of a rotation."""

_DRIFT_COLOURS = (
    (0.0, "#26324a"), (0.5, "#33609e"), (0.75, "#4c8dff"), (0.9, "#ffb36b"), (1.0, "#ff5a4f"),
)  # fmt: skip
_SMALLEST = 1e-18
_TICKS = 10


def style(figure: go.Figure, height: int = 340) -> go.Figure:
    """Transparent ground, quiet grid; the page's script sets text and grid colours."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        legend={"orientation": "h", "y": 1.12, "x": 0},
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
    )
    grid = {"gridcolor": "rgba(138,148,166,0.25)", "zerolinecolor": "rgba(138,148,166,0.4)"}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    return figure


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
            z=np.log10(np.maximum(values, _SMALLEST)),
            zmin=_DRIFT_RANGE[0],
            zmax=_DRIFT_RANGE[1],
            customdata=values,
            colorscale=_DRIFT_COLOURS,
            colorbar={"title": {"text": "log₁₀"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate=say("layer %{y}, block %{x}") + ": %{customdata:.2e}<extra></extra>",
        )
    )
    figure.update_xaxes(title=say("block"), **_whole(width))
    figure.update_yaxes(title=say("layer"), **_whole(len(matrix)))
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
    figure.update_xaxes(title=say("layer"), **_whole(len(layers(record))))
    return _legend_below(style(figure))


def quality_by_size(qc: Record, quantize: Record | None, export: Record | None) -> go.Figure | None:
    """Mean KL against file size of every GGUF whose size is known."""
    import plotly.graph_objects as go

    if quantize is None:
        return None
    sizes = _sizes(quantize, export)
    points = sorted(
        (sizes[check.subject], check.value, check.subject, check.ci95 or (check.value, check.value))
        for check in qc.checks
        if check.id == "kl.mean" and check.subject in sizes and check.value
    )
    if not points:
        return None
    figure = go.Figure(
        go.Scatter(
            x=[size / 1e6 for size, *_ in points],
            y=[kl for _, kl, *_ in points],
            text=[name.removesuffix(".gguf").rpartition("-")[2] for _, _, name, _ in points],
            customdata=[name for _, _, name, _ in points],
            mode="markers+text",
            textposition="middle right",
            cliponaxis=False,
            marker={"size": 10, "color": BLUE},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - kl for _, kl, _, (_, high) in points],
                "arrayminus": [kl - low for _, kl, _, (low, _) in points],
                "color": GREY,
                "thickness": 1.2,
            },
            hovertemplate="%{customdata}<br>%{x:.1f} MB, KL %{y:.3g}<extra></extra>",
        )
    )
    # room on the right for the last point's name
    figure.update_xaxes(title=say("file size, MB"), range=[0, points[-1][0] / 1e6 * 1.2])
    figure.update_yaxes(title=say("mean KL, nats"), type="log", dtick=1, exponentformat="power")
    return style(figure)


def kl_histogram(qc: Record) -> go.Figure | None:
    """Distribution of per-token KL (log scale) of every candidate."""
    import plotly.graph_objects as go

    figure, used = go.Figure(), list[float]()
    for i, (name, metrics) in enumerate(entries(qc, "candidates").items()):
        histogram = metrics.get("kl_histogram")
        if histogram:
            pairs = zip(histogram["log10_centres"], histogram["counts"], strict=True)
            used += [centre for centre, count in pairs if count]
            figure.add_scatter(
                x=histogram["log10_centres"],
                y=histogram["counts"],
                name=name,
                mode="lines",
                line={"shape": "hvh", "width": 2, "color": _SERIES[i % len(_SERIES)]},
            )
    if not used:
        return None
    figure.update_xaxes(
        title=say("KL of one token, log₁₀ nats"), range=[min(used) - 0.5, max(used) + 0.5]
    )
    figure.update_yaxes(title=say("tokens"))
    return _legend_below(style(figure))


def _whole(count: int) -> dict[str, int]:
    """Ticks at whole numbers: there is no layer 0.5."""
    return {"tick0": 0, "dtick": max(1, round(count / _TICKS))}


def _legend_below(figure: go.Figure) -> go.Figure:
    """Under the plot, where long names may wrap on a phone."""
    figure.update_layout(
        legend={"orientation": "h", "yanchor": "top", "y": -0.22, "x": 0}, margin={"b": 90, "t": 12}
    )
    return figure


def _sizes(quantize: Record, export: Record | None) -> dict[str, float]:
    from pathlib import Path

    sizes: dict[str, float] = {}
    for record in (quantize, export):
        for output in record.outputs.values() if record else ():
            sizes[Path(output.path).name] = float(output.bytes)
    return sizes

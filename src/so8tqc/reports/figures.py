"""Plots of records. Colours work on light and dark ground; text colours follow the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from so8tqc.records import Record

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, ORANGE, GREEN, GREY = "#4c8dff", "#ff8b3d", "#2fb67c", "#8a94a6"


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
            z=np.log10(np.maximum(values, 1e-18)),
            customdata=values,
            colorscale="Viridis",
            colorbar={"title": {"text": "log₁₀"}},
            hovertemplate="layer %{y}, block %{x}: %{customdata:.2e}<extra></extra>",
        )
    )
    figure.update_xaxes(title="block")
    figure.update_yaxes(title="layer")
    return style(figure, height=420)


def layer_fidelity(record: Record) -> go.Figure | None:
    """Effect and distance from the exact fold, layer by layer."""
    import plotly.graph_objects as go

    rows = _layer_rows(record)
    if not rows:
        return None
    layers = [row["layer"] for row in rows]
    figure = go.Figure()
    figure.add_bar(x=layers, y=[row["effect"] for row in rows], name="effect ‖W'−W‖/‖W‖",
                   marker_color=BLUE)  # fmt: skip
    figure.add_scatter(x=layers, y=[row["relative_error"] for row in rows], mode="lines+markers",
                       name="rounding ‖W'−W·R‖/‖W·R‖", marker_color=ORANGE)  # fmt: skip
    figure.update_yaxes(type="log", title="relative to the norm", exponentformat="power")
    figure.update_xaxes(title="layer")
    return style(figure)


def quality_by_size(qc: Record, quantize: Record, export: Record | None) -> go.Figure | None:
    """Mean KL against file size of every GGUF."""
    import plotly.graph_objects as go

    sizes = _sizes(quantize, export)
    points = [
        (sizes[check.subject], check.value, check.subject, check.ci95)
        for check in qc.checks
        if check.id == "kl.mean" and check.subject in sizes and check.value
    ]
    if not points:
        return None
    points.sort()
    figure = go.Figure(
        go.Scatter(
            x=[p[0] / 1e6 for p in points],
            y=[p[1] for p in points],
            text=[p[2] for p in points],
            mode="markers+text",
            textposition="top center",
            marker={"size": 11, "color": BLUE},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [p[3][1] - p[1] if p[3] else 0 for p in points],
                "arrayminus": [p[1] - p[3][0] if p[3] else 0 for p in points],
                "color": GREY,
            },
            hovertemplate="%{text}<br>%{x:.1f} MB, KL %{y:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="file size, MB", rangemode="tozero")
    figure.update_yaxes(title="mean KL, nats", type="log", exponentformat="power")
    return style(figure)


def kl_histogram(qc: Record) -> go.Figure | None:
    """Distribution of per-token KL (log scale) of every candidate."""
    import plotly.graph_objects as go

    candidates = qc.metrics.get("candidates")
    if not isinstance(candidates, dict):
        return None
    figure = go.Figure()
    for name, metrics in candidates.items():
        histogram: Any = metrics["kl_histogram"] if isinstance(metrics, dict) else None
        if histogram:
            figure.add_scatter(x=histogram["log10_centres"], y=histogram["counts"], name=name,
                               mode="lines", line={"shape": "hvh"})  # fmt: skip
    figure.update_xaxes(title="KL of one token, log₁₀ nats")
    figure.update_yaxes(title="tokens")
    return style(figure)


def _layer_rows(record: Record) -> list[dict[str, Any]]:
    rows = record.metrics.get("layers")
    if not isinstance(rows, list):
        return []
    return [row for row in rows if isinstance(row, dict)]


def _sizes(quantize: Record, export: Record | None) -> dict[str, float]:
    from pathlib import Path

    sizes: dict[str, float] = {}
    for record in (quantize, export):
        for output in record.outputs.values() if record else ():
            sizes[Path(output.path).name] = float(output.bytes)
    return sizes

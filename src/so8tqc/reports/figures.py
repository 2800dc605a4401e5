"""Plots of records. Colours work on light and dark ground; text colours follow the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, ORANGE, GREEN, GREY = "#4c8dff", "#ff8b3d", "#2fb67c", "#8a94a6"
SERIES = (BLUE, ORANGE, GREEN, "#b07cff", "#e05a8a", "#2bb3c0")

SMALLEST = 1e-18
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


def whole_ticks(count: int) -> dict[str, int]:
    """Ticks at whole numbers: there is no layer 0.5."""
    return {"tick0": 0, "dtick": max(1, round(count / _TICKS))}


def legend_below(figure: go.Figure) -> go.Figure:
    """Under the plot, where long names may wrap on a phone."""
    figure.update_layout(
        legend={"orientation": "h", "yanchor": "top", "y": -0.22, "x": 0}, margin={"b": 90, "t": 12}
    )
    return figure

"""Reliability diagram and NLL(T) curve of a calibration record, as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from so8tqc.artifacts import write_text
from so8tqc.records import Record

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Mid-tones that stand out on white and on near-black alike; text and grid follow the page's
# colour scheme by CSS (see _PAGE).
_BEFORE, _AFTER, _NEUTRAL = "#d97a1f", "#3f86d6", "#8a8f98"
_INTERVAL = "rgba(63, 134, 214, 0.18)"

_SMALLEST_VIEW = 0.05
"""nats; a flat curve is not magnified beyond this height."""


def reliability_figure(record: Record) -> Figure:
    """Reliability before and at the fitted temperature, tokens per bin, NLL(T).

    Args:
        record: of kind ``calibrate``.

    Returns:
        A plotly figure with transparent background.
    """
    from plotly.subplots import make_subplots

    metrics: dict[str, Any] = record.metrics
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        column_widths=[0.48, 0.52],
        row_heights=[0.76, 0.24],
        horizontal_spacing=0.1,
        vertical_spacing=0.06,
        subplot_titles=("Reliability, held-out tokens", "NLL against temperature"),
    )
    _add_reliability(figure, metrics)
    _add_curve(figure, metrics)
    figure.update_layout(
        height=560,
        margin={"l": 70, "r": 30, "t": 50, "b": 90},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": _NEUTRAL},
        legend={"orientation": "h", "yanchor": "top", "y": -0.13, "x": 0},
        barmode="group",
        bargap=0.15,
    )
    figure.update_xaxes(gridcolor=_NEUTRAL, zeroline=False)
    figure.update_yaxes(gridcolor=_NEUTRAL, zeroline=False)
    return figure


def _add_reliability(figure: Figure, metrics: dict[str, Any]) -> None:
    from plotly import graph_objects as go

    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": _NEUTRAL, "dash": "dash", "width": 1},
        name="perfect",
        hoverinfo="skip",
        row=1,
        col=1,
    )
    sides = (
        ("before", "T = 1", _BEFORE, "circle"),
        ("fitted", f"T = {metrics['fitted']:.3f}", _AFTER, "diamond"),
    )
    for key, name, colour, symbol in sides:
        data = metrics["reliability"][key]
        filled = [i for i, count in enumerate(data["count"]) if count]
        centres = [(a + b) / 2 for a, b in zip(data["edges"], data["edges"][1:], strict=False)]
        figure.add_scatter(
            x=[data["confidence"][i] for i in filled],
            y=[data["accuracy"][i] for i in filled],
            customdata=[data["count"][i] for i in filled],
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"symbol": symbol, "size": 8},
            name=name,
            legendgroup=key,
            hovertemplate="confidence %{x:.3f}<br>accuracy %{y:.3f}<br>%{customdata} tokens",
            row=1,
            col=1,
        )
        figure.add_trace(
            go.Bar(
                x=centres,
                y=data["count"],
                marker={"color": colour, "line": {"width": 0}},
                name=name,
                legendgroup=key,
                showlegend=False,
                hovertemplate="%{y} tokens",
            ),
            row=2,
            col=1,
        )
    figure.update_xaxes(range=[0, 1], showticklabels=False, row=1, col=1)
    figure.update_yaxes(range=[0, 1], title_text="accuracy", row=1, col=1)
    figure.update_xaxes(range=[0, 1], title_text="confidence", row=2, col=1)
    figure.update_yaxes(title_text="tokens", rangemode="tozero", nticks=4, row=2, col=1)


def _add_curve(figure: Figure, metrics: dict[str, Any]) -> None:
    place: dict[str, Any] = {"row": 1, "col": 2}
    grid = np.asarray(metrics["curve"]["temperature"], dtype=np.float64)
    lowest = 0.0
    for key, name, dash in (
        ("nll_holdout", "held-out texts", "solid"),
        ("nll_fit", "fit texts", "dot"),
    ):
        nll = np.asarray(metrics["curve"][key], dtype=np.float64)
        relative = nll - np.interp(0.0, np.log(grid), nll)
        lowest = min(lowest, float(relative.min()))
        figure.add_scatter(
            x=grid,
            y=relative,
            mode="lines",
            line={"color": _AFTER, "dash": dash, "width": 2},
            name=f"NLL, {name}",
            hovertemplate="T %{x:.3f}<br>%{y:+.4f} nats",
            **place,
        )
    if metrics["ci95"] is not None:
        figure.add_vrect(*metrics["ci95"], fillcolor=_INTERVAL, line_width=0, **place)
    for bound in metrics["bounds"]:
        figure.add_vline(bound, line={"color": _NEUTRAL, "dash": "dash", "width": 1}, **place)
    figure.add_vline(1.0, line={"color": _BEFORE, "width": 1.5}, **place)
    figure.add_vline(metrics["fitted"], line={"color": _AFTER, "width": 1.5}, **place)
    view = max(_SMALLEST_VIEW, -6.0 * lowest)
    low, high = (float(np.log10(bound)) for bound in metrics["bounds"])
    ticks = [
        t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if low <= np.log10(t) <= high
    ]
    figure.update_xaxes(
        type="log",
        range=[low - 0.02, high + 0.02],
        tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks],
        title_text="temperature T (dashed: bounds; shaded: 95 % interval)",
        **place,
    )
    figure.update_yaxes(
        range=[lowest - 0.08 * view, view],
        title_text="NLL(T) − NLL(1), nats per token",
        **place,
    )


def write_reliability(record: Record, path: Path) -> None:
    """Write the page: figure, verdict and tables; plotly.js is inside, nothing is fetched."""
    from jinja2 import Environment

    plot = reliability_figure(record).to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="reliability",
        config={"displaylogo": False, "responsive": True},
    )
    page = Environment(autoescape=True).from_string(_PAGE)
    write_text(path, page.render(plot=plot, m=record.metrics, record=record))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Calibration: T = {{ "%.3f" | format(m.temperature) }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2228; --soft: #59616b; --grid: #e3e6ea; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3abb5; --grid: #33393f; --page: #14171a; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .2rem 0; color: var(--soft); } strong { color: var(--ink); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--grid);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
#reliability .xtick text, #reliability .ytick text, #reliability .xtitle, #reliability .ytitle,
#reliability .x2title, #reliability .y2title, #reliability .x3title, #reliability .y3title,
#reliability .legendtext, #reliability .annotation-text { fill: var(--ink) !important; }
#reliability .gridlayer path { stroke: var(--grid) !important; }
</style>
</head>
<body>
<h1>Temperature {{ "%.3f" | format(m.temperature) }}</h1>
<p>Fitted <strong>{{ "%.3f" | format(m.fitted) }}</strong>
{%- if m.ci95 %} (95 % interval {{ "%.3f" | format(m.ci95[0]) }} to
{{ "%.3f" | format(m.ci95[1]) }}){% endif %}
by {{ m.objective }} on {{ m.split.fit | length }} texts ({{ m.tokens.fit }} tokens),
judged on {{ m.split.holdout | length }} others ({{ m.tokens.holdout }} tokens):
<strong>{{ "used" if m.significant else "not used" }}</strong>.
Verdict: <strong>{{ record.verdict.value }}</strong>.</p>
{% for notice in record.notices %}<p>{{ notice }}</p>{% endfor %}
<div class="wide">{{ plot | safe }}</div>
<h2>Held-out texts</h2>
<div class="wide"><table>
<tr><th>measure</th><th>T = 1</th><th>T = {{ "%.3f" | format(m.fitted) }}</th>
<th>change</th><th>95 % interval</th>{% if m.reference %}<th>reference</th>{% endif %}</tr>
{% for name, title in [("nll", "NLL, nats"), ("ece", "ECE"), ("adaptive_ece", "ECE, equal mass"),
("brier", "Brier score")] %}
<tr><td>{{ title }}</td><td>{{ "%.4f" | format(m.before[name]) }}</td>
<td>{{ "%.4f" | format(m.at_fitted[name]) }}</td>
<td>{{ "%+.4f" | format(m.change[name].difference) }}</td>
<td>{% if m.change[name].ci95 %}{{ "%+.4f" | format(m.change[name].ci95[0]) }} to
{{ "%+.4f" | format(m.change[name].ci95[1]) }}{% else %}none{% endif %}</td>
{% if m.reference %}<td>{{ "%.4f" | format(m.reference[name]) }}</td>{% endif %}</tr>
{% endfor %}
</table></div>
<h2>By language and category</h2>
<div class="wide"><table>
<tr><th>group</th><th>texts</th><th>tokens</th><th>NLL, T = 1</th><th>fitted</th>
<th>ECE, T = 1</th><th>fitted</th><th>Brier, T = 1</th><th>fitted</th></tr>
{% for row in m.groups %}
<tr><td>{{ [row.language, row.category] | select | join(" / ") or "all" }}</td>
<td>{{ row.texts }}</td><td>{{ row.tokens }}</td>
{% for name in ["nll", "ece", "brier"] %}<td>{{ "%.4f" | format(row.before[name]) }}</td>
<td>{{ "%.4f" | format(row.fitted[name]) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
</body>
</html>
"""

"""Reliability diagram and NLL(T) curve of a calibration record, as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from so8tqc.artifacts import write_text
from so8tqc.records import Record
from so8tqc.reports.figures import BLUE, GREY, ORANGE, style
from so8tqc.reports.html import Plot, Section, page
from so8tqc.reports.png import write_pngs
from so8tqc.reports.summary import summarise_run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows: what a section of the report page shows."""

_MEASURES = {
    "nll": "NLL, nats",
    "ece": "ECE",
    "adaptive_ece": "ECE, equal mass",
    "classwise_ece": "ECE, classwise",
    "brier": "Brier",
    "sharpness": "sharpness (mean confidence)",
}
_PNG_SIZE = {"width": 1100, "height": 584, "scale": 2}
_INTERVAL = "rgba(76, 141, 255, 0.2)"
_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)

_SMALLEST_VIEW = 0.05
"""nats; a flat curve is not magnified beyond this height."""


def reliability_figure(record: Record) -> Figure:
    """Reliability before and at the fitted temperature, tokens per bin, NLL(T).

    Args:
        record: of kind ``calibrate``.
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
    style(figure, height=584)
    figure.update_layout(
        margin={"l": 70, "r": 20, "t": 64, "b": 100},
        legend={"orientation": "h", "yanchor": "top", "y": -0.14, "x": 0},
        barmode="group",
        bargap=0.15,
    )
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(zeroline=False)
    return figure


def _add_reliability(figure: Figure, metrics: dict[str, Any]) -> None:
    from plotly import graph_objects as go

    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": GREY, "dash": "dash", "width": 1},
        name="perfect",
        hoverinfo="skip",
        row=1,
        col=1,
    )
    sides = [
        ("before", "T = 1", ORANGE, "circle"),
        ("fitted", f"T = {metrics['fitted']:.3f}", BLUE, "diamond"),
    ]
    if "reference" in metrics["reliability"]:
        sides.append(("reference", "unquantized", GREY, "square"))
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
    figure.update_yaxes(range=[-0.03, 1.03], title_text="accuracy", row=1, col=1)
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
            line={"color": BLUE, "dash": dash, "width": 2},
            name=f"NLL, {name}",
            hovertemplate="T %{x:.3f}<br>%{y:+.4f} nats",
            **place,
        )
    if metrics["ci95"] is not None:
        figure.add_vrect(*metrics["ci95"], fillcolor=_INTERVAL, line_width=0, **place)
    for bound in metrics["bounds"]:
        figure.add_vline(bound, line={"color": GREY, "dash": "dash", "width": 1}, **place)
    figure.add_vline(1.0, line={"color": ORANGE, "width": 1.5}, **place)
    figure.add_vline(metrics["fitted"], line={"color": BLUE, "width": 1.5}, **place)
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
        title_text="temperature T",
        **place,
    )
    figure.update_yaxes(
        range=[lowest - 0.08 * view, view],
        title_text="NLL(T) − NLL(1), nats per token",
        **place,
    )


def calibration_tables(record: Record) -> list[Table]:
    """Held-out measures before and after, the fits, and the measures by language and category."""
    metrics: dict[str, Any] = record.metrics
    against = [_against(metrics)] if metrics["against_reference"] else []
    return [
        _measures(metrics, metrics["reference"]), *against, _objectives(metrics), _beyond(metrics),
        *_group_temperatures(metrics), _groups(metrics),
    ]  # fmt: skip


def held_out_table(record: Record) -> Table:
    """The fitted temperature, whether it is used, and what it does; fits 80 columns."""
    metrics: dict[str, Any] = record.metrics
    _, header, rows = _measures(metrics, reference=None)
    interval = f", 95 % interval {_interval(metrics['ci95'], 3, '')}" if metrics["ci95"] else ""
    used = "used" if metrics["significant"] else "not used"
    return f"T = {metrics['fitted']:.3f}{interval}, {used}; held-out texts", header, rows


def _measures(metrics: dict[str, Any], reference: dict[str, Any] | None) -> Table:
    header = ["measure", "T = 1", f"T = {metrics['fitted']:.3f}", "change", "95 % interval"]
    rows = []
    for key, title in _MEASURES.items():
        change = metrics["change"][key]
        row = [
            title,
            f"{metrics['before'][key]:.4f}",
            f"{metrics['at_fitted'][key]:.4f}",
            f"{change['difference']:+.4f}",
            _interval(change["ci95"]),
        ]
        rows.append([*row, f"{reference[key]:.4f}"] if reference else row)
    return "Held-out texts", [*header, "reference"] if reference else header, rows


def _interval(ci95: list[float] | None, digits: int = 4, sign: str = "+") -> str:
    if not ci95:
        return "–"
    return " … ".join(f"{end:{sign}.{digits}f}" for end in ci95)


def _against(metrics: dict[str, Any]) -> Table:
    """Whether the model is back where the unquantized one is."""
    header = ["measure", "unquantized", "difference at T = 1", "with the temperature in use",
              "95 % interval", "back"]  # fmt: skip
    rows = [
        [
            _MEASURES[key],
            f"{row['reference']:.4f}",
            f"{row['before']['difference']:+.4f}",
            f"{row['after']['difference']:+.4f}",
            _interval(row["after"]["ci95"]),
            {True: "yes", False: "no", None: "–"}[row["back"]],
        ]
        for key, row in metrics["against_reference"].items()
    ]
    return "Against the unquantized model", header, rows


def _objectives(metrics: dict[str, Any]) -> Table:
    header = ["objective", "T", "95 % interval", "at a bound", "converged"]
    rows = [
        [
            name,
            f"{fit['temperature']:.4f}",
            _interval(fit["ci95"], 3, ""),
            "yes" if fit["at_bound"] else "no",
            "yes" if fit["converged"] else "no",
        ]
        for name, fit in metrics["objectives"].items()
    ]
    return "Every objective, on the fit texts", header, rows


def _beyond(metrics: dict[str, Any]) -> Table:
    """What more than one number gains over the best single temperature, on held-out text."""
    entropy = metrics["entropy_temperature"]
    judged = {f"by {axis}": groups for axis, groups in metrics["group_temperatures"].items()}
    judged[f"T(H) = {entropy['a']:.3f} {entropy['b']:+.3f}·H"] = entropy
    header = ["temperatures", "against T", "NLL, nats", "95 % interval", "ECE", "significant"]
    rows = [
        [
            name,
            f"{one['against']:.3f}",
            f"{one['change']['nll']['difference']:+.4f}",
            _interval(one["change"]["nll"]["ci95"]),
            f"{one['change']['ece']['difference']:+.4f}",
            "yes" if one["significant"] else "no",
        ]
        for name, one in judged.items()
    ]
    return "Beyond one temperature", header, rows


def _group_temperatures(metrics: dict[str, Any]) -> list[Table]:
    """The temperatures of each axis that held-out text supports."""
    header = ["group", "T", "its own optimum", "weight of its own", "fit texts"]
    return [
        (
            f"Temperatures by {axis}",
            header,
            [
                [
                    label or "all",
                    f"{group['temperature']:.4f}",
                    "–" if group["own"] is None else f"{group['own']:.4f}",
                    f"{group['weight']:.2f}",
                    str(group["texts"]),
                ]
                for label, group in judged["temperatures"].items()
            ],
        )
        for axis, judged in metrics["group_temperatures"].items()
        if judged["temperatures"]
    ]


def _groups(metrics: dict[str, Any]) -> Table:
    header = ["group", "texts", "tokens"]
    for key in ("nll", "ece", "brier"):
        header += [f"{_MEASURES[key]}, T = 1", "fitted"]
    rows = []
    for group in metrics["groups"]:
        name = " / ".join(filter(None, (group["language"], group["category"]))) or "all"
        row = [name, str(group["texts"]), str(group["tokens"])]
        for key in ("nll", "ece", "brier"):
            row += [f"{group['before'][key]:.4f}", f"{group['fitted'][key]:.4f}"]
        rows.append(row)
    return "By language and category", header, rows


def write_reliability(record: Record, path: Path) -> None:
    """Write a page of its own: verdict, figure and tables; plotly.js is inside."""
    section = Section(
        record.kind,
        record,
        plots=[
            Plot("Reliability and temperature", _note(record.metrics), reliability_figure(record))
        ],
        tables=calibration_tables(record),
    )
    write_text(path, page(summarise_run("Calibration", {record.kind: record}), [section]))


def draw_reliability_png(record: Record, path: Path) -> None:
    """Draw the same figure as a PNG image on white.

    Raises:
        MissingToolError: kaleido or a Chrome is missing, or Chrome does not start.
    """
    figure = reliability_figure(record)
    write_pngs({path: figure}, _PNG_SIZE)


def _note(metrics: dict[str, Any]) -> str:
    ci95, split, tokens = metrics["ci95"], metrics["split"], metrics["tokens"]
    interval = f" (95 % interval {ci95[0]:.3f} to {ci95[1]:.3f})" if ci95 else ""
    return (
        f"T = {metrics['fitted']:.3f}{interval}, fitted by {metrics['objective']} on "
        f"{len(split['fit'])} texts ({tokens['fit']} tokens) and judged on {len(split['holdout'])} "
        f"others ({tokens['holdout']} tokens): {'used' if metrics['significant'] else 'not used'}. "
        "On the dashed diagonal, confidence equals accuracy. In the curve, dashed lines are the "
        "bounds, the shaded band is the interval."
    )

"""Reliability diagram and NLL(T) curve of a calibration record, as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from so8tqc.record_kinds.base import Interval
from so8tqc.record_kinds.calibrate import (
    AgainstReference,
    CalibrateMetrics,
    EntropyTemperature,
    GroupTemperatures,
)
from so8tqc.records import Record
from so8tqc.reports.figures import BLUE, GREY, ORANGE, style
from so8tqc.reports.html import Plot, deciding
from so8tqc.reports.language import message, say
from so8tqc.reports.png import write_pngs
from so8tqc.reports.tables import Table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MEASURES = {
    "nll": message("NLL, nats"),
    "ece": message("ECE"),
    "adaptive_ece": message("ECE, equal mass"),
    "classwise_ece": message("ECE, classwise"),
    "brier": message("Brier"),
    "sharpness": message("sharpness (mean confidence)"),
}
_AXES = {"language": message("language"), "category": message("category")}
_PNG_SIZE = {"width": 1100, "height": 584, "scale": 2}
_INTERVAL = "rgba(76, 141, 255, 0.2)"
_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)

_SMALLEST_VIEW = 0.05
"""nats; a flat curve is not magnified beyond this height."""


class _Place(TypedDict):
    """Which of a figure's plots."""

    row: int
    col: int


def reliability_figure(record: Record) -> Figure:
    """Reliability before and at the fitted temperature, tokens per bin, NLL(T), side by side.

    Args:
        record: of kind ``calibrate``.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        column_widths=[0.48, 0.52],
        row_heights=[0.76, 0.24],
        horizontal_spacing=0.1,
        vertical_spacing=0.06,
        subplot_titles=(say("Reliability, held-out tokens"), say("NLL against temperature")),
    )
    metrics = CalibrateMetrics.of(record)
    _add_reliability(figure, metrics)
    _add_curve(figure, metrics, {"row": 1, "col": 2})
    return _finished(figure, 584, top=64)


def reliability_plots(record: Record) -> list[Plot]:
    """The reliability diagram as two figures, one below the other: a phone has no room for two."""
    from plotly.subplots import make_subplots

    metrics = CalibrateMetrics.of(record)
    diagram = make_subplots(
        rows=2, cols=1, row_heights=[0.76, 0.24], vertical_spacing=0.06, shared_xaxes=True
    )
    _add_reliability(diagram, metrics)
    curve = make_subplots(rows=1, cols=1)
    _add_curve(curve, metrics, {"row": 1, "col": 1})
    return [
        Plot(
            say("Reliability"),
            say(
                "On the dashed diagonal, confidence equals accuracy; held-out tokens, and how "
                "many there are in each bin."
            ),
            _finished(diagram, 520),
        ),
        Plot(
            say("NLL against temperature"),
            say(
                "Below zero a temperature is better than 1. Dashed lines are the bounds, the "
                "shaded band is the interval of the fit."
            ),
            _finished(curve, 380),
        ),
    ]


def _finished(figure: Figure, height: int, top: int = 20) -> Figure:
    style(figure, height=height)
    below = -80 / (height - top - 100)
    figure.update_layout(
        margin={"l": 70, "r": 20, "t": top, "b": 100},
        legend={"orientation": "h", "yanchor": "top", "y": below, "x": 0},
        barmode="group",
        bargap=0.15,
    )
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(zeroline=False)
    return figure


def _add_reliability(figure: Figure, metrics: CalibrateMetrics) -> None:
    from plotly import graph_objects as go

    found = metrics.reliability
    assert found is not None

    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": GREY, "dash": "dash", "width": 1},
        name=say("perfect"),
        hoverinfo="skip",
        row=1,
        col=1,
    )
    sides = [
        ("before", found.before, "T = 1", ORANGE, "circle"),
        ("fitted", found.fitted, f"T = {_fitted(metrics):.3f}", BLUE, "diamond"),
    ]
    if found.reference is not None:
        sides.append(("reference", found.reference, say("unquantized"), GREY, "square"))
    for key, data, name, colour, symbol in sides:
        filled = [i for i, count in enumerate(data.count) if count]
        centres = [(a + b) / 2 for a, b in pairwise(data.edges)]
        figure.add_scatter(
            x=[data.confidence[i] for i in filled],
            y=[data.accuracy[i] for i in filled],
            customdata=[data.count[i] for i in filled],
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"symbol": symbol, "size": 8},
            name=name,
            legendgroup=key,
            hovertemplate=say("confidence %{x:.3f}<br>accuracy %{y:.3f}<br>%{customdata} tokens"),
            row=1,
            col=1,
        )
        figure.add_trace(
            go.Bar(
                x=centres,
                y=data.count,
                marker={"color": colour, "line": {"width": 0}},
                name=name,
                legendgroup=key,
                showlegend=False,
                hovertemplate=say("%{y} tokens"),
            ),
            row=2,
            col=1,
        )
    figure.update_xaxes(range=[0, 1], showticklabels=False, row=1, col=1)
    figure.update_yaxes(range=[-0.03, 1.03], title_text=say("accuracy"), row=1, col=1)
    figure.update_xaxes(range=[0, 1], title_text=say("confidence"), row=2, col=1)
    figure.update_yaxes(title_text=say("tokens"), rangemode="tozero", nticks=4, row=2, col=1)


def _add_curve(figure: Figure, metrics: CalibrateMetrics, place: _Place) -> None:
    curve, bounds = metrics.curve, metrics.bounds
    assert curve is not None
    assert bounds is not None
    grid = np.asarray(curve.temperature, dtype=np.float64)
    lowest = 0.0
    for values, name, dash in (
        (curve.nll_holdout, say("NLL, held-out texts"), "solid"),
        (curve.nll_fit, say("NLL, fit texts"), "dot"),
    ):
        nll = np.asarray(values, dtype=np.float64)
        relative = nll - np.interp(0.0, np.log(grid), nll)
        lowest = min(lowest, float(relative.min()))
        figure.add_scatter(
            x=grid,
            y=relative,
            mode="lines",
            line={"color": BLUE, "dash": dash, "width": 2},
            name=name,
            hovertemplate="T %{x:.3f}<br>%{y:+.4f} nats<extra></extra>",
            **place,
        )
    if metrics.ci95 is not None:
        figure.add_vrect(*metrics.ci95, fillcolor=_INTERVAL, line_width=0, **place)
    for bound in bounds:
        figure.add_vline(bound, line={"color": GREY, "dash": "dash", "width": 1}, **place)
    figure.add_vline(1.0, line={"color": ORANGE, "width": 1.5}, **place)
    figure.add_vline(_fitted(metrics), line={"color": BLUE, "width": 1.5}, **place)
    view = max(_SMALLEST_VIEW, -6.0 * lowest)
    low, high = (float(np.log10(bound)) for bound in bounds)
    ticks = [t for t in _TICKS if low <= np.log10(t) <= high]
    figure.update_xaxes(
        type="log",
        range=[low - 0.02, high + 0.02],
        tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks],
        title_text=say("temperature T"),
        **place,
    )
    figure.update_yaxes(
        range=[lowest - 0.08 * view, view],
        title_text=say("NLL(T) − NLL(1), nats per token"),
        **place,
    )


def calibration_tables(record: Record) -> list[Table]:
    """Held-out measures before and after, the fits, and the measures by language and category."""
    metrics = CalibrateMetrics.of(record)
    against = [_against(metrics.against_reference)] if metrics.against_reference else []
    return [
        _measures(metrics, metrics.reference),
        *against,
        _objectives(metrics),
        _beyond(metrics),
        *_group_temperatures(metrics),
        _groups(metrics),
    ]


def held_out_table(record: Record) -> Table | None:
    """The fitted temperature, whether it is used, and what it does; fits 80 columns.

    None where nothing was fitted.
    """
    metrics = CalibrateMetrics.of(record)
    if not metrics.change:
        return None
    _, header, rows = _measures(metrics, reference=None)
    parts = [f"T = {_fitted(metrics):.3f}"]
    if metrics.ci95:
        parts.append(say("95 % interval {interval}", interval=_interval(metrics.ci95, 3, "")))
    parts.append(say("used") if metrics.significant else say("not used"))
    return Table(say("{fit}; held-out texts", fit=say(", ").join(parts)), header, rows)


def _fitted(metrics: CalibrateMetrics) -> float:
    assert metrics.fitted is not None  # a calibration fits, or leaves no record
    return metrics.fitted


def _measures(metrics: CalibrateMetrics, reference: Mapping[str, float] | None) -> Table:
    fitted = f"T = {_fitted(metrics):.3f}"
    header = [say("measure"), "T = 1", fitted, say("change"), say("95 % interval")]
    rows = []
    for key, title in _MEASURES.items():
        change = metrics.change[key]
        row = [
            say(title),
            f"{metrics.before[key]:.4f}",
            f"{metrics.at_fitted[key]:.4f}",
            f"{change.difference:+.4f}",
            _interval(change.ci95),
        ]
        rows.append([*row, f"{reference[key]:.4f}"] if reference else row)
    columns = [*header, say("reference")] if reference else header
    return Table(say("Held-out texts"), columns, rows)


def _interval(ci95: Interval | None, digits: int = 4, sign: str = "+") -> str:
    if not ci95:
        return "–"
    return " … ".join(f"{end:{sign}.{digits}f}" for end in ci95)


def _against(measures: Mapping[str, AgainstReference]) -> Table:
    """Whether the model is back where the unquantized one is."""
    header = [
        say("measure"),
        say("unquantized"),
        say("difference at T = 1"),
        say("with the temperature in use"),
        say("95 % interval"),
        say("back"),
    ]
    rows = [
        [
            say(_MEASURES[key]),
            f"{row.reference:.4f}",
            f"{row.before.difference:+.4f}",
            f"{row.after.difference:+.4f}",
            _interval(row.after.ci95),
            {True: say("yes"), False: say("no"), None: "–"}[row.back],
        ]
        for key, row in measures.items()
    ]
    return Table(say("Against the unquantized model"), header, rows)


def _objectives(metrics: CalibrateMetrics) -> Table:
    header = [say("objective"), "T", say("95 % interval"), say("at a bound"), say("converged")]
    rows = [
        [
            name,
            f"{fit.temperature:.4f}",
            _interval(fit.ci95, 3, ""),
            say("yes") if fit.at_bound else say("no"),
            say("yes") if fit.converged else say("no"),
        ]
        for name, fit in metrics.objectives.items()
    ]
    return Table(say("Every objective, on the fit texts"), header, rows)


def _beyond(metrics: CalibrateMetrics) -> Table:
    """What more than one number gains over the best single temperature, on held-out text."""
    entropy = metrics.entropy_temperature
    assert entropy is not None
    judged: dict[str, GroupTemperatures | EntropyTemperature] = {
        say("by {axis}", axis=say(_AXES.get(axis, axis))): groups
        for axis, groups in metrics.group_temperatures.items()
    }
    judged[f"T(H) = {entropy.a:.3f} {entropy.b:+.3f}·H"] = entropy
    header = [
        say("temperatures"),
        say("against T"),
        say("NLL, nats"),
        say("95 % interval"),
        "ECE",
        say("significant"),
    ]
    rows = [
        [
            name,
            f"{one.against:.3f}",
            f"{one.change.nll.difference:+.4f}",
            _interval(one.change.nll.ci95),
            f"{one.change.ece.difference:+.4f}",
            say("yes") if one.significant else say("no"),
        ]
        for name, one in judged.items()
    ]
    return Table(say("Beyond one temperature"), header, rows)


def _group_temperatures(metrics: CalibrateMetrics) -> list[Table]:
    """The temperatures of each axis that held-out text supports."""
    header = [say("group"), "T", say("its own optimum"), say("weight of its own"), say("fit texts")]
    return [
        Table(
            say("Temperatures by {axis}", axis=say(_AXES.get(axis, axis))),
            header,
            [
                [
                    label or say("all"),
                    f"{group.temperature:.4f}",
                    "–" if group.own is None else f"{group.own:.4f}",
                    f"{group.weight:.2f}",
                    str(group.texts),
                ]
                for label, group in judged.temperatures.items()
            ],
        )
        for axis, judged in metrics.group_temperatures.items()
        if judged.temperatures
    ]


def _groups(metrics: CalibrateMetrics) -> Table:
    header = [say("group"), say("texts"), say("tokens")]
    for key in ("nll", "ece", "brier"):
        measure = say(_MEASURES[key])
        header += [say("{measure}, T = 1", measure=measure), say("fitted")]
    rows = []
    for group in metrics.groups:
        name = " / ".join(filter(None, (group.language, group.category))) or say("all")
        row = [name, str(group.texts), str(group.tokens)]
        for key in ("nll", "ece", "brier"):
            row += [f"{group.before[key]:.4f}", f"{group.fitted[key]:.4f}"]
        rows.append(row)
    return Table(say("By language and category"), header, rows)


def draw_reliability_png(record: Record, path: Path) -> None:
    """Draw the same figure as a PNG image on white.

    Raises:
        MissingToolError: kaleido or a Chrome is missing, or Chrome does not start.
    """
    figure = reliability_figure(record)
    write_pngs({path: figure}, _PNG_SIZE)


def sentence(record: Record) -> str:
    """How the temperature was fitted and judged, in one sentence."""
    metrics = CalibrateMetrics.of(record)
    ci95, split, tokens = metrics.ci95, metrics.split, metrics.tokens
    assert split is not None
    assert tokens is not None
    interval = ""
    if ci95:
        interval = say(" (95 % interval {low:.3f} to {high:.3f})", low=ci95[0], high=ci95[1])
    return say(
        "T = {fitted:.3f}{interval}, fitted by {objective} on {fit_texts} texts ({fit_tokens} "
        "tokens) and judged on {held_texts} others ({held_tokens} tokens): {used}.",
        fitted=_fitted(metrics),
        interval=interval,
        objective=metrics.objective,
        fit_texts=len(split.fit),
        fit_tokens=tokens.fit,
        held_texts=len(split.holdout),
        held_tokens=tokens.holdout,
        used=say("used") if metrics.significant else say("not used"),
    )


def tables(record: Record) -> list[Table]:
    """The calibration's own tables; none where nothing was fitted."""
    found = CalibrateMetrics.of(record)
    fitted = found.fitted is not None and found.change and found.groups and found.objectives
    return calibration_tables(record) if fitted else []


def plots(record: Record) -> list[Plot]:
    """The reliability diagram and the curve; none where nothing was fitted."""
    if CalibrateMetrics.of(record).reliability is None:
        return []
    return deciding(reliability_plots(record))

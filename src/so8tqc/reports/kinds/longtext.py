"""Plots of long text: oscillation and entropy of each case, as HTML and PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.disk.atomic import write_text
from so8tqc.metrics.oscillation import high_variance
from so8tqc.metrics.spectra import Spectrum, nearest_wavelength
from so8tqc.progress import Task
from so8tqc.record_kinds.longtext import CaseMetrics, Indices, LongTextMetrics
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.figures import BLUE, GREEN, GREY, ORANGE, style
from so8tqc.reports.language import current, message, say
from so8tqc.reports.png import write_pngs
from so8tqc.reports.tables import Column, Table, number_of, signed_percent_of, tabulate

if TYPE_CHECKING:
    import plotly.graph_objects as go

FloatArray = npt.NDArray[np.float64]

WINDOW = 64
"""Tokens of the rolling mean and standard deviation."""

HEAT_COLUMNS = 256
"""Positions are averaged into so many columns of the attention heat map."""

WIDTHS = {"reference": 3.0, "candidate": 1.5}
"""The reference is drawn first and wider: where a good candidate covers it, a rim still shows."""

_SIDES = {"reference": message("reference"), "candidate": message("candidate")}

_PNG_SIZE = {"width": 1200, "height": 1100, "scale": 1}


@dataclass(frozen=True)
class CasePlots:
    """What the plots of one case show.

    Attributes:
        case: file name prefix.
        columns: of the token table, candidate against reference (or against itself, if there is
            none): name → [tokens].
        position: [tokens].
        has_reference: whether ``columns`` compare with a reference.
        attention: [layers, T] mean attention entropy of the candidate, nats; None if unknown.
        spectra: ``candidate`` and ``reference`` spectra of mean attention entropy.
        wavelengths: RoPE wavelengths, tokens.
    """

    case: str
    columns: Mapping[str, FloatArray]
    position: npt.NDArray[np.integer]
    has_reference: bool
    attention: npt.NDArray[np.floating] | None
    spectra: Mapping[str, Spectrum]
    wavelengths: FloatArray


_NAMES = {"oscillation": message("oscillation"), "entropy": message("entropy")}
"""The figures of a case, as files and as headings."""


def case_files(case: str, suffix: str) -> list[str]:
    """Names of a case's pages (``.html``) or images (``.png``)."""
    return [f"{case}_{name}{suffix}" for name in _NAMES]


def draw_case(plots: CasePlots, out: Path) -> None:
    """Write ``CASE_oscillation.html`` and ``CASE_entropy.html``, each self-contained."""
    titles = [f"{plots.case}: {say(name)}" for name in _NAMES.values()]
    names = case_files(plots.case, ".html")
    for name, title, figure in zip(names, titles, _figures(plots), strict=True):
        write_text(out / name, _page(title, figure))


def draw_png(plots: Sequence[CasePlots], out: Path, task: Task) -> None:
    """Write the same figures as PNG.

    Raises:
        MissingToolError: kaleido or a Chrome is missing, or Chrome does not start.
    """
    figures = {
        out / name: figure
        for case in plots
        for name, figure in zip(case_files(case.case, ".png"), _figures(case), strict=True)
    }
    write_pngs(figures, _PNG_SIZE, task)


def _figures(plots: CasePlots) -> list[go.Figure]:
    """In the order of ``_NAMES``."""
    return [_oscillation(plots), _entropy(plots)]


def _oscillation(plots: CasePlots) -> go.Figure:
    """Maximum logit, its first and second difference, and KL, against position."""
    from plotly.subplots import make_subplots

    c, x = plots.columns, plots.position
    titles = [say("maximum logit (shaded: high variance)"), "Δ", "Δ²"] + (
        [say("KL, nats")] if plots.has_reference else []
    )
    figure = make_subplots(
        rows=len(titles), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.06
    )
    for name, colour in _sides(plots):
        series = c[f"max_logit_{name}"]
        for row, values in enumerate((series, np.diff(series), np.diff(series, n=2)), start=1):
            _line(figure, row, x[: values.size], values, name, colour, show=row == 1)
    for start, stop in _spans(high_variance(c["max_logit_candidate"])):
        figure.add_vrect(
            x0=int(x[start]),
            x1=int(x[stop - 1]),
            fillcolor=GREY,
            opacity=0.25,
            line_width=0,
            layer="below",
            row=1,
            col=1,
        )
    if plots.has_reference:
        kl = np.maximum(c["kl"], 1e-14)
        figure.add_scatter(
            x=x, y=kl, mode="markers", marker={"size": 2, "color": GREY}, name="KL", row=4, col=1
        )
        rolling = np.exp(_rolling(np.log(kl))[0])
        _line(figure, 4, x, rolling, say("KL, rolling"), GREEN, show=True)
        figure.update_yaxes(type="log", exponentformat="power", row=4, col=1)
    figure.update_xaxes(range=[0, int(x[-1])])
    figure.update_xaxes(title=say("position, tokens"), row=len(titles), col=1)
    return _tall(figure, 1000)


def _entropy(plots: CasePlots) -> go.Figure:
    """Next-token entropy, its change, attention entropy by layer, and its spectrum."""
    from plotly.subplots import make_subplots

    c, x = plots.columns, plots.position
    titles = [
        say("next-token entropy, nats: rolling mean ± sd"),
        say("change rate of the rolling mean"),
    ]
    if plots.attention is not None:
        titles += [
            say("attention entropy, nats (layer × position)"),
            say("spectrum of mean attention entropy"),
        ]
    figure = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.08)
    for name, colour in _sides(plots):
        mean, deviation = _rolling(c[f"entropy_{name}"])
        if name == "candidate":
            _band(figure, x, mean, deviation)
        _line(figure, 1, x, mean, name, colour, show=True)
        _line(figure, 2, x, np.gradient(mean), name, colour, show=False)
    figure.update_xaxes(title=say("position, tokens"), row=2, col=1)
    if plots.attention is not None:
        _heat(figure, plots.attention)
        _spectrum(figure, plots)
    return _tall(figure, 1150)


def _tall(figure: go.Figure, height: int) -> go.Figure:
    """The house style, with the legend close above the first of many rows."""
    style(figure, height=height)
    figure.update_layout(
        legend={"y": 1.03, "yanchor": "bottom"},
        margin_t=70,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
    )
    return figure


def _sides(plots: CasePlots) -> list[tuple[str, str]]:
    sides = [("reference", ORANGE)] if plots.has_reference else []
    return [*sides, ("candidate", BLUE)]


def _line(
    figure: go.Figure,
    row: int,
    x: npt.NDArray[np.number],
    y: FloatArray,
    name: str,
    colour: str,
    *,
    show: bool,
) -> None:
    figure.add_scattergl(
        x=x,
        y=y,
        mode="lines",
        name=say(_SIDES.get(name, name)),
        legendgroup=name,
        showlegend=show,
        line={"color": colour, "width": WIDTHS.get(name, 1.0)},
        row=row,
        col=1,
    )


def _band(
    figure: go.Figure, x: npt.NDArray[np.number], mean: FloatArray, deviation: FloatArray
) -> None:
    """mean ± one standard deviation as a filled area."""
    figure.add_scatter(
        x=x,
        y=mean + deviation,
        mode="lines",
        line={"width": 0},
        showlegend=False,
        hoverinfo="skip",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=mean - deviation,
        mode="lines",
        line={"width": 0},
        fill="tonexty",
        fillcolor="rgba(76,141,255,0.18)",
        name=say("± sd"),
        hoverinfo="skip",
        row=1,
        col=1,
    )


def _heat(figure: go.Figure, attention: npt.NDArray[np.floating]) -> None:
    """[layers, T] averaged into columns."""
    length = attention.shape[1]
    edges = np.linspace(0, length, min(HEAT_COLUMNS, length) + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, length))
    z = np.add.reduceat(attention, edges, axis=1) / counts
    figure.add_heatmap(
        z=z,
        x=edges,
        colorscale="Viridis",
        row=3,
        col=1,
        colorbar={"len": 0.2, "y": 0.38, "thickness": 12},
    )
    figure.update_xaxes(title=say("position, tokens"), row=3, col=1)
    figure.update_yaxes(title=say("layer"), row=3, col=1)


def _spectrum(figure: go.Figure, plots: CasePlots) -> None:
    """Power against period, significant peaks marked, RoPE wavelengths as lines."""
    for name, colour in _sides(plots):
        if name not in plots.spectra:
            continue
        s = plots.spectra[name]
        _line(figure, 4, s.period, s.power, name, colour, show=False)
        if name == "candidate" and s.significant.any():
            labels = [_label(period, plots.wavelengths) for period in s.period[s.significant]]
            figure.add_scatter(
                x=s.period[s.significant],
                y=s.power[s.significant],
                mode="markers",
                marker={"color": GREEN, "size": 7},
                name=say("significant"),
                text=labels,
                hovertemplate="%{text}<extra></extra>",
                row=4,
                col=1,
            )
    shown = [s.period for s in plots.spectra.values()]
    low = min(float(p.min()) for p in shown)
    high = max(float(p.max()) for p in shown)
    for wavelength in plots.wavelengths[(plots.wavelengths > low) & (plots.wavelengths < high)]:
        figure.add_vline(
            x=float(wavelength), line={"color": GREY, "width": 1, "dash": "dot"}, row=4, col=1
        )
    title = say("period, tokens (dotted: RoPE wavelengths)")
    figure.update_xaxes(type="log", title=title, row=4, col=1)
    figure.update_yaxes(title=say("power"), row=4, col=1)


def _label(period: float, wavelengths: FloatArray) -> str:
    near = nearest_wavelength(period, wavelengths)
    if near is None:
        return say("{period:.1f} tokens", period=period)
    return say("{period:.1f} tokens, RoPE wavelength {near:.1f}", period=period, near=near)


def _spans(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[T] → (start, stop) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _rolling(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Centred rolling mean and standard deviation, shorter windows at the ends."""
    kernel = np.ones(min(WINDOW, values.size))
    count = np.convolve(np.ones_like(values), kernel, mode="same")
    mean = np.convolve(values, kernel, mode="same") / count
    square = np.convolve(np.square(values), kernel, mode="same") / count
    return mean, np.sqrt(np.maximum(square - np.square(mean), 0.0))


_PAGE = """<!doctype html>
<html lang="{language}"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>
:root {{ --ground: #fff; --ink: #1b2330; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: #12161d; --ink: #e6eaf0; }} }}
body {{ margin: 1rem auto; max-width: 80rem; background: var(--ground); color: var(--ink);
  font-family: system-ui, sans-serif; }}
h1 {{ font-size: 1.2rem; font-weight: 600; padding: 0 1rem; }}
</style></head><body><h1>{title}</h1>
{plot}
<script>
(function () {{
  var query = window.matchMedia("(prefers-color-scheme: dark)");
  function paint() {{
    var ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    document.querySelectorAll(".js-plotly-plot").forEach(function (plot) {{
      Plotly.relayout(plot, {{"font.color": ink}});
    }});
  }}
  window.addEventListener("load", paint);
  query.addEventListener("change", paint);
}})();
</script></body></html>
"""


def _page(title: str, figure: go.Figure) -> str:
    from html import escape

    import plotly.io

    plot = plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=True,
        div_id="plot",
        config={"displaylogo": False, "responsive": True},
    )
    return _PAGE.format(language=current(), title=escape(title), plot=plot)


def case_table(record: Record) -> Table | None:
    """Long texts: divergence, oscillation, smoothness, repetition."""
    columns: list[Column[CaseMetrics]] = [
        (say("tokens"), number_of(lambda row: row.tokens)),
        (say("KL mean"), number_of(lambda row: row.kl_mean)),
        (say("oscillation index"), _index(lambda found: found.index)),
        (say("von Neumann"), _index(lambda found: found.von_neumann)),
        (say("high-frequency power"), _index(lambda found: found.high_frequency)),
        (say("Δ² energy vs base"), signed_percent_of(lambda row: row.energy_relative_to_base)),
        (say("periodic dips"), _periods),
        (say("repeated 4-grams"), _repeated),
    ]
    return tabulate(say("Cases"), say("text"), columns, LongTextMetrics.of(record).cases)


def _index(read: Callable[[Indices], float | None]) -> Callable[[CaseMetrics], str]:
    """An index of the maximum logit of both models."""
    return lambda row: _both(
        {
            name: read(found.max_logit)
            for name, found in row.indices.items()
            if found.max_logit is not None
        }
    )


def _repeated(row: CaseMetrics) -> str:
    """Share of repeated 4-grams of both models' greedy texts."""
    return _both({name: found.repeated for name, found in row.generation.items()})


def _both(values: Mapping[str, float | None]) -> str:
    """``reference → candidate``, or the candidate alone."""
    found = (values.get(side) for side in ("reference", "candidate"))
    return " → ".join(fmt.number(value) for value in found if value is not None)


def _periods(row: CaseMetrics) -> str:
    """Periods of significant entropy dips, tokens."""
    if row.significant_periods is None:
        return ""
    return ", ".join(
        fmt.counted(round(period), "token") for period in row.significant_periods
    ) or say("none")

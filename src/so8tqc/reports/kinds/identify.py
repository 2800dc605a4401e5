"""The readings of a gate file side by side: what each is worth, and which was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from so8tqc.record_kinds.base import Interval
from so8tqc.record_kinds.identify import IdentifyMetrics, ReadingRow
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.figures import BLUE, GREEN, GREY, ORANGE, SMALLEST, style
from so8tqc.reports.html import Plot, drawn
from so8tqc.reports.language import message, say
from so8tqc.reports.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

_STATES = {
    "identified": message("identified"),
    "possible": message("possible"),
    "refuted": message("refuted"),
    "": message("no gates"),
}
_COLOURS = {"identified": GREEN, "possible": ORANGE, "refuted": BLUE, "": GREY}
_FOUND = "→ "
_ROW_HEIGHT = 26


def sentence(record: Record) -> str:
    """What was found."""
    return IdentifyMetrics.of(record).sentence


def reading_table(record: Record, *, narrow: bool = False) -> Table | None:
    """Every reading with its measure, and how much worse than the best one it is.

    Args:
        record: of ``identify``.
        narrow: leave out what a terminal has no room for.
    """
    measured = IdentifyMetrics.of(record)
    rows = measured.readings
    if not rows:
        return None
    recorded = any(row.kl is not None for row in rows.values())
    body = [
        [
            (_FOUND if row.state == "identified" else "") + _name(name),
            say(_STATES[row.state]),
            *(_by_capture(row, narrow) if recorded else _by_text(row, narrow)),
            _interval(row.difference, row.difference_ci95),
            _tokens(row.needed),
        ]
        for name, row in rows.items()
    ]
    measures = [say("KL, nats")] if recorded else ["NLL", say("gain, nats"), say("gain/√KL")]
    if narrow and not recorded:
        measures = measures[1:2]
    header = [say("reading"), say("found"), *measures, say("worse by"), say("tokens to tell")]
    if not any(row[-1] for row in body):
        header, body = header[:-1], [row[:-1] for row in body]
    title = say(
        "Readings, the best first ({texts}, {tokens}; intervals hold together with 95 %)",
        texts=fmt.counted(measured.texts, "text"),
        tokens=fmt.counted(measured.tokens, "token"),
    )
    return Table(title, header, body)


def _name(name: str) -> str:
    return say("none") if name == "none" else name


def _by_text(row: ReadingRow, narrow: bool) -> list[str]:
    if narrow:
        return [f"{row.gain:.3g}" if row.state else ""]
    return [
        fmt.number(row.nll),
        _interval(row.gain, row.gain_ci95) if row.state else "",
        f"{row.efficiency:.2f}" if row.state else "",
    ]


def _by_capture(row: ReadingRow, narrow: bool) -> list[str]:
    return [f"{row.kl:.3g}" if narrow else _interval(row.kl, row.kl_ci95)]


def _interval(value: float | None, ci95: Interval | None) -> str:
    if value is None:
        return ""
    text = f"{value:.3g}"
    return text if ci95 is None else f"{text} ({ci95[0]:.3g} … {ci95[1]:.3g})"


def _tokens(needed: float | None) -> str:
    return "" if needed is None else f"{needed:.1e}"


def _span(row: ReadingRow) -> tuple[float, Interval | None]:
    """What is drawn of a reading, with its interval."""
    if row.kl is not None:
        return row.kl, row.kl_ci95
    return row.gain or 0.0, row.gain_ci95


def reading_plot(record: Record) -> go.Figure | None:
    """The measure of each reading with its interval, the best at the top."""
    import plotly.graph_objects as go

    rows = IdentifyMetrics.of(record).readings
    if not rows:
        return None
    recorded = any(row.kl is not None for row in rows.values())
    names = list(rows)[::-1]
    spans = [_span(rows[name]) for name in names]
    middle = [max(value, SMALLEST) if recorded else value for value, _ in spans]
    ends = [ci95 or (m, m) for (_, ci95), m in zip(spans, middle, strict=True)]
    figure = go.Figure(
        go.Scatter(
            x=middle,
            y=[_name(name) for name in names],
            mode="markers",
            marker={"size": 10, "color": [_COLOURS[rows[name].state] for name in names]},
            error_x={
                "type": "data",
                "symmetric": False,
                "color": GREY,
                "thickness": 1.2,
                "array": [high - m for m, (_, high) in zip(middle, ends, strict=True)],
                "arrayminus": [m - low for m, (low, _) in zip(middle, ends, strict=True)],
            },
            hovertemplate="%{y}<br>%{x:.3g}<extra></extra>",
        )
    )
    figure.update_yaxes(automargin=True)
    if recorded:
        figure.update_xaxes(
            title=say("mean KL from the recorded logits, nats"),
            type="log",
            exponentformat="power",
        )
    else:
        figure.update_xaxes(title=say("NLL below the base's, nats per token"), zeroline=True)
    return style(figure, height=120 + _ROW_HEIGHT * len(names))


def plots(record: Record) -> list[Plot]:
    return drawn(
        (
            say("Every reading"),
            say(
                "What each reading makes of the gates, with its 95 % interval: green the one that "
                "was identified, orange those that were not told apart, blue those refuted."
            ),
            reading_plot(record),
        )
    )

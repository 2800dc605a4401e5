"""One self-contained HTML file: no network, light and dark, phone and paper."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from so8tqc.records import Check, Record, Verdict
from so8tqc.reports.templating import render

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Plot:
    """A figure with its heading and a sentence on how to read it."""

    title: str
    note: str
    figure: go.Figure


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        name: heading and anchor.
        record: the stage it shows.
        plots: figures, in order.
        tables: (title, header, rows) of strings.
        folded: tables of detail, shown when asked for.
        links: (text, relative path) of other files of the run.
    """

    name: str
    record: Record
    plots: Sequence[Plot] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    folded: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    links: Sequence[tuple[str, str]] = ()


def page(summary: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        summary: see ``reports.summary.summarise_run``.
        sections: in order.
    """
    from plotly.offline import get_plotlyjs

    numbers = itertools.count(1)
    with_plots = any(section.plots for section in sections)
    return render(
        "page.html.j2",
        summary=summary,
        sections=sections,
        plotlyjs=get_plotlyjs() if with_plots else "",
        draw=lambda plot: _draw(plot, f"plot-{next(numbers)}"),
        groups=check_groups,
        columns=check_columns,
    )


def check_groups(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Subject → its checks, those that did not pass first."""
    order = {Verdict.FAIL: 0, Verdict.SKIP: 1, Verdict.PASS: 2}
    groups: dict[str, list[Check]] = {}
    for check in sorted(checks, key=lambda check: order[check.verdict]):
        groups.setdefault(check.subject, []).append(check)
    return {subject: groups[subject] for subject in dict.fromkeys(c.subject for c in checks)}


def check_columns(checks: Sequence[Check]) -> list[str]:
    """The optional columns that at least one check fills."""
    names = {"ci95": "95 % interval", "noise_floor": "noise floor", "target": "absolute target"}
    return [
        name
        for field, name in names.items()
        if any(getattr(check, field) is not None for check in checks)
    ]


def _draw(plot: Plot, div: str) -> str:
    """A plot's div and script; plotly.js itself is in the page once. Its own ids are random."""
    import plotly.io

    html: str = plotly.io.to_html(
        plot.figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=div,
        config={"displayModeBar": False, "responsive": True},
    )
    return html

"""One self-contained HTML file: no network, light and dark, phone and paper."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from so8tqc.records import Check, Record, Verdict
from so8tqc.reports.language import current, message, say
from so8tqc.reports.summary import Summary
from so8tqc.reports.tables import Table
from so8tqc.reports.templating import render

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Plot:
    """A figure with its heading and a sentence on how to read it.

    ``decides``: it is one that a decision rests on, and stands on a run's first screen.
    """

    title: str
    note: str
    figure: go.Figure
    decides: bool = False


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        name: heading and anchor.
        record: the stage it shows.
        plots: figures, in order.
        tables: the stage's results.
        closeups: tables below the plots.
        folded: tables of detail, shown when asked for.
        notes: sentences above everything, beside the record's own notices.
        links: (text, relative path) of other files of the run.
    """

    name: str
    record: Record
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    closeups: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    links: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        """Heading for people."""
        return say(_TITLES[self.name]) if self.name in _TITLES else self.name.capitalize()


_TITLES = {
    "audit": message("What the file is"),
    "identify": message("Which reading was trained"),
    "locate": message("Where two models part"),
    "bake": message("Bake"),
    "export": message("Export"),
    "quantize": message("Quantization"),
    "choose": message("Choice of a file"),
    "calibrate": message("Calibration"),
    "qc": message("Quality control"),
    "longtext": message("Long text"),
}
_ORDER = ("identify", "bake", "export", "qc", "quantize", "choose", "calibrate", "longtext")
"""What is asked first stands first: is the bake right, which file, how does it behave."""


_FIRST_SCREEN_HEIGHT = 300
"""Pixels of a plot on the first screen."""


def page(summary: Summary, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        summary: see ``reports.summary.summarise_run``.
        sections: in any order.
    """
    from plotly.offline import get_plotlyjs

    numbers = itertools.count(1)
    ordered = sorted(sections, key=_place)
    deciding = [plot for section in ordered for plot in section.plots if plot.decides]
    if len(ordered) == 1:  # its plots are in the section already
        deciding = []
    for plot in deciding:
        plot.figure.update_layout(height=_FIRST_SCREEN_HEIGHT)
    with_plots = any(section.plots for section in sections)
    return render(
        "page.html.j2",
        summary=summary,
        sections=ordered,
        deciding=deciding,
        language=current(),
        plotlyjs=get_plotlyjs() if with_plots else "",
        draw=lambda plot: _draw(plot, f"plot-{next(numbers)}"),
        groups=check_groups,
        columns=check_columns,
    )


def _place(section: Section) -> int:
    return _ORDER.index(section.name) if section.name in _ORDER else len(_ORDER)


def check_groups(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Subject → its checks, those that did not pass first."""
    order = {Verdict.FAIL: 0, Verdict.SKIP: 1, Verdict.PASS: 2}
    groups: dict[str, list[Check]] = {}
    for check in sorted(checks, key=lambda check: order[check.verdict]):
        groups.setdefault(check.subject, []).append(check)
    return {subject: groups[subject] for subject in dict.fromkeys(c.subject for c in checks)}


def check_columns(checks: Sequence[Check]) -> list[str]:
    """The optional columns (fields of ``Check``) that at least one check fills."""
    return [
        field
        for field in ("ci95", "noise_floor", "target")
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


def deciding(plots: Sequence[Plot], *, at: int = 0) -> list[Plot]:
    """The plots, of which the one at a place decides."""
    return [replace(plot, decides=True) if i == at else plot for i, plot in enumerate(plots)]


def drawn(*candidates: tuple[str, str, go.Figure | None]) -> list[Plot]:
    """The plots that their record could fill."""
    return [Plot(title, note, figure) for title, note, figure in candidates if figure is not None]

"""Checks as tables of at most 80 columns, one for each subject, all with the same columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from so8tqc.records import Check, Verdict
from so8tqc.reports import format as fmt
from so8tqc.reports.language import message, say
from so8tqc.reports.measured import measured

_COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.SKIP: "yellow"}
_HEADER = (
    "",
    message("check"),
    message("value"),
    message("limit"),
    message("95 % interval"),
    message("target"),
)
_LEFT = 2
"""Columns that are words; the others are numbers and stand right."""


def print_checks(console: Console, checks: Sequence[Check], title: str) -> None:
    """Print the checks, then the sentence of each one that did not pass.

    A column that no check fills is left out. Numbers of an interval have three digits here;
    the record has all.
    """
    rows = [(check, _row(check)) for check in checks]
    header = [say(name) for name in _HEADER]
    used = [i for i in range(len(header)) if any(row[i] for _, row in rows)]
    widths = [max(cell_len(header[i]), *(cell_len(row[i]) for _, row in rows)) for i in used]
    fits = sum(widths) + len(widths) <= console.width
    for subject in dict.fromkeys(check.subject for check in checks):
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        for i, width in zip(used, widths, strict=True):
            table.add_column(
                header[i],
                justify="left" if i < _LEFT else "right",
                min_width=width if fits else None,
            )
        for check, row in rows:
            if check.subject == subject:
                cells = [_mark(check), *(escape(cell) for cell in row[1:])]
                table.add_row(*(cells[i] for i in used))
        heading = f"{title}{say(', ')}{subject}" if subject else title
        console.print(f"\n[bold]{escape(heading)}[/]")
        console.print(table)
    _print_reasons(console, checks)


def mark(verdict: Verdict) -> str:
    """The verdict in its colour, a failure in capitals."""
    word = say(verdict.value)
    return f"[{_COLOURS[verdict]}]{word.upper() if verdict is Verdict.FAIL else word}[/]"


def _mark(check: Check) -> str:
    """The verdict; one that does not count is yellow and says so."""
    if not check.allowed:
        return mark(check.verdict)
    return f"[yellow]{say('{verdict}, allowed', verdict=say(check.verdict.value))}[/]"


def _row(check: Check) -> tuple[str, ...]:
    met = {True: " ✓", False: " ✗", None: ""}[check.target_met]
    return (
        Text.from_markup(_mark(check)).plain,
        check.id,
        fmt.number(check.value),
        "" if check.limit is None else fmt.limit(check),
        "" if check.ci95 is None else f"{check.ci95[0]:.3g} … {check.ci95[1]:.3g}",
        "" if check.target is None else fmt.number(check.target) + met,
    )


def _print_reasons(console: Console, checks: Sequence[Check]) -> None:
    """Why checks failed or were skipped; those that share a reason share a line."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for check in checks:
        if check.verdict is not Verdict.PASS:
            key = (_mark(check), check.subject, check.detail)
            reasons.setdefault(key, []).append(check.id)
    if reasons:
        console.print()
    for (verdict, subject, detail), ids in reasons.items():
        named = say(", ").join(ids)
        named = say("{checks} of {name}", checks=named, name=subject) if subject else named
        console.print(f"{verdict} {escape(named)}: {escape(measured(detail))}")

"""Checks as tables of at most 80 columns, one for each subject, all with the same columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from so8tqc.records import Check, Verdict
from so8tqc.reports import format as fmt

MARKS = {
    Verdict.PASS: "[green]pass[/]",
    Verdict.FAIL: "[bold red]FAIL[/]",
    Verdict.SKIP: "[yellow]skip[/]",
}
_HEADER = ("", "check", "value", "limit", "95 % interval", "target")
_LEFT = 2
"""Columns that are words; the others are numbers and stand right."""


def print_checks(console: Console, checks: Sequence[Check], title: str) -> None:
    """Print the checks, then the sentence of each one that did not pass.

    A column that no check fills is left out. Numbers of an interval have three digits here;
    the record has all.
    """
    rows = [(check, _row(check)) for check in checks]
    used = [i for i, name in enumerate(_HEADER) if any(row[i] for _, row in rows)]
    widths = [max(len(_HEADER[i]), *(len(row[i]) for _, row in rows)) for i in used]
    fits = sum(widths) + len(widths) <= console.width
    for subject in dict.fromkeys(check.subject for check in checks):
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        for i, width in zip(used, widths, strict=True):
            table.add_column(
                _HEADER[i],
                justify="left" if i < _LEFT else "right",
                min_width=width if fits else None,
            )
        for check, row in rows:
            if check.subject == subject:
                cells = [_mark(check), *(escape(cell) for cell in row[1:])]
                table.add_row(*(cells[i] for i in used))
        heading = f"{title}, {subject}" if subject else title
        console.print(f"\n[bold]{escape(heading)}[/]")
        console.print(table)
    _print_reasons(console, checks)


def _mark(check: Check) -> str:
    """The verdict; one that does not count is yellow and says so."""
    return f"[yellow]{check.verdict} (allowed)[/]" if check.allowed else MARKS[check.verdict]


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
    for (mark, subject, detail), ids in reasons.items():
        of = f" of {subject}" if subject else ""
        console.print(f"{mark} {escape(', '.join(ids) + of)}: {escape(detail)}")

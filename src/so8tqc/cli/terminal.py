"""Progress and tables on a terminal, in a pipe, and in CI logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from so8tqc.progress import SILENT, Progress, Task
from so8tqc.records import Check, Record, Verdict

PIPE_INTERVAL_SECONDS = 5.0
_MARKS = {
    Verdict.PASS: "[green]pass[/]",
    Verdict.FAIL: "[bold red]FAIL[/]",
    Verdict.SKIP: "[yellow]skip[/]",
}
_SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@contextmanager
def terminal_progress(*, quiet: bool) -> Iterator[Progress]:
    """A progress display on stderr: live bars on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield SILENT
    elif console.is_terminal:
        with RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("[dim]{task.fields[rate]}[/]"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[item]}[/]"),
            console=console,
            transient=True,
        ) as display:
            yield _LiveProgress(display)
    else:
        yield _PlainProgress()


class _LiveTask:
    def __init__(self, display: RichProgress, task: int, unit: str) -> None:
        self._display, self._task, self._unit = display, task, unit
        self._done, self._started = 0.0, time.monotonic()

    def advance(self, amount: float = 1.0, item: str | None = None) -> None:
        self._done += amount
        elapsed = time.monotonic() - self._started
        rate = f"{scaled(self._done / elapsed)} {self._unit}/s" if self._unit and elapsed else ""
        fields = {"rate": rate}
        if item is not None:
            fields["item"] = escape(item[-40:])
        self._display.update(self._task, advance=amount, **fields)  # type: ignore[arg-type]


class _LiveProgress:
    def __init__(self, display: RichProgress) -> None:
        self._display = display

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        task = self._display.add_task(escape(description), total=total, rate="", item="")
        started = time.monotonic()
        try:
            yield _LiveTask(self._display, task, unit)
        finally:
            self._display.remove_task(task)
        self._display.console.print(
            f"[green]✓[/] {escape(description)} [dim]{time.monotonic() - started:.1f} s[/]"
        )

    def message(self, text: str) -> None:
        self._display.console.print(escape(text))


class _PlainTask:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._started, self._last = 0.0, time.monotonic(), time.monotonic()

    def advance(self, amount: float = 1.0, item: str | None = None) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last < PIPE_INTERVAL_SECONDS:
            return
        self._last = now
        parts = [self._description]
        if self._total:
            share = self._done / self._total
            left = (now - self._started) * (1 - share) / share if share else 0.0
            parts.append(f"{share:.0%}, {left:.0f} s left")
        if self._unit:
            parts.append(f"{scaled(self._done / (now - self._started))} {self._unit}/s")
        if item:
            parts.append(item)
        print(" · ".join(parts), file=sys.stderr, flush=True)


class _PlainProgress:
    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        started = time.monotonic()
        print(f"{description} …", file=sys.stderr, flush=True)
        yield _PlainTask(description, total, unit)
        print(f"{description}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def scaled(value: float) -> str:
    """1234567 → ``1.2 M``."""
    for factor, letter in _SCALES:
        if value >= factor:
            return f"{value / factor:.1f} {letter}"
    return f"{value:.1f}"


def show(record: Record, path: Path | None = None) -> None:
    """Print a record for people: checks, notices, diagnosis, verdict."""
    console = Console()
    if record.kind == "run":
        _show_stages(console, record)
        failed = [check for check in record.checks if check.verdict is Verdict.FAIL]
        if failed:
            console.print(_checks_table(failed, "Failed checks"))
    elif record.checks:
        console.print(_checks_table(record.checks, f"{record.kind}: checks"))
    for notice in record.notices:
        console.print(f"[yellow]·[/] {escape(notice)}")
    for diagnosis in record.diagnosis:
        console.print(f"\n[bold red]{diagnosis.code}[/]  {escape(diagnosis.text)}")
        if diagnosis.layers:
            console.print(f"  layers: {escape(_ranges(diagnosis.layers))}")
        console.print(f"  [bold]{escape(diagnosis.remedy)}[/]")
    for name, output in record.outputs.items():
        console.print(f"[dim]{escape(name)}:[/] {escape(output.path)}", soft_wrap=True)
    if path is not None:
        console.print(f"[dim]record:[/] {escape(str(path))}", soft_wrap=True)
    console.print(f"\n{record.kind}: {_MARKS[record.verdict]}")


def _show_stages(console: Console, record: Record) -> None:
    table = Table(title="Stages", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "verdict", "passed", "failed", "skipped", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "verdict") else "right")
    stages = record.metrics.get("stages", {})
    assert isinstance(stages, dict)
    for name, row in stages.items():
        assert isinstance(row, dict)
        seconds = "reused" if row["reused"] else f"{row['seconds']:.1f}"
        counts = [str(row[key]) for key in ("passed", "failed", "skipped")]
        table.add_row(name, _MARKS[Verdict(str(row["verdict"]))], *counts, seconds)
    console.print(table)


def _checks_table(checks: list[Check] | tuple[Check, ...], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("of", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    for check in checks:
        table.add_row(
            _MARKS[check.verdict],
            check.id,
            escape(check.subject),
            number(check.value),
            "" if check.value is None else check.comparison,
            number(check.limit),
            _target(check),
        )
    return table


def _target(check: Check) -> str:
    if check.target is None:
        return ""
    return f"{number(check.target)} {'met' if check.target_met else 'not met'}"


def number(value: float | None) -> str:
    """Four significant digits; integers as integers."""
    if value is None:
        return "–"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def _ranges(layers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) → ``0-2, 5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)

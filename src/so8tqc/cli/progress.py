"""Progress on a terminal, in a pipe, and in CI logs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

from so8tqc.progress import SILENT, Progress, Task

PIPE_INTERVAL_SECONDS = 5.0


_LEAST_WAIT_SECONDS = 0.05


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
    """Tells how far a task is every few seconds, also while nothing is counted."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._started, self._last = 0.0, time.monotonic(), time.monotonic()
        self._item: str | None = None
        self._lock = threading.Lock()

    def advance(self, amount: float = 1.0, item: str | None = None) -> None:
        with self._lock:
            self._done += amount
            self._item = item or self._item
        self.tell()

    def tell(self) -> None:
        """Print a line, unless one was printed just now."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < PIPE_INTERVAL_SECONDS:
                return
            self._last = now
            line = self._line(now - self._started)
        print(line, file=sys.stderr, flush=True)

    def _line(self, elapsed: float) -> str:
        parts = [self._description]
        if self._total:
            share = self._done / self._total
            left = f", {elapsed * (1 - share) / share:.0f} s left" if share else ""
            parts.append(f"{share:.0%}{left}")
        if not self._total or not self._done:
            parts.append(f"{elapsed:.0f} s")
        if self._unit and elapsed:
            parts.append(f"{scaled(self._done / elapsed)} {self._unit}/s")
        if self._item:
            parts.append(self._item)
        return " · ".join(parts)


class _PlainProgress:
    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        started = time.monotonic()
        print(f"{description} …", file=sys.stderr, flush=True)
        task, over = _PlainTask(description, total, unit), threading.Event()

        def remind() -> None:
            while not over.wait(max(PIPE_INTERVAL_SECONDS, _LEAST_WAIT_SECONDS)):
                task.tell()

        # a library may work for minutes without a word, and a log that stands still looks hung
        reminder = threading.Thread(target=remind, daemon=True)
        reminder.start()
        try:
            yield task
        finally:
            over.set()
            reminder.join()
        print(f"{description}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def scaled(value: float) -> str:
    """1234567 → ``1.2 M``."""
    for factor, letter in _SCALES:
        if value >= factor:
            return f"{value / factor:.1f} {letter}"
    return f"{value:.1f}"

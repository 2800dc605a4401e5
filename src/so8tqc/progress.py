"""Progress as an argument: services report, the caller decides how to show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running task, told how far it is."""

    def advance(self, amount: float = 1.0, item: str | None = None) -> None:
        """Count ``amount`` more units as done; ``item`` names what is being worked on."""


class Progress(Protocol):
    """Where services report what they are doing."""

    def task(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Open a task of ``total`` units (None: unknown) for the duration of a ``with``."""

    def message(self, text: str) -> None:
        """Tell the user one line, for example that a stage was reused."""


class _SilentTask:
    def advance(self, amount: float = 1.0, item: str | None = None) -> None:
        pass


class SilentProgress:
    """Reports nothing: for libraries, tests and ``--quiet``."""

    @contextmanager
    def task(
        self,
        description: str,  # noqa: ARG002
        total: float | None = None,  # noqa: ARG002
        unit: str = "",  # noqa: ARG002
    ) -> Iterator[Task]:
        yield _SilentTask()

    def message(self, text: str) -> None:
        pass


SILENT = SilentProgress()

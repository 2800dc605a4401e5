"""Errors that a user can act on. Each kind has the exit code of its cause.

A message has three parts: what happened, where (file, key, line, tensor, layer),
and how to mend it. The command line prints them as one paragraph; a traceback
is shown only under ``--debug``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    VERDICT_FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    TOOL = 4
    INTERNAL = 70
    """A defect of this program (sysexits' EX_SOFTWARE), told apart from every planned code."""
    INTERRUPTED = 130
    TERMINATED = 143


_SHOWN_CHARACTERS = 1000
"""Characters shown of a sentence or a place: names in hostile files may have a million."""


class So8tqcError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: one sentence, what happened.
        where: the file, key, line, tensor or layer it happened at.
        remedy: what the user can do, a command where there is one.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = _shortened(what)
        self.where = _shortened(where) if where else where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if text[-1:] not in ".!?":
            text += "."
        return f"{text} {self.remedy}" if self.remedy else text


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


class ConfigError(So8tqcError):
    """A config file, flag or ``--set`` value is wrong."""

    exit_code = ExitCode.USAGE


class InputError(So8tqcError):
    """A model, rotation or data file is missing, unreadable or does not fit."""


class ModelError(InputError):
    """A model directory or GGUF file cannot be used."""


class RotationError(InputError):
    """Rotations are malformed, not in SO(n), or do not fit the model."""


class ShapeError(InputError):
    """Two shapes that must agree do not."""


class DataError(InputError):
    """Text, token or capture data cannot be used."""


class ToolError(So8tqcError):
    """Something outside this package failed: libllama, converter, Chrome, disk."""

    exit_code = ExitCode.TOOL


class BusyError(ToolError):
    """Another process is writing where this one was told to."""


class MissingToolError(ToolError):
    """An optional part is not installed; the remedy is the command that installs it."""


def explained(error: Exception) -> tuple[str, ExitCode]:
    """What to tell of any exception, and its exit code."""
    if isinstance(error, So8tqcError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        # a full disk or a forbidden folder is no defect of ours (libraries' own have no errno)
        names = ", ".join(str(name) for name in (error.filename, error.filename2) if name)
        return f"{names}: {error.strerror}." if names else f"{error.strerror}.", ExitCode.TOOL
    return (
        f"Internal error: {type(error).__name__}: {error}. Run again with --debug for its trace "
        "and please report it.",
        ExitCode.INTERNAL,
    )


def first_line(error: Exception) -> str:
    """What a library's error says first, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

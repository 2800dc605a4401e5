"""Command lines against the Typer app, without running anything."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from typer.main import get_command

from so8tqc.cli.app import app


@functools.cache
def _app() -> Any:
    return get_command(app)


def parse(arguments: Sequence[str]) -> None:
    """Parse a command line as ``so8tqc`` would.

    Raises:
        Exception: click's own, for an unknown command or option, or a value of the wrong kind.
    """
    command: Any = _app()
    context = command.make_context("so8tqc", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def options_of(words: Sequence[str]) -> set[str]:
    """The options of the command that these words begin with.

    Raises:
        KeyError: there is no such command.
    """
    command: Any = _app()
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    options = {name for parameter in command.params for name in parameter.opts}
    return options | {name for p in command.params for name in p.secondary_opts} | {"--help"}

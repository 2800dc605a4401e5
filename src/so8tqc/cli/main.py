"""Entry point: runs the app and turns every error into one paragraph and an exit code."""

from __future__ import annotations

import os
import sys

from so8tqc.errors import ExitCode, So8tqcError, explained
from so8tqc.paths import anchored

_EVERYWHERE = ("--debug", "--no-color")
"""Options of every command, at any place."""


def main() -> None:
    """Console script ``so8tqc``."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the app with these arguments; return the exit code."""
    debug = "--debug" in arguments
    if "--no-color" in arguments:
        os.environ["NO_COLOR"] = "1"  # what rich and the processes we start go by
    arguments = [_explicit(argument) for argument in arguments if argument not in _EVERYWHERE]
    # not threads that spin while they wait: two processes of matrix products on two cores would
    # take three times as long as with threads that sleep
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from so8tqc.cli.app import app

        code = int(app(arguments, prog_name="so8tqc", standalone_mode=False) or 0)
    except KeyboardInterrupt:
        code = int(ExitCode.INTERRUPTED)
    except So8tqcError as error:
        if debug:
            raise
        _complain(str(error))
        return int(error.exit_code)
    except Exception as error:  # noqa: BLE001  the last resort: say so and exit, never continue
        return _other(error, debug)
    if code == ExitCode.INTERRUPTED:  # Typer turns most of Ctrl-C into this exit code itself
        _complain("Interrupted; run the same command again to go on where it stopped.")
    return code


def _explicit(argument: str) -> str:
    """``./x/y`` and ``--option=./x/y`` stay paths, whatever is there."""
    if not argument.startswith("--"):
        return anchored(argument)
    name, equals, value = argument.partition("=")
    return name + equals + anchored(value)


def _other(error: Exception, debug: bool) -> int:
    """Exit code of what click raised, or of a defect."""
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's own errors
        error.show()  # type: ignore[attr-defined]
        return int(ExitCode.USAGE)
    if debug:
        raise error
    text, code = explained(error)
    _complain(text)
    return int(code)


def _complain(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    console.print(f"[bold red]error[/] {escape(text)}", soft_wrap=not console.is_terminal)

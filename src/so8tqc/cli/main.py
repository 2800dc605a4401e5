"""Entry point: runs the app and turns every error into one paragraph and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
    with _terminable() as received:
        code = _run(arguments, debug)
    if code != ExitCode.INTERRUPTED:
        return code
    how = "Terminated" if received else "Interrupted"
    _complain(f"{how}; run the same command again to go on where it stopped.")
    return int(ExitCode.TERMINATED) if received else code


def _run(arguments: list[str], debug: bool) -> int:
    try:
        from so8tqc.cli.app import app

        # Typer turns most of Ctrl-C into INTERRUPTED itself
        return int(app(arguments, prog_name="so8tqc", standalone_mode=False) or 0)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except So8tqcError as error:
        if debug:
            raise
        _complain(str(error))
        return int(error.exit_code)
    except Exception as error:  # noqa: BLE001  the last resort: say so and exit, never continue
        return _other(error, debug)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Have SIGTERM (``kill``, a stopped container, a cancelled job) end the work as Ctrl-C does.

    By itself it would leave temporaries, which may be as large as a model, and child processes.
    Whoever has arranged for it otherwise, or ignores it, is left alone.

    Yields:
        The signals received so far.
    """
    received: list[int] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield received
        return

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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

"""so8tqc report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption, QuietOption
from so8tqc.cli.stage import Output, add_to_step_summary, finish


def report(
    directory: Annotated[Path, typer.Argument(help="Run directory.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Hash every file of the run again; write nothing."),
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write report.html, report.md and report.json of a run directory.

    Examples:

        so8tqc report out/demo

        so8tqc report --verify out/demo
    """
    from so8tqc.cli.terminal import terminal_progress
    from so8tqc.services.recheck import recheck
    from so8tqc.services.report import report as service

    with terminal_progress(quiet=quiet) as progress:
        if verify:
            finish(recheck(directory, progress), Output(json, quiet))
            return
        record = service(directory, progress)
    add_to_step_summary(directory / "report" / "report.md")
    finish(record, Output(json, quiet))

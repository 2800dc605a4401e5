"""so8tqc report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption, QuietOption
from so8tqc.cli.stage import Output, add_to_step_summary, finish
from so8tqc.languages import Language


def report(
    directory: Annotated[Path, typer.Argument(help="Run directory.")],
    lang: Annotated[
        Language | None,
        typer.Option(help="Language; default: the run's, which is en.", show_default=False),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write report.html, report.md and report.json of a run directory.

    Examples:

        so8tqc report out/demo

        so8tqc report out/demo --lang ja
    """
    from so8tqc.cli.terminal import terminal_progress
    from so8tqc.reports.language import spoken
    from so8tqc.services.report import report as service

    with terminal_progress(quiet=quiet) as progress:
        record = service(directory, progress, language=lang)
    add_to_step_summary(directory / "report" / "report.md")
    with spoken(Language(str(record.metrics["language"]))):
        finish(record, Output(json, quiet))

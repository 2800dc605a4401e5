"""so8tqc doctor"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(help="Model directory, GGUF, or rotations to describe."),
    ] = None,
    json: JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only what is missing; of a file, nothing.")
    ] = False,
) -> None:
    """Say what is installed, what is missing and how to get it; or describe a file.

    Examples:

        so8tqc doctor

        so8tqc doctor model-Q5_K_M.gguf

        so8tqc doctor --quiet
    """
    import json as json_module

    from so8tqc.services.doctor import describe, examine

    findings = examine() if path is None else describe(path)
    if quiet:
        findings = [finding for finding in findings if finding.ok is False]
    if json:
        typer.echo(json_module.dumps([finding._asdict() for finding in findings], indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for overflow in ("ellipsis", "ellipsis", "fold"):  # fingerprints are of use only whole
        table.add_column(overflow=overflow)
    marks = {True: "[green]✓[/]", False: "[yellow]✗[/]", None: " "}
    for finding in findings:
        remedy = f"\n[bold]{escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(marks[finding.ok], finding.name, escape(finding.value) + remedy)
    if findings:
        Console().print(table)

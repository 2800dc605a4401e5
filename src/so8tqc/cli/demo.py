"""so8tqc demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption, QuietOption
from so8tqc.cli.stage import Output, finish


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; default out/demo."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole pipeline on SmolLM2-135M with the gates that come with so8tqc.

    Takes about ten minutes on two cores the first time; a second run reuses every stage.

    Examples:

        so8tqc demo

        so8tqc demo --out /tmp/demo
    """
    from so8tqc.cli.terminal import terminal_progress
    from so8tqc.services.demo import demo_config
    from so8tqc.services.pipeline import run as service

    with terminal_progress(quiet=quiet) as progress:
        record = service(demo_config(out), progress)
    finish(record, Output(json, quiet))

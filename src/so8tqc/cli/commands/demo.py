"""so8tqc demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption, QuietOption
from so8tqc.cli.stage import Output, finish, work


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
    from so8tqc.services.run.demo import demo_config
    from so8tqc.services.run.pipeline import run as service

    config, output = demo_config(out), Output(json, quiet)
    record = work(lambda p: service(config, p), config, config.out / "record.json", output)
    finish(record, output)

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
    quick: Annotated[
        bool,
        typer.Option(
            "--quick/--full", help="Less of everything: two types, ten texts, one long text."
        ),
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole pipeline on SmolLM2-135M with the gates that come with so8tqc.

    In full it takes about seven minutes on two idle cores, --quick about three; a second run
    reuses every stage. Both use the same directory: the full demo goes on from the quick one.

    Examples:

        so8tqc demo --quick

        so8tqc demo

        so8tqc demo --full --out /tmp/demo
    """
    from so8tqc.services.run.demo import demo_config, quick_demo_config
    from so8tqc.services.run.pipeline import run as service

    config = quick_demo_config(out) if quick else demo_config(out)
    output = Output(json, quiet)
    record = work(lambda p: service(config, p), config, config.out / "record.json", output)
    finish(record, output)

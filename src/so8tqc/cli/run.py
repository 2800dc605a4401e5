"""so8tqc run"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption, QuietOption, SetOption, given
from so8tqc.cli.stage import Output, add_to_step_summary, configure, finish


def run(
    config: Annotated[Path, typer.Argument(help="YAML file of a pipeline.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; overrides the file's `out`."),
    ] = None,
    set_: SetOption = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Run this stage alone."),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage and all later ones again."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a pipeline: bake, export, quantize, calibrate, qc, longtext, report.

    A stage whose inputs, options and code are unchanged is reused.

    Examples:

        so8tqc run configs/demo.yaml

        so8tqc run configs/demo.yaml --set quantize.types=[Q4_K_M] --set calibrate_type=Q4_K_M

        so8tqc run configs/demo.yaml --from qc
    """
    from so8tqc.cli.terminal import terminal_progress
    from so8tqc.config import RunConfig
    from so8tqc.reports.language import spoken
    from so8tqc.services.pipeline import run as service

    options = configure(RunConfig, given(out=out), config, set_)
    with terminal_progress(quiet=quiet) as progress:
        record = service(options, progress, only=only, from_stage=from_)
    add_to_step_summary(options.out / "report" / "report.md")
    with spoken(options.report.language):
        finish(record, Output(json, quiet))

"""so8tqc run"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption, QuietOption, SetOption, given
from so8tqc.cli.stage import Output, add_to_step_summary, finish, present, work


def run(
    config: Annotated[Path, typer.Argument(help="YAML file of a pipeline, or of several.")],
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
    """Run a pipeline: bake, export, quantize, calibrate, qc, choose, longtext, report.

    A stage whose inputs, options and code are unchanged is reused. A file with a `matrix:` is a
    batch: one run for each combination, in its own directory of --out; what fails does not stop
    the others, and the exit code is the largest of all.

    Examples:

        so8tqc run configs/demo.yaml

        so8tqc run configs/demo.yaml --set quantize.types=[Q4_K_M]

        so8tqc run configs/demo.yaml --from qc

        so8tqc run configs/batch.yaml --out out/batch
    """
    import os

    from so8tqc.config.batch import Batch, load_runs
    from so8tqc.record_kinds.batch import BatchMetrics
    from so8tqc.reports.language import spoken
    from so8tqc.services.run.batch import BATCH_REPORT, language_of, run_batch
    from so8tqc.services.run.pipeline import run as run_one

    runs = load_runs(
        file=config, overrides=set_ or (), flags=given(out=out), environment=os.environ
    )
    output = Output(json, quiet)
    path = runs.out / "record.json"
    if isinstance(runs, Batch):
        batch = runs
        record = work(
            lambda p: run_batch(batch, p, only=only, from_stage=from_),
            None,
            path,
            output,
        )
        add_to_step_summary(batch.out / BATCH_REPORT)
        with spoken(language_of(batch)):
            present(record, output, batch.out / BATCH_REPORT)
        raise typer.Exit(BatchMetrics.of(record).exit_code)
    one = runs
    record = work(lambda p: run_one(one, p, only=only, from_stage=from_), one, path, output)
    add_to_step_summary(one.out / "report" / "report.md")
    with spoken(one.report.language):
        finish(record, output)

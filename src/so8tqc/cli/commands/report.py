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
    other: Annotated[
        Path | None,
        typer.Argument(help="A second one: it is compared with the first.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the comparison; default OTHER/comparison.", show_default=False
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Hash every file of the run again; write nothing."),
    ] = False,
    lang: Annotated[
        Language | None,
        typer.Option(help="Language; default: the run's, which is en.", show_default=False),
    ] = None,
    model_card: Annotated[
        bool,
        typer.Option("--model-card", help="Also write report/model-card.md, for a hub's README."),
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write report.html, report.md and report.json of a run directory; or compare two of them.

    With two directories (of `run`, or of a stage such as `qc`), comparison.html, .md and .json say
    what changed in config, inputs, versions, verdicts and values, and whether a difference is more
    than chance. Exit code 1: a check fails in the second that did not fail in the first.

    Examples:

        so8tqc report out/demo

        so8tqc report out/demo --lang ja

        so8tqc report --verify out/demo

        so8tqc report out/demo --model-card

        so8tqc report out/before out/after

        so8tqc report out/before out/after --out compared/ --json
    """
    from so8tqc.errors import ConfigError

    output = Output(json, quiet)
    if model_card and (verify or other):
        raise ConfigError("--model-card is for the report of one run directory")
    if verify and (other or out):
        raise ConfigError("--verify is for one run directory")
    if other is not None:
        _compare(directory, other, out or other / "comparison", output, lang)
    elif out is not None:
        raise ConfigError(
            "--out is for a comparison", remedy="A report is written to DIRECTORY/report."
        )
    elif verify:
        _verify(directory, output)
    else:
        if model_card:
            _model_card(directory, output)
        _report(directory, output, lang)


def _model_card(directory: Path, output: Output) -> None:
    from so8tqc.services.report import write_model_card

    path = write_model_card(directory)
    if not output.json and not output.quiet:
        typer.echo(f"model card: {path}")


def _report(directory: Path, output: Output, lang: Language | None) -> None:
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.record_kinds.run import RunMetrics
    from so8tqc.reports.language import spoken
    from so8tqc.services.report import report as service

    with terminal_progress(quiet=output.quiet) as progress:
        record = service(directory, progress, language=lang)
    add_to_step_summary(directory / "report" / "report.md")
    with spoken(Language(str(RunMetrics.of(record).language))):
        finish(record, output)


def _verify(directory: Path, output: Output) -> None:
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.services.attest.recheck import recheck

    with terminal_progress(quiet=output.quiet) as progress:
        record = recheck(directory, progress)
    finish(record, output)


def _compare(
    directory: Path, other: Path, out: Path, output: Output, lang: Language | None
) -> None:
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.reports.language import spoken
    from so8tqc.services.compare.run import read_run, require_two
    from so8tqc.services.compare.service import compare_runs
    from so8tqc.services.report import configured_language

    require_two(directory, other)
    with terminal_progress(quiet=output.quiet) as progress:
        record = compare_runs(directory, other, out, progress, language=lang)
    add_to_step_summary(out / "comparison.md")
    with spoken(lang or configured_language(read_run(other).whole)):
        finish(record, output, out / "comparison.html")

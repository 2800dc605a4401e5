"""so8tqc attest"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import ConfigOption, JsonOption, QuietOption, SetOption, given
from so8tqc.cli.stage import Output, configure, finish


def attest(
    directory: Annotated[
        Path, typer.Argument(help="Run directory, baked directory, or GGUF file.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The statement; default in the run directory, or beside the file.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a statement about files: what each was made from, and how.

    Of a run, or of what single commands made: the records beside a file are followed back as far
    as they go, and where that is not to a base, it is said.

    The statement is plain JSON (in-toto) that any signing tool can sign. Whoever has the files
    checks them with so8tqc verify; whoever has base and rotations too makes them again.

    Examples:

        so8tqc attest out/demo

        so8tqc attest baked/

        so8tqc attest quantized/model-Q5_K_M.gguf

        so8tqc verify out/demo/attestation.json --base model/ --rotations gates.safetensors
    """
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.config import AttestConfig
    from so8tqc.services.attest.service import attest as service

    options = configure(AttestConfig, given(directory=directory, out=out), config, set_)
    with terminal_progress(quiet=quiet) as progress:
        record = service(options, progress)
    finish(record, Output(json, quiet))

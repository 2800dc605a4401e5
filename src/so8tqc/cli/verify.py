"""so8tqc verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import ConfigOption, JsonOption, QuietOption, SetOption, given
from so8tqc.cli.stage import Output, configure, finish


def verify(
    file: Annotated[Path, typer.Argument(help="A quantized GGUF.")],
    record: Annotated[
        Path | None,
        typer.Option(
            help="The record that quantize wrote; default: record.json beside the file.",
            show_default=False,
        ),
    ] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input", help="The GGUF it was made from, if it has moved.", show_default=False
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="The importance matrix, if it has moved.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize again as a file's record says, and compare tensor by tensor.

    Examples:

        so8tqc verify quantized/model-Q5_K_M.gguf

        so8tqc verify model-Q5_K_M.gguf --record quantized/record.json --input model-F16.gguf
    """
    from so8tqc.cli.terminal import terminal_progress
    from so8tqc.config import VerifyConfig
    from so8tqc.services.verify import verify as service

    flags = given(file=file, record=record, input=input_, imatrix=imatrix)
    options = configure(VerifyConfig, flags, config, set_)
    with terminal_progress(quiet=quiet) as progress:
        result = service(options, progress)
    finish(result, Output(json, quiet))

"""so8tqc verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import ConfigOption, JsonOption, QuietOption, SetOption, given
from so8tqc.cli.stage import Output, configure, finish


def verify(
    file: Annotated[
        Path,
        typer.Argument(
            help="A GGUF file or baked directory, by the records beside it; or a statement."
        ),
    ],
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
    hessians: Annotated[
        Path | None,
        typer.Option(help="The file of second moments, if it has moved.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Of a statement: the base model.", show_default=False),
    ] = None,
    rotations: Annotated[
        Path | None,
        typer.Option(help="Of a statement: the rotations.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of a statement: a PEFT adapter beside the rotations; repeatable, in order.",
            show_default=False,
        ),
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option(
            help="Of a statement: where its files are; default beside it.", show_default=False
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            help="Of a statement: files checks digests alone; full (default) makes links again.",
            show_default=False,
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Of a statement: where files are made again (they need the room of the model); "
            "default the system's temporary directory.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make files again from what they were made from, and compare.

    Of a quantized GGUF: quantize again as its record says. Of another GGUF, or a baked directory:
    follow the records beside it back, and make every step again. Of a statement that attest wrote:
    check the files that are here, and make again every link (bake, export, quantize, calibrate)
    whose inputs are here. Each link is identical, within rounding, different or not checked.

    Examples:

        so8tqc verify quantized/model-Q5_K_M.gguf

        so8tqc verify model-Q5_K_M.gguf --record quantized/record.json --input model-F16.gguf

        so8tqc verify baked/

        so8tqc verify out/demo/attestation.json --base model/ --rotations gates.safetensors

        so8tqc verify attestation.json --base model/ --rotations lora/ --adapter second/

        so8tqc verify attestation.json --level files
    """
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.config import VerifyConfig
    from so8tqc.services.attest.verify_file import verify as verify_file
    from so8tqc.services.attest.verify_loose import is_loose, verify_loose
    from so8tqc.services.attest.verify_statement import verify_statement

    flags = given(
        file=file,
        record=record,
        input=input_,
        imatrix=imatrix,
        hessians=hessians,
        base=base,
        rotations=rotations,
        adapters=adapter,
        files=files,
        level=level,
        scratch=scratch,
    )
    options = configure(VerifyConfig, flags, config, set_)
    service = verify_statement if options.is_statement else verify_file
    if is_loose(options):
        service = verify_loose
    with terminal_progress(quiet=quiet) as progress:
        result = service(options, progress)
    finish(result, Output(json, quiet))

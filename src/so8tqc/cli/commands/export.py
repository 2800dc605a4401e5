"""so8tqc export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import ConfigOption, JsonOption, QuietOption, SetOption, given
from so8tqc.cli.stage import Output, configure, run_single_output, with_converter


def export(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    out: Annotated[Path, typer.Option(help="GGUF file to write.")],
    type_: Annotated[
        str | None,
        typer.Option("--type", help="f16 (default), bf16, f32, q8_0 or auto.", show_default=False),
    ] = None,
    keep_f32: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Store these tensors unrounded, as F32: baked, or a glob of names; repeatable.",
            show_default=False,
        ),
    ] = None,
    converter_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ARGUMENT",
            help="Hand this to the converter as it is, e.g. --converter-arg=--no-mtp; repeatable.",
            show_default=False,
        ),
    ] = None,
    text_only: Annotated[
        bool | None,
        typer.Option(
            "--text-only",
            help="Of a model that sees, leave out vision tower and projector (mmproj-NAME.gguf).",
            show_default=False,
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="A llama.cpp checkout to convert with."),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Fetch the converter where it is not here yet, without asking."),
    ] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a model directory to GGUF, compare every tensor with its source, and run the file.

    Of a model that sees, vision tower and projector are written beside it as mmproj-NAME.gguf.

    llama.cpp's converter is needed. Where it is not here yet, a terminal is asked whether to fetch
    it; --yes, or SO8TQC_VENDOR=auto, fetches it without asking.

    Examples:

        so8tqc export baked/ --out model-F16.gguf

        so8tqc export baked/ --type bf16 --out model-BF16.gguf

        so8tqc export baked/ --keep-f32 baked --out model-F16.gguf

        so8tqc export baked/ --text-only --out model-F16.gguf
    """
    from so8tqc.config import ExportConfig
    from so8tqc.services.export.service import export as service

    flags = given(
        model=model,
        out=out,
        type=type_,
        keep_f32=keep_f32,
        converter_args=converter_arg,
        text_only=text_only,
        llama_cpp=llama_cpp,
        vendor="auto" if yes else None,
    )
    options = configure(ExportConfig, flags, config, set_)
    run_single_output(service, with_converter(options), Output(json, quiet))

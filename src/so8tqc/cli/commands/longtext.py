"""so8tqc longtext"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    ChatOption,
    ConfigOption,
    ImagesOption,
    JsonOption,
    QuietOption,
    RotationsOption,
    SetOption,
    ThreadsOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_reported_stage


@reads_rotations
def longtext(
    model: Annotated[Path, typer.Argument(help="Model directory or GGUF file under test.")],
    out: Annotated[Path, typer.Option(help="Directory for record, plots and series.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="Base model to compare with."),
    ] = None,
    rotations: RotationsOption = None,
    rotation_options: Mapping[str, object] = NOTHING,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, or builtin:longtext (default); repeatable.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Model directory with the tokenizer, for a GGUF file."),
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(help="Teacher-forced tokens of each text.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to generate for each prompt; 0 for none.", show_default=False),
    ] = None,
    png: Annotated[
        bool | None,
        typer.Option("--png/--no-png", help="Also draw PNG images.", show_default=False),
    ] = None,
    images: ImagesOption = None,
    chat: ChatOption = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Look for failures that only long text shows: phase, oscillation, PET, repetition.

    Examples:

        so8tqc longtext baked/ --reference model/ --rotations gates.safetensors --out long/

        so8tqc longtext model-Q5_K_M.gguf --tokenizer baked/ --data book.txt --out long/
    """
    from so8tqc.config import LongTextConfig
    from so8tqc.services.longtext.service import longtext as service

    flags = given(
        rotation_options=rotation_options,
        model=model,
        out=out,
        reference=reference,
        rotations=rotations,
        data=data,
        tokenizer=tokenizer,
        min_tokens=min_tokens,
        images=images,
        chat=chat,
        max_new_tokens=max_new_tokens,
        png=png,
        threads=threads,
    )
    options = configure(LongTextConfig, flags, config, set_)
    run_reported_stage(service, options, options.out, Output(json, quiet), "report.md")

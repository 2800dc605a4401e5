"""so8tqc check"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    ConfigOption,
    DataOption,
    JsonOption,
    MaxTokensOption,
    QuietOption,
    SetOption,
    ThreadsOption,
    given,
)
from so8tqc.cli.stage import Output, configure, finish_check


def check(
    path: Annotated[Path, typer.Argument(help="Anything: a GGUF file, a directory, a gate file.")],
    other: Annotated[
        Path | None,
        typer.Argument(help="What it is compared with; which is the reference is recognised."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base model, where it is not found.", show_default=False)
    ] = None,
    rotations: Annotated[
        Path | None, typer.Option(help="The gates, where they are not found.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Model directory with the tokenizer.", show_default=False),
    ] = None,
    data: DataOption = None,
    max_tokens: MaxTokensOption = None,
    level: Annotated[
        str | None,
        typer.Option(
            help="auto (default): models are run that are small enough; files: none; full: all.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what a file or directory is, whether to trust it, and what to do next.

    What is needed is found beside it: the record of its making, so8tqc.json, the base and the
    rotations that they name, a tokenizer, the built-in texts. Exit code 0: something was judged,
    and passed; 1: a check failed; 3: it cannot be read, or nothing here can judge it.

    Examples:

        so8tqc check model-Q5_K_M.gguf

        so8tqc check baked/

        so8tqc check model/ model-Q5_K_M.gguf --rotations gates.safetensors

        so8tqc check model-Q5_K_M.gguf --level files --json
    """
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.config import CheckConfig
    from so8tqc.services.check.service import check as service

    flags = given(
        path=path,
        other=other,
        base=base,
        rotations=rotations,
        tokenizer=tokenizer,
        data=data,
        max_tokens=max_tokens,
        level=level,
        threads=threads,
    )
    options = configure(CheckConfig, flags, config, set_)
    with terminal_progress(quiet=quiet or options.level == "files") as progress:
        record = service(options, progress)
    finish_check(record, Output(json, quiet))

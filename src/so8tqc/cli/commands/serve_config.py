"""so8tqc serve-config"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import ConfigOption, QuietOption, SetOption, given
from so8tqc.cli.stage import configure


def serve_config(
    gguf: Annotated[Path, typer.Argument(help="GGUF file to serve.")],
    runtime: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="RUNTIME",
            help="ollama, llama-server, llama-cpp-python, transformers or lm-studio.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; standard output if left out.", show_default=False),
    ] = None,
    temperature: Annotated[
        Path | None,
        typer.Option(
            help="temperature_config.json of calibrate; default what the file declares, or one "
            "nearby that was fitted on it.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Directory that it was exported from; default what records say.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the file and what is known as JSON on stdout.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a runtime's own file: fitted temperature, chat template, where answers end.

    Examples:

        so8tqc serve-config model-Q5_K_M.gguf --for ollama --out Modelfile

        so8tqc serve-config model-Q5_K_M.gguf --for llama-server

        so8tqc serve-config q5.gguf --for transformers --temperature cal/temperature_config.json
    """
    import json as json_module

    from so8tqc.config import ServeConfig
    from so8tqc.services.serving.service import serve_config as service

    flags = given(gguf=gguf, runtime=runtime, out=out, temperature=temperature, model=model)
    served = service(configure(ServeConfig, flags, config, set_))
    if json:
        typer.echo(json_module.dumps(served._asdict(), indent=2, ensure_ascii=False))
        return
    if out is None:
        typer.echo(served.text, nl=False)
    if not quiet:
        for notice in (served.origin, *served.notices):
            typer.echo(notice, err=True)

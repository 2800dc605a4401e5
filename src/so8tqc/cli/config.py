"""so8tqc config"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

config = typer.Typer(
    name="config",
    help="Config files: their schema.\n\nExamples:\n\n"
    "    so8tqc config schema --out so8tqc.schema.json",
    no_args_is_help=True,
)


@config.command()
def schema(
    stage: Annotated[
        str | None,
        typer.Argument(help="A command that has --config; default: the file of `run`."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write instead of stdout.", show_default=False)
    ] = None,
) -> None:
    """Print the JSON Schema of a run file, or of a command's options, for editors.

    Examples:

        so8tqc config schema

        so8tqc config schema qc

        so8tqc config schema --out configs/so8tqc.schema.json
    """
    from so8tqc.config_schema import schema_text

    text = schema_text(stage)
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")

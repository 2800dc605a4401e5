"""so8tqc config"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import QuietOption, SetOption, given

StageOption = Annotated[
    str | None,
    typer.Option(
        "--stage",
        metavar="COMMAND",
        help="The file is for this command's --config, not for `run`.",
        show_default=False,
    ),
]

config = typer.Typer(
    name="config",
    help="Config files: their schema, their mistakes, the values in force.\n\nExamples:\n\n"
    "    so8tqc config schema --out so8tqc.schema.json\n\n"
    "    so8tqc config check run.yaml\n\n"
    "    so8tqc config show run.yaml --set qc.seed=1",
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
    from so8tqc.config.schema import schema_text
    from so8tqc.disk.atomic import write_text

    text = schema_text(stage)
    if out is None:
        typer.echo(text, nl=False)
        return
    write_text(out, text)


@config.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML files.")],
    stage: StageOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Validate config files; every mistake is told with its file, line and key. Exit code 2 if any.

    The files alone are looked at: no environment variable, no model, no data.

    Examples:

        so8tqc config check configs/demo.yaml configs/strict.yaml

        so8tqc config check qc.yaml --stage qc
    """
    import json as json_module

    from so8tqc.config import config_model
    from so8tqc.config.batch import check_file
    from so8tqc.errors import ConfigError, ExitCode

    config_model(stage)
    errors: dict[Path, str | None] = dict.fromkeys(files)
    for file in files:
        try:
            check_file(file, stage)
        except ConfigError as error:
            errors[file] = str(error)
    if json:
        rows = [{"file": str(f), "valid": e is None, "error": e} for f, e in errors.items()]
        typer.echo(json_module.dumps(rows, indent=2, ensure_ascii=False))
    for file, text in errors.items():
        if text is not None:
            typer.echo(f"✗ {text}", err=True)
        elif not (quiet or json):
            typer.echo(f"✓ {file}")
    if any(errors.values()):
        raise typer.Exit(ExitCode.USAGE)


@config.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="YAML file.", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory, as `so8tqc run --out`.", show_default=False),
    ] = None,
    set_: SetOption = None,
    stage: StageOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Print the values in force and where each came from.

    The order is flag, --set, environment (SO8TQC_KEY__SUBKEY), file, default. Of a file with a
    matrix what all runs share comes first, then what each is given.

    Examples:

        so8tqc config show configs/demo.yaml

        so8tqc config show configs/demo.yaml --set qc.seed=1 --json

        so8tqc config show qc.yaml --stage qc
    """
    import json as json_module
    import os

    from so8tqc.config import config_model
    from so8tqc.config.origins import settings

    rows = settings(
        config_model(stage),
        file=file,
        overrides=set_ or (),
        flags=given(out=out),
        environment=os.environ,
    )
    if json:
        listed = [row._asdict() for row in rows]
        typer.echo(json_module.dumps(listed, indent=2, ensure_ascii=False))
        return
    texts = [
        row.value
        if isinstance(row.value, str)
        else json_module.dumps(row.value, ensure_ascii=False)
        for row in rows
    ]
    key_width, value_width = max(len(row.key) for row in rows), max(map(len, texts))
    combination = ""
    for row, text in zip(rows, texts, strict=True):
        if row.combination != combination:
            combination = row.combination
            typer.echo(f"\n[{combination}]")
        typer.echo(f"{row.key:<{key_width}}  {text:<{value_width}}  {row.origin}")

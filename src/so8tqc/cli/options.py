"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.rotations.enums import Convention, Parametrization, Site

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file with this command's options."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one config value; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]

ConventionOption = Annotated[
    Convention | None,
    typer.Option(help="column: the gate computes R·x; row: x_row·R.", show_default=False),
]
ParametrizationOption = Annotated[
    Parametrization | None,
    typer.Option(help="How theta becomes R.", show_default=False),
]
SiteOption = Annotated[
    Site | None,
    typer.Option(help="Gate before (input) or after (output) the projection.", show_default=False),
]
LayersOption = Annotated[
    str | None,
    typer.Option(help="Layers that carry a gate, e.g. 0-11,13.", show_default=False),
]
OrthogonalizeOption = Annotated[
    str | None,
    typer.Option(help="as-trained (default), or polar: the nearest rotation.", show_default=False),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads.", show_default=False),
]


def given(**flags: object) -> dict[str, object]:
    """The flags that were given: those that are neither None nor empty."""
    return {name: value for name, value in flags.items() if value not in (None, [], (), {})}

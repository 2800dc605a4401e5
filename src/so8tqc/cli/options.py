"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from so8tqc.rotations.enums import Convention, Parametrization, Site

ConfigOption = Annotated[
    Optional[Path],  # noqa: UP045  typer reads the annotation at run time
    typer.Option("--config", help="YAML file with this command's options."),
]
SetOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="Override one config value; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]

ConventionOption = Annotated[
    Optional[Convention],  # noqa: UP045
    typer.Option(help="column: the gate computes R·x; row: x_row·R.", show_default=False),
]
ParametrizationOption = Annotated[
    Optional[Parametrization],  # noqa: UP045
    typer.Option(help="How theta becomes R.", show_default=False),
]
SiteOption = Annotated[
    Optional[Site],  # noqa: UP045
    typer.Option(help="Gate before (input) or after (output) the projection.", show_default=False),
]
LayersOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Layers that carry a gate, e.g. 0-11,13.", show_default=False),
]
OrthogonalizeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="as-trained (default), or polar: the nearest rotation.", show_default=False),
]
ThreadsOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="CPU threads.", show_default=False),
]


def given(**flags: object) -> dict[str, object]:
    """The flags that were given: those that are not None and not empty."""
    return {name: value for name, value in flags.items() if value not in (None, [], ())}

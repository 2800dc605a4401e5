"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
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

_Convention = Annotated[
    Convention | None,
    typer.Option(help="column: the gate computes R·x; row: x_row·R.", show_default=False),
]
_Parametrization = Annotated[
    Parametrization | None,
    typer.Option(help="How theta becomes R.", show_default=False),
]
_Site = Annotated[
    Site | None,
    typer.Option(help="Gate before (input) or after (output) the projection.", show_default=False),
]
_Layers = Annotated[
    str | None,
    typer.Option(help="Layers that carry a gate, e.g. 0-11,13.", show_default=False),
]
_Orthogonalize = Annotated[
    str | None,
    typer.Option(help="as-trained (default), or polar: the nearest rotation.", show_default=False),
]
RotationsOption = Annotated[
    Path | None, typer.Option(help="Rotations: the reference is then the gated model.")
]
BaseOption = Annotated[
    Path | None,
    typer.Option(help="What the rotations are applied to, if the reference is a capture."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads.", show_default=False),
]


NOTHING: Mapping[str, object] = MappingProxyType({})


def given(**flags: object) -> dict[str, object]:
    """The flags that were given: those that are neither None nor empty."""
    return {name: value for name, value in flags.items() if value not in (None, [], (), {})}


_READING = {
    "convention": _Convention,
    "parametrization": _Parametrization,
    "site": _Site,
    "layers": _Layers,
    "orthogonalize": _Orthogonalize,
}
"""How a rotation file is to be read: options of every command that takes one."""


def reads_rotations(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options in the place of its parameter ``rotation_options``.

    The command gets those that were given as one mapping.
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def with_options(**values: object) -> None:
        command(rotation_options=given(**{name: values.pop(name) for name in _READING}), **values)

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name != "rotation_options":
            parameters.append(parameter)
            continue
        parameters += [
            inspect.Parameter(name, parameter.kind, default=None, annotation=option)
            for name, option in _READING.items()
        ]
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return with_options

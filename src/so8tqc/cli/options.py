"""Options that several commands share."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, get_args

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
    typer.Option(
        help="Gate before (input) or after (output) the projection, or before the head (head).",
        show_default=False,
    ),
]
_Key = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="Names of the gates' tensors, {layer} for the number, where nobody knows them.",
        show_default=False,
    ),
]
_LoraAlpha = Annotated[
    float | None,
    typer.Option(
        help="α of LoRA branches beside the gates, where the file does not state it.",
        show_default=False,
    ),
]
_Layers = Annotated[
    str | None,
    typer.Option(help="Layers that carry a gate, e.g. 0-11,13.", show_default=False),
]
_Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        help="PEFT adapter directory; repeatable, in order. Gates are in front of all of them.",
        show_default=False,
    ),
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

DataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text file, or builtin:validation (default); repeatable.", show_default=False
    ),
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat",
        help="Conversations: through the chat template, scored on the answers alone.",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(help="Model directory with the tokenizer, if the reference has none."),
]
CtxOption = Annotated[
    int | None,
    typer.Option(help="Window length in tokens, for texts longer than that.", show_default=False),
]
StrideOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens from one window to the next; half of --ctx if left out.", show_default=False
    ),
]
ImagesOption = Annotated[
    int | None,
    typer.Option(help="Pictures used of the data at most.", show_default=False),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens used of each text; 256 if left out, or all with --ctx.", show_default=False
    ),
]
ComputeDtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        show_default=False,
        help="What transformers computes in: float32, float64, bfloat16. Default: float32, on "
        "a GPU bfloat16.",
    ),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto",
        show_default=False,
        help="Spread models over GPUs, memory and disk, for what does not fit on one GPU.",
    ),
]
StreamOption = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        show_default=False,
        help="Run transformers models a layer at a time, whatever their size; default: where the "
        "free memory would not suffice.",
    ),
]
TypesOption = Annotated[
    list[str] | None,
    typer.Option("--type", help="Type, e.g. Q5_K_M; repeatable.", show_default=False),
]
TensorTypesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Type of the tensors whose name has a regular expression; repeatable.",
        show_default=False,
    ),
]
OutputTensorTypeOption = Annotated[
    str | None, typer.Option(help="Type of the output head.", show_default=False)
]
TokenEmbeddingTypeOption = Annotated[
    str | None, typer.Option(help="Type of the token embedding.", show_default=False)
]
PureOption = Annotated[
    bool, typer.Option("--pure", help="One type for all matrices instead of a mixture.")
]
AllowRequantizeOption = Annotated[
    bool, typer.Option("--allow-requantize", help="Accept an input that is quantized.")
]
ImatrixOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|auto",
        help="Importance matrix (.gguf, .dat), or auto: computed from calibration text.",
        show_default=False,
    ),
]
ImatrixDataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Calibration text for --imatrix auto; repeatable. Keep it apart from the text "
        "that judges.",
        show_default=False,
    ),
]

SolverOption = Annotated[
    str | None,
    typer.Option(
        metavar="libllama|hessian",
        help="Who chooses codes and scales; hessian: by the second moments of each matrix' "
        "inputs, types and sizes as they are.",
        show_default=False,
    ),
]
HessiansOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|auto",
        help="Second moments (.npz) for --solver hessian, or auto: computed from calibration text.",
        show_default=False,
    ),
]
HessianDataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Calibration text for --hessians auto; repeatable. Texts that judge are refused.",
        show_default=False,
    ),
]
HessianTokensOption = Annotated[
    int | None, typer.Option(help="Tokens of it at most.", show_default=False)
]
ExportedFromOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Model directory that the GGUF was exported from, for --hessians auto.",
        show_default=False,
    ),
]


NOTHING: Mapping[str, object] = MappingProxyType({})


def given(**flags: object) -> dict[str, object]:
    """The flags that were given: those that are neither None nor empty."""
    return {name: value for name, value in flags.items() if value not in (None, [], (), {})}


def in_place_of(
    parameter: str, options: Mapping[str, object]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options in the place of one parameter; it gets the given ones as a mapping.

    Args:
        parameter: of the command; a mapping.
        options: name → annotation. Their default is None.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def with_options(**values: object) -> None:
            command(**{parameter: given(**{n: values.pop(n) for n in options})}, **values)

        parameters: list[inspect.Parameter] = []
        for own in signature.parameters.values():
            if own.name != parameter:
                parameters.append(own)
                continue
            parameters += [
                inspect.Parameter(name, own.kind, default=None, annotation=option)
                for name, option in options.items()
            ]
        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return with_options

    return decorate


reads_rotations = in_place_of(
    "rotation_options",
    {
        "convention": _Convention,
        "parametrization": _Parametrization,
        "site": _Site,
        "key": _Key,
        "lora_alpha": _LoraAlpha,
        "layers": _Layers,
        "adapters": _Adapters,
        "orthogonalize": _Orthogonalize,
    },
)
"""How a rotation file is to be read: options of every command that takes one."""


def hidden(command: Callable[..., None], without: Collection[str]) -> dict[str, object]:
    """Another command's options as options that no help shows: name → annotation.

    Args:
        command: whose options.
        without: names that are left out.
    """
    options: dict[str, object] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name not in without:
            value, option = get_args(parameter.annotation)
            option = copy.copy(option)
            option.hidden = True
            options[parameter.name] = Annotated[value | None, option]
    return options

"""so8tqc identify"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    ComputeDtypeOption,
    ConfigOption,
    DeviceMapOption,
    JsonOption,
    QuietOption,
    SetOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_identify


@reads_rotations
def identify(
    base: Annotated[
        Path, typer.Argument(help="Model directory, org/name on a hub, or builtin:smollm2-135m.")
    ],
    rotations: Annotated[Path, typer.Argument(help="Gate file, checkpoint, or adapter.")],
    capture: Annotated[
        Path | None,
        typer.Option(help="Logits that the trained model gave (see docs/capture.md)."),
    ] = None,
    rotation_options: Mapping[str, object] = NOTHING,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that the gates were trained on; repeatable. Default builtin:validation.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Gate file to write with the facts stated, NAME.safetensors."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Directory for record.json, report.html and report.md.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model directory with the tokenizer, if the base has none.")
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(help="Tokens of a window; 256 if left out.", show_default=False),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(help="Windows that are run; 32 if left out.", show_default=False),
    ] = None,
    compute_dtype: ComputeDtypeOption = None,
    device_map: DeviceMapOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find out which reading of a gate file was trained: parametrization, convention, site.

    All readings are run side by side, against recorded logits or on text of the training. Exit
    code 0: identified; 1: not, and the reason is told. What is known already may be stated
    (--parametrization and so on): only readings that fit are run.

    Examples:

        so8tqc identify model/ gates.pt --capture trained.safetensors --out gates.safetensors

        so8tqc identify model/ gates.pt --data training.txt --parametrization cayley
          --out gates.safetensors --report identify/
    """
    from so8tqc.config import IdentifyConfig

    flags = given(
        rotation_options=rotation_options,
        base=base,
        rotations=rotations,
        capture=capture,
        data=data,
        out=out,
        report=report,
        tokenizer=tokenizer,
        ctx=ctx,
        windows=windows,
        compute_dtype=compute_dtype,
        device_map=device_map,
    )
    run_identify(configure(IdentifyConfig, flags, config, set_), Output(json, quiet))

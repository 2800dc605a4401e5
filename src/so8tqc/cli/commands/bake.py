"""so8tqc bake"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    ConfigOption,
    JsonOption,
    QuietOption,
    SetOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, finish, run_single_output


@reads_rotations
def bake(
    base: Annotated[
        Path, typer.Argument(help="Model directory (safetensors), or org/name on a hub.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write the baked model to.")],
    rotations: Annotated[
        Path | None,
        typer.Argument(
            help="Gate file, checkpoint, PEFT adapter; none: the model's weights hold the gates.",
            show_default=False,
        ),
    ] = None,
    rotation_options: Mapping[str, object] = NOTHING,
    baked_dtype: Annotated[
        str | None,
        typer.Option(help="keep, float32, float16 or bfloat16.", show_default=False),
    ] = None,
    force: Annotated[
        bool | None,
        typer.Option("--force", help="Bake a directory that was already baked."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Re-read the result and prove it.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the drift; write nothing.")
    ] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fold rotations and adapters into a checkpoint: W' = (W + s·B·A)·R; re-read it, prove it.

    The directory appears complete or not at all; only the rotated tensors change.

    Examples:

        so8tqc bake model/ gates.safetensors --out baked/

        so8tqc bake trained/ --out baked/

        so8tqc bake model/ gates.pt --out baked/ --parametrization exp --convention row --site input

        so8tqc bake model/ oft-adapter/ --out baked/ --baked-dtype float32

        so8tqc bake model/ lora-adapter/ --out baked/

        so8tqc bake model/ gates.safetensors --adapter lora-adapter/ --out baked/

        so8tqc bake org/name@revision gates.safetensors --out baked/

        so8tqc bake model/ gates.safetensors --out baked/ --dry-run
    """
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.cli.show import show_plan
    from so8tqc.config import BakeConfig
    from so8tqc.services.bake import bake as service
    from so8tqc.services.bake import plan

    flags = given(
        base=base,
        rotations=rotations,
        out=out,
        baked_dtype=baked_dtype,
        force=force,
        verify=verify,
        **rotation_options,
    )
    options, output = configure(BakeConfig, flags, config, set_), Output(json, quiet)
    if not dry_run:
        run_single_output(service, options, output)
        return
    with terminal_progress(quiet=quiet) as progress:
        record = plan(options, progress)
    if not json and not quiet:
        show_plan(record)
    finish(record, output)

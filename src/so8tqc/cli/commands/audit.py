"""so8tqc audit"""

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
    RotationsOption,
    SetOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_reported_stage


@reads_rotations
def audit(
    file: Annotated[Path, typer.Argument(help="GGUF file, whoever made it.")],
    base: Annotated[Path, typer.Option(help="Model directory that it claims to be made from.")],
    out: Annotated[Path, typer.Option(help="Directory for record and reports.")],
    rotations: RotationsOption = None,
    rotation_options: Mapping[str, object] = NOTHING,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Is this GGUF really that model, honestly quantized? Tensor by tensor; no model is run.

    Examples:

        so8tqc audit model-Q4_K_M.gguf --base model/ --out audit/

        so8tqc audit model-Q5_K_M.gguf --base model/ --rotations gates.safetensors --out audit/
    """
    from so8tqc.config import AuditConfig
    from so8tqc.services.audit import audit as service

    flags = given(
        rotation_options=rotation_options,
        file=file,
        base=base,
        out=out,
        rotations=rotations,
    )
    options = configure(AuditConfig, flags, config, set_)
    run_reported_stage(service, options, options.out, Output(json, quiet), "report.html")

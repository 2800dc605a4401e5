"""so8tqc locate"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    ConfigOption,
    DataOption,
    JsonOption,
    QuietOption,
    RotationsOption,
    SetOption,
    TokenizerOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_reported_stage


@reads_rotations
def locate(
    reference: Annotated[Path, typer.Argument(help="The model we trust: a model directory.")],
    candidate: Annotated[Path, typer.Argument(help="Model directory or GGUF file under test.")],
    out: Annotated[Path, typer.Option(help="Directory for record and reports.")],
    rotations: RotationsOption = None,
    rotation_options: Mapping[str, object] = NOTHING,
    data: DataOption = None,
    tokenizer: TokenizerOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens used of each text; 64 if left out.", show_default=False),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(help="Texts that are run; 2 if left out.", show_default=False),
    ] = None,
    only_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers whose operations are looked at, e.g. 0-11,13; all if left out.",
            show_default=False,
        ),
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="What transformers computes in: float32 (default), float64.",
            show_default=False,
        ),
    ] = None,
    runtime: Annotated[
        bool | None,
        typer.Option(
            "--runtime/--no-runtime",
            help="Of a GGUF, look at libllama's own values, too (default).",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Where do two models part? Layer by layer, operation by operation, on the same tokens.

    Each operation of the candidate is also run on what the reference's is given: so the first wrong
    one stands out, and those after it are judged by themselves. Exit code 1: something is not
    explained by the stored types and the arithmetic.

    Examples:

        so8tqc locate model/ model-Q4_K_M.gguf --out locate/

        so8tqc locate model/ baked/ --rotations gates.safetensors --out locate/
    """
    from so8tqc.config import LocateConfig
    from so8tqc.services.locate.service import locate as service

    flags = given(
        rotation_options=rotation_options,
        reference=reference,
        candidate=candidate,
        out=out,
        rotations=rotations,
        data=data,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        texts=texts,
        only_layers=only_layers,
        compute_dtype=compute_dtype,
        runtime=runtime,
    )
    options = configure(LocateConfig, flags, config, set_)
    run_reported_stage(service, options, options.out, Output(json, quiet), "report.html")

"""so8tqc calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    ChatOption,
    ConfigOption,
    ImagesOption,
    JsonOption,
    QuietOption,
    SetOption,
    StreamOption,
    given,
)
from so8tqc.cli.stage import Output, configure, run_stage


def calibrate(
    gguf: Annotated[Path, typer.Argument(help="GGUF file to calibrate.")],
    tokenizer: Annotated[Path, typer.Option(help="Model directory with the tokenizer.")],
    out: Annotated[Path, typer.Option(help="Directory for the temperature and its report.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, builtin:validation (default) or builtin:calibration; repeatable.",
            show_default=False,
        ),
    ] = None,
    chat: ChatOption = None,
    images: ImagesOption = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="nll (default), brier, ece, entropy, confidence-variance (degenerate: "
            "tends to a bound).",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Unquantized model: is its calibration back? Needed by the objective entropy."
        ),
    ] = None,
    apply: Annotated[
        str | None,
        typer.Option(
            help="none (default); metadata: a copy of the GGUF that says T; norm: a copy whose "
            "final norm is scaled by 1/T. The copy is run again and measured.",
            show_default=False,
        ),
    ] = None,
    png: Annotated[
        bool | None,
        typer.Option(
            "--png/--no-png",
            help="Draw reliability.png too (needs Chrome; default).",
            show_default=False,
        ),
    ] = None,
    allow_small: Annotated[
        bool | None,
        typer.Option("--allow-small", help="Accept fewer than 500 held-out tokens."),
    ] = None,
    stream: StreamOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit a temperature on a GGUF's own logits, and judge it on held-out text.

    Examples:

        so8tqc calibrate model-Q5_K_M.gguf --tokenizer baked/ --data texts.jsonl --out cal/

        so8tqc calibrate q5.gguf --tokenizer baked/ --reference f16.gguf --apply norm --out cal/
    """
    from so8tqc.config import CalibrateConfig
    from so8tqc.services.calibrate.service import calibrate as service

    flags = given(
        gguf=gguf,
        tokenizer=tokenizer,
        out=out,
        data=data,
        chat=chat,
        images=images,
        objective=objective,
        reference=reference,
        apply=apply,
        allow_small=allow_small,
        png=png,
        stream=stream,
    )
    run_stage(
        service,
        configure(CalibrateConfig, flags, config, set_),
        Output(json, quiet),
    )

"""so8tqc quantize"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    ConfigOption,
    JsonOption,
    QuietOption,
    SetOption,
    ThreadsOption,
    given,
)
from so8tqc.cli.stage import Output, configure, run_stage


def quantize(
    gguf: Annotated[Path, typer.Argument(help="Unquantized GGUF (F16, BF16, F32).")],
    out: Annotated[Path, typer.Option(help="Directory for the quantized files.")],
    type_: Annotated[
        list[str] | None,
        typer.Option("--type", help="Type, e.g. Q5_K_M; repeatable.", show_default=False),
    ] = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a GGUF with libllama, and read every file back.

    Examples:

        so8tqc quantize model-F16.gguf --type Q8_0 --type Q5_K_M --out quantized/
    """
    from so8tqc.config import QuantizeConfig
    from so8tqc.services.quantize import quantize as service

    flags = given(gguf=gguf, out=out, types=type_, threads=threads)
    run_stage(
        service,
        configure(QuantizeConfig, flags, config, set_),
        Output(json, quiet),
        lambda c: c.out / "record.json",
    )

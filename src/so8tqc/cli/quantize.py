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
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            help="Type of the tensors whose name has a regular expression; repeatable.",
            show_default=False,
        ),
    ] = None,
    output_tensor_type: Annotated[
        str | None, typer.Option(help="Type of the output head.", show_default=False)
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(help="Type of the token embedding.", show_default=False)
    ] = None,
    pure: Annotated[
        bool, typer.Option("--pure", help="One type for all matrices instead of a mixture.")
    ] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept an input that is quantized.")
    ] = False,
    imatrix: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|auto",
            help="Importance matrix (.gguf, .dat), or auto: computed from calibration text.",
            show_default=False,
        ),
    ] = None,
    imatrix_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Calibration text for --imatrix auto; repeatable. Keep it apart from the text "
            "that judges.",
            show_default=False,
        ),
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

        so8tqc quantize model-F16.gguf --type IQ2_M --imatrix auto --out quantized/

        so8tqc quantize model-F16.gguf --type Q4_K_M --tensor-type 'attn_(v|output)=Q8_0' --out q/
    """
    from so8tqc.config import QuantizeConfig
    from so8tqc.services.quantize import quantize as service

    flags = given(
        gguf=gguf, out=out, types=type_, tensor_types=tensor_type,
        output_tensor_type=output_tensor_type, token_embedding_type=token_embedding_type,
        pure=pure or None, allow_requantize=allow_requantize or None, imatrix=imatrix,
        imatrix_data=imatrix_data, threads=threads,
    )  # fmt: skip
    run_stage(
        service,
        configure(QuantizeConfig, flags, config, set_),
        Output(json, quiet),
        lambda c: c.out / "record.json",
    )

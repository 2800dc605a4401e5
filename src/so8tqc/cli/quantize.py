"""so8tqc quantize"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    BaseOption,
    ConfigOption,
    JsonOption,
    QuietOption,
    RotationsOption,
    SetOption,
    ThreadsOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_reported_stage, run_stage


@reads_rotations
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
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare the files in quality and speed; recommend one."),
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Find the smallest file with at most this mean KL.", show_default=False),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            help="… that keeps this share of the reference's top tokens.", show_default=False
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="… of at most this size, e.g. 120MB; alone: the best file of that size.",
            show_default=False,
        ),
    ] = None,
    judge_by: Annotated[
        str | None,
        typer.Option(
            help="What must keep the budget: value (default), or the whole 95 % interval.",
            show_default=False,
        ),
    ] = None,
    max_evaluations: Annotated[
        int | None,
        typer.Option(help="Files evaluated at most; 24 if left out.", show_default=False),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Compare with: directory, capture or GGUF; the input if left out."),
    ] = None,
    base: BaseOption = None,
    rotations: RotationsOption = None,
    rotation_options: Mapping[str, object] = NOTHING,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to compare on, or builtin:validation (default); repeatable.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Model directory with the tokenizer, if the reference has none."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens used of each text; 256 if left out.", show_default=False),
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

        so8tqc quantize model-F16.gguf --compare --reference model/ --rotations gates.pt --out q/

        so8tqc quantize model-F16.gguf --max-kl 0.05 --reference model/ --out q/
    """
    from so8tqc.config import ChooseConfig, QuantizeConfig
    from so8tqc.errors import ConfigError
    from so8tqc.services.choose.service import choose
    from so8tqc.services.quantize.service import quantize as service

    flags = given(
        gguf=gguf, out=out, types=type_, tensor_types=tensor_type,
        output_tensor_type=output_tensor_type, token_embedding_type=token_embedding_type,
        pure=pure or None, allow_requantize=allow_requantize or None, imatrix=imatrix,
        imatrix_data=imatrix_data, threads=threads,
    )  # fmt: skip
    budget = given(max_kl=max_kl, min_top1=min_top1, max_size=max_size)
    judging = given(
        judge_by=judge_by, max_evaluations=max_evaluations, reference=reference, base=base,
        rotations=rotations, rotation_options=rotation_options, data=data, tokenizer=tokenizer,
        max_tokens=max_tokens,
    )  # fmt: skip
    if compare or budget:
        chosen = configure(ChooseConfig, {**flags, **budget, **judging}, config, set_)
        run_reported_stage(choose, chosen, chosen.out, Output(json, quiet), "report.html")
        return
    if judging:
        raise ConfigError(
            f"{', '.join(sorted(judging))}: for a comparison only",
            remedy="Add --compare, or a budget such as --max-kl 0.05.",
        )
    run_stage(
        service,
        configure(QuantizeConfig, flags, config, set_),
        Output(json, quiet),
    )

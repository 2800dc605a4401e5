"""so8tqc choose"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    AllowRequantizeOption,
    BaseOption,
    ComputeDtypeOption,
    ConfigOption,
    CtxOption,
    DataOption,
    DeviceMapOption,
    ExportedFromOption,
    HessianDataOption,
    HessiansOption,
    HessianTokensOption,
    ImagesOption,
    ImatrixDataOption,
    ImatrixOption,
    JsonOption,
    MaxTokensOption,
    OutputTensorTypeOption,
    PureOption,
    QuietOption,
    RotationsOption,
    SetOption,
    SolverOption,
    StrideOption,
    TensorTypesOption,
    ThreadsOption,
    TokenEmbeddingTypeOption,
    TokenizerOption,
    TypesOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_reported_stage


@reads_rotations
def choose(
    gguf: Annotated[Path, typer.Argument(help="Unquantized GGUF (F16, BF16, F32).")],
    out: Annotated[Path, typer.Option(help="Directory for the files, the record and reports.")],
    types: TypesOption = None,
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
    data: DataOption = None,
    tokenizer: TokenizerOption = None,
    ctx: CtxOption = None,
    stride: StrideOption = None,
    max_tokens: MaxTokensOption = None,
    images: ImagesOption = None,
    compute_dtype: ComputeDtypeOption = None,
    device_map: DeviceMapOption = None,
    tensor_types: TensorTypesOption = None,
    output_tensor_type: OutputTensorTypeOption = None,
    token_embedding_type: TokenEmbeddingTypeOption = None,
    pure: PureOption = False,
    allow_requantize: AllowRequantizeOption = False,
    imatrix: ImatrixOption = None,
    imatrix_data: ImatrixDataOption = None,
    solver: SolverOption = None,
    model: ExportedFromOption = None,
    hessians: HessiansOption = None,
    hessian_data: HessianDataOption = None,
    hessian_tokens: HessianTokensOption = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Which quantization is good enough: measure several in one pass, recommend one.

    With a budget (--max-kl, --min-top1, --max-size) the smallest file that keeps it is searched
    for, mixtures of types included.

    Examples:

        so8tqc choose model-F16.gguf --reference model/ --rotations g.safetensors --out q/

        so8tqc choose model-F16.gguf --type Q4_K_M --type Q6_K --reference model/ --out q/

        so8tqc choose model-F16.gguf --max-kl 0.05 --reference model/ --out q/

        so8tqc choose model-F16.gguf --max-kl 0.05 --solver hessian --model model/ --out q/
    """
    flags = given(
        gguf=gguf,
        out=out,
        types=types,
        max_kl=max_kl,
        min_top1=min_top1,
        max_size=max_size,
        judge_by=judge_by,
        max_evaluations=max_evaluations,
        reference=reference,
        base=base,
        rotations=rotations,
        rotation_options=rotation_options,
        data=data,
        tokenizer=tokenizer,
        ctx=ctx,
        stride=stride,
        max_tokens=max_tokens,
        images=images,
        compute_dtype=compute_dtype,
        device_map=device_map,
        tensor_types=tensor_types,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        pure=pure or None,
        allow_requantize=allow_requantize or None,
        imatrix=imatrix,
        imatrix_data=imatrix_data,
        solver=solver,
        model=model,
        hessians=hessians,
        hessian_data=hessian_data,
        hessian_tokens=hessian_tokens,
        threads=threads,
    )
    run_choose(flags, config, set_, Output(json, quiet))


def run_choose(
    flags: Mapping[str, object], config: Path | None, set_: list[str] | None, output: Output
) -> None:
    """Choose with these flags, show the result and exit."""
    from so8tqc.config import ChooseConfig
    from so8tqc.services.choose.service import choose as service

    options = configure(ChooseConfig, flags, config, set_)
    run_reported_stage(service, options, options.out, output, "report.html")

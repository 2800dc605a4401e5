"""so8tqc quantize"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.commands.choose import choose, run_choose
from so8tqc.cli.options import (
    NOTHING,
    AllowRequantizeOption,
    ConfigOption,
    ExportedFromOption,
    HessianDataOption,
    HessiansOption,
    HessianTokensOption,
    ImatrixDataOption,
    ImatrixOption,
    JsonOption,
    OutputTensorTypeOption,
    PureOption,
    QuietOption,
    SetOption,
    SolverOption,
    TensorTypesOption,
    ThreadsOption,
    TokenEmbeddingTypeOption,
    TypesOption,
    given,
    hidden,
    in_place_of,
)
from so8tqc.cli.stage import Output, configure, run_stage

_OWN = (
    "gguf",
    "out",
    "types",
    "tensor_types",
    "output_tensor_type",
    "token_embedding_type",
    "pure",
    "allow_requantize",
    "imatrix",
    "imatrix_data",
    "solver",
    "model",
    "hessians",
    "hessian_data",
    "hessian_tokens",
    "max_size",
    "threads",
    "config",
    "set_",
    "json",
    "quiet",
)
_BUDGET = ("max_kl", "min_top1", "max_size")
_Compare = Annotated[bool | None, typer.Option("--compare", hidden=True)]


@in_place_of("comparison", {"compare": _Compare, **hidden(choose, without=_OWN)})
def quantize(
    gguf: Annotated[Path, typer.Argument(help="Unquantized GGUF (F16, BF16, F32).")],
    out: Annotated[Path, typer.Option(help="Directory for the quantized files.")],
    types: TypesOption = None,
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
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --solver hessian: bytes of the file, e.g. 100MB; the type of each tensor is "
            "chosen so that it loses least.",
        ),
    ] = None,
    comparison: Mapping[str, object] = NOTHING,
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

        so8tqc quantize model-F16.gguf --type Q4_K_M --solver hessian --model baked/ --out q/

        so8tqc quantize model-F16.gguf --max-size 100MB --solver hessian --model baked/ --out q/

        so8tqc quantize model-F16.gguf --type Q4_K_M --tensor-type 'attn_(v|output)=Q8_0' --out q/
    """
    from so8tqc.config import QuantizeConfig
    from so8tqc.services.quantize.service import quantize as service

    flags = given(
        gguf=gguf,
        out=out,
        types=types,
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
    output = Output(json, quiet)
    size = given(max_size=max_size)
    made = None if comparison else configure(QuantizeConfig, {**flags, **size}, config, set_)
    if made is None or (size and not made.chooses_types):
        _as_before(flags, {**comparison, **size}, config, set_, output)
        return
    run_stage(service, made, output)


def _as_before(
    flags: Mapping[str, object],
    comparison: Mapping[str, object],
    config: Path | None,
    set_: list[str] | None,
    output: Output,
) -> None:
    """``quantize --compare`` and its budgets, which are ``choose``: for one release."""
    from so8tqc.errors import ConfigError

    judging = {name: value for name, value in comparison.items() if name != "compare"}
    if "compare" not in comparison and not judging.keys() & set(_BUDGET):
        raise ConfigError(
            f"{', '.join(sorted(judging))}: for a comparison only",
            remedy="Add --compare; better, use so8tqc choose, which this has become.",
        )
    typer.echo(
        "quantize --compare is so8tqc choose, with the same options; the next release has only "
        "the latter.",
        err=True,
    )
    run_choose({**flags, **judging}, config, set_, output)

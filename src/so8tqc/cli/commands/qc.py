"""so8tqc qc"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    BaseOption,
    ChatOption,
    ComputeDtypeOption,
    ConfigOption,
    CtxOption,
    DataOption,
    DeviceMapOption,
    ImagesOption,
    JsonOption,
    MaxTokensOption,
    QuietOption,
    RotationsOption,
    SetOption,
    StreamOption,
    StrideOption,
    ThreadsOption,
    TokenizerOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_reported_stage


@reads_rotations
def qc(
    reference: Annotated[
        Path, typer.Option(help="The model we trust: directory, GGUF or capture.")
    ],
    candidate: Annotated[list[Path], typer.Option(help="Model under test; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for record and reports.")],
    rotations: RotationsOption = None,
    base: BaseOption = None,
    rotation_options: Mapping[str, object] = NOTHING,
    data: DataOption = None,
    tokenizer: TokenizerOption = None,
    chat: ChatOption = None,
    profile: Annotated[
        str | None,
        typer.Option(help="default, strict, or FILE.yaml[:NAME].", show_default=False),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="full (default), or files: no model is run.", show_default=False),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="native (default): every token is scored; llama-perplexity: the tokens that "
            "tool scores.",
            show_default=False,
        ),
    ] = None,
    ctx: CtxOption = None,
    stride: StrideOption = None,
    max_tokens: MaxTokensOption = None,
    images: ImagesOption = None,
    compute_dtype: ComputeDtypeOption = None,
    device_map: DeviceMapOption = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHECK",
            show_default=False,
            help="Only these checks count for the verdict, e.g. 'kl.*'; repeatable.",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHECK",
            show_default=False,
            help="These checks do not count for the verdict; repeatable.",
        ),
    ] = None,
    mmproj: Annotated[
        Path | None,
        typer.Option(help="File of the vision tower beside the GGUF candidates, judged, too."),
    ] = None,
    save_recovered: Annotated[
        Path | None,
        typer.Option(help="Write the rotations recovered from the candidate as a gate file."),
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            metavar="nf4|fp4|int8|DIR",
            help="Quantized base that the adapters were trained on: the reference runs on it.",
            show_default=False,
        ),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(
            metavar="WIDTH",
            show_default=False,
            help="Take texts until the intervals of the mean KL are so narrow, nats.",
        ),
    ] = None,
    kv_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="f16|q8_0|q4_0",
            show_default=False,
            help="Also run each GGUF candidate with such a cache; repeatable.",
        ),
    ] = None,
    threads: ThreadsOption = None,
    stream: StreamOption = None,
    gguf_reading: Annotated[
        str | None,
        typer.Option(
            metavar="libllama|weights|both",
            show_default=False,
            help="How GGUF files are run: by libllama, or their weights by transformers; default: "
            "both with --stream, weights where a file does not fit into memory, else libllama.",
        ),
    ] = None,
    quantization_floor: Annotated[
        bool | None,
        typer.Option(
            "--quantization-floor/--no-quantization-floor",
            show_default=False,
            help="Run what an honest encoder makes in the same types beside each quantized file "
            "(default).",
        ),
    ] = None,
    evaluation_cache: Annotated[
        bool | None,
        typer.Option(
            "--evaluation-cache/--no-evaluation-cache",
            show_default=False,
            help="Take from the user's cache what an earlier call computed from the same bytes and "
            "tokens, and keep there what is computed (default).",
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Judge candidates against a reference: structure, algebra, logits, KL, calibration.

    Examples:

        so8tqc qc --reference model/ --rotations gates.safetensors --candidate baked/ --out qc/

        so8tqc qc --reference model/ --rotations gates.safetensors --candidate baked/
          --candidate model-Q5_K_M.gguf --data texts.jsonl --out qc/

        so8tqc qc --reference model/ --rotations lora/ --candidate merged/ --out qc/

        so8tqc qc --reference ref.safetensors --candidate model-Q5_K_M.gguf --out qc/

        so8tqc qc --reference m/ --rotations g.safetensors --candidate baked/ --level files --out q/

        so8tqc qc --reference model-F16.gguf --candidate model-Q8_0.gguf --data wiki.txt
          --protocol llama-perplexity --ctx 512 --out qc/

        so8tqc qc --reference model/ --candidate q5.gguf --kv-type q8_0 --until 0.002 --out qc/

        so8tqc qc --reference model/ --candidate q5.gguf --chat --data chats.jsonl --out qc/

        so8tqc qc --reference model/ --candidate foreign/ --level files
          --save-recovered found.safetensors --out qc/
    """
    from so8tqc.config import QCConfig
    from so8tqc.services.qc.service import qc as service

    flags = given(
        rotation_options=rotation_options,
        reference=reference,
        base=base,
        candidates=candidate,
        out=out,
        rotations=rotations,
        data=data,
        tokenizer=tokenizer,
        chat=chat,
        profile=profile,
        level=level,
        protocol=protocol,
        ctx=ctx,
        stride=stride,
        max_tokens=max_tokens,
        images=images,
        mmproj=mmproj,
        threads=threads,
        fail_on=fail_on,
        allow=allow,
        compute_dtype=compute_dtype,
        device_map=device_map,
        save_recovered=save_recovered,
        trained_on=trained_on,
        until=until,
        kv_types=kv_type,
        stream=stream,
        gguf_reading=gguf_reading,
        quantization_floor=quantization_floor,
        evaluation_cache=evaluation_cache,
    )
    options = configure(QCConfig, flags, config, set_)
    run_reported_stage(service, options, options.out, Output(json, quiet), "report.html")

"""so8tqc capture"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from so8tqc.cli.options import (
    NOTHING,
    ChatOption,
    ConfigOption,
    ImagesOption,
    JsonOption,
    QuietOption,
    SetOption,
    StreamOption,
    ThreadsOption,
    given,
    reads_rotations,
)
from so8tqc.cli.stage import Output, configure, run_single_output


@reads_rotations
def capture(
    model: Annotated[Path, typer.Argument(help="Model to record: directory or GGUF.")],
    out: Annotated[Path, typer.Option(help="Capture to write, NAME.safetensors.")],
    rotations: Annotated[
        Path | None,
        typer.Option(help="Rotations: the gated model is recorded."),
    ] = None,
    rotation_options: Mapping[str, object] = NOTHING,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, or builtin:validation (default); repeatable.", show_default=False
        ),
    ] = None,
    chat: ChatOption = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Model directory with the tokenizer, if the model is a GGUF file."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 (default), or float16: half the size.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens recorded of each text.", show_default=False),
    ] = None,
    images: ImagesOption = None,
    threads: ThreadsOption = None,
    stream: StreamOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Record token ids and logits of a model, as a reference for qc.

    Examples:

        so8tqc capture model/ --rotations gates.safetensors --data texts.jsonl --out ref.safetensors

        so8tqc qc --reference ref.safetensors --candidate model-Q5_K_M.gguf --out qc/
    """
    from so8tqc.config import CaptureConfig
    from so8tqc.services.capture import capture as service

    flags = given(
        rotation_options=rotation_options,
        model=model,
        out=out,
        rotations=rotations,
        data=data,
        chat=chat,
        tokenizer=tokenizer,
        dtype=dtype,
        max_tokens=max_tokens,
        images=images,
        threads=threads,
        stream=stream,
    )
    run_single_output(
        service,
        configure(CaptureConfig, flags, config, set_),
        Output(json, quiet),
    )

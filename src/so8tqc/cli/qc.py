"""so8tqc qc"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from so8tqc.cli.options import (
    ConfigOption,
    ConventionOption,
    JsonOption,
    LayersOption,
    OrthogonalizeOption,
    ParametrizationOption,
    QuietOption,
    SetOption,
    SiteOption,
    ThreadsOption,
    given,
)
from so8tqc.cli.stage import Output, configure, finish


def qc(
    reference: Annotated[Path, typer.Option(help="The model we trust: directory or GGUF.")],
    candidate: Annotated[list[Path], typer.Option(help="Model under test; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for record and reports.")],
    rotations: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Rotations: the reference is then the gated model."),
    ] = None,
    convention: ConventionOption = None,
    parametrization: ParametrizationOption = None,
    site: SiteOption = None,
    layers: LayersOption = None,
    orthogonalize: OrthogonalizeOption = None,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Text file, or builtin:validation (default); repeatable.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Model directory with the tokenizer, if all models are GGUF files."),
    ] = None,
    profile: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="default, strict, or FILE.yaml[:NAME].", show_default=False),
    ] = None,
    level: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="full (default), or files: no model is run.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens used of each text.", show_default=False),
    ] = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Judge candidates against a reference: structure, algebra, logits, KL, calibration.

    Examples:

        so8tqc qc --reference model/ --rotations gates.safetensors --candidate baked/ --out qc/

        so8tqc qc --reference model/ --rotations gates.pt --candidate baked/
          --candidate model-Q5_K_M.gguf --data texts.jsonl --out qc/

        so8tqc qc --reference model/ --rotations gates.pt --candidate baked/ --level files --out qc/
    """
    from so8tqc.artifacts import write_record
    from so8tqc.cli.terminal import terminal_progress
    from so8tqc.config import QCConfig
    from so8tqc.services.qc import qc as service
    from so8tqc.services.report import write_stage_reports

    rotation_options = given(
        convention=convention, parametrization=parametrization, site=site, layers=layers,
        orthogonalize=orthogonalize,
    )  # fmt: skip
    flags = given(
        reference=reference, candidates=candidate, out=out, rotations=rotations, data=data,
        tokenizer=tokenizer, profile=profile, level=level, max_tokens=max_tokens, threads=threads,
    )  # fmt: skip
    if rotation_options:
        flags["rotation_options"] = rotation_options
    options = configure(QCConfig, flags, config, set_)
    with terminal_progress(quiet=quiet) as progress:
        record = service(options, progress)
    write_record(options.out / "record.json", record)
    write_stage_reports(record, options.out)
    finish(record, Output(json, quiet), options.out / "report.html")

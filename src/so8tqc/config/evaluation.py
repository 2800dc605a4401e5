"""What every command shares that evaluates models on texts: the reference, windows, arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from so8tqc.options import Options
from so8tqc.rotations.options import RotationOptions

QUALITY_TEXTS = "builtin:validation"
PICTURES = "builtin:images"
"""Pictures drawn by a script of this project, with passages about them."""

QUICK_TEXTS = "builtin:validation-quick"

IMAGES_HELP = "Pictures used of the data at most; of the texts with pictures the first ones."


class EvaluationOptions(Options):
    """Which tokens are scored, in which arithmetic, and how intervals are drawn."""

    seed: int = 0
    resamples: Annotated[int, Field(ge=100)] = 2000
    ctx: int | None = Field(None, ge=8, description="Window length, tokens.")
    stride: int | None = Field(
        None, ge=1, description="Tokens from one window to the next; default half of ctx."
    )
    max_tokens: int | None = Field(
        None, ge=2, description="Tokens used of each text; default 256, or all if there is a ctx."
    )
    chat: bool = Field(
        False,
        description="The data are conversations: rendered through the tokenizer's chat template, "
        "and scored on the answers alone.",
    )
    images: int | None = Field(None, ge=0, description=IMAGES_HELP)
    threads: int | None = Field(None, ge=1)
    compute_dtype: Literal["float32", "float64", "bfloat16"] | None = Field(
        None, description="What transformers computes in; default float32, on a GPU bfloat16."
    )
    device_map: Literal["auto"] | None = Field(
        None, description="auto: spread a model over GPUs, memory and disk with accelerate."
    )

    @model_validator(mode="after")
    def _windows_make_sense(self) -> EvaluationOptions:
        if self.stride is not None and (self.ctx is None or self.stride >= self.ctx):
            raise ValueError("stride needs a longer ctx: a window keeps ctx − stride tokens")
        return self


class StreamOptions(Options):
    """Models that memory cannot hold."""

    stream: bool | None = Field(
        None,
        description="Run transformers models a layer at a time; default: where the free memory "
        "would not suffice.",
    )


class ReferenceOptions(Options):
    """What the reference is beside its model, and the texts."""

    base: Path | None = Field(
        None, description="What the rotations are applied to, if the reference is a capture."
    )
    rotations: Path | None = None
    rotation_options: RotationOptions = RotationOptions()
    trained_on: str | None = Field(
        None,
        description="The quantized base that the adapters were trained on: nf4, fp4, int8 "
        "(bitsandbytes, quantized again), or a directory of quantized weights. The reference runs "
        "on it.",
    )
    data: tuple[str, ...] = (QUALITY_TEXTS,)
    tokenizer: Path | None = None

"""The demo: the whole pipeline on SmolLM2-135M with the gates that come along."""

from __future__ import annotations

from pathlib import Path

from so8tqc.config import (
    ChoiceOptions,
    LongTextOptions,
    QCOptions,
    QuantizeOptions,
    RunConfig,
)
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.options import RotationOptions
from so8tqc.sources.inputs.builtin import DEMO_MODEL, DEMO_ROTATIONS

DEMO_OUT = Path("out/demo")


def demo_config(out: Path | None = None) -> RunConfig:
    """The pipeline of ``configs/demo.yaml``, without a file (a test keeps the two equal)."""
    return RunConfig(
        name="smollm2-135m",
        base=DEMO_MODEL,
        rotations=DEMO_ROTATIONS,
        rotation_options=RotationOptions(
            parametrization=Parametrization.EXP, convention=Convention.COLUMN, site=Site.INPUT
        ),
        out=out or DEMO_OUT,
        quantize=QuantizeOptions(types=("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")),
        calibrate_type="Q5_K_M",
        qc=QCOptions(max_tokens=256),
        choose=ChoiceOptions(repeats=3),
        longtext=LongTextOptions(min_tokens=2048, max_new_tokens=128),
    )

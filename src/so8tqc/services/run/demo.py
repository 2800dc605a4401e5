"""The demo: the whole pipeline on SmolLM2-135M with the gates that come along, quick or in full."""

from __future__ import annotations

from pathlib import Path

from so8tqc.config import (
    QUICK_LONG_TEXTS,
    QUICK_TEXTS,
    CalibrateOptions,
    ChoiceOptions,
    LongTextOptions,
    QCOptions,
    QuantizeOptions,
    RunConfig,
)
from so8tqc.reports.language import message
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.options import RotationOptions
from so8tqc.sources.inputs.builtin import DEMO_MODEL, DEMO_ROTATIONS

DEMO_OUT = Path("out/demo")

_JUDGING_SHARE = 0.7
"""Of ten texts: three fit the one number that a temperature is; its gain is judged on seven, since
the interval of a gain is over texts."""

_OF_THE_QUICK_ONE = message(
    "This is the quick demo. The full one, so8tqc demo --full, adds two quantizations (Q4_K_M, "
    "Q6_K), 15 short and two long texts, and with them narrower intervals and a choice among four "
    "files."
)


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


def quick_demo_config(out: Path | None = None) -> RunConfig:
    """The pipeline of ``configs/demo-quick.yaml``: the same stages over less of everything."""
    full = demo_config(out)
    changes: dict[str, object] = {
        "data": (QUICK_TEXTS,),
        "long_data": (QUICK_LONG_TEXTS,),
        "quantize": QuantizeOptions(types=("Q5_K_M", "Q8_0")),
        "calibrate": CalibrateOptions(holdout=_JUDGING_SHARE),
        "choose": ChoiceOptions(repeats=1),
        "longtext": LongTextOptions(min_tokens=2048, max_new_tokens=64),
        "note": _OF_THE_QUICK_ONE,
    }
    return RunConfig.model_validate({**dict(full), **changes})

"""A run directory that a real pipeline on a tiny model has left, for whoever renders it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from so8tqc.config import (
    CalibrateOptions,
    ExportOptions,
    LongTextOptions,
    QCOptions,
    QuantizeOptions,
    RunConfig,
)
from so8tqc.llama.vendor import is_vendored
from so8tqc.resources import package_file
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.run.pipeline import run

LAYERS, BLOCKS = 3, 8


@pytest.fixture(scope="session")
def real_run(make_model: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage once: bake, export, quantize, calibrate, qc, choose, longtext, report."""
    pytest.importorskip("llama_cpp")
    if not is_vendored():
        pytest.skip("the converter is not here: so8tqc vendor")
    folder = tmp_path_factory.mktemp("run")
    gates = folder / "gates.safetensors"
    generator = np.random.default_rng(0)
    write_native(
        gates,
        {Target(i): generator.normal(size=(BLOCKS, 8, 8)) * 0.3 for i in range(LAYERS)},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    root = Path(__file__).parents[2] / "data"
    texts = json.loads((root / "validation_en.json").read_text(encoding="utf-8"))["texts"]
    data = folder / "texts.jsonl"
    lines = [json.dumps({"id": f"t{i}", "text": text[:500]}) for i, text in enumerate(texts)]
    data.write_text("\n".join(lines), encoding="utf-8")
    profile = folder / "profile.yaml"  # a page shall have checks that failed
    lines = package_file("profiles.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    fixed = [x.replace("{target:", "{limit:") if x.startswith("    Q") else x for x in lines]
    profile.write_text("".join(fixed), encoding="utf-8")
    run(
        RunConfig(
            name="tiny",
            base=str(make_model("llama")),
            rotations=str(gates),  # type: ignore[operator]
            out=folder / "out",
            data=(str(data),),
            export=ExportOptions(type="f16"),
            quantize=QuantizeOptions(types=("Q4_K_M", "Q8_0")),
            calibrate_type="Q4_K_M",
            calibrate=CalibrateOptions(png=False, resamples=200, allow_small=True),
            qc=QCOptions(resamples=200, max_tokens=96, profile=str(profile)),
            longtext=LongTextOptions(min_tokens=384, max_new_tokens=40, png=False, resamples=200),
        )
    )
    return folder / "out"

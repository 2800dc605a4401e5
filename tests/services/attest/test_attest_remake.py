"""Links made again from their inputs and recorded parameters, wherever the inputs lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.checkpoints.provenance import read_provenance
from so8tqc.config import BakeConfig
from so8tqc.disk.digests import sha256_file
from so8tqc.errors import ModelError
from so8tqc.llama.build import Build
from so8tqc.progress import SILENT
from so8tqc.services.attest.remake import recorded_build, remake
from so8tqc.services.attest.statement import BASE, ROTATIONS, Digest, Link, Resource
from so8tqc.services.bake import bake

FOLDER = "bake/baked_model"


def resource(name: str) -> Resource:
    return Resource(name=name, digest=Digest(sha256="0" * 64))


def link(kind: str, *outputs: str, inputs: tuple[str, ...] = (), **parameters: object) -> Link:
    return Link.model_validate(
        {
            "name": kind,
            "kind": kind,
            "inputs": [resource(name) for name in inputs],
            "outputs": [resource(name) for name in outputs],
            "parameters": parameters,
            "verdict": "pass",
        }
    )


def test_a_bake_made_again_elsewhere_has_the_same_bytes(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    gates = make_gates(llama)
    config = BakeConfig(base=llama, rotations=gates, out=tmp_path / "first")
    bake(config)
    said = read_provenance(tmp_path / "first")
    assert said is not None
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(gates.read_bytes())
    options = config.model_dump(mode="json", exclude={"base", "rotations", "out", "verify"})
    names = ("base", "rotations", "versions", "created")
    parameters = {
        "model": FOLDER,
        "options": options,
        "said": {k: v for k, v in said.model_dump(mode="json").items() if k in names},
    }
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    made = remake(link("bake", **parameters), {BASE: llama, ROTATIONS: moved}, scratch, SILENT)
    first = [path for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(made) == len(first)
    for path in first:
        again = made[f"{FOLDER}/{path.relative_to(tmp_path / 'first').as_posix()}"]
        assert sha256_file(again) == sha256_file(path), path.name


def test_a_temperature_that_was_not_applied_makes_nothing(tmp_path: Path) -> None:
    measured = link("calibrate", "calibrate/temperature_config.json", inputs=("x.gguf",))
    assert remake(measured, {"x.gguf": tmp_path / "x.gguf"}, tmp_path, SILENT) == {}


def test_parameters_of_another_version_are_refused(tmp_path: Path) -> None:
    odd = link("quantize", "x-Q8_0.gguf", inputs=("x.gguf",), options="none")
    with pytest.raises(ModelError, match="not those of this version"):
        remake(odd, {"x.gguf": tmp_path / "x.gguf"}, tmp_path, SILENT)


def test_the_build_that_quantized_is_recorded() -> None:
    build = Build(version="0.3.36", libraries="1" * 64, cpu="AVX2")
    assert recorded_build(link("quantize", build=build.model_dump())) == build

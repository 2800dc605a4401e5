"""The doctor describes what it is given, and names the command that gets what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.config import BakeConfig
from so8tqc.errors import InputError
from so8tqc.services import doctor as module
from so8tqc.services.bake import bake
from so8tqc.services.doctor import Finding, describe, examine
from tiny_gguf import LAYERS, write_llama


def told(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.value for finding in findings}


def test_a_model_is_described_and_says_whether_it_was_baked(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    found = told(describe(llama))
    assert found["kind"] == "model directory, llama"
    assert found["layers"] == "3"
    assert "BF16" in found["tensors"]
    assert found["baked"] == "no so8tqc.json: not baked by so8tqc"
    bake(BakeConfig(base=llama, rotations=make_gates(llama), out=tmp_path / "baked"))
    assert "exp, column, 3 tensors" in told(describe(tmp_path / "baked"))["baked"]


def test_rotations_are_described_with_their_drift(
    llama: Path, make_gates: Callable[..., Path]
) -> None:
    found = told(describe(make_gates(llama)))
    assert found["kind"] == "rotations, exp, column, input"
    assert found["targets"].startswith("3, layers 0 to 2, blocks [8, 8, 8]")
    assert float(found["drift"].rpartition(" ")[2]) < 1e-12


def test_a_gguf_is_described(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    found = told(describe(path))
    assert found["kind"].startswith("GGUF, architecture llama")
    assert found["name"] == "tiny"
    assert found["tensors"].startswith(f"{3 + 9 * LAYERS}: F32")
    assert float(found["general.sampling.temp"]) == pytest.approx(0.7)
    assert "not known to be" in found["baked"]


def test_what_is_none_of_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        describe(tmp_path / "absent")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(InputError):
        describe(tmp_path / "x.txt")


def test_what_is_missing_names_the_command_that_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_version", lambda name: "absent")
    monkeypatch.setattr(module, "is_vendored", lambda: False)
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    found = {finding.name: finding for finding in examine()}
    assert found["packages"].ok is False
    assert found["png"] == Finding(
        "png", "kaleido is not installed", False, "pip install 'so8tqc[png]'"
    )
    assert found["libllama"].ok is False
    assert found["libllama"].remedy
    assert found["converter"].ok is False
    for finding in found.values():
        assert finding.ok is not True or not finding.remedy


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"kind": "l2", "strength": 0.5}', "kind=l2, strength=0.5"),
        ("none", "none"),
        ("[1, 2]", "[1, 2]"),
        (json.dumps("x"), '"x"'),
    ],
)
def test_metadata_is_shortened_without_losing_any(text: str, wanted: str) -> None:
    assert module._shorten(text) == wanted


def test_a_torchvision_of_another_torch_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its version alone says nothing: transformers' classes that see fail to import beside it."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    versions = {"torchvision": "0.28.0", "pillow": "13.0.0", "torch": "2.13.0"}
    monkeypatch.setattr(module, "_version", lambda name: versions[name])
    found = module._pictures()
    assert found.ok is False
    assert "0.28.0 does not load beside torch 2.13.0" in found.value
    assert "operator nms does not exist" in found.value
    (tmp_path / "torchvision.py").write_text("")
    assert module._pictures().ok

"""Sampling defaults that the converter could not write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.config import ExportConfig
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.generation_keys import FILE, mended
from so8tqc.llama.vendor import is_vendored
from so8tqc.services.export.service import export


def of(tmp_path: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / FILE).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "fit"),
    [
        ("top_k", 20.0, 20),
        ("top_k", "20", 20),
        ("top_k", 20.5, None),
        ("top_k", True, None),
        ("top_k", [20], None),
        ("top_k", 2**31, None),
        ("mirostat", 2.0, 2),
        ("penalty_last_n", "64.0", 64),
        ("temperature", "0.7", 0.7),
        ("temperature", "warm", None),
        ("temperature", 1e39, None),
        ("top_p", {"value": 1}, None),
        ("repetition_penalty", "1.1", 1.1),
        ("min_p", False, None),
        ("sequence", ["top_k"], None),
    ],
)
def test_a_value_of_another_type(key: str, value: object, fit: object, tmp_path: Path) -> None:
    found = mended(of(tmp_path, {key: value, "eos_token_id": [1, 2]}))
    assert found is not None
    assert found.values.get(key) == fit
    assert type(found.values.get(key)) is type(fit)
    assert found.values["eos_token_id"] == [1, 2]
    (told,) = found.notices
    assert f"{key} = {value!r}" in told
    assert ("was not given it" in told) is (fit is None)


def test_values_that_can_be_written_stay(tmp_path: Path) -> None:
    good = {"top_k": 20, "temperature": 1, "top_p": 0.9, "min_p": None, "do_sample": True}
    assert mended(of(tmp_path, good)) is None
    assert mended(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("content", ["[]", "3", "{", ""])
def test_what_is_no_object_is_told(content: str, tmp_path: Path) -> None:
    found = mended(of(tmp_path, content))
    assert found is not None
    assert found.values == {}
    assert FILE in found.notices[0]


def test_what_the_converter_does_not_open_is_not_read(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to("/dev/zero")
    assert mended(tmp_path) is None


@pytest.mark.skipif(not is_vendored(), reason="needs the vendored converter")
def test_the_converter_writes_the_mended_values(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Without the mending, gguf-py ends with struct.error: required argument is not an integer."""
    model = tmp_path / "model"
    shutil.copytree(make_model("llama", "float16"), model)
    before = of(model, {"top_k": 20.0, "temperature": "0.6", "top_p": "much", "eos_token_id": 2})
    text = (before / FILE).read_text()
    record = export(ExportConfig(model=model, out=tmp_path / "m.gguf"))
    assert record.verdict == "pass"
    fields = open_gguf(tmp_path / "m.gguf").fields
    assert fields["general.sampling.top_k"] == 20
    assert fields["general.sampling.temp"] == pytest.approx(0.6)
    assert "general.sampling.top_p" not in fields
    assert sum(FILE in notice for notice in record.notices) == 3
    assert (model / FILE).read_text() == text  # the model directory is not touched

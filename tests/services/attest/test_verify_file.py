"""Verify: a quantized file is made again; what is not what the recipe makes is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.config import QuantizeConfig, VerifyConfig
from so8tqc.errors import InputError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, changed_copy, rewrite
from so8tqc.record_files import write_record
from so8tqc.records import Record, Verdict
from so8tqc.services.attest import verify_file as module
from so8tqc.services.attest.verify_file import verify
from so8tqc.services.quantize.derivation import tensor_digests
from so8tqc.services.quantize.service import quantize
from tiny_gguf import write_llama

pytestmark = pytest.mark.llama
EDITED = "blk.1.attn_output.weight"


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A Q4_0 file, made from model-F16.gguf beside it, with its record."""
    return _quantized(write_llama(tmp_path / "model-F16.gguf", dtype=np.float16), tmp_path / "q")


def _quantized(source: Path, out: Path) -> Path:
    record = quantize(QuantizeConfig(gguf=source, out=out, types=("Q8_0", "Q4_0"), threads=1))
    write_record(out / "record.json", record)
    return out / "model-Q4_0.gguf"


def _place(path: Path, name: str) -> tuple[int, int]:
    tensor = next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == name)
    return int(tensor.data_offset), int(tensor.n_bytes)


def _edit(path: Path, name: str, offset: int, flip: int) -> None:
    data = bytearray(path.read_bytes())
    data[_place(path, name)[0] + offset] ^= flip
    path.write_bytes(data)


def _failed(record: Record) -> list[str]:
    return [check.id for check in record.checks if check.verdict is Verdict.FAIL]


def test_a_file_that_is_what_its_recipe_makes_passes(quantized: Path) -> None:
    record = verify(VerifyConfig(file=quantized))
    assert record.verdict is Verdict.PASS
    assert record.metrics["not_identical"] == {}
    assert record.metrics["tensors"]["identical"] == len(gguf.GGUFReader(str(quantized)).tensors)
    assert record.metrics["build"]["same"] is True
    assert [p.name for p in quantized.parent.iterdir() if "partial" in p.name] == []


def test_one_edited_block_is_named_with_its_tensor(quantized: Path) -> None:
    _edit(quantized, EDITED, 18 * 5 + 3, 0x01)  # the last bit of one weight of the sixth block
    record = verify(VerifyConfig(file=quantized))
    assert _failed(record) == ["derivation.record", "derivation.tensors"]
    assert record.metrics["not_identical"] == {EDITED: {"link": "different", "blocks": 1}}
    assert f"{EDITED} (1 block)" in record.check("derivation.tensors").detail


def test_a_forged_record_does_not_help(quantized: Path) -> None:
    """File and record edited alike: only making it again shows it."""
    _edit(quantized, EDITED, 40, 0x10)
    _recorded_as(quantized)
    record = verify(VerifyConfig(file=quantized))
    assert _failed(record) == ["derivation.tensors"]
    assert list(record.metrics["not_identical"]) == [EDITED]


@pytest.fixture
def unbaked(quantized: Path, tmp_path: Path) -> Path:
    """A Q4_0 file, with its record, of a model whose attention outputs are others."""
    other, source = tmp_path / "other" / "model-F16.gguf", tmp_path / "model-F16.gguf"
    other.parent.mkdir()
    generator = np.random.default_rng(5)
    tensors = gguf.GGUFReader(str(source)).tensors
    fresh = {
        t.name: generator.normal(size=t.data.shape).astype(np.float32)
        for t in tensors
        if "attn_output" in t.name
    }
    rewrite(source, other, {}, {n: lambda n=n: iter([fresh[n]]) for n in fresh})
    return _quantized(other, tmp_path / "other" / "q")


def test_a_file_of_the_unbaked_model_is_named_with_its_tensors(
    quantized: Path, unbaked: Path
) -> None:
    baked_record = quantized.parent / "record.json"
    swapped = verify(VerifyConfig(file=unbaked, record=baked_record))
    assert _failed(swapped) == ["derivation.record", "derivation.tensors"]
    assert sorted(swapped.metrics["not_identical"]) == [
        "blk.0.attn_output.weight",
        EDITED,
    ]


def test_another_input_than_the_recorded_one_is_named(
    quantized: Path, unbaked: Path, tmp_path: Path
) -> None:
    record = verify(VerifyConfig(file=unbaked, input=tmp_path / "model-F16.gguf"))
    assert _failed(record) == ["derivation.inputs", "derivation.tensors"]
    assert "gguf" in record.check("derivation.inputs").detail


def test_an_edited_key_is_named_and_a_calibration_is_not(quantized: Path, tmp_path: Path) -> None:
    record_path = quantized.parent / "record.json"
    calibrated = tmp_path / "c" / quantized.name
    changed_copy(quantized, calibrated, {CALIBRATION_TEMPERATURE: 1.1})
    assert verify(VerifyConfig(file=calibrated, record=record_path)).verdict is Verdict.PASS
    edited = tmp_path / "e" / quantized.name
    edited.parent.mkdir()
    rewrite(quantized, edited, {"general.name": "another"}, {})
    record = verify(VerifyConfig(file=edited, record=record_path))
    assert _failed(record) == ["derivation.metadata"]
    assert "general.name" in record.check("derivation.metadata").detail


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's build of libllama is another than the recorded one."""
    here = module.library_build()
    monkeypatch.setattr(
        module, "library_build", lambda: here.model_copy(update={"cpu": "CPU : NEON = 1"})
    )


def _recorded_as(path: Path) -> None:
    """Make the record say that these bytes are what was made."""
    record = path.parent / "record.json"
    content = json.loads(record.read_text())
    content["metrics"]["derivation"]["tensors"][path.name] = tensor_digests(open_gguf(path))
    record.write_text(json.dumps(content))


def _tie(path: Path, source: Path, name: str) -> int:
    """Offset of a byte of Q8_0 whose weight lies nearest the middle of two steps."""
    by_name = {t.name: t for t in gguf.GGUFReader(str(source)).tensors}
    weights = by_name[name].data.astype(np.float32).reshape(-1, 32)
    start, size = _place(path, name)
    blocks = np.frombuffer(path.read_bytes()[start : start + size], np.uint8).reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    steps = weights / scale
    distance = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
    block, weight = np.unravel_index(int(distance.argmin()), distance.shape)
    return int(block) * 34 + 2 + int(weight)


def _round_a_tie_otherwise(path: Path, source: Path) -> None:
    """Change the Q8_0 weight that lies nearest the middle of two steps to its other neighbour."""
    offset = _tie(path, source, EDITED)
    block, weight = offset // 34, offset % 34 - 2
    data = bytearray(path.read_bytes())
    at = _place(path, EDITED)[0] + offset
    scale = np.frombuffer(bytes(data[at - weight - 2 : at - weight]), np.float16)[0]
    tensors = {t.name: t for t in gguf.GGUFReader(str(source)).tensors}
    exact = tensors[EDITED].data.reshape(-1, 32)[block, weight] / np.float32(scale)
    stored = data[at] - 256 * (data[at] > 127)
    data[at] = (stored + (1 if exact > stored else -1)) % 256
    path.write_bytes(data)


@pytest.mark.usefixtures("elsewhere")
def test_another_build_may_round_a_tie_otherwise_and_this_is_said(
    quantized: Path, tmp_path: Path
) -> None:
    path = quantized.with_name("model-Q8_0.gguf")
    _round_a_tie_otherwise(path, tmp_path / "model-F16.gguf")
    unknown = verify(VerifyConfig(file=path))
    assert unknown.metrics["not_identical"] == {EDITED: {"link": "different", "blocks": 1}}
    _recorded_as(path)
    record = verify(VerifyConfig(file=path))
    assert record.verdict is Verdict.PASS
    assert record.metrics["not_identical"] == {EDITED: {"link": "within rounding", "blocks": 1}}
    assert record.check("derivation.identical").verdict is Verdict.SKIP
    assert "another build" in record.check("derivation.tensors").detail


@pytest.mark.usefixtures("elsewhere")
def test_another_build_excuses_no_edit(quantized: Path) -> None:
    path = quantized.with_name("model-Q8_0.gguf")
    _edit(path, EDITED, 10, 0x40)
    _recorded_as(path)
    record = verify(VerifyConfig(file=path))
    assert "derivation.tensors" in _failed(record)
    assert record.metrics["not_identical"][EDITED]["link"] == "different"


def _drop_derivation(content: dict) -> None:
    del content["metrics"]["derivation"]


def _other_kind(content: dict) -> None:
    content["kind"] = "export"


def _other_names(content: dict) -> None:
    tensors = content["metrics"]["derivation"]["tensors"]
    tensors["other.gguf"] = tensors.pop("model-Q4_0.gguf")


def _moved_input(content: dict) -> None:
    content["inputs"]["gguf"]["path"] = "gone.gguf"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop_derivation, "no digests of tensors"),
        (_other_kind, "a record of export"),
        (_other_names, r"knows no file model-Q4_0\.gguf"),
        (_moved_input, "--input"),
    ],
)
def test_a_record_that_does_not_serve_is_bad_input(
    change: Callable[[dict], None], says: str, quantized: Path
) -> None:
    path = quantized.parent / "record.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        verify(VerifyConfig(file=quantized))

"""Rewriting key-values: what is set is set, and every other byte stays."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.errors import ModelError, ShapeError, ToolError
from so8tqc.gguf import rewrite as gguf_rewrite
from so8tqc.gguf.rewrite import (
    CALIBRATION_TEMPERATURE,
    SAMPLING_TEMPERATURE,
    changed_copy,
    key_values,
    rewrite,
)
from tiny_gguf import VOCABULARY, WIDTH, write_llama

TEMPERATURE = 1.0810251044585526


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny.gguf")


def _values(path: Path) -> dict[str, object]:
    fields = gguf.GGUFReader(str(path)).fields
    return {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}


@pytest.mark.parametrize("big_endian", [False, True])
def test_adds_and_replaces_and_keeps_the_rest(tmp_path: Path, big_endian: bool) -> None:
    source = write_llama(tmp_path / "in.gguf", big_endian=big_endian)
    target = tmp_path / "new" / "out.gguf"
    before = source.read_bytes()
    changed_copy(
        source, target, {CALIBRATION_TEMPERATURE: TEMPERATURE, SAMPLING_TEMPERATURE: TEMPERATURE}
    )
    assert source.read_bytes() == before
    expected = _values(source) | {
        CALIBRATION_TEMPERATURE: float(np.float32(TEMPERATURE)),
        SAMPLING_TEMPERATURE: float(np.float32(TEMPERATURE)),
    }
    assert _values(target) == expected
    old, new = gguf.GGUFReader(str(source)), gguf.GGUFReader(str(target))
    assert new.data_offset % new.alignment == 0
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]
    # the whole data section, padding included
    assert target.read_bytes()[new.data_offset :] == before[old.data_offset :]


def test_untouched_values_keep_their_bytes(model: Path, tmp_path: Path) -> None:
    """Types, nested array types and order survive, which a re-encoding might not grant."""
    target = tmp_path / "out.gguf"
    changed_copy(model, target, {CALIBRATION_TEMPERATURE: 1.5})
    fields = list(gguf.GGUFReader(str(model)).fields.values())[3:]
    end = gguf.GGUFReader(str(model)).tensors[0].field.offset
    block = model.read_bytes()[fields[0].offset : end]
    assert target.read_bytes()[fields[0].offset :].startswith(block)


@pytest.mark.llama
def test_libllama_loads_it_and_computes_the_same(model: Path, tmp_path: Path) -> None:
    from so8tqc.sources.gguf import GGUFSource

    target = tmp_path / "out.gguf"
    changed_copy(model, target, {CALIBRATION_TEMPERATURE: 1.25, SAMPLING_TEMPERATURE: 1.25})
    tokens = np.arange(1, 40, dtype=np.int64)
    logits = []
    for path in (model, target):
        source = GGUFSource(path, path.name, threads=1)
        logits.append(np.concatenate([b.numpy().copy() for b in source.logits(tokens, 16)]))
        source.close()
    assert logits[0].shape == (39, VOCABULARY)
    assert np.array_equal(logits[0], logits[1])


def test_an_existing_file_is_replaced(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    changed_copy(model, target, {CALIBRATION_TEMPERATURE: 1.5})
    assert _values(target)[CALIBRATION_TEMPERATURE] == 1.5


def test_interrupted_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_rewrite, "_copy", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        changed_copy(model, out / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})
    assert list(out.iterdir()) == []


def test_refuses_its_own_source(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    with pytest.raises(ModelError, match="may not replace its source"):
        changed_copy(model, link, {CALIBRATION_TEMPERATURE: 1.5})


def test_refuses_a_model_of_which_parts_are_missing(tmp_path: Path) -> None:
    part = write_llama(tmp_path / "tiny-00001-of-00002.gguf", split=2)
    with pytest.raises(ModelError, match="files missing"):
        changed_copy(part, tmp_path / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})


def test_refuses_what_is_truncated(model: Path, tmp_path: Path) -> None:
    model.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="truncated"):
        changed_copy(model, tmp_path / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})
    assert not (tmp_path / "out.gguf").exists()


def test_refuses_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ToolError, match="free"):
        changed_copy(model, tmp_path / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})


def float_of(tensors: dict[str, np.ndarray], names: list[str], pieces: int = 3) -> dict:
    """Replacements that come in several pieces."""
    return {n: lambda n=n: iter(np.array_split(tensors[n].reshape(-1), pieces)) for n in names}


@pytest.mark.parametrize("big_endian", [False, True])
def test_replaced_tensors_are_float32_and_all_others_keep_their_bytes(
    tmp_path: Path, big_endian: bool
) -> None:
    source = write_llama(tmp_path / "in.gguf", big_endian=big_endian, dtype=np.float16)
    target = tmp_path / "out.gguf"
    generator = np.random.default_rng(7)
    new = {
        "blk.0.attn_output.weight": generator.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "output.weight": generator.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
    }
    rewrite(source, target, {}, float_of(new, list(new)))
    old = {t.name: t for t in gguf.GGUFReader(str(source)).tensors}
    tensors = gguf.GGUFReader(str(target)).tensors
    assert [t.name for t in tensors] == list(old)
    for tensor in tensors:
        if tensor.name in new:
            assert tensor.tensor_type is gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(tensor.data, new[tensor.name])
        else:
            assert tensor.tensor_type == old[tensor.name].tensor_type
            assert tensor.data.tobytes() == old[tensor.name].data.tobytes()
    assert _values(target) == _values(source)


def test_strings_and_booleans_are_values_too(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    values = {"so8t.baked": True, "so8t.site": "input", "so8t.長い": "", "general.name": "other"}
    rewrite(model, target, values, {})
    assert _values(target) == _values(model) | values
    raw = key_values(target)
    assert raw["so8t.baked"] == b"\x07\0\0\0\x01"  # type 7 is BOOL
    assert raw["so8t.site"] == b"\x08\0\0\0" + b"\x05\0\0\0\0\0\0\0" + b"input"
    assert {k: v for k, v in raw.items() if k not in values} == {
        k: v for k, v in key_values(model).items() if k != "general.name"
    }


def test_a_replacement_of_another_size_or_name_is_refused(model: Path, tmp_path: Path) -> None:
    short = {"output.weight": np.zeros(5, dtype=np.float32)}
    with pytest.raises(ShapeError, match=f"5 values for a tensor of {VOCABULARY * WIDTH}"):
        rewrite(model, tmp_path / "a.gguf", {}, float_of(short, list(short)))
    with pytest.raises(ModelError, match=r"no tensor output\.wait"):
        rewrite(model, tmp_path / "a.gguf", {}, {"output.wait": lambda: iter(())})


@pytest.mark.llama
def test_libllama_runs_a_file_of_mixed_precision(tmp_path: Path) -> None:
    """All matrices put back unrounded give the logits of the file that was never rounded."""
    from so8tqc.llama.isolated import first_logits

    exact, rounded = tmp_path / "exact.gguf", tmp_path / "rounded.gguf"
    write_llama(exact)
    write_llama(rounded, dtype=np.float16)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(str(exact)).tensors}
    matrices = [name for name, values in tensors.items() if values.ndim > 1]
    rewrite(rounded, tmp_path / "mixed.gguf", {}, float_of(tensors, matrices[:-3]))
    rewrite(rounded, tmp_path / "back.gguf", {}, float_of(tensors, matrices))
    tokens = np.arange(1, 40, dtype=np.int64)
    wanted = first_logits(exact, tokens)
    assert np.array_equal(first_logits(tmp_path / "back.gguf", tokens), wanted)
    mixed = np.abs(first_logits(tmp_path / "mixed.gguf", tokens) - wanted).max()
    assert 0 < mixed < np.abs(first_logits(rounded, tokens) - wanted).max()

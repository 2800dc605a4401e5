"""Rewriting key-values: what is set is set, and every other byte stays."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.errors import ModelError, ToolError
from so8tqc.llama import gguf_rewrite
from so8tqc.llama.gguf_rewrite import (
    CALIBRATION_TEMPERATURE,
    SAMPLING_TEMPERATURE,
    set_float_values,
)

VOCABULARY, WIDTH, HIDDEN, LAYERS = 96, 32, 64, 2
TEMPERATURE = 1.0810251044585526


def _write(path: Path, *, big_endian: bool = False, split: int = 0) -> Path:
    """A Llama of random weights without a tokenizer, which libllama can run."""
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(str(path), "llama", endianess=order)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    writer.add_float32(SAMPLING_TEMPERATURE, 0.7)
    writer.add_array("test.words", ["a", "", "長い"])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_bool("test.flag", True)
    if split:
        writer.add_uint16("split.count", split)
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> None:
        values = generator.normal(size=shape) * shape[-1] ** -0.5
        array = values.astype(np.float32) if len(shape) > 1 else np.ones(shape, np.float32)
        writer.add_tensor(name, array)

    weight("token_embd.weight", VOCABULARY, WIDTH)
    for i in range(LAYERS):
        weight(f"blk.{i}.attn_norm.weight", WIDTH)
        weight(f"blk.{i}.attn_q.weight", WIDTH, WIDTH)
        weight(f"blk.{i}.attn_k.weight", WIDTH // 2, WIDTH)
        weight(f"blk.{i}.attn_v.weight", WIDTH // 2, WIDTH)
        weight(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        weight(f"blk.{i}.ffn_norm.weight", WIDTH)
        weight(f"blk.{i}.ffn_gate.weight", HIDDEN, WIDTH)
        weight(f"blk.{i}.ffn_up.weight", HIDDEN, WIDTH)
        weight(f"blk.{i}.ffn_down.weight", WIDTH, HIDDEN)
    weight("output_norm.weight", WIDTH)
    weight("output.weight", VOCABULARY, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return _write(tmp_path / "tiny.gguf")


def _values(path: Path) -> dict[str, object]:
    fields = gguf.GGUFReader(str(path)).fields
    return {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}


@pytest.mark.parametrize("big_endian", [False, True])
def test_adds_and_replaces_and_keeps_the_rest(tmp_path: Path, big_endian: bool) -> None:
    source = _write(tmp_path / "in.gguf", big_endian=big_endian)
    target = tmp_path / "new" / "out.gguf"
    before = source.read_bytes()
    set_float_values(
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
    set_float_values(model, target, {CALIBRATION_TEMPERATURE: 1.5})
    fields = list(gguf.GGUFReader(str(model)).fields.values())[3:]
    end = gguf.GGUFReader(str(model)).tensors[0].field.offset
    block = model.read_bytes()[fields[0].offset : end]
    assert target.read_bytes()[fields[0].offset :].startswith(block)


@pytest.mark.llama
def test_libllama_loads_it_and_computes_the_same(model: Path, tmp_path: Path) -> None:
    from so8tqc.sources.gguf import GGUFSource

    target = tmp_path / "out.gguf"
    set_float_values(model, target, {CALIBRATION_TEMPERATURE: 1.25, SAMPLING_TEMPERATURE: 1.25})
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
    set_float_values(model, target, {CALIBRATION_TEMPERATURE: 1.5})
    assert _values(target)[CALIBRATION_TEMPERATURE] == 1.5


def test_interrupted_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_rewrite, "_copy", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        set_float_values(model, out / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})
    assert list(out.iterdir()) == []


def test_refuses_its_own_source(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    with pytest.raises(ModelError, match="may not replace its source"):
        set_float_values(model, link, {CALIBRATION_TEMPERATURE: 1.5})


def test_refuses_parts_of_a_split_model(tmp_path: Path) -> None:
    part = _write(tmp_path / "tiny-00001-of-00002.gguf", split=2)
    with pytest.raises(ModelError, match="split model"):
        set_float_values(part, tmp_path / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})


def test_refuses_what_is_truncated(model: Path, tmp_path: Path) -> None:
    model.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="truncated"):
        set_float_values(model, tmp_path / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})
    assert not (tmp_path / "out.gguf").exists()


def test_refuses_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ToolError, match="free"):
        set_float_values(model, tmp_path / "out.gguf", {CALIBRATION_TEMPERATURE: 1.5})

"""A temperature in the final norm: logits of the new file are z/T, all else stays."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.errors import ModelError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.norm import NORM_TEMPERATURE, require_scalable_norm, scale_norm
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, changed_copy

VOCABULARY, WIDTH, HIDDEN = 96, 32, 64
T = 1.37


def write_tiny(
    path: Path,
    *,
    architecture: str = "llama",
    cap: float | None = None,
    norm_type: type = np.float32,
    norm: bool = True,
    big_endian: bool = False,
) -> Path:
    """A one-layer model of random float32 weights, biases included, without a tokenizer.

    ``llama`` has an RMS norm and no biases; ``gpt2`` a layer norm with bias; ``phi2`` a bias on
    the output head too.
    """
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(str(path), architecture, endianess=order)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)

    def tensor(name: str, *shape: int, near: float = 0.0) -> None:
        scale = 0.3 if len(shape) == 1 else 2 * shape[-1] ** -0.5
        values = near + generator.normal(size=shape) * scale
        kind = norm_type if name == "output_norm.weight" else np.float32
        writer.add_tensor(name, values.astype(kind))

    def both(name: str, out: int, width: int) -> None:
        tensor(f"{name}.weight", out, width)
        tensor(f"{name}.bias", out)

    tensor("token_embd.weight", VOCABULARY, WIDTH)
    if norm:
        tensor("output_norm.weight", WIDTH, near=1.0)
    tensor("output.weight", VOCABULARY, WIDTH)
    tensor("blk.0.attn_norm.weight", WIDTH, near=1.0)
    if architecture == "llama":
        writer.add_layer_norm_rms_eps(1e-5)
        if cap is not None:
            writer.add_final_logit_softcapping(cap)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.0.{name}.weight", WIDTH, WIDTH)
        tensor("blk.0.ffn_norm.weight", WIDTH, near=1.0)
        tensor("blk.0.ffn_gate.weight", HIDDEN, WIDTH)
        tensor("blk.0.ffn_up.weight", HIDDEN, WIDTH)
        tensor("blk.0.ffn_down.weight", WIDTH, HIDDEN)
    else:
        writer.add_layer_norm_eps(1e-5)
        tensor("output_norm.bias", WIDTH)
        tensor("blk.0.attn_norm.bias", WIDTH)
        both("blk.0.attn_qkv", 3 * WIDTH, WIDTH)
        both("blk.0.attn_output", WIDTH, WIDTH)
        both("blk.0.ffn_up", HIDDEN, WIDTH)
        both("blk.0.ffn_down", WIDTH, HIDDEN)
    if architecture == "gpt2":
        tensor("position_embd.weight", 64, WIDTH)
        tensor("blk.0.ffn_norm.weight", WIDTH, near=1.0)
        tensor("blk.0.ffn_norm.bias", WIDTH)
    if architecture == "phi2":
        writer.add_rope_dimension_count(WIDTH // 4)
        tensor("output.bias", VOCABULARY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _logits(path: Path) -> np.ndarray:
    from so8tqc.sources.gguf import GGUFSource

    source = GGUFSource(path, path.name, threads=1)
    try:
        tokens = np.arange(1, 40, dtype=np.int64)
        return np.concatenate([block.numpy().copy() for block in source.logits(tokens, 64)])
    finally:
        source.close()


@pytest.mark.llama
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi2"])
@pytest.mark.parametrize("temperature", [0.5, T, 3.0])
def test_logits_are_divided_by_the_temperature(
    architecture: str, temperature: float, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "in.gguf", architecture=architecture)
    scale_norm(source, tmp_path / "out.gguf", temperature)
    before, after = _logits(source), _logits(tmp_path / "out.gguf")
    assert before.std() > 0.5
    # float32 weights: the only rounding is that of g/T, W h and libllama's own sums
    np.testing.assert_allclose(after * temperature, before, atol=4e-6 * np.abs(before).max())


@pytest.mark.parametrize("big_endian", [False, True])
def test_only_the_norm_changes_and_the_file_says_so(tmp_path: Path, big_endian: bool) -> None:
    source = write_tiny(tmp_path / "in.gguf", architecture="phi2", big_endian=big_endian)
    bytes_before = source.read_bytes()
    scale_norm(source, tmp_path / "out.gguf", T)
    assert source.read_bytes() == bytes_before
    old, new = open_gguf(source), open_gguf(tmp_path / "out.gguf")
    for name, tensor in old.tensors.items():
        scaled = name in ("output_norm.weight", "output_norm.bias", "output.bias")
        exact = tensor.data.astype(np.float64) / (T if scaled else 1.0)
        assert np.array_equal(new.tensors[name].data, exact.astype(np.float32))
    added = {k: v for k, v in new.fields.items() if old.fields.get(k) != v}
    assert added.pop("GGUF.kv_count") == old.fields["GGUF.kv_count"] + 1
    assert added == {NORM_TEMPERATURE: pytest.approx(T)}


def test_a_second_temperature_multiplies_the_first(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "in.gguf")
    scale_norm(source, tmp_path / "once.gguf", T)
    scale_norm(tmp_path / "once.gguf", tmp_path / "twice.gguf", 1.1)
    fields = open_gguf(tmp_path / "twice.gguf").fields
    assert fields[NORM_TEMPERATURE] == pytest.approx(1.1 * T)


def test_a_temperature_left_to_the_reader_is_taken_back(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "in.gguf")
    changed_copy(source, tmp_path / "told.gguf", {CALIBRATION_TEMPERATURE: 1.3})
    scale_norm(tmp_path / "told.gguf", tmp_path / "out.gguf", T)
    assert open_gguf(tmp_path / "out.gguf").fields[CALIBRATION_TEMPERATURE] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 30.0}, r"soft-caps its logits, z = 30·tanh.* --apply metadata"),
        ({"norm": False}, r"no final norm to scale \(output_norm.weight\)"),
        ({"norm_type": np.float16}, "output_norm.weight is stored as F16; only F32"),
    ],
)
def test_what_cannot_be_scaled_is_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "in.gguf", **options)
    with pytest.raises(ModelError, match=message):
        scale_norm(source, tmp_path / "out.gguf", T)
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_a_cap_of_zero_caps_nothing(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "in.gguf", cap=0.0)
    require_scalable_norm(open_gguf(source))
    scale_norm(source, tmp_path / "out.gguf", T)
    assert (tmp_path / "out.gguf").stat().st_size >= source.stat().st_size


def test_its_own_source_is_not_replaced(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "in.gguf")
    before = source.read_bytes()
    (tmp_path / "link.gguf").symlink_to(source)
    with pytest.raises(ModelError, match="may not replace its source"):
        scale_norm(source, tmp_path / "link.gguf", T)
    assert source.read_bytes() == before

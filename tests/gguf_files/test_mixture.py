"""Files put together from two quantizations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from so8tqc.errors import ModelError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.mixture import differing_tensors, mix, mixture_bytes


def write(path: Path, kind: str, width: int = 64, seed: int = 0) -> Path:
    """Three matrices of a type, with key-values that a rewriting may lose."""
    import gguf
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("general.description", "")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "€"])
    type_ = GGMLQuantizationType[kind]
    for i, name in enumerate(("a.weight", "b.weight", "c.weight")):
        # odd row counts leave data that must be padded
        values = np.random.default_rng(seed + i).normal(size=(3 + i, width)).astype(np.float32)
        writer.add_tensor(name, quantize(values, type_), raw_dtype=type_)
    writer.add_tensor("norm.weight", np.ones(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_nothing_raised_is_the_lower_file_byte_by_byte(tmp_path: Path) -> None:
    low, high = (open_gguf(write(tmp_path / f"{k}.gguf", k)) for k in ("Q4_0", "Q8_0"))
    mix(low, high, (), tmp_path / "mixed.gguf")
    assert (tmp_path / "mixed.gguf").read_bytes() == low.path.read_bytes()


@pytest.mark.parametrize("raised", [{"b.weight"}, {"a.weight", "c.weight"}])
def test_raised_tensors_are_those_of_the_higher_file(raised: set[str], tmp_path: Path) -> None:
    low, high = (open_gguf(write(tmp_path / f"{k}.gguf", k)) for k in ("Q4_0", "Q8_0"))
    path = tmp_path / "mixed.gguf"
    mix(low, high, raised, path)
    mixed = open_gguf(path)
    assert list(mixed.tensors) == list(low.tensors)
    for name, tensor in mixed.tensors.items():
        expected = (high if name in raised else low).tensors[name]
        assert (tensor.type, tensor.shape) == (expected.type, expected.shape)
        np.testing.assert_array_equal(tensor.values(), expected.values())
    assert mixed.fields == low.fields
    assert set(differing_tensors(low.path, path)) == raised
    assert abs(mixture_bytes(low, high, raised) - path.stat().st_size) < 32 * 4


def test_other_models_are_refused(tmp_path: Path) -> None:
    low = open_gguf(write(tmp_path / "low.gguf", "Q4_0"))
    high = open_gguf(write(tmp_path / "high.gguf", "Q8_0", width=32))
    with pytest.raises(ModelError, match=r"a\.weight is not the same tensor"):
        mix(low, high, (), tmp_path / "mixed.gguf")


def test_an_edited_byte_is_a_differing_tensor(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.gguf", "Q8_0"), write(tmp_path / "b.gguf", "Q8_0")
    assert list(differing_tensors(first, second)) == []
    data = bytearray(second.read_bytes())
    data[-13] ^= 1  # of the last of 5 floats, before 12 bytes of padding
    second.write_bytes(data)
    assert list(differing_tensors(first, second)) == ["norm.weight"]

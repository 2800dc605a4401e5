"""What a file stores, part by part: every change is found and named by its part."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from so8tqc.errors import ModelError
from so8tqc.services.attest.stored import BETWEEN, differing_parts, resource, stored
from tiny_gguf import write_llama

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, dtype=np.float16)


def weights(path: Path, **tensors: np.ndarray) -> Path:
    save_file({"a": A, "b": B} | tensors, str(path))
    return path


def test_tensors_are_known_by_the_digest_of_their_bytes(tmp_path: Path) -> None:
    path = weights(tmp_path / "m.safetensors")
    found = stored(path)
    assert found is not None
    assert found.keys == {}
    for name, values in (("a", A), ("b", B)):
        assert found.tensors[name].sha256 == hashlib.sha256(values.tobytes()).hexdigest()
        assert found.tensors[name].shape == values.shape
    assert (found.tensors["a"].dtype, found.tensors["b"].dtype) == ("F32", "F16")
    whole = resource(path, "baked/m.safetensors")
    assert whole.name == "baked/m.safetensors"
    assert whole.digest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_gguf_has_tensors_and_keys(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    found = stored(path)
    assert found is not None
    read = gguf.GGUFReader(str(path))
    assert set(found.tensors) == {tensor.name for tensor in read.tensors}
    for tensor in read.tensors:
        wanted = hashlib.sha256(np.ascontiguousarray(tensor.data).tobytes()).hexdigest()
        assert found.tensors[tensor.name].sha256 == wanted
    assert {"general.architecture", "llama.block_count", "test.words"} <= set(found.keys)
    assert not any(key.startswith("GGUF.") for key in found.keys)


def test_another_file_is_one_part(tmp_path: Path) -> None:
    text = tmp_path / "config.json"
    text.write_text("{}")
    assert stored(text) is None
    before = resource(text, "config.json")
    assert differing_parts(text, before) == []
    text.write_text("{ }")
    assert differing_parts(text, before) == ["its bytes"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"a": A + 1}, ["a"]),
        ({"a": A.reshape(3, 2)}, ["a"]),
        ({"a": A.astype(np.float64)}, ["a"]),
        ({"c": A}, ["c"]),
        ({"a": A + 1, "b": B + 1}, ["a", "b"]),
    ],
)
def test_each_differing_tensor_is_named(
    change: dict[str, np.ndarray], parts: list[str], tmp_path: Path
) -> None:
    path = weights(tmp_path / "m.safetensors")
    before = resource(path, "m")
    assert differing_parts(weights(path, **change), before) == parts


def test_a_missing_tensor_and_a_change_between_tensors_are_named(tmp_path: Path) -> None:
    path = weights(tmp_path / "m.safetensors")
    before = resource(path, "m")
    save_file({"a": A}, str(path))
    assert differing_parts(path, before) == ["b"]
    save_file(dict(load_file(str(weights(path)))), str(path), metadata={"who": "me"})
    assert differing_parts(path, before) == [BETWEEN]


def test_a_key_of_a_gguf_is_named(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    before = resource(path, "m")
    content = path.read_bytes()
    assert content.count(b"tiny") == 1
    path.write_bytes(content.replace(b"tiny", b"tInY"))
    assert differing_parts(path, before) == ["key general.name"]


def test_a_file_that_cannot_be_read_is_said_to_be_unreadable(tmp_path: Path) -> None:
    path = weights(tmp_path / "m.safetensors")
    before = resource(path, "m")
    path.write_bytes(path.read_bytes()[:-4])
    (part,) = differing_parts(path, before)
    assert part.startswith("unreadable: ")
    with pytest.raises(ModelError):
        resource(path, "m")

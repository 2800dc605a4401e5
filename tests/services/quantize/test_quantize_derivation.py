"""What a record needs for its files to be made again: each tensor's digest, and the build."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.gguf.file import open_gguf
from so8tqc.services.quantize.derivation import Derivation, derivation, tensor_digests
from tiny_gguf import write_llama


def test_digests_are_of_the_bytes_that_gguf_py_reads(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", dtype=np.float16)
    read = gguf.GGUFReader(str(path))
    wanted = {
        t.name: hashlib.sha256(np.ascontiguousarray(t.data)).hexdigest() for t in read.tensors
    }
    found = tensor_digests(open_gguf(path))
    assert found == wanted
    assert list(found) == [tensor.name for tensor in read.tensors]
    assert len(set(found.values())) > len(found) // 2


@pytest.mark.llama
def test_it_names_the_build_that_is_here_and_survives_json() -> None:
    import llama_cpp

    made = derivation({"f.gguf": {"w": "0" * 64}})
    assert made.build.version == llama_cpp.__version__
    assert Derivation.model_validate_json(made.model_dump_json()) == made

"""The proof at work while a file grows: same results, begun early, nothing taken on trust."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.config import QuantizeConfig
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.llama.quantizer import PlannedTensor, Quantizer, Recipe, resolve_type
from so8tqc.records import Verdict
from so8tqc.services.quantize import files as quantize_files
from so8tqc.services.quantize.service import quantize
from so8tqc.services.quantize.stream import StreamedProof
from tiny_gguf import write_wide

pytestmark = pytest.mark.llama

ROWS = 97  # of a K-quant fill no multiple of 32 bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[GGUFFile, Path]:
    folder = tmp_path_factory.mktemp("made")
    model = write_wide(folder / "tiny-F16.gguf", vocabulary=ROWS, keys=True)
    quantize(QuantizeConfig(gguf=model, out=folder, types=("Q4_K_M",), threads=1))
    return open_gguf(model), folder / "tiny-Q4_K_M.gguf"


def plan(source: GGUFFile, recipe: str) -> dict[str, PlannedTensor]:
    quantizer = Quantizer()
    try:
        return quantizer.plan(source.path, Recipe(resolve_type(recipe)[1]))
    finally:
        quantizer.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def as_libllama_writes(made: Path, path: Path, proof: StreamedProof) -> Iterator[int]:
    """Copy a file in the order in which libllama writes it; the tensors begun after each piece."""
    content = made.read_bytes()
    start = min(t.offset for t in open_gguf(made).tensors.values())
    with path.open("wb", buffering=0) as stream:
        stream.write(bytes(start))
        for begin in range(start, len(content), 5000):
            stream.write(content[begin : begin + 5000])
            proof.advance()
            yield len(proof._begun)
        stream.seek(0)
        stream.write(content[:start])


def test_tensors_are_compared_as_soon_as_they_are_complete(
    made: tuple[GGUFFile, Path], tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    source, file = made
    path = tmp_path / "growing"
    path.touch()
    proof = StreamedProof(source, plan(source, "Q4_K_M"), path, pool)
    begun = list(as_libllama_writes(file, path, proof))
    assert begun == sorted(begun)
    assert begun[0] < 2
    assert 2 < begun[len(begun) // 2] < len(source.tensors) - 2
    assert begun[-1] == len(source.tensors)
    pool.shutdown()  # nothing is left to compare, or the next line fails
    found = dict(proof.finish(open_gguf(path)))
    for tensor in gguf.GGUFReader(str(file)).tensors:
        before = source.tensors[tensor.name].values().astype(np.float64)
        after = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(before.shape)
        compared = found[tensor.name]
        assert compared.error is not None
        assert compared.error.error == pytest.approx(((after - before) ** 2).sum(), rel=1e-4)
        assert compared.error.norm == pytest.approx((before**2).sum(), rel=1e-4)
        assert compared.sha256 == hashlib.sha256(tensor.data.tobytes()).hexdigest()


def test_what_lies_elsewhere_than_expected_is_read_again(
    made: tuple[GGUFFile, Path], tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    source, file = made
    path = tmp_path / "growing"
    path.touch()
    proof = StreamedProof(source, plan(source, "Q8_0"), path, pool)
    assert list(as_libllama_writes(file, path, proof))[-1] > 2
    found = dict(proof.finish(open_gguf(path)))
    for name, tensor in open_gguf(file).tensors.items():
        assert found[name].sha256 == hashlib.sha256(tensor.raw.tobytes()).hexdigest()
        error = found[name].error
        assert error is not None
        assert error.relative is not None
        assert error.relative < 0.1


@pytest.mark.parametrize("keys", [True, False])
def test_libllama_writes_where_the_plan_says(
    keys: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the header's keys there, every tensor begun early lies where it was expected."""
    counts = []

    class Counting(StreamedProof):
        def finish(self, result: GGUFFile):  # type: ignore[no-untyped-def]
            places = {(t.name, t.type, t.offset, t.bytes) for t in result.tensors.values()}
            counts.append((len(self._begun), len(places & self._begun.keys())))
            return super().finish(result)

    monkeypatch.setattr(quantize_files, "StreamedProof", Counting)
    model = write_wide(tmp_path / "tiny-F16.gguf", vocabulary=ROWS, keys=keys)
    config = QuantizeConfig(gguf=model, out=tmp_path / "q", types=("Q5_K_M",), threads=1)
    record = quantize(config)
    assert record.verdict is Verdict.PASS
    (begun, right) = counts[0]
    assert begun == right
    # what libllama still holds in its buffer when it names the last tensor is read afterwards
    assert (begun >= len(open_gguf(model).tensors) - 3) if keys else (begun == 0)


def test_damage_in_a_tensor_that_was_read_early_is_found(
    made: tuple[GGUFFile, Path], tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    source, file = made
    damaged = tmp_path / "damaged.gguf"
    content = bytearray(file.read_bytes())
    tensor = open_gguf(file).tensors["blk.0.attn_norm.weight"]
    content[tensor.offset : tensor.offset + 4] = np.float32(math.nan).tobytes()
    damaged.write_bytes(content)
    path = tmp_path / "growing"
    path.touch()
    proof = StreamedProof(source, plan(source, "Q4_K_M"), path, pool)
    list(as_libllama_writes(damaged, path, proof))
    pool.shutdown()
    found = dict(proof.finish(open_gguf(path)))
    broken = [n for n, c in found.items() if c.error and not math.isfinite(sum(c.error))]
    assert broken == ["blk.0.attn_norm.weight"]

"""Where a GGUF file parts from the model that it was made from, by its weights and by its keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from parted import exchanged, located, places, with_tensors, wrong

from so8tqc.cli.main import run
from so8tqc.config import QuantizeConfig
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.llama.imatrix import write_imatrix
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_kinds.locate import LocateMetrics
from so8tqc.records import Verdict
from so8tqc.services.quantize.service import quantize

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
    pytest.mark.usefixtures("traced_once"),
]

ModelOf = Callable[[str], Path]
FilesOf = Callable[[str], dict[str, Path]]
TYPES = ("F16", "Q8_0", "Q4_K")
MORE = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q5_1", "Q4_0", "IQ4_XS", "IQ3_S")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "mixtral"])
def test_no_honest_file_is_accused(
    parted_model: ModelOf, parted_files: FilesOf, architecture: str, tmp_path: Path
) -> None:
    for kind, file in parted_files(architecture).items():
        record = located(parted_model(architecture), file, tmp_path / "out")
        assert (kind, wrong(record), record.diagnosis) == (kind, [], ())
        assert record.verdict is Verdict.PASS
        found = LocateMetrics.of(record)
        assert kind in found.types
        layer = found.layers[1]
        assert layer.own is not None
        assert layer.own <= (1e-4 if kind == "F16" else 0.2)
        if kind != "F16":
            assert layer.own_explained == pytest.approx(layer.own, rel=0.2)


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
def test_no_honest_type_is_accused(
    parted_model: ModelOf, parted_files: FilesOf, importance: bool, tmp_path: Path
) -> None:
    """Also with an importance matrix over four decades, which has nothing to do with the texts."""
    whole = parted_files("llama")["F16"]
    matrix = _importance(whole, tmp_path / "imatrix.gguf") if importance else None
    quantize(QuantizeConfig(gguf=whole, out=tmp_path / "q", types=MORE, imatrix=matrix))
    files = sorted((tmp_path / "q").glob("*.gguf"))
    assert len(files) == len(MORE)
    for file in files:
        record = located(parted_model("llama"), file, tmp_path / "out")
        assert (file.name, wrong(record)) == (file.name, [])
        assert record.verdict is Verdict.PASS


def _importance(file: Path, path: Path) -> Path:
    sums = {}
    for name, tensor in open_gguf(file).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            spread = np.random.default_rng(len(name)).normal(0, 1.5, tensor.shape[-1])
            sums[name] = np.exp(spread)[None] * 100.0
    counts = {name: np.array([100]) for name in sums}
    write_imatrix(path, sums, counts, datasets=["none"], chunks=1, chunk_size=100)
    return path


def _times(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values * np.float32(factor)


def _halves(values: np.ndarray) -> np.ndarray:
    """The rows of q as transformers has them: the converter has not permuted them."""
    return values.reshape(4, 32, 2, -1).swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("architecture", "tensor", "change", "operation", "cause"),
    [
        ("llama", "blk__1__attn_q__weight", _times(1.05), "q", "times the reference's"),
        ("llama", "blk__1__ffn_down__weight", _times(1.2), "mlp", "times the reference's"),
        ("llama", "blk__1__attn_q__weight", _halves, "q", "order of rope over"),
        ("qwen2", "blk__1__attn_v__bias", _times(0.0), "v", "its bias is lost"),
        ("gemma3_text", "blk__1__ffn_norm__weight", lambda w: w - 1, "norm", "1 was not added"),
        ("mixtral", "blk__1__ffn_gate_inp__weight", lambda w: w[[1, 0, 2, 3]], "router",
         "2 of its output features hold others (0 holds 1, 1 holds 0"),
    ],
)  # fmt: skip
def test_a_tensors_fault_is_named(
    parted_model: ModelOf,
    parted_files: FilesOf,
    architecture: str,
    tensor: str,
    change: Callable[[np.ndarray], np.ndarray],
    operation: str,
    cause: str,
    kind: str,
    tmp_path: Path,
) -> None:
    file = with_tensors(parted_files(architecture)[kind], tmp_path / "bad.gguf", **{tensor: change})
    record = located(parted_model(architecture), file, tmp_path / "out")
    assert places(record) == {(1, operation)}
    assert cause in wrong(record)[0].cause


@pytest.mark.parametrize("kind", TYPES)
def test_exchanged_layers_and_experts_are_named(
    parted_model: ModelOf, parted_files: FilesOf, kind: str, tmp_path: Path
) -> None:
    model, file = parted_model("mixtral"), parted_files("mixtral")[kind]
    bad = exchanged(file, tmp_path / "layers.gguf", "blk.1.", "blk.2.")
    rows = wrong(located(model, bad, tmp_path / "out"))
    assert {(row.layer, row.cause) for row in rows} == {
        (1, "it has the weights of layer 2"), (2, "it has the weights of layer 1"),
    }  # fmt: skip
    assert {row.operation for row in rows} >= {"q", "k", "v", "o", "experts", "router"}
    swapped = {
        f"blk__1__ffn_{name}_exps__weight": lambda w: w[[2, 1, 0, 3]]
        for name in ("gate", "up", "down")
    }
    record = located(model, with_tensors(file, tmp_path / "b.gguf", **swapped), tmp_path / "out")
    assert places(record) == {(1, "experts")}
    assert (
        wrong(record)[0].cause == "its experts are exchanged (expert 0 holds 2, expert 2 holds 0)"
    )


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("architecture", "key", "value", "expected"),
    [
        ("llama", "rope.freq_base", 10500.0, {(i, "rope") for i in range(3)}),
        ("qwen2", "attention.layer_norm_rms_epsilon", 1e-5,
         {(None, "norm"), *((i, "norm") for i in range(3))}),
        ("gemma3_text", "final_logit_softcapping", 15.0, {(None, "soft cap")}),
        ("gemma3_text", "rope.freq_base", 950000.0, {(1, "rope")}),
        ("gemma3_text", "attention.sliding_window", 17, {(0, "attention"), (2, "attention")}),
    ],
)  # fmt: skip
def test_a_keys_fault_is_named_with_its_operations(
    parted_model: ModelOf,
    parted_files: FilesOf,
    architecture: str,
    key: str,
    value: float,
    expected: set,
    kind: str,
    tmp_path: Path,
) -> None:
    file = parted_files(architecture)[kind]
    name = f"{open_gguf(file).architecture}.{key}"
    changed_copy(file, tmp_path / "bad.gguf", {name: value})
    record = located(parted_model(architecture), tmp_path / "bad.gguf", tmp_path / "out")
    assert places(record) == expected
    for row in wrong(record):
        assert re.match(rf"{name} is \S+, not", row.cause)


def test_a_lost_bias_is_run_as_zeros_and_named(
    parted_model: ModelOf, parted_files: FilesOf, tmp_path: Path
) -> None:
    import gguf

    file = parted_files("qwen2")["F16"]
    content = file.read_bytes().replace(b"blk.1.attn_k.bias", b"blk.1.attn_k.bi_s")
    (tmp_path / "bad.gguf").write_bytes(content)
    assert gguf.GGUFReader(tmp_path / "bad.gguf").tensors
    record = located(parted_model("qwen2"), tmp_path / "bad.gguf", tmp_path / "out")
    assert places(record) == {(1, "k")}
    assert wrong(record)[0].cause == "its bias is lost"
    assert any("lacks run as zeros: 1, first" in notice for notice in record.notices)


def test_a_file_of_another_model_or_without_a_converter(
    parted_model: ModelOf,
    parted_files: FilesOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = parted_files("llama")["F16"]
    out = str(tmp_path / "out")
    assert run(["locate", str(parted_model("qwen2")), str(file), "--out", out]) == 3
    content = bytearray(file.read_bytes())
    content[:4] = b"GGUX"
    (tmp_path / "broken.gguf").write_bytes(content)
    broken = str(tmp_path / "broken.gguf")
    assert run(["locate", str(parted_model("llama")), broken, "--out", out]) == 3
    from so8tqc.errors import MissingToolError
    from so8tqc.services.locate import sides

    def none(_checkpoint: object) -> object:
        raise MissingToolError("llama.cpp's converter is missing")

    monkeypatch.setattr(sides, "traced", none)
    assert run(["locate", str(parted_model("llama")), str(file), "--out", out]) == 4

"""Quantization of small hand-made files by the real libllama."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.config import QuantizeConfig
from so8tqc.errors import ConfigError, ModelError, ToolError
from so8tqc.llama import child
from so8tqc.llama.gguf_file import open_gguf
from so8tqc.llama.imatrix import read_imatrix
from so8tqc.records import Record, Verdict
from so8tqc.services.quantize import quantize

pytestmark = pytest.mark.llama

VOCABULARY = 64


def write_model(path: Path, width: int = 256, layers: int = 1) -> Path:
    """A Llama of random weights; all matrices but ``ffn_down`` have ``width`` columns."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(256)
    writer.add_block_count(layers)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    make = np.random.default_rng(0).normal
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, width)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{n}": (width, width)
                   for n in ("attn_q", "attn_k", "attn_v", "attn_output")}  # fmt: skip
        shapes |= {f"blk.{i}.{n}": (width,) for n in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{n}": (256, width) for n in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (width, 256)
    shapes |= {"output_norm": (width,), "output": (VOCABULARY, width)}
    for name, shape in shapes.items():
        kind = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{name}.weight", (make(size=shape) / 16).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_imatrix(path: Path, model: Path, **replace: np.ndarray) -> Path:
    """Importance for every matrix of the layers; ``replace`` by ``NAME_in_sum2`` or ``…counts``."""
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 7)
    make = np.random.default_rng(1)
    for name, tensor in open_gguf(model).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            sums = make.gamma(0.3, size=(1, tensor.shape[1])).astype(np.float32) * 50
            short = name.split(".")[2]
            writer.add_tensor(f"{name}.in_sum2", replace.get(f"{short}_in_sum2", sums))
            counts = np.full((1, 1), 50, dtype=np.float32)
            writer.add_tensor(f"{name}.counts", replace.get(f"{short}_counts", counts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny-F16.gguf")


def run(model: Path, out: Path, *types: str, **options: object) -> Record:
    config = QuantizeConfig(gguf=model, out=out, types=types, threads=1, **options)  # type: ignore[arg-type]
    return quantize(config)


def test_every_type_is_written_once_and_described(model: Path, tmp_path: Path) -> None:
    record = run(model, tmp_path / "q", "q8_0", "Q8_0", "q5_k_m")
    assert record.verdict is Verdict.PASS
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == [
        "tiny-Q5_K_M.gguf", "tiny-Q8_0.gguf",
    ]  # fmt: skip
    files = record.metrics["files"]
    assert files["tiny-Q5_K_M.gguf"]["fallbacks"] == {}
    assert record.notices == ()
    # Q8_0 has 8 bits and one float16 scale for 32 weights
    assert 8.5 <= files["tiny-Q8_0.gguf"]["bits_per_weight"] < 8.6


def test_the_attention_output_error_is_the_relative_frobenius_norm(
    model: Path, tmp_path: Path
) -> None:
    record = run(model, tmp_path / "q", "Q8_0")
    weight = "blk.0.attn_output.weight"
    read = {t.name: t for t in gguf.GGUFReader(str(model)).tensors}[weight].data.astype(np.float64)
    blocks = read.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    rounded = (np.round(blocks / scale) * scale).reshape(read.shape)
    expected = np.linalg.norm(rounded - read) / np.linalg.norm(read)
    error = record.metrics["files"]["tiny-Q8_0.gguf"]["attention_output_error"]["0"]
    assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("width", "recipe", "kinds", "sentence"),
    [
        (64, "Q5_K_M", {"Q5_1", "Q8_0"}, "no multiple of 256"),
        (80, "Q5_K_M", {"F16"}, "no multiple of 32"),
        (80, "Q8_0", {"F16"}, "no multiple of 32"),
        (64, "Q8_0", set(), None),
        (80, "BF16", set(), None),
    ],
)
def test_tensors_whose_width_forbids_the_recipe_are_named(
    width: int, recipe: str, kinds: set[str], sentence: str | None, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny-F16.gguf", width)
    record = run(model, tmp_path / "q", recipe)
    fell = record.metrics["files"][f"tiny-{recipe}.gguf"]["fallbacks"]
    assert set(fell.values()) == kinds
    assert "blk.0.ffn_down.weight" not in fell  # 256 columns
    assert len(fell) == (8 if kinds else 0)
    assert [sentence in notice for notice in record.notices] == ([True] if sentence else [])


def test_the_input_is_never_replaced(model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(ConfigError, match="F16 would replace the input"):
        run(model, model.parent, "Q8_0", "F16")
    assert model.read_bytes() == before
    assert list(model.parent.iterdir()) == [model]


def test_types_that_cannot_be_read_back_are_not_offered(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no quantization type 'Q2_0'"):
        run(model, tmp_path / "q", "Q2_0")


def test_libllamas_reason_is_told_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"importance matrix.*Give an importance matrix"):
        run(model, tmp_path / "q", "IQ2_XXS")
    assert list((tmp_path / "q").iterdir()) == []


def test_one_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("output.weight", np.ones((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="one part of a split model"):
        run(path, tmp_path / "q", "Q8_0")


def test_a_full_disk_is_found_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ToolError, match="are needed"):
        run(model, tmp_path / "q", "Q8_0")


def test_importance_changes_the_weighted_error_in_its_favour(model: Path, tmp_path: Path) -> None:
    """The claim of an importance matrix: less error where the inputs are large."""
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    record = run(model, tmp_path / "with", "Q4_K_M", imatrix=imatrix)
    run(model, tmp_path / "without", "Q4_K_M")
    assert record.verdict is Verdict.PASS
    assert record.inputs["imatrix"].path == str(imatrix)
    metrics = record.metrics["imatrix"]
    assert (metrics["tensors"], metrics["chunks"]) == (7, 7)
    assert set(metrics["without"]) == {"token_embd.weight", "output.weight"}
    assert any("token_embd.weight" in notice for notice in record.notices)
    name = "blk.0.attn_q.weight"
    importance = read_imatrix(imatrix).means[name][0]

    def weighted(directory: Path) -> float:
        before = open_gguf(model).tensors[name].values()
        after = open_gguf(directory / "tiny-Q4_K_M.gguf").tensors[name].values()
        return float((importance * (after - before) ** 2).sum())

    assert weighted(tmp_path / "with") < 0.9 * weighted(tmp_path / "without")


def test_types_that_need_importance_get_it(model: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    record = run(model, tmp_path / "q", "IQ2_XXS", imatrix=imatrix)
    assert record.verdict is Verdict.PASS
    assert "IQ2_XXS" in record.metrics["files"]["tiny-IQ2_XXS.gguf"]["types"]


def test_means_are_sums_over_counts_and_unseen_experts_weigh_alike(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_tensor("w.in_sum2", np.array([[2, 4], [0, 0]], dtype=np.float32))
    writer.add_tensor("w.counts", np.array([[2], [0]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(read_imatrix(path).means["w"], [[1, 2], [1, 1]])


@pytest.mark.parametrize(
    ("replace", "says"),
    [
        ({"attn_q_in_sum2": np.full((1, 256), np.nan, np.float32)}, "attn_q.*not finite"),
        ({"attn_q_in_sum2": np.full((1, 256), -1, np.float32)}, "attn_q.*negative"),
        ({"attn_q_in_sum2": np.zeros((1, 256), np.float32)}, "attn_q.*every importance is zero"),
        ({"attn_q_in_sum2": np.ones((1, 128), np.float32)}, r"attn_q.*needs \[1, 256\]"),
        ({"attn_q_counts": np.ones((3, 1), np.float32)}, "attn_q.*do not belong to 3 counts"),
    ],
)
def test_an_importance_that_cannot_be_right_is_refused(
    replace: dict[str, np.ndarray], says: str, model: Path, tmp_path: Path
) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model, **replace)
    with pytest.raises(ModelError, match=says):
        run(model, tmp_path / "q", "Q4_K_M", imatrix=imatrix)


def test_importance_of_another_model_or_none_is_refused(model: Path, tmp_path: Path) -> None:
    other = write_imatrix(tmp_path / "other.gguf", write_model(tmp_path / "o-F16.gguf", layers=2))
    with pytest.raises(ModelError, match=r"blk\.1\..*tiny-F16.gguf does not have"):
        run(model, tmp_path / "q", "Q4_K_M", imatrix=other)
    with pytest.raises(ModelError, match="holds no importance matrix"):
        run(model, tmp_path / "q", "Q4_K_M", imatrix=model)


def test_a_dying_libllama_is_a_message(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abort = [sys.executable, "-c", "import os; print('GGML_ASSERT failed', flush=True); os.abort()"]
    follow = child.follow
    monkeypatch.setattr(
        "so8tqc.llama.quantizer.follow", lambda _, on_line, env: follow(abort, on_line, env)
    )
    with pytest.raises(ToolError, match=r"SIGABRT.*GGML_ASSERT failed"):
        run(model, tmp_path / "q", "Q8_0")
    assert list((tmp_path / "q").iterdir()) == []


def test_ctrl_c_ends_a_quantization_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """Interrupted at its first tensor: what libllama's own log callback would swallow."""
    model = write_model(tmp_path / "tiny-F16.gguf", layers=3)
    script = f"""
import os, signal
from pathlib import Path
from so8tqc.config import QuantizeConfig
from so8tqc.services import quantize as module
real = module.quantize_file
def interrupted(*a, on_tensor, **o):
    real(*a, on_tensor=lambda t: os.kill(os.getpid(), signal.SIGINT), **o)
module.quantize_file = interrupted
module.quantize(QuantizeConfig(gguf=Path({str(model)!r}), out=Path({str(tmp_path / "q")!r}),
                               types=("Q5_K_M",), threads=1))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert list((tmp_path / "q").iterdir()) == []

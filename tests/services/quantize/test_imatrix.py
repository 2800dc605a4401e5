"""Importance matrices from text: against transformers' hooks, on tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.errors import DataError, ModelError, ToolError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.tensor_map import gguf_names
from so8tqc.llama import ggml, imatrix_worker
from so8tqc.llama.imatrix import read_imatrix
from so8tqc.llama.imatrix_worker import expert_squares, stack_squares
from so8tqc.llama.libllama import tokenize
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Verdict
from so8tqc.resources import data_file
from so8tqc.services.export.service import export
from so8tqc.services.quantize.imatrix import CHUNK_TOKENS, compute_imatrix
from so8tqc.services.quantize.service import quantize
from so8tqc.sources.inputs.texts import load_texts

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

VOCABULARY = 512


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.txt"
    path.write_text(
        "\n\n".join(
            text.full for text in load_texts([str(data_file("calibration_written_en.json"))])[:14]
        )
    )
    return path


@pytest.fixture(scope="session")
def exported(
    make_model: Callable[..., Path],
    tokenizer_files: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Path]]:
    """architecture → (model directory, F32 GGUF: no product rounds its inputs)."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(f"f32-{architecture}")
            model = (
                mixtral(folder / "model", tokenizer_files)
                if architecture == "mixtral"
                else make_model(architecture, "float32")
            )
            out = folder / "tiny-F32.gguf"
            export(ExportConfig(model=model, out=out, type="f32"))
            made[architecture] = (model, out)
        return made[architecture]

    return make


def mixtral(directory: Path, tokenizer_files: Path) -> Path:
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(str(directory))
    for file in tokenizer_files.iterdir():
        shutil.copy(file, directory / file.name)
    return directory


def chunks_of(gguf_file: Path, text: Path) -> list[list[int]]:
    tokens, bos = tokenize(gguf_file, text.read_bytes().decode())
    return [chunk.tolist() for chunk in imatrix_worker.cut(tokens, bos, CHUNK_TOKENS)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_means_are_those_of_transformers_inputs(
    architecture: str,
    exported: Callable[[str], tuple[Path, Path]],
    calibration: Path,
    tmp_path: Path,
) -> None:
    directory, file = exported(architecture)
    matrix = compute_imatrix(open_gguf(file), [str(calibration)], tmp_path / "i.gguf", threads=1)
    chunks = chunks_of(file, calibration)
    assert matrix.chunks == len(chunks) > 1
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
    sums: dict[str, np.ndarray] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            square = inputs[0][0].double().square().sum(dim=0).numpy()
            sums[name] = sums.get(name, 0) + square

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.inference_mode():
        for chunk in chunks:
            assert chunk[0] == 1 or architecture != "llama"  # BOS begins each
            model(torch.tensor([chunk]))
    names = gguf_names(list(sums), open_gguf(file).architecture, 3)
    assert set(matrix.means) == set(names.values())
    for source, total in sums.items():
        expected = total / (len(chunks) * CHUNK_TOKENS)
        np.testing.assert_allclose(matrix.means[names[source]][0], expected, rtol=2e-3)
        difference = np.linalg.norm(matrix.means[names[source]][0] - expected)
        assert difference < 2e-4 * np.linalg.norm(expected)


def test_experts_are_weighed_by_the_tokens_that_chose_them(
    exported: Callable[[str], tuple[Path, Path]], calibration: Path, tmp_path: Path
) -> None:
    """Routing and inputs of the first layer, computed from transformers' own hidden states."""
    directory, file = exported("mixtral")
    matrix = compute_imatrix(open_gguf(file), [str(calibration)], tmp_path / "i.gguf", threads=1)
    model = MixtralForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
    layer = model.model.layers[0]
    gate = dict(layer.named_parameters())
    router = next(p for n, p in gate.items() if n.endswith("gate.weight"))
    norm = layer.post_attention_layernorm
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    with torch.inference_mode():
        for chunk in chunks_of(file, calibration):
            model(torch.tensor([chunk]))
        hidden = torch.cat(seen)
        chosen = (hidden @ router.T).topk(2, dim=-1).indices
    sums = np.zeros((4, 64))
    counts = np.zeros(4)
    for expert in range(4):
        rows = (chosen == expert).any(dim=-1)
        sums[expert] = hidden[rows].double().square().sum(dim=0).numpy()
        counts[expert] = rows.sum()
    for short in ("ffn_gate_exps", "ffn_up_exps"):
        means = matrix.means[f"blk.0.{short}.weight"]
        np.testing.assert_allclose(means, sums / counts[:, None], rtol=0.02)  # near ties may flip
    stored = {t.name: t.data for t in gguf.GGUFReader(str(tmp_path / "i.gguf")).tensors}
    np.testing.assert_allclose(stored["blk.0.ffn_down_exps.weight.counts"][:, 0], counts, atol=3)
    record = quantize(
        QuantizeConfig(
            gguf=file, out=tmp_path / "q", types=("IQ4_NL",), threads=1, imatrix=tmp_path / "i.gguf"
        )
    )
    assert record.verdict is Verdict.PASS


def test_expert_squares_are_sums_over_the_slots_that_chose_them() -> None:
    make = np.random.default_rng(0)
    chosen = np.stack([make.permutation(5)[:3] for _ in range(20)]).astype(np.int32)
    for slots in (1, 3):
        inputs = make.normal(size=(20, slots, 6)).astype(np.float32)
        sums, counts = np.zeros((5, 6)), np.zeros(5, dtype=int)
        for token in range(20):
            for slot in range(3):
                sums[chosen[token, slot]] += inputs[token, slot % slots].astype(np.float64) ** 2
                counts[chosen[token, slot]] += 1
        ours = expert_squares(inputs, chosen, 5)
        np.testing.assert_allclose(ours[0], sums, rtol=1e-12)
        np.testing.assert_array_equal(ours[1], counts)


def test_matrices_of_a_stack_see_the_inputs_that_ggml_gives_them() -> None:
    """ggml multiplies input (i3, i2) with matrix (i3 mod ne03, i2 mod ne02)."""
    outer, inner = 2, 3
    inputs = np.random.default_rng(0).normal(size=(4, 6, 5, 7)).astype(np.float32)
    expected = np.zeros((outer * inner, 7))
    for i3 in range(4):
        for i2 in range(6):
            matrix = (i3 % outer) * inner + i2 % inner
            expected[matrix] += (inputs[i3, i2].astype(np.float64) ** 2).sum(axis=0)
    sums, counts = stack_squares(inputs, outer, inner)
    np.testing.assert_allclose(sums, expected, rtol=1e-12)
    assert counts.tolist() == [4 * 6 * 5 // 6]


def test_auto_weighs_and_keeps_the_matrix(
    exported: Callable[[str], tuple[Path, Path]], calibration: Path, tmp_path: Path
) -> None:
    _, file = exported("llama")
    record = quantize(
        QuantizeConfig(
            gguf=file,
            out=tmp_path / "q",
            types=("IQ2_XXS", "Q4_0"),
            threads=1,
            imatrix="auto",
            imatrix_data=(str(calibration),),
        )
    )
    assert record.verdict is Verdict.PASS
    path = tmp_path / "q" / "tiny-imatrix.gguf"
    assert record.outputs["imatrix"].path == str(path)
    assert record.inputs["imatrix_data: calibration.txt"].path == str(calibration)
    fields = gguf.GGUFReader(str(path)).fields
    said = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF")}
    assert said == {
        "general.type": "imatrix",
        "imatrix.datasets": ["calibration.txt"],
        "imatrix.chunk_count": read_imatrix(path).chunks,
        "imatrix.chunk_size": CHUNK_TOKENS,
    }
    again = quantize(
        QuantizeConfig(gguf=file, out=tmp_path / "again", types=("IQ2_XXS",), imatrix=path)
    )
    assert again.outputs["IQ2_XXS"].sha256 == record.outputs["IQ2_XXS"].sha256


def test_too_little_text_is_refused(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, file = exported("llama")
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(DataError, match=r"fewer tokens than one chunk of 512.*--imatrix-data"):
        quantize(
            QuantizeConfig(
                gguf=file,
                out=tmp_path / "q",
                types=("Q8_0",),
                imatrix="auto",
                imatrix_data=(str(tmp_path / "short.txt"),),
            )
        )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, "not finite"), (0.0, "every importance is zero")]
)
def test_a_model_without_sound_activations_gives_no_matrix(
    value: float,
    says: str,
    exported: Callable[[str], tuple[Path, Path]],
    calibration: Path,
    tmp_path: Path,
) -> None:
    _, file = exported("llama")
    broken = tmp_path / "broken.gguf"
    shutil.copy(file, broken)
    reader = gguf.GGUFReader(str(broken), "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_norm.weight").data[:] = value
    reader.data.flush()
    with pytest.raises(ModelError, match=rf"blk\.\d\.\w+.*{says}"):
        compute_imatrix(open_gguf(broken), [str(calibration)], tmp_path / "i.gguf", threads=1)
    assert not list(tmp_path.glob("*i.gguf*"))


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "bare.gguf"), "llama")
    writer.add_tensor("output.weight", np.ones((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="no tokenizer"):
        compute_imatrix(open_gguf(tmp_path / "bare.gguf"), ["x"], tmp_path / "i.gguf")


def test_another_layout_of_tensors_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = ggml.Tensor(name=b"blk.0.attn_q.weight")
    ggml.require_layout(tensor)
    monkeypatch.setattr(ggml.ggml(), "ggml_get_name", lambda _: b"where another version keeps it")
    with pytest.raises(ToolError, match="in another way"):
        ggml.require_layout(tensor)


def test_a_dying_child_is_a_message(
    exported: Callable[[str], tuple[Path, Path]],
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, file = exported("llama")
    monkeypatch.setattr(
        "so8tqc.services.quantize.imatrix.follow",
        lambda *_: (-6, ["ggml.c:1: GGML_ASSERT(x) failed"]),
    )
    with pytest.raises(ToolError, match=r"SIGABRT.*GGML_ASSERT"):
        compute_imatrix(open_gguf(file), [str(calibration)], tmp_path / "i.gguf")
    assert list(tmp_path.iterdir()) == []

"""Model directory → GGUF → quantized, by the real converter and libllama, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from so8tqc.config import BakeConfig, ExportConfig, QCConfig, QuantizeConfig
from so8tqc.errors import ConfigError, DataError, ModelError, ToolError
from so8tqc.llama.gguf_file import open_gguf
from so8tqc.llama.pin import PIN, Pin
from so8tqc.llama.tensor_map import interleave_rope
from so8tqc.llama.vendor import find_converter, is_vendored
from so8tqc.records import Verdict
from so8tqc.resources import repository_root
from so8tqc.services.bake import bake
from so8tqc.services.export import export
from so8tqc.services.export_proof import compare_tensors
from so8tqc.services.qc import qc
from so8tqc.services.quantize import quantize, stem
from so8tqc.services.quantize_proof import fallbacks
from so8tqc.sources.compare import compare
from so8tqc.sources.generate import greedy, hf_steps
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.protocol import EncodedText

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

TOKENS = np.random.default_rng(0).integers(3, 500, size=60)


@pytest.fixture(scope="session")
def exported(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """architecture → (model directory, F16 GGUF), each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            model = make_model(architecture)
            out = tmp_path_factory.mktemp(f"gguf-{architecture}") / "tiny-F16.gguf"
            record = export(ExportConfig(model=model, out=out))
            assert record.verdict is Verdict.PASS, [c.detail for c in record.checks]
            made[architecture] = (model, out)
        return made[architecture]

    return make


def test_the_pin_is_the_same_for_people_and_code() -> None:
    root = repository_root()
    assert root is not None
    text = (root / "vendor" / "llama.cpp" / "pin.json").read_text(encoding="utf-8")
    assert Pin.model_validate_json(text) == PIN


@pytest.mark.parametrize(
    "architecture",
    ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text", "qwen2_vl"],
)
def test_the_exported_file_has_the_models_logits(
    architecture: str, exported: Callable[[str], tuple[Path, Path]]
) -> None:
    model, gguf = exported(architecture)
    hf, ours = HFSource(HFModel.load(model), "hf"), GGUFSource(gguf, "gguf")
    text = EncodedText("t", TOKENS)
    table = compare([hf, ours], [("hf", "gguf")], [text])[("hf", "gguf")]
    assert table.columns["kl"].mean() < 1e-4
    assert table.columns["same_top"].mean() > 0.95
    ours.close()


def test_a_gguf_source_gives_the_same_logits_in_any_block_size(
    exported: Callable[[str], tuple[Path, Path]],
) -> None:
    _, gguf = exported("llama")
    source = GGUFSource(gguf, "gguf")
    whole = np.concatenate([b.numpy().copy() for b in source.logits(TOKENS, 60)])
    parts = [b.numpy().copy() for b in source.logits(TOKENS, 7)]
    assert [len(p) for p in parts] == [7] * 8 + [4]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-2)
    with pytest.raises(DataError, match="token 512 is not in the model's vocabulary of 512"):
        list(source.logits(np.array([5, 512, 6]), 3))
    with pytest.raises(DataError, match="token -1 is not in"):
        list(source.logits(np.array([5, -1, 6]), 3))
    with pytest.raises(DataError, match="600 tokens are more than"):
        list(source.logits(np.zeros(600, dtype=np.int64), 64))
    source.close()
    source.close()


def test_generation_agrees_between_transformers_and_libllama(
    exported: Callable[[str], tuple[Path, Path]],
) -> None:
    """Both are made to take the same tokens, so that near ties of random weights do not matter."""
    model, gguf = exported("llama")
    source = GGUFSource(gguf, "gguf")
    forced = [int(t) for t in TOKENS[20:28]]

    def replay() -> Callable[[torch.Tensor], int]:
        tokens = iter(forced)
        return lambda _logits: next(tokens)

    ours = list(source.steps(TOKENS[:20], 8, replay()))
    theirs = list(hf_steps(HFModel.load(model), TOKENS[:20], 8, replay()))
    source.close()
    assert [token for token, _ in ours] == [token for token, _ in theirs] == forced
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=0.03, rtol=0)


def test_greedy_takes_the_most_likely_token() -> None:
    assert greedy(torch.tensor([0.1, 3.0, 2.0])) == 1


def test_quantized_files_are_complete_and_close(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, gguf = exported("llama")
    record = quantize(QuantizeConfig(gguf=gguf, out=tmp_path, types=("q8_0", "Q4_K_M")))
    assert record.verdict is Verdict.PASS
    files = record.metrics["files"]
    assert set(files) == {"tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"}
    q4 = open_gguf(tmp_path / "tiny-Q4_K_M.gguf")
    # 64 columns are no multiple of 256: nothing can be stored in super-blocks
    assert set(fallbacks(q4, "Q4_K_M")) == {
        name for name, t in q4.tensors.items() if len(t.shape) > 1
    }
    assert any("fell back" in notice for notice in record.notices)
    assert q4.file_type == "Q4_K_M"
    hf, q8 = HFSource(HFModel.load(model), "hf"), GGUFSource(tmp_path / "tiny-Q8_0.gguf", "q8")
    table = compare([hf, q8], [("hf", "q8")], [EncodedText("t", TOKENS)])[("hf", "q8")]
    q8.close()
    assert 0 < table.columns["kl"].mean() < 0.05
    assert not list(tmp_path.glob("*partial*"))


def test_a_quantized_input_and_an_unknown_type_are_refused(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, gguf = exported("llama")
    quantize(QuantizeConfig(gguf=gguf, out=tmp_path, types=("Q8_0",)))
    with pytest.raises(ModelError, match="already quantized"):
        quantize(QuantizeConfig(gguf=tmp_path / "tiny-Q8_0.gguf", out=tmp_path))
    with pytest.raises(ConfigError, match="no quantization type 'Q9_Z'"):
        quantize(QuantizeConfig(gguf=gguf, out=tmp_path, types=("Q9_Z",)))


def test_an_edited_tensor_is_found_by_the_export_check(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from so8tqc.checkpoints.safetensors_index import open_checkpoint

    model, gguf = exported("llama")
    broken = tmp_path / "broken.gguf"
    data = bytearray(gguf.read_bytes())
    data[-200] ^= 0x10  # one bit of the last tensor's data
    broken.write_bytes(data)
    comparison = compare_tensors(open_checkpoint(model), open_gguf(broken))
    assert len(comparison.different) == 1
    assert compare_tensors(open_checkpoint(model), open_gguf(gguf)).different == []


def test_rope_interleaving_is_llamas_permutation() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    # one head of width 8: pairs (0, 4), (1, 5), (2, 6), (3, 7)
    np.testing.assert_array_equal(interleave_rope(rows, 1)[:, 0], [0, 4, 1, 5, 2, 6, 3, 7])


@pytest.mark.parametrize("cut", [3, 40, 5000])
def test_damaged_files_are_refused_before_libllama_sees_them(
    cut: int, exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, gguf = exported("llama")
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"not a GGUF file|malformed or truncated|truncated"):
        GGUFSource(short, "short")


def test_a_failing_converter_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    fake = tmp_path / "llama.cpp"
    fake.mkdir()
    (fake / "convert_hf_to_gguf.py").write_text("raise NotImplementedError('no such model')\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2, dtype=np.float32)}, str(model / "model.safetensors"))
    out = tmp_path / "out" / "x.gguf"
    with pytest.raises(ToolError, match=r"NotImplementedError: no such model.*x.gguf.log"):
        export(ExportConfig(model=model, out=out, llama_cpp=fake))
    assert [p.name for p in out.parent.iterdir()] == ["x.gguf.log"]
    with pytest.raises(ConfigError, match=r"convert_hf_to_gguf.py is not here"):
        find_converter(tmp_path)


def test_names_lose_the_suffix_of_their_type() -> None:
    assert stem(Path("a/model-F16.gguf")) == "model"
    assert stem(Path("model-v2.gguf")) == "model-v2"


def test_a_file_from_the_unbaked_model_does_not_survive_qc(
    exported: Callable[[str], tuple[Path, Path]],
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base, unbaked = exported("llama")
    gates = make_gates(base)
    bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "baked"))
    export(ExportConfig(model=tmp_path / "baked", out=tmp_path / "baked-F16.gguf"))

    def verdicts(candidate: Path) -> dict[str, Verdict]:
        record = qc(
            QCConfig(
                reference=base,
                rotations=gates,
                candidates=(candidate,),
                max_tokens=64,
                data=(str(texts_file),),
                out=tmp_path / "qc",
                resamples=200,
            )
        )
        return {c.id: c.verdict for c in record.checks} | {"all": record.verdict}

    right, wrong = verdicts(tmp_path / "baked-F16.gguf"), verdicts(unbaked)
    assert right["all"] is Verdict.PASS
    assert wrong["effect.survival"] is wrong["kl.mean"] is Verdict.FAIL

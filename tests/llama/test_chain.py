"""Model directory → GGUF → quantized, by the real converter and libllama, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from so8tqc.config import ExportConfig, QCConfig, QuantizeConfig
from so8tqc.errors import ConfigError, DataError, InputError, ModelError, ToolError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.tensor_map import interleave_rope
from so8tqc.llama.pin import PIN, Pin
from so8tqc.llama.vendor import find_converter, is_vendored
from so8tqc.records import Verdict
from so8tqc.resources import repository_root
from so8tqc.services.export.proof import compare_tensors
from so8tqc.services.export.service import export
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.texts import evaluation_texts
from so8tqc.services.quantize.service import quantize, stem
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
    assert Pin(**json.loads(text)) == PIN


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


def test_unwanted_rows_are_left_out_and_the_rest_stays(
    exported: Callable[[str], tuple[Path, Path]],
) -> None:
    model, gguf = exported("llama")
    for source in (HFSource(HFModel.load(model), "hf"), GGUFSource(gguf, "gguf")):
        whole = torch.cat([block.clone() for block in source.logits(TOKENS, 60)])
        for first, rows in ((0, 7), (1, 60), (30, 8), (30, 30), (59, 8)):
            blocks = [block.clone() for block in source.logits(TOKENS, rows, first)]
            heights = [rows] * ((60 - first) // rows) + [(60 - first) % rows]
            assert [block.shape[0] for block in blocks] == [h for h in heights if h]
            torch.testing.assert_close(torch.cat(blocks), whole[first:], rtol=0, atol=2e-2)
        source.close()


def test_the_header_is_read_as_gguf_py_reads_it(
    exported: Callable[[str], tuple[Path, Path]],
) -> None:
    from gguf import GGUFReader, GGUFValueType

    _, path = exported("llama")
    ours, theirs = open_gguf(path), GGUFReader(str(path))
    assert ours.fields == {
        name: field.contents()
        for name, field in theirs.fields.items()
        if field.types[0] != GGUFValueType.ARRAY
    }
    assert len(ours.fields) < len(theirs.fields)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.tensors[tensor.name].data, tensor.data)


def test_llama_perplexity_protocol_from_files_alone(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Windows of the tokens that transformers' tokenizer finds, each headed by BOS."""
    from transformers import AutoTokenizer

    model, gguf = exported("llama")
    quantize(QuantizeConfig(gguf=gguf, types=("Q8_0",), out=tmp_path))
    content = "One fox.\r\n\nTwo <s> foxes, 三 foxes.\n" * 30
    (tmp_path / "text.txt").write_bytes(content.encode())
    config = QCConfig(
        reference=gguf,
        candidates=(tmp_path / "tiny-Q8_0.gguf",),
        out=tmp_path / "qc",
        data=(str(tmp_path / "text.txt"),),
        protocol="llama-perplexity",
        ctx=64,
        resamples=200,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(model), add_bos_token=True)
    ids = tokenizer(content[:-1], split_special_tokens=True)["input_ids"]
    windows = evaluation_texts(config, _no_tokenizer)
    assert len(windows) == len(ids) // 64 >= 5
    for i, window in enumerate(windows):
        assert window.tokens.tolist() == [1, *ids[64 * i + 1 : 64 * (i + 1)]]
        assert (window.first, window.start) == (32, 64 * i)
    by_transformers = evaluation_texts(
        config.model_copy(update={"tokenizer": model}), lambda: tokenizer
    )
    assert [w.tokens.tolist() for w in by_transformers] == [w.tokens.tolist() for w in windows]
    record = qc(config)
    metrics = record.metrics["candidates"]["tiny-Q8_0.gguf"]  # type: ignore[index,call-overload]
    assert (metrics["texts"], metrics["tokens"]) == (len(windows), 31 * len(windows))
    mean = next(check for check in record.checks if check.id == "kl.mean")
    assert mean.ci95 is not None
    limited = config.model_copy(update={"max_tokens": 150})
    assert len(evaluation_texts(limited, _no_tokenizer)) == 2


def _no_tokenizer() -> None:
    raise AssertionError("the file has its own tokenizer")


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
    assert set(files["tiny-Q4_K_M.gguf"]["fallbacks"]) == {
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
    with pytest.raises(InputError, match="no quantization type 'Q9_Z'"):
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
    with pytest.raises(
        ModelError, match=r"not a GGUF file|malformed or truncated|truncated"
    ) as told:
        GGUFSource(short, "short")
    assert "reshape" not in str(told.value)


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
    with pytest.raises(ToolError, match=r"it stops with: no such model.*x.gguf.log"):
        export(ExportConfig(model=model, out=out, llama_cpp=fake))
    assert [p.name for p in out.parent.iterdir()] == ["x.gguf.log"]
    with pytest.raises(ConfigError, match=r"convert_hf_to_gguf.py is not here"):
        find_converter(tmp_path)


def test_names_lose_the_suffix_of_their_type() -> None:
    assert stem(Path("a/model-F16.gguf")) == "model"
    assert stem(Path("model-v2.gguf")) == "model-v2"

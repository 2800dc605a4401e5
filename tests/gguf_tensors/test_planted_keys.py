"""Faults of a conversion: each is found, located and named, whatever the tensors' type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted import Bench, Change, bench_of, file_of, save_model

import so8tqc
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import ExportConfig
from so8tqc.gguf.file import GGUFTensor, open_gguf
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_kinds.audit import AuditMetrics
from so8tqc.record_kinds.tensors import TensorRow
from so8tqc.records import Verdict
from so8tqc.services.export.service import write_gguf
from so8tqc.services.tensors.expected import expected_of, history_of
from so8tqc.services.tensors.metadata import differences, metadata_checks
from so8tqc.services.tensors.service import judge_tensors, tensor_checks, wrong_of

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

ARCHITECTURES = ("llama", "qwen2", "gemma2")
TYPES = ("F16", "Q8_0", "Q4_K")
EPS, ROPE = ".attention.layer_norm_rms_epsilon", ".rope.freq_base"

Models = Callable[[str], Path]
Faults = dict[str, tuple[str, object, str]]


@pytest.fixture(scope="session")
def models(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("keys") / architecture
            made[architecture] = save_model(folder, architecture, tokenizer_files)
        return made[architecture]

    return make


def faults_of(architecture: str) -> Faults:
    """Fault → (key, its value, what is said of it)."""
    window, cap = ".attention.sliding_window", "_logit_softcapping"
    found: Faults = {
        "rope base 5 % off": (f"{architecture}{ROPE}", 10500.0, "angles"),
        "eps 10 times": (f"{architecture}{EPS}", 1e-5, "norms divide"),
        "bos added twice": ("tokenizer.ggml.add_bos_token", None, "before or behind every text"),
        "wrong pre-tokenizer": ("tokenizer.ggml.pre", "llama-bpe", "cut otherwise"),
        "fewer key heads": (f"{architecture}.attention.head_count_kv", 1.0, "other heads"),
        "another bos": ("tokenizer.ggml.bos_token_id", 7.0, "begin with another token"),
    }
    if architecture == "gemma2":
        found |= {
            "window off by one": (f"gemma2{window}", 4097.0, "window's edge"),
            "window off by one, below": (f"gemma2{window}", 4095.0, "window's edge"),
            "soft cap of another": (f"gemma2.attn{cap}", 30.0, "bounded otherwise"),
        }
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_key_that_is_wrong_is_named_and_no_other(
    models: Models, architecture: str, tmp_path: Path
) -> None:
    model, right = models(architecture), tmp_path / "right.gguf"
    write_gguf(ExportConfig(model=model, out=right))
    conversion = history_of(open_checkpoint(model)).conversion
    assert conversion is not None
    assert conversion.keys is not None
    assert differences(open_gguf(right), conversion.keys) == []
    for fault, (key, value, words) in faults_of(architecture).items():
        if value is None:  # the other of both
            value = not open_gguf(right).fields.get(key, False)
        elif key.endswith(EPS):
            value = 10 * float(open_gguf(right).fields[key])
        elif key.endswith(ROPE):
            value = 1.05 * float(open_gguf(right).fields.get(key, 10000.0))
        wrong = tmp_path / "wrong.gguf"
        changed_copy(right, wrong, {key: value})
        (check,) = metadata_checks(open_gguf(wrong), conversion.keys, "it")
        assert (check.value, check.verdict) == (1, Verdict.FAIL), (fault, check.detail)
        assert key in check.detail, fault
        assert words in check.detail, (fault, check.detail)
    lost = [k for k in conversion.keys if k.endswith(("softcapping", EPS, "head_count_kv"))]
    for key in lost:
        content = right.read_bytes()
        assert content.count(key.encode()) == 1
        wrong.write_bytes(content.replace(key.encode(), key[:-1].encode() + b"X"))
        found = {d.key: d for d in differences(open_gguf(wrong), conversion.keys)}
        assert (found[key].here, found[key].reaches_logits) == ("missing", True)
    assert len(lost) == (4 if architecture == "gemma2" else 2)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_conversion_forgets_is_found_located_and_named(
    models: Models, architecture: str, type_: str
) -> None:
    bench = bench_of(models(architecture))
    weights = bench.weights

    def judged(name: str, change: Change) -> TensorRow:
        rows = judge_tensors(file_of(bench, type_, changes={name: change}), bench.expected)
        (row,) = wrong_of(rows)
        assert row.name == name
        return row

    # rope rows in the order of the directory, of a file that interleaves them, or the reverse
    q = "blk.1.attn_q.weight"
    row = judged(q, lambda x: x.reshape(4, 32, 2, -1).swapaxes(1, 2).reshape(x.shape))
    assert "its rows in another order" in row.detail
    norm = "blk.1.attn_norm.weight"
    step, words = (-1.0, "was not added") if architecture == "gemma2" else (1.0, "too often")
    assert words in judged(norm, lambda x: x + np.float32(step)).detail
    row = judged("blk.1.attn_v.weight", lambda _: weights["blk.1.attn_k.weight"])
    assert "it holds the weights of blk.1.attn_k.weight" in row.detail
    _head_of_another(bench, type_)
    if architecture == "qwen2":
        _bias_lost(bench, type_)


def _head_of_another(bench: Bench, type_: str) -> None:
    """Of a tied model a head that is not its embedding; of another one, its embedding or a
    stranger's."""
    embedding, head = (bench.weights.get(f"{n}.weight") for n in ("token_embd", "output"))
    assert embedding is not None
    strange = np.random.default_rng(5).normal(0, embedding.std(), embedding.shape)
    stranger = strange.astype(np.float32)
    if head is None:
        file = file_of(bench, type_)
        kind = file.tensors["token_embd.weight"]
        file.tensors["output.weight"] = GGUFTensor(
            "output.weight", kind.type, kind.shape, kind.bytes, 0, kind.data
        )
        checks = tensor_checks(judge_tensors(file, bench.expected), file, bench.expected)
        (extra,) = [check for check in checks if check.id == "tensors.extra"]
        assert (extra.verdict, "output.weight" in extra.detail) == (Verdict.FAIL, True)
        name = "token_embd.weight"
    else:
        name = "output.weight"
        changed = {name: lambda _: embedding}
        (row,) = wrong_of(judge_tensors(file_of(bench, type_, changes=changed), bench.expected))
        assert "it holds the weights of token_embd.weight" in row.detail
    (row,) = wrong_of(
        judge_tensors(file_of(bench, type_, changes={name: lambda _: stranger}), bench.expected)
    )
    assert (row.name, row.verdict) == (name, "other tensor")
    assert "another model" in row.detail


def _bias_lost(bench: Bench, type_: str) -> None:
    name = "blk.2.attn_k.bias"
    file = file_of(bench, type_)
    del file.tensors[name]
    checks = tensor_checks(judge_tensors(file, bench.expected), file, bench.expected)
    (missing,) = [check for check in checks if check.id == "tensors.missing"]
    assert (missing.verdict, name in missing.detail) == (Verdict.FAIL, True)
    zero = file_of(bench, type_, changes={name: lambda x: x * 0})
    (row,) = wrong_of(judge_tensors(zero, bench.expected))
    assert (row.name, row.verdict) == (name, "damaged")


def test_an_audit_says_what_the_file_is_and_what_is_wrong(models: Models, tmp_path: Path) -> None:
    """By the function, on a file with two wrong keys."""
    model, right = models("gemma2"), tmp_path / "right.gguf"
    write_gguf(ExportConfig(model=model, out=right))
    wrong = tmp_path / "wrong.gguf"
    changed_copy(right, wrong, {"gemma2.attention.sliding_window": 4097.0,
                                "tokenizer.ggml.pre": "llama-bpe"})  # fmt: skip
    record = so8tqc.audit(wrong, model, tmp_path / "audit")
    assert (record.kind, record.verdict) == ("audit", Verdict.FAIL)
    assert record.check("tensors.keys").value == 2
    assert record.check("tensors.honest").verdict is Verdict.PASS
    found = AuditMetrics.of(record)
    assert (found.how, found.file.architecture, found.file.declared) == ("rounded", "gemma2", "F16")
    assert found.types["F16"].verdicts == {"exact": found.types["F16"].tensors}
    assert found.file.weights == sum(use.weights for use in found.types.values())
    page = (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")
    for words in ("What wrong.gguf is", "rounded to a plain type", "sliding_window", "llama-bpe",
                  "Tensors of wrong.gguf"):  # fmt: skip
        assert words in page, words


def test_wrong_rope_factors_are_found(tokenizer_files: Path, tmp_path: Path) -> None:
    """The converter makes them of the configuration: no tensor of the model corresponds to them."""
    model = save_model(tmp_path / "scaled", "llama", tokenizer_files)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    (model / "config.json").write_text(json.dumps(config))
    path = tmp_path / "scaled.gguf"
    write_gguf(ExportConfig(model=model, out=path))
    right = open_gguf(path)
    expected = expected_of(open_checkpoint(model), right)
    assert wrong_of(judge_tensors(right, expected)) == []
    factors = right.tensors["rope_freqs.weight"]
    values = factors.raw.view(np.float32).copy()
    assert values[-1] == 8.0
    values[-1] = 16.0
    with path.open("r+b") as out:
        out.seek(factors.offset)
        out.write(values.tobytes())
    (row,) = wrong_of(judge_tensors(open_gguf(path), expected))
    assert (row.name, row.verdict, row.outside) == ("rope_freqs.weight", "edited", 1)

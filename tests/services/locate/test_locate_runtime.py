"""libllama's own values: what is kept of them, and where they part from the file's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from parted import located, places

from so8tqc.errors import ToolError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.llama.activations import rounded
from so8tqc.llama.isolated import first_logits
from so8tqc.llama.values import LOGITS, STATE, node_values
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_kinds.locate import LocateMetrics
from so8tqc.records import Record, Verdict
from so8tqc.services.locate import runtime, service

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
    pytest.mark.usefixtures("traced_once"),
]

ModelOf = Callable[[str], Path]
FilesOf = Callable[[str], dict[str, Path]]
TOKENS = np.arange(3, 27)


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_t(4, (5, 512)).astype(np.float32)


def test_activations_are_rounded_as_ggml_rounds_them() -> None:
    """Against gguf-py's Q8_0 and torch's halves; Q8_K has no Python encoder: by its step."""
    x = values()
    kind = GGMLQuantizationType.Q8_0
    for type_ in ("Q8_0", "Q4_0", "IQ4_NL"):
        found, known = rounded(x, type_), dequantize(quantize(x, kind), kind)
        step = np.abs(x.reshape(5, -1, 32)).max(-1).repeat(32, axis=-1) / 127
        near = np.abs(found - known) <= 1e-3 * np.abs(x) + 1e-6  # but for codes on an edge
        assert np.mean(near) > 0.995
        assert np.all(np.abs(found - x) <= 0.51 * step + 1e-3 * np.abs(x))
    for type_, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        torch.testing.assert_close(
            torch.from_numpy(rounded(x, type_)),
            torch.from_numpy(x).to(dtype).float(),
            rtol=0,
            atol=0,
        )
    assert rounded(x, "F32") is x
    step = np.abs(x.reshape(5, 2, 256)).max(-1).repeat(256, axis=-1) / 127
    apart = np.abs(rounded(x, "Q4_K") - x) / step
    assert 0.45 < apart.max() <= 0.5001


def test_kept_values_are_the_models(parted_model: ModelOf, parted_files: FilesOf) -> None:
    """Against transformers' hidden states, libllama's own logits, and a product by numpy."""
    from transformers import AutoModelForCausalLM

    file = parted_files("llama")["F16"]
    seen = node_values(file, [TOKENS, TOKENS[:9]])
    assert [len(states[LOGITS]) for states in seen.states] == [24, 9]
    np.testing.assert_array_equal(seen.states[0][LOGITS], first_logits(file, TOKENS))
    model = AutoModelForCausalLM.from_pretrained(parted_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(TOKENS)[None], output_hidden_states=True)
    for layer in range(2):  # transformers norms the last
        known = out.hidden_states[layer + 1][0].numpy()
        found = seen.states[0][f"{STATE}l_out-{layer}"]
        assert np.linalg.norm(found - known) < 3e-3 * np.linalg.norm(known)
    embedding = seen.states[0][f"{STATE}embd"]
    np.testing.assert_array_equal(embedding, out.hidden_states[0][0].numpy())
    weights = {n for n, t in open_gguf(file).tensors.items() if len(t.shape) > 1}
    assert seen.products.keys() == weights - {"token_embd.weight"}
    halves = np.sqrt(np.mean((rounded(values(), "F16") - values()) ** 2) / np.mean(values() ** 2))
    for product in seen.products.values():
        assert product.explained == pytest.approx(halves, rel=0.25)
        assert product.error == pytest.approx(product.explained, rel=0.05)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "mixtral"])
def test_libllama_is_not_accused_of_its_rounding(
    parted_model: ModelOf, parted_files: FilesOf, architecture: str, tmp_path: Path
) -> None:
    for kind, file in parted_files(architecture).items():
        record = located(parted_model(architecture), file, tmp_path / "out", runtime=True)
        rows = LocateMetrics.of(record).runtime
        assert rows is not None
        assert [(kind, row.node, row.error, row.limit) for row in rows if row.wrong] == []
        assert record.verdict is Verdict.PASS
        assert {check.id for check in record.checks} == {
            "locate.operations", "locate.layers", "locate.runtime",
        }  # fmt: skip
        words = {row.operation for row in rows if row.layer == 1}
        assert words >= {"norm", "q", "k", "v", "attention", "o", "residual"}
        assert ("experts" in words, "router" in words) == ((architecture == "mixtral"),) * 2
        last = [row.node for row in rows if row.layer is None]
        assert last[-1] == "logits"


def told(record: Record) -> list[tuple[int | None, str]]:
    rows = LocateMetrics.of(record).runtime or []
    return [(row.layer, row.operation) for row in rows if row.wrong]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_key_that_transformers_does_not_know_shows_in_libllamas_values(
    parted_model: ModelOf, parted_files: FilesOf, architecture: str, kind: str, tmp_path: Path
) -> None:
    model, file = parted_model(architecture), parted_files(architecture)[kind]
    keys = {f"{architecture}.rope.scaling.{n}": v for n, v in (("type", "linear"), ("factor", 4.0))}
    changed_copy(file, tmp_path / "bad.gguf", keys)
    record = located(model, tmp_path / "bad.gguf", tmp_path / "out", runtime=True)
    assert places(record) == set()
    assert record.verdict is Verdict.FAIL
    assert record.check("locate.operations").verdict is Verdict.PASS
    assert all(f"{key} is " in record.check("locate.seen").detail for key in keys)
    wrong = told(record)
    assert wrong[0] == (0, "attention")
    assert {layer for layer, _ in wrong} == {0, 1, 2}
    assert not {"q", "k", "v", "o", "mlp", "head"} & {word for _, word in wrong}
    (found,) = record.diagnosis
    assert (found.code, found.layers) == ("runtime_differs", (0, 1, 2))


def test_layers_that_libllama_runs_otherwise_are_named(
    parted_model: ModelOf, parted_files: FilesOf, tmp_path: Path
) -> None:
    """libllama takes every sixth layer of a Gemma 3 to see all; of this one it is the second."""
    record = located(
        parted_model("gemma3_text"), parted_files("gemma3_text")["F16"], tmp_path / "out",
        runtime=True,
    )  # fmt: skip
    assert places(record) == set()
    assert told(record)[0] == (1, "attention")
    assert {layer for layer, _ in told(record)} == {1}


def test_without_libllama_or_where_it_fails_that_is_said(
    parted_model: ModelOf,
    parted_files: FilesOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, file = parted_model("llama"), parted_files("llama")["F16"]
    monkeypatch.setattr(service, "can_watch", lambda: False)
    record = located(model, file, tmp_path / "out", runtime=True)
    assert record.check("locate.runtime").verdict is Verdict.SKIP
    assert record.verdict is Verdict.PASS
    monkeypatch.undo()

    def dies(*_args: object) -> object:
        raise ToolError("libllama's values cannot be seen (SIGABRT)")

    monkeypatch.setattr(runtime, "node_values", dies)
    record = located(model, file, tmp_path / "out", runtime=True)
    assert record.check("locate.runtime").verdict is Verdict.FAIL
    assert "SIGABRT" in record.check("locate.runtime").detail

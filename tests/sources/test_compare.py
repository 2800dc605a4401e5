"""Walking sources in step: every pair scored as if alone, faults named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch

from so8tqc.errors import DataError, InputError, ModelError, ToolError
from so8tqc.metrics.distributions import distribution
from so8tqc.metrics.divergence import summarise, token_rows
from so8tqc.sources.compare import compare
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.protocol import EncodedText, LogitSource, TokenIds


class Recorded:
    """Logits from memory: [T, V] for each text, by its first token."""

    def __init__(self, name: str, logits: dict[int, np.ndarray]) -> None:
        self.name = name
        self._logits = logits
        self.vocab_size = next(iter(logits.values())).shape[1]
        self.passes = 0

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        self.passes += 1
        yield from torch.from_numpy(self._logits[int(tokens[0])][first:]).split(rows)

    def close(self) -> None:
        pass


def setup(vocabulary: int = 40) -> tuple[list[EncodedText], list[Recorded]]:
    generator = np.random.default_rng(0)
    texts = [
        EncodedText(f"t{i}", np.r_[i, generator.integers(0, vocabulary, n)])
        for i, n in enumerate((3, 200, 129))
    ]
    sources = [
        Recorded(
            name,
            {
                i: generator.normal(size=(t.tokens.size, vocabulary)) * 2
                for i, t in enumerate(texts)
            },
        )
        for name in ("a", "b", "c")
    ]
    return texts, sources


def test_every_pair_agrees_with_scipy_and_every_source_is_run_once() -> None:
    texts, sources = setup()
    tables = compare(sources, [("a", "b"), ("a", "c"), ("c", "b")], texts)
    assert [s.passes for s in sources] == [3, 3, 3]
    assert all(isinstance(s, LogitSource) for s in sources)
    by_name = {s.name: s for s in sources}
    for (p, q), table in tables.items():
        expected = np.concatenate(
            [
                scipy.special.rel_entr(
                    scipy.special.softmax(by_name[p]._logits[i][:-1], axis=1),
                    scipy.special.softmax(by_name[q]._logits[i][:-1], axis=1),
                ).sum(axis=1)
                for i in range(3)
            ]
        )
        np.testing.assert_allclose(table.columns["kl"], expected, rtol=1e-9)
        assert len(table) == 3 + 200 + 129
        assert list(np.bincount(table.text)) == [3, 200, 129]
        assert table.position[table.text == 1].tolist() == list(range(200))
    targets = np.concatenate([t.tokens[1:] for t in texts])
    logits = np.concatenate([sources[0]._logits[i][:-1] for i in range(3)])
    nll = -scipy.special.log_softmax(logits, axis=1)[np.arange(targets.size), targets]
    np.testing.assert_allclose(tables[("a", "b")].columns["nll_reference"], nll, rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_results_do_not_depend_on_the_block_size(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, sources = setup()
    whole = compare(sources, [("a", "b")], texts)[("a", "b")]
    expected = summarise(whole)
    monkeypatch.setattr("so8tqc.sources.compare.head_rows", lambda _v: rows)
    monkeypatch.setattr("so8tqc.sources.compare.rows_per_block", lambda _v: rows)
    parts = compare(sources, [("a", "b")], texts)[("a", "b")]
    for name, values in whole.columns.items():
        np.testing.assert_allclose(parts.columns[name], values, rtol=1e-12, atol=1e-13)
    got = summarise(parts)
    assert got["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-12)
    assert got["max_abs"] == expected["max_abs"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_located(value: float) -> None:
    texts, sources = setup()
    sources[1]._logits[1][150, 7] = value
    with pytest.raises(
        DataError, match=r"t1: b yields a non-finite logit at position 150, token 7"
    ):
        compare(sources, [("a", "b")], texts)


def test_models_that_cannot_be_compared() -> None:
    texts, sources = setup()
    other = setup(vocabulary=41)[1][0]
    other.name = "d"
    with pytest.raises(InputError, match="41 vocabulary entries"):
        compare([sources[0], other], [("a", "d")], texts)
    sources[1].name = "a"
    with pytest.raises(InputError, match="share a name"):
        compare(sources, [("a", "c")], texts)


@pytest.mark.parametrize("token", [-1, 40])
def test_a_token_of_another_vocabulary_is_named(token: int) -> None:
    texts, sources = setup()
    texts[1].tokens[-1] = token
    with pytest.raises(DataError, match=f"t1: token {token} is not in a's vocabulary of 40"):
        compare(sources, [("a", "b")], texts)
    assert sources[0].passes == 0


def test_a_transformers_source_gives_the_models_own_logits(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(1).integers(3, 500, size=70)
    source = HFSource(HFModel.load(llama), "hf")
    ours = torch.cat(list(source.logits(tokens, 16)))
    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(torch.from_numpy(tokens)[None]).logits[0])
    with pytest.raises(DataError, match="513 tokens are more than"):
        list(source.logits(np.zeros(513, dtype=np.int64), 16))


def test_a_model_with_missing_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(str(file))
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing and would be random"):
        HFModel.load(tmp_path / "model")


class _Delayed:
    """What a GPU does, done on the CPU: whole blocks, and a place for every broken row."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        self.side = distribution(logits, targets)
        first = (~torch.isfinite(logits)).int().argmax(dim=1)
        self.broken = torch.where(torch.isfinite(logits).all(dim=1), logits.shape[1], first)


@pytest.mark.parametrize("rows", [1, 128, 199, 200, 1000])
def test_rows_that_a_gpu_gives_later_come_in_order(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, sources = setup()
    expected = compare(sources, [("a", "b"), ("c", "b")], texts)
    monkeypatch.setattr("so8tqc.sources.compare.head_rows", lambda _v: rows)
    monkeypatch.setattr("so8tqc.sources.compare._gpu_of", lambda _b: torch.device("cpu"))
    monkeypatch.setattr("so8tqc.sources.compare.gpu_distribution", _Delayed)
    monkeypatch.setattr(
        "so8tqc.sources.compare.gpu_token_rows", lambda a, b, _goal: token_rows(a.side, b.side)
    )
    for pair, table in compare(sources, [("a", "b"), ("c", "b")], texts).items():
        for name, values in expected[pair].columns.items():
            np.testing.assert_allclose(table.columns[name], values, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(table.position, expected[pair].position)
    sources[1]._logits[1][150, 7] = np.nan
    with pytest.raises(
        DataError, match=r"t1: b yields a non-finite logit at position 150, token 7"
    ):
        compare(sources, [("a", "b")], texts)


def test_a_gpu_that_is_hidden_later_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, sources = setup()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert compare(sources, [("a", "b")], texts)


def test_a_full_gpu_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, sources = setup()

    def full(*_args: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")

    monkeypatch.setattr("so8tqc.sources.compare._gpu_of", lambda _b: torch.device("cpu"))
    monkeypatch.setattr("so8tqc.sources.compare.gpu_distribution", full)
    with pytest.raises(ToolError, match=r"t0: the GPU's memory does not suffice .*--device-map"):
        compare(sources, [("a", "b")], texts)

"""What a quantized cache of keys and values costs, as a candidate of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from captured_gguf import token_texts, write_capture, write_model
from so8tqc.config import QCConfig
from so8tqc.errors import ToolError
from so8tqc.llama.isolated import IsolatedModel
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.services.qc.service import qc

KINDS = ("q8_0", "q4_0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 128 features."""
    return write_model(tmp_path_factory.mktemp("kv") / "m.gguf")


def logits(path: Path, kind: str) -> np.ndarray:
    tokens = token_texts()[0]
    model = IsolatedModel(path, kv_type=kind)
    try:
        model.begin(tokens.size)
        return model.decode(tokens, 0).astype(np.float64).copy()
    finally:
        model.close()


def test_a_coarser_cache_is_further_away(model: Path) -> None:
    exact = logits(model, "f16")
    far = {kind: np.abs(logits(model, kind) - exact).mean() for kind in KINDS}
    assert 0 < far["q8_0"] < far["q4_0"] / 4


def test_each_cache_is_a_candidate_of_its_own(model: Path, tmp_path: Path) -> None:
    capture = write_capture(tmp_path / "c.safetensors", model)
    config = QCConfig(
        reference=capture, candidates=(model,), out=tmp_path / "qc", kv_types=("f16", *KINDS)
    )
    record = qc(config)
    found = QCMetrics.of(record).candidates
    assert {n: c.kv_type for n, c in found.items()} == {
        "m.gguf": None, "m.gguf (kv q8_0)": "q8_0", "m.gguf (kv q4_0)": "q4_0"
    }  # fmt: skip
    kl = {c.kv_type: c.kl_mean for c in found.values()}
    assert kl[None] < kl["q8_0"] < kl["q4_0"]
    assert record.check("kl.mean", "m.gguf (kv q4_0)").value == kl["q4_0"]
    told = [notice for notice in record.notices if "cache of keys and values in" in notice]
    assert len(told) == 2
    assert f"{kl['q4_0']:.3g}" in told[1]
    pairs = QCMetrics.of(record).comparisons
    assert pairs is not None
    assert len(pairs["pairs"]) == 3


def test_heads_that_cannot_be_cut_into_blocks_fail_as_that_candidate(tmp_path: Path) -> None:
    narrow = write_model(tmp_path / "n.gguf", width=32)
    with pytest.raises(ToolError, match="cannot make a context"):
        IsolatedModel(narrow, kv_type="q8_0")
    capture = write_capture(tmp_path / "c.safetensors", narrow)
    config = QCConfig(
        reference=capture, candidates=(narrow,), out=tmp_path / "qc", kv_types=("q8_0",)
    )
    record = qc(config)
    assert record.check("logits.run", "n.gguf (kv q8_0)").failed
    assert record.check("kl.mean", "n.gguf").verdict == "pass"

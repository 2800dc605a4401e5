"""Conversations in qc, capture and calibrate: the answers alone, and the file's own template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chat_templates import PLAIN, with_template
from so8tqc.config import CaptureConfig, QCConfig
from so8tqc.errors import DataError
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.services.capture import capture
from so8tqc.services.qc.service import qc
from so8tqc.sources.capture import open_capture
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import load_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "chat.jsonl"
    words = ("river", "mill", "boat", "lamp", "stone", "winter")
    rows = [{"prompt": f"Where is the {w}?", "text": f"Behind the other {w}."} for w in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers_nll(model: Path, data: str) -> list[float]:
    """Of every answer token, by transformers' own forward in float64."""
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float64)
    found: list[float] = []
    for text in prepare([data], load_tokenizer(model), None, chat=True).texts:
        ids = torch.from_numpy(text.tokens)[None]
        with torch.inference_mode():
            scores = live(ids).logits[0].log_softmax(-1)
        found += [-float(scores[i - 1, ids[0, i]]) for i in np.flatnonzero(text.answers)]
    return found


def test_the_answers_alone_are_scored(
    make_model: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    a = with_template(make_model("llama", "float32"), tmp_path / "a", PLAIN)
    b = with_template(make_model("llama", "bfloat16"), tmp_path / "b", PLAIN + "{# b #}")
    config = {"reference": a, "candidates": [b], "data": [data], "chat": True}
    record = qc(QCConfig.model_validate({**config, "out": tmp_path / "qc"}))
    found = QCMetrics.of(record).candidates["b"]
    exact = answers_nll(a, data)
    assert found.tokens == len(exact)
    assert found.nll_reference == pytest.approx(np.mean(exact), rel=1e-5)
    assert record.check("chat.template", "b").verdict == "pass"
    assert any("tokens of answers are scored" in notice for notice in record.notices)

    made = tmp_path / "ref.safetensors"
    capture(CaptureConfig(model=a, data=(data,), chat=True, out=made))
    recorded = open_capture(made).texts
    assert sum(text.scored.size for text in recorded) == len(exact)
    again = qc(QCConfig(reference=made, candidates=(b,), out=tmp_path / "qc2"))
    assert QCMetrics.of(again).candidates["b"].kl_mean == pytest.approx(found.kl_mean, rel=1e-6)


def test_a_template_that_renders_otherwise_fails(
    make_model: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    a = with_template(make_model("llama", "float32"), tmp_path / "a", PLAIN)
    b = with_template(make_model("llama", "bfloat16"), tmp_path / "b", "x" + PLAIN)
    bare = make_model("llama", "bfloat16")
    config = QCConfig(
        reference=a, candidates=(b, bare), data=(data,), chat=True, out=tmp_path / "qc"
    )
    record = qc(config)
    check = record.check("chat.template", "b")
    assert (check.value, check.failed) == (6, True)
    assert "character 0" in check.detail
    assert "would guess" in record.check("chat.template", bare.name).detail


def test_conversations_are_refused_without_chat(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    config = QCConfig(reference=llama, candidates=(llama,), data=(str(path),), out=tmp_path / "qc")
    with pytest.raises(DataError, match="Give --chat"):
        qc(config)

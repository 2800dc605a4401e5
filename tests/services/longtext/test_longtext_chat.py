"""Long conversations: the answers alone are scored, and what stands before them is continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chat_templates import PLAIN, with_template
from so8tqc.cli.main import run
from so8tqc.config import LongTextConfig
from so8tqc.errors import DataError
from so8tqc.records import Verdict
from so8tqc.services.longtext.generation import prompt_of
from so8tqc.services.longtext.judging import Case
from so8tqc.services.longtext.service import longtext
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import load_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> str:
    """One conversation of several turns."""
    path = tmp_path / "chat.jsonl"
    words = ("river", "mill", "boat", "lamp", "stone", "winter", "meadow", "harbour")
    turns = [
        {"role": role, "content": text}
        for word in words
        for role, text in (
            ("user", f"Where is the {word}, and who has seen it last?"),
            ("assistant", f"Behind the other {word}; the miller's daughter saw it on Monday."),
        )
    ]
    path.write_text(json.dumps({"id": "talk", "messages": turns}) + "\n")
    return str(path)


def test_answers_are_scored_and_the_first_question_is_continued(
    make_model: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    a = with_template(make_model("llama", "float32"), tmp_path / "a", PLAIN)
    b = with_template(make_model("llama", "bfloat16"), tmp_path / "b", PLAIN)
    config = LongTextConfig(
        model=b, reference=a, data=(data,), chat=True, min_tokens=128, max_new_tokens=8,
        resamples=100, png=False, out=tmp_path / "long",
    )  # fmt: skip
    record = longtext(config)
    assert record.check("chat.template", "b").verdict is Verdict.PASS
    (text,) = prepare([data], load_tokenizer(a), 128, chat=True).texts
    with np.load(tmp_path / "long" / "series.npz") as series:
        position, nll = series["talk/position"], series["talk/nll_reference"]
        written = series["talk/generated_reference"]
    assert text.answers is not None
    assert np.array_equal(position + 1, np.flatnonzero(text.answers))

    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(str(a), dtype=torch.float64)
    ids = torch.from_numpy(text.tokens)[None]
    with torch.inference_mode():
        scores = live(ids).logits[0].log_softmax(-1)
        prompt = torch.from_numpy(prompt_of(Case(text)).copy())[None]
        exact = live.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    expected = [-float(scores[i, ids[0, i + 1]]) for i in position]
    assert nll == pytest.approx(expected, rel=1e-4)
    assert prompt.shape[1] == int(text.answers.argmax())
    assert list(written) == exact.tolist()[: len(written)]


def test_a_template_that_renders_otherwise_fails_and_the_command_takes_the_flag(
    make_model: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    a = with_template(make_model("llama", "float32"), tmp_path / "a", PLAIN)
    b = with_template(make_model("llama", "bfloat16"), tmp_path / "b", "x" + PLAIN)
    arguments = [
        "longtext", b, "--reference", a, "--tokenizer", a, "--data", data, "--min-tokens", "128",
        "--max-new-tokens", "0", "--no-png", "--out", tmp_path / "long",
    ]  # fmt: skip
    assert run([*map(str, arguments), "--chat"]) == 1
    told = json.loads((tmp_path / "long" / "record.json").read_text())
    (check,) = [c for c in told["checks"] if c["id"] == "chat.template"]
    assert (check["verdict"], check["value"]) == ("fail", 1)


def test_conversations_without_the_flag_are_refused(
    make_model: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    model = make_model("llama", "float32")
    config = LongTextConfig(
        model=model, data=(data,), min_tokens=64, max_new_tokens=0, out=tmp_path / "long"
    )
    with pytest.raises(DataError, match="Give --chat"):
        longtext(config)

"""Attention entropy against eager attention, and the long-text stage on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.config import BakeConfig, LongTextConfig
from so8tqc.errors import DataError, InputError
from so8tqc.records import Record, Verdict
from so8tqc.services.bake import bake
from so8tqc.services.longtext import longtext
from so8tqc.sources.attention import attention_entropy
from so8tqc.sources.hf import HFModel

TOKENS = np.random.default_rng(0).integers(3, 500, size=300)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "qwen2_vl"])
def test_entropies_are_those_of_eager_attention(
    architecture: str, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped queries, head_dim ≠ hidden/heads, and a sliding window of 64 within 300 tokens."""
    monkeypatch.setattr("so8tqc.sources.attention.QUERY_BLOCK", 48)
    directory = make_model(architecture)
    model = HFModel.load(directory)
    plain = model.head(model.hidden(TOKENS))
    with attention_entropy(model) as collector:
        ours = model.head(model.hidden(TOKENS))
    torch.testing.assert_close(ours, plain, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(model.head(model.hidden(TOKENS)), plain)

    eager = HFModel.load(directory, dtype="float64", attention="eager")
    with torch.no_grad():
        output = eager.module(torch.from_numpy(TOKENS)[None], output_attentions=True)
    for layer, weights in enumerate(output.attentions):
        expected = torch.special.entr(weights[0]).sum(-1)
        np.testing.assert_allclose(collector.layers[layer], expected, atol=2e-4)


@pytest.fixture
def long_texts(tmp_path: Path) -> Path:
    root = Path(__file__).parent.parent.parent / "data"
    texts = json.loads((root / "longtext_en.json").read_text(encoding="utf-8"))
    path = tmp_path / "long.json"
    path.write_text(json.dumps({k: texts[k][:1] for k in ("ids", "texts", "prompts")}))
    return path


def run(model: Path, base: Path, gates: Path, texts: Path, out: Path, **options: object) -> Record:
    defaults: dict[str, object] = {"min_tokens": 256, "max_new_tokens": 12, "png": False}
    return longtext(
        LongTextConfig(
            model=model,
            reference=base,
            rotations=gates,
            data=(str(texts),),
            out=out,
            resamples=200,
            **{**defaults, **options},  # type: ignore[arg-type]
        )
    )


def test_a_correct_bake_passes_and_leaves_plots(
    llama: Path, make_gates: Callable[..., Path], long_texts: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    record = run(tmp_path / "baked", llama, gates, long_texts, tmp_path / "out")
    assert [c.id for c in record.checks if c.verdict is not Verdict.PASS] == []
    assert record.check("phase.layer0").value == 0.0
    assert len(record.checks) == 8
    for name in ("scientific_explanation_oscillation", "scientific_explanation_entropy"):
        html = (tmp_path / "out" / f"{name}.html").read_text()
        assert "Plotly.newPlot" in html
        assert 'src="http' not in html
    with np.load(tmp_path / "out" / "series.npz") as series:
        assert series["scientific_explanation/kl"].size == 255
        assert series["scientific_explanation/attention_entropy"].shape == (3, 256)
        assert series["scientific_explanation/generated_candidate"].size == 12


def test_a_rope_base_changed_after_the_bake_fails_the_self_test(
    llama: Path, make_gates: Callable[..., Path], long_texts: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    path = tmp_path / "baked" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] *= 1.05
    path.write_text(json.dumps(config))
    record = run(tmp_path / "baked", llama, gates, long_texts, tmp_path / "out")
    assert record.check("phase.layer0").verdict is Verdict.FAIL


def test_an_oscillating_head_fails(
    llama: Path, make_gates: Callable[..., Path], long_texts: Path, tmp_path: Path
) -> None:
    """Louder hidden states in the last norm swing the maximum logit more."""
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    shutil.copytree(tmp_path / "baked", tmp_path / "loud")
    file = tmp_path / "loud" / "model.safetensors"
    tensors = load_file(str(file))
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, str(file), metadata={"format": "pt"})
    record = run(tmp_path / "loud", llama, gates, long_texts, tmp_path / "out", max_new_tokens=0)
    assert record.check("oscillation.index").verdict is Verdict.FAIL
    assert record.check("phase.layer0").verdict is Verdict.PASS


def test_without_a_reference_nothing_is_judged(
    llama: Path, long_texts: Path, tmp_path: Path
) -> None:
    config = LongTextConfig(
        model=llama, data=(str(long_texts),), out=tmp_path / "out", min_tokens=128,
        max_new_tokens=4, png=False,
    )  # fmt: skip
    record = longtext(config)
    assert record.verdict is Verdict.SKIP
    assert all(check.verdict is Verdict.SKIP for check in record.checks)


def test_texts_that_are_too_short_or_too_long(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, long_texts: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama)
    with pytest.raises(DataError, match=r"t0: has \d+ tokens, 256 are asked for"):
        run(llama, llama, gates, texts_file, tmp_path / "out")
    with pytest.raises(DataError, match="600 tokens are more than the model's context of 512"):
        run(llama, llama, gates, long_texts, tmp_path / "out", min_tokens=600)
    with pytest.raises(InputError, match="need the base model"):
        longtext(LongTextConfig(model=llama, rotations=gates, data=(str(long_texts),),
                                out=tmp_path / "out"))  # fmt: skip


@pytest.mark.png
def test_images_are_drawn(
    llama: Path, make_gates: Callable[..., Path], long_texts: Path, tmp_path: Path
) -> None:
    record = run(llama, llama, make_gates(llama), long_texts, tmp_path / "out",
                 png=True, max_new_tokens=0)  # fmt: skip
    assert record.notices == ()
    images = sorted((tmp_path / "out").glob("*.png"))
    assert [i.name for i in images] == [
        "scientific_explanation_entropy.png", "scientific_explanation_oscillation.png",
    ]  # fmt: skip
    for image in images:
        assert image.read_bytes().startswith(b"\x89PNG")
        assert image.stat().st_size > 20_000

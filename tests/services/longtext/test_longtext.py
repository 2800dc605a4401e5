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
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.longtext.service import _Models, _wavelengths, longtext
from so8tqc.services.pages import draw_pages
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


def run(model: Path, base: Path, gates: Path, texts: Path, out: Path, **options: object) -> Record:
    defaults: dict[str, object] = {"min_tokens": 256, "max_new_tokens": 40, "png": False}
    record = longtext(
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
    draw_pages(record, out)
    return record


def test_a_correct_bake_passes_and_leaves_plots(
    llama: Path, make_gates: Callable[..., Path], long_texts: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    record = run(tmp_path / "baked", llama, gates, long_texts, tmp_path / "out")
    # the gates have no PET record, so there is no promise to keep
    assert [c.id for c in record.checks if c.verdict is not Verdict.PASS] == ["pet.effect"]
    generation = record.metrics["cases"]["scientific_explanation"]["generation"]
    for suffix in ("", "_sampled"):
        assert generation[f"candidate{suffix}"] == generation[f"reference{suffix}"]
    assert record.check("phase.layer0").value == 0.0
    assert len(record.checks) == 13
    for name in ("scientific_explanation_oscillation", "scientific_explanation_entropy"):
        html = (tmp_path / "out" / f"{name}.html").read_text()
        assert "Plotly.newPlot" in html
        assert 'src="http' not in html
    with np.load(tmp_path / "out" / "series.npz") as series:
        assert series["scientific_explanation/kl"].size == 255
        for name in ("attention_entropy", "attention_entropy_reference"):
            assert series[f"scientific_explanation/{name}"].shape == (3, 256)
        assert series["scientific_explanation/generated_candidate_sampled"].size == 40


def test_rotated_queries_of_layer_0_raise_no_alarm(
    llama: Path, long_texts: Path, tmp_path: Path
) -> None:
    """They change layer 0's attention, in the gated reference just as in the bake."""
    theta = {
        Target(i, module): np.random.default_rng(i).normal(size=(8, 8, 8)) * 0.3
        for i in range(3)
        for module in ("self_attn.q_proj", None)
    }
    gates = tmp_path / "gates.safetensors"
    write_native(
        gates,
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    record = run(tmp_path / "baked", llama, gates, long_texts, tmp_path / "out", max_new_tokens=0)
    check = record.check("phase.layer0")
    assert check.verdict is Verdict.SKIP
    assert "rotations change" in check.detail


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
        model=llama,
        data=(str(long_texts),),
        out=tmp_path / "out",
        min_tokens=128,
        max_new_tokens=4,
        png=False,
    )
    record = longtext(config)
    assert record.verdict is Verdict.SKIP
    assert all(check.verdict is Verdict.SKIP for check in record.checks)
    assert {check.id for check in record.checks} == {
        "phase.layer0",
        "phase.attention",
        "phase.dips",
        "phase.position",
        "oscillation.index",
        "oscillation.von_neumann",
        "oscillation.high_frequency",
        "oscillation.repetition",
        "oscillation.compression",
        "oscillation.loops",
        "pet.energy",
        "pet.high_frequency",
        "pet.effect",
    }


def test_texts_that_are_too_short_or_too_long(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, long_texts: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama)
    with pytest.raises(DataError, match=r"t0: has \d+ tokens, 256 are asked for"):
        run(llama, llama, gates, texts_file, tmp_path / "out")
    with pytest.raises(DataError, match="600 tokens are more than the model's context of 512"):
        run(llama, llama, gates, long_texts, tmp_path / "out", min_tokens=600)
    with pytest.raises(DataError, match=r"256 new tokens, 384 in all, are more than .* of 300"):
        shorter = shutil.copytree(llama, tmp_path / "shorter")
        config = json.loads((shorter / "config.json").read_text())
        (shorter / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
        run(shorter, llama, gates, long_texts, tmp_path / "out", max_new_tokens=256)
    with pytest.raises(InputError, match="need the base model"):
        longtext(
            LongTextConfig(
                model=llama, rotations=gates, data=(str(long_texts),), out=tmp_path / "out"
            )
        )


def test_files_are_named_after_cases_and_notices_of_the_gates_are_kept(
    llama: Path, tmp_path: Path
) -> None:
    words = "The stars form, live and die, and we see them all at once. " * 40
    texts = tmp_path / "texts.jsonl"
    ids = ("../a b", ".._a_b", "x" * 300)
    texts.write_text("\n".join(json.dumps({"id": i, "text": words}) for i in ids))
    gates = tmp_path / "gates.pt"
    generator = np.random.default_rng(0)
    key = "layers.{}.self_attn.o_proj.so8t_rotation_gate.theta"
    theta = {key.format(i): torch.from_numpy(generator.normal(size=(8, 8, 8))) for i in range(3)}
    torch.save(theta, gates)
    out = tmp_path / "out"
    out.mkdir()
    (out / "older_entropy.html").write_text("of another run")
    record = run(llama, llama, gates, texts, out, min_tokens=64, max_new_tokens=0)
    assert any("Recognised" in notice for notice in record.notices)
    assert list(record.outputs) == ["series.npz"]
    drawn = draw_pages(record, out)
    assert sorted(path.name for path in drawn.files) == sorted(
        f"{stem}_{kind}.html"
        for stem in (".._a_b", ".._a_b~2", "x" * 100)
        for kind in ("entropy", "oscillation")
    )
    assert (out / "older_entropy.html").read_text() == "of another run"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen2_vl"])
def test_wavelengths_are_those_the_model_turns_with(
    architecture: str, make_model: Callable[..., Path]
) -> None:
    model = HFModel.load(make_model(architecture))
    # Gemma 3 keeps a base for each kind of layer; the tiny one has sliding layers only
    base, width = {"llama": (1e4, 16), "gemma3_text": (1e4, 32), "qwen2_vl": (1e6, 16)}[
        architecture
    ]
    expected = 2 * np.pi * base ** (2 * np.arange(width // 2) / width)
    np.testing.assert_allclose(_wavelengths(_Models(model, None, None)), expected, rtol=1e-6)


def test_a_model_without_rope_has_no_wavelengths_to_look_for(
    llama: Path,
    make_gates: Callable[..., Path],
    long_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "so8tqc.services.longtext.service._wavelengths", lambda _models: np.empty(0)
    )
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    record = run(tmp_path / "baked", llama, gates, long_texts, tmp_path / "out", max_new_tokens=0)
    check = record.check("phase.dips")
    assert check.verdict is Verdict.SKIP
    assert "no RoPE" in check.detail
    assert record.check("phase.attention").verdict is Verdict.PASS
    assert (
        "Plotly.newPlot" in (tmp_path / "out" / "scientific_explanation_entropy.html").read_text()
    )


@pytest.mark.png
def test_images_are_drawn(
    llama: Path, make_gates: Callable[..., Path], long_texts: Path, tmp_path: Path
) -> None:
    record = run(
        llama, llama, make_gates(llama), long_texts, tmp_path / "out", png=True, max_new_tokens=0
    )
    assert record.notices == ()
    images = sorted((tmp_path / "out").glob("*.png"))
    assert [i.name for i in images] == [
        "scientific_explanation_entropy.png",
        "scientific_explanation_oscillation.png",
    ]
    for image in images:
        assert image.read_bytes().startswith(b"\x89PNG")
        assert image.stat().st_size > 20_000

"""A tenth of all types, another one every day; and the kinds of faults that a sweep has found."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import page
import pytest
import sweep
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.checkpoints.sites import layers_with_attention, locate
from so8tqc.config import BakeConfig, QCConfig
from so8tqc.errors import ModelError, RotationError, ToolError
from so8tqc.llama.config_keys import derived, missing_keys
from so8tqc.llama.converter import in_plain_words
from so8tqc.records import Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.export import logits as export_logits
from so8tqc.services.qc.service import qc
from so8tqc.sources.converted.history import places_of
from so8tqc.sources.converted.unasked_keys import unasked
from so8tqc.sources.hf import HFModel
from so8tqc.sources.routing import Choice, ties, watching

TENTH = [
    k
    for i, k in enumerate(tiny_models.types())
    if i % 10 == datetime.datetime.now(datetime.UTC).toordinal() % 10
]


def built(kind: str, directory: Path, tokenizer: Path) -> Path:
    tiny_models.build(kind, directory, tokenizer, sweep.VOCABULARY)
    return directory


@pytest.mark.parametrize("kind", TENTH)
def test_a_type_of_today_is_baked_right_or_refused(
    kind: str, tokenizer_files: Path, tmp_path: Path
) -> None:
    """The oracle: transformers' own float64 logits with pre-hooks x ↦ R·x."""
    shutil.copytree(tokenizer_files, tmp_path / "sentencepiece")
    row = sweep.sweep(kind, tmp_path, tmp_path, export=False)
    if row.bake.startswith("not built"):
        pytest.skip(row.bake)
    assert row.bake == "pass" or row.bake.startswith("refused: "), row
    if row.bake == "pass":
        assert row.error is None or row.error <= sweep.RIGHT, row
        assert row.files == "pass", row
        assert row.unbaked.startswith("FAIL"), row


def test_what_is_stored_in_by_out_is_asked_of_the_module(
    tokenizer_files: Path, tmp_path: Path
) -> None:
    """openai-gpt's projection is square and a Conv1D: no shape tells, only its module."""
    row = sweep.Row("openai-gpt")
    base = built("openai-gpt", tmp_path / "base", tokenizer_files)
    rotations = sweep.write_gates(base, tmp_path / "gates.safetensors")
    (first, *_) = locate((Target(0, "attn.c_proj"),), open_checkpoint(base))
    assert first.transposed
    config = BakeConfig(base=base, rotations=tmp_path / "gates.safetensors", out=tmp_path / "baked")
    record = bake(config)
    assert record.check("algebra.projection").verdict is Verdict.PASS
    gated, folded = sweep.logits(base, rotations), sweep.logits(tmp_path / "baked")
    assert float((gated - folded).abs().max()) < 1e-4, row


def test_a_projection_folded_along_the_wrong_axis_fails_as_it_is_run(
    tokenizer_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from so8tqc.checkpoints import sites

    base = built("openai-gpt", tmp_path / "base", tokenizer_files)
    sweep.write_gates(base, tmp_path / "gates.safetensors")
    monkeypatch.setattr(sites, "_transposed", lambda *_: False)
    config = BakeConfig(base=base, rotations=tmp_path / "gates.safetensors", out=tmp_path / "baked")
    record = bake(config)
    assert record.check("algebra.exact").verdict is Verdict.PASS  # it is blind to this
    assert record.check("algebra.projection").verdict is Verdict.FAIL


def shared_gates(path: Path, layers: tuple[int, ...], *, same: bool) -> Path:
    theta = {
        Target(i, "shared_transformer.self_attn.o_proj"): 0.05
        * np.random.default_rng(0 if same else i).normal(size=(24, 8, 8))
        for i in layers
    }
    write_native(
        path,
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    return path


@pytest.mark.parametrize(
    ("layers", "same", "says"),
    [
        ((1,), True, "at once, but layer"),
        ((1, 3, 5), False, "different gates, but one weight"),
    ],
)
def test_other_gates_for_a_shared_weight_are_refused(
    layers: tuple[int, ...], same: bool, says: str, tokenizer_files: Path, tmp_path: Path
) -> None:
    base = built("zamba2", tmp_path / "base", tokenizer_files)
    gates = shared_gates(tmp_path / "g.safetensors", layers, same=same)
    config = BakeConfig(
        base=base, rotations=gates, out=tmp_path / "baked", layers=",".join(map(str, layers))
    )
    with pytest.raises(RotationError, match=says):
        bake(config)


def test_equal_gates_for_a_shared_weight_are_folded_once(
    tokenizer_files: Path, tmp_path: Path
) -> None:
    row = sweep.Row("zamba2")
    base = built("zamba2", tmp_path / "base", tokenizer_files)
    rotations = sweep.write_gates(base, tmp_path / "g.safetensors")
    config = BakeConfig(base=base, rotations=tmp_path / "g.safetensors", out=tmp_path / "baked")
    assert bake(config).verdict is Verdict.PASS
    plain, gated = sweep.logits(base), sweep.logits(base, rotations)
    folded = sweep.logits(tmp_path / "baked")
    assert float((gated - folded).abs().max()) < 1e-4 * float((gated - plain).abs().max()), row


def test_a_hybrid_wants_gates_for_its_attention_layers_alone(
    tokenizer_files: Path, tmp_path: Path
) -> None:
    base = built("qwen3_next", tmp_path / "base", tokenizer_files)
    assert layers_with_attention(open_checkpoint(base)) == {3}
    theta = {Target(3): np.zeros((16, 8, 8))}
    for name, gates in (("right", theta), ("wrong", {Target(2): np.zeros((16, 8, 8))})):
        write_native(
            tmp_path / f"{name}.safetensors",
            gates,
            parametrization=Parametrization.EXP,
            convention=Convention.COLUMN,
            site=Site.INPUT,
            pet=None,
        )
    bake(
        BakeConfig(
            base=base,
            rotations=tmp_path / "right.safetensors",
            out=tmp_path / "baked",
            verify=False,
        )
    )
    with pytest.raises(RotationError, match=r"no gate for layer\(s\) 3"):
        bake(
            BakeConfig(base=base, rotations=tmp_path / "wrong.safetensors", out=tmp_path / "other")
        )


@pytest.mark.parametrize(
    "kind",
    [
        "falcon_h1",
        "hyperclovax",
        "gemma2",
        "cohere",
        "granite",
        "opt",
        "llama4_text",
        "mpt",
        "nanochat",
    ],
)
def test_hidden_states_and_head_make_the_models_own_logits(
    kind: str, tokenizer_files: Path, tmp_path: Path
) -> None:
    """Multipliers, scalings and soft caps of each are the model's own forward's."""
    model = HFModel.load(built(kind, tmp_path / kind, tokenizer_files), dtype="float32")
    ids = np.arange(5, 40)
    with torch.inference_mode():
        whole = model.module(input_ids=torch.from_numpy(ids)[None]).logits[0]
    parted = model.head(model.hidden(ids))
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_a_gguf_without_the_models_tensors_fails_at_level_files(
    llama: Path, tmp_path: Path
) -> None:
    """Gates of q_proj alone, whose rows a converter rearranges; of the file one tensor is left."""
    import gguf

    width = open_checkpoint(llama).tensors["model.layers.0.self_attn.q_proj.weight"].shape[1]
    write_native(
        tmp_path / "g.safetensors",
        {Target(i, "self_attn.q_proj"): np.ones((width // 8, 8, 8)) for i in range(3)},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("blk.0.attn_output.weight", np.ones((8, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = QCConfig(
        reference=llama,
        rotations=tmp_path / "g.safetensors",
        candidates=(tmp_path / "x.gguf",),
        out=tmp_path / "qc",
        level="files",
    )
    record = qc(config)
    assert "tensors.honest" in {c.id for c in record.checks if c.verdict is Verdict.FAIL}


def test_two_sets_of_weights_are_one_or_refused(llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tensors = load_file(str(model / "model.safetensors"))
    save_file(tensors, str(model / "part.safetensors"), metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [f.name for f in open_checkpoint(model).files] == ["model.safetensors"]
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, str(model / "part.safetensors"))
    with pytest.raises(ModelError, match=f"two different sets of weights.*{name}"):
        open_checkpoint(model)


def test_a_key_that_the_converter_misses_is_derived_or_left(tmp_path: Path) -> None:
    assert missing_keys("exit 1: KeyError: 'rotary_pct'") == ["rotary_pct"]
    many = "KeyError: \"could not find any of: ['rotary_dim', 'rope_dim']\""
    assert missing_keys(many) == ["rotary_dim", "rope_dim"]
    assert missing_keys("AssertionError") == []
    config: dict[str, Any] = {
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5e5},
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 99,
    }
    expected = {"rotary_pct": 0.25, "rotary_dim": 4, "rope_theta": 5e5, "head_dim": 16, "n_ctx": 99}
    assert {key: derived(key, config, tmp_path, {}) for key in expected} == expected
    assert derived("topk_method", config, tmp_path, {}) is None


def test_what_lists_of_layers_and_stored_tensors_say_is_derived(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "head_dim": 8,
        "num_key_value_heads": 2,
    }
    shapes = {
        "model.layers.0.self_attn.k_proj.weight": (16, 64),
        "model.layers.1.self_attn.k_proj.weight": (32, 64),
        "model.layers.1.mlp.gate.e_score_correction_bias": (4,),
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    expected = {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "topk_method": "noaux_tc",
        "swa_num_key_value_heads": 4,  # twice the others': only the weights say it
        "swa_head_dim": 8,
    }
    assert {key: derived(key, config, tmp_path, shapes) for key in expected} == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mixtral", {"scoring_func": "softmax"}),
        ("minimax_m2", {"scoring_func": "sigmoid"}),
        ("glm4_moe_lite", {"scoring_func": "sigmoid", "first_k_dense_replace": 1}),
        ("afmoe", {"scoring_func": "sigmoid", "route_norm": True}),
        ("llama", {}),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention", "mamba", "attention"]}),
        ("bamba", {"attn_rotary_emb": 12}),
        ("gemma4_unified", {}),  # its layers of full attention have a head_dim of their own
    ],
)
def test_what_a_configuration_leaves_unsaid_is_asked_of_transformers(
    kind: str, expected: dict[str, Any], tokenizer_files: Path, tmp_path: Path
) -> None:
    found = unasked(open_checkpoint(built(kind, tmp_path / kind, tokenizer_files)))
    assert {key: found.get(key) for key in expected} == expected
    assert expected or not found


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("KeyError: 'topk_method'", "asks the configuration for `topk_method`"),
        ("KeyError: \"could not find any of: ['n_shared_experts']\"", "'n_shared_experts'"),
        ("KeyError: '<|endoftext|>'", "looks for <|endoftext|> among the tokenizer's special"),
        ("KeyError: 'Missing hash routing tensor a.b'", "stops with: Missing hash routing tensor"),
        ("ValueError: Can not map tensor 'lm_head.weight'", "no name in GGUF for the tensor lm_"),
        ("AssertionError: `assert a is not None` does not hold", "own check `a is not None`"),
        ("ERROR:hf-to-gguf:Model Xy is not supported", "does not know models of class Xy"),
        ("TypeError: 'int' object is not iterable", "where this configuration has one number"),
        ("FileNotFoundError: File not found: /a/b/tokenizer.model", "needs tokenizer.model in"),
    ],
)
def test_a_refusal_of_the_converter_is_a_sentence(said: str, meant: str) -> None:
    error = in_plain_words(ToolError(f"the converter failed (exit 1): {said}", where="m"))
    assert meant in error.what
    assert "Error" not in error.what
    assert "/a/b" not in error.what


def test_a_tie_is_where_the_error_may_turn_a_choice() -> None:
    """Token 0 is clear; of 1 the second and third score are nearer than its error, of 2 equal."""
    exact = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.9, 0.5, 0.499, 0.0], [0.5, 0.3, 0.3, 0.1]])
    rounded = exact + torch.tensor([[0.01], [0.001], [0.0]])
    found = ties([Choice(exact, 2)], [Choice(rounded, 2)])
    assert found.tolist() == [False, True, True]
    clear = Choice(torch.tensor([[0.9, 0.1]] * 3), 1)
    assert not ties([clear], [clear]).any()
    assert ties([], []).size == 0


def test_choices_of_experts_are_noted_and_others_are_not() -> None:
    scores = torch.rand(5, 6)
    with watching(5) as watch:
        torch.topk(scores, 2, dim=-1)
        scores.topk(k=3, dim=1)
        torch.rand(7, 6).topk(2)  # of something else than the five tokens
        scores.topk(6)  # leaves none out
    assert [(choice.chosen, tuple(choice.scores.shape)) for choice in watch.choices] == [
        (2, (5, 6)),
        (3, (5, 6)),
    ]


@pytest.mark.parametrize(("first", "judged"), [(20, 20), (3, 63)])
def test_tokens_from_a_tie_on_are_counted_apart(
    first: int, judged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = np.zeros(64, dtype=bool)
    marked[[first, 40]] = True
    monkeypatch.setattr(export_logits, "ties", lambda *_: marked)
    run = export_logits.ModelRun(None, np.arange(64), torch.zeros(64, 2))  # type: ignore[arg-type]
    count, said = export_logits._before_ties({"kl": torch.ones(63)}, run, ())
    assert count == judged
    assert "at 2 tokens" in said


def test_the_page_counts_what_the_sweep_found() -> None:
    rows = page.read()
    written = page.PAGE.read_text(encoding="utf-8")
    assert written == page.page(rows), "run tests/architectures/page.py"
    assert ("internal errors (exit 70)", "0") in page.counts(rows)
    assert all(r["unbaked"].startswith("FAIL") for r in rows if r["bake"] == "pass")
    planted = [found for r in rows for found in r["faults"].values()]
    assert all(planted)
    assert len(planted) >= 200
    passed = [r for r in rows if r["export"] == "pass"]
    failed = [r for r in rows if "FAIL" in r["export"] and r["kind"] not in page.NOT_ALIKE]
    assert len(passed) >= 0.95 * (len(passed) + len(failed))


def test_places_tell_tensors_apart(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    assert sorted(places_of(checkpoint).values()) == sorted(checkpoint.tensors)

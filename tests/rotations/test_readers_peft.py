"""PEFT adapters: PEFT's own forward and merge are the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from so8tqc.errors import ConfigError, RotationError
from so8tqc.rotations.enums import Convention
from so8tqc.rotations.files.peft_oft import neumann_series
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import orthogonality_error


def oft_adapter(model: Path, directory: Path, **options: object) -> tuple[Path, object]:
    """A trained-looking OFT adapter, saved by PEFT; returns the live PEFT model too."""
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float64)
    config = OFTConfig(**{"r": 0, "oft_block_size": 8, "target_modules": ["o_proj"], **options})
    live = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in live.named_parameters():
        if "oft_R" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (noise * 0.01).to(torch.float32).double()
    live.save_pretrained(str(directory))
    return directory, live


@pytest.mark.parametrize(
    "options",
    [
        {"use_cayley_neumann": False},
        {"use_cayley_neumann": True},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 7, "oft_block_size": 16},
        {"use_cayley_neumann": False, "target_modules": ["q_proj", "down_proj"]},
        {"use_cayley_neumann": False, "coft": True, "eps": 0.05},
    ],
)
def test_adapters_give_what_pefts_forward_computes(
    llama: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    directory, live = oft_adapter(llama, tmp_path / "adapter", **options)
    got = read_rotations(directory)
    assert got.convention is Convention.ROW
    modules = dict(live.named_modules())  # type: ignore[attr-defined]
    for target in got:
        layer = modules[f"base_model.model.model.layers.{target.layer}.{target.module}"]
        rotate = layer.oft_R["default"].double()
        width = layer.base_layer.in_features
        with torch.no_grad():
            dense = rotate(torch.eye(width, dtype=torch.float64)).numpy()  # row i is e_i · R
        blocks = got.blocks[target]
        size = blocks.shape[1]
        expected = np.stack([dense[k : k + size, k : k + size] for k in range(0, width, size)])
        np.testing.assert_allclose(blocks, expected, rtol=0, atol=1e-12)
    assert len(got) == 3 * len(options.get("target_modules", ["o_proj"]))  # type: ignore[arg-type]


def test_the_two_branches_turn_in_opposite_directions(llama: Path, tmp_path: Path) -> None:
    exact = read_rotations(oft_adapter(llama, tmp_path / "exact", use_cayley_neumann=False)[0])
    series = read_rotations(oft_adapter(llama, tmp_path / "series", use_cayley_neumann=True)[0])
    for target in exact:
        np.testing.assert_allclose(
            exact.blocks[target], series.blocks[target].transpose(0, 2, 1), atol=1e-4
        )


def test_older_adapters_use_the_older_series(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a", use_cayley_neumann=True)
    config = json.loads((directory / "adapter_config.json").read_text())
    new = read_rotations(directory)
    config["peft_version"] = "0.17.1"
    (directory / "adapter_config.json").write_text(json.dumps(config))
    old = read_rotations(directory)
    assert "twice the last power" in old.notices[0]
    # last term Q⁴ once or twice: the difference is Q⁴, about (0.02)⁴
    gap = max(float(np.abs(new.blocks[t] - old.blocks[t]).max()) for t in new)
    assert 0 < gap < 1e-4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), terms=st.integers(5, 9))
def test_series_drift_grows_with_its_first_missing_power(seed: int, terms: int) -> None:
    q = np.random.default_rng(seed).normal(size=(2, 8, 8)) * 0.02
    q = q - q.transpose(0, 2, 1)
    r = neumann_series(q, terms, last_term_halved=False)
    exact = np.linalg.solve(np.eye(8) - q, np.eye(8) + q)
    missing = 2 * np.linalg.norm(np.linalg.matrix_power(q, terms), axis=(1, 2))
    error = np.linalg.norm(r - exact, axis=(1, 2))
    np.testing.assert_allclose(error, missing, rtol=0.2, atol=1e-15)
    assert (orthogonality_error(r) < 3 * missing + 1e-14).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "BOFT"}, "'BOFT'"),
        ({"peft_type": "LORA"}, "'LORA'"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_with_other_parts_are_refused_by_name(
    llama: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RotationError, match=message):
        read_rotations(directory)


def test_lora_tensors_among_the_rotations_are_refused(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a")
    weights = directory / "adapter_model.safetensors"
    extra = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((2, 2))}
    save_file({**load_file(str(weights)), **extra}, str(weights))
    with pytest.raises(RotationError, match=r"lora_A.*no OFT rotation"):
        read_rotations(directory)


def changed(directory: Path, **entries: object) -> Path:
    """Rewrite entries of the adapter's configuration; None removes one."""
    path = directory / "adapter_config.json"
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


@pytest.mark.parametrize("neumann", [True, False])
def test_the_fold_equals_pefts_merged_weight(llama: Path, tmp_path: Path, neumann: bool) -> None:
    options = {"use_cayley_neumann": neumann, "target_modules": ["o_proj", "up_proj"]}
    directory, live = oft_adapter(llama, tmp_path / "a", **options)
    names = dict(live.named_modules())  # type: ignore[attr-defined]
    prefix = "base_model.model.model.layers"
    got = read_rotations(directory)
    assert {t.module for t in got} == {"self_attn.o_proj", "mlp.up_proj"}
    before = {t: names[f"{prefix}.{t.layer}.{t.module}"].base_layer.weight.clone() for t in got}
    merged = dict(live.merge_and_unload().named_parameters())  # type: ignore[attr-defined]
    for target in got:
        weight = before[target].detach().numpy()
        c = got.column_blocks(target)
        folded = np.einsum("onj,njk->onk", weight.reshape(len(weight), *c.shape[:2]), c)
        theirs = merged[f"model.layers.{target.layer}.{target.module}.weight"].detach().numpy()
        np.testing.assert_allclose(folded.reshape(weight.shape), theirs, rtol=0, atol=1e-12)
        assert np.abs(theirs - weight).max() > 1e-3


@pytest.mark.parametrize("extra", [{}, {"coft": True, "eps": 0.05}])
def test_a_shared_block_is_one_block_marked_as_shared(
    llama: Path, tmp_path: Path, extra: dict[str, object]
) -> None:
    directory, live = oft_adapter(llama, tmp_path / "a", block_share=True, **extra)
    got = read_rotations(directory)
    assert got.shared
    for target in got:
        layer = dict(live.named_modules())[  # type: ignore[attr-defined]
            f"base_model.model.model.layers.{target.layer}.{target.module}"
        ]
        with torch.no_grad():
            width = layer.base_layer.in_features
            dense = layer.oft_R["default"].double()(torch.eye(width, dtype=torch.float64))
        (block,) = got.blocks[target]
        repeated = np.kron(np.eye(width // len(block)), block)
        np.testing.assert_allclose(repeated, dense.numpy(), rtol=0, atol=1e-12)


def test_a_number_of_blocks_instead_of_a_size(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a", r=4, oft_block_size=0)
    got = read_rotations(directory)
    assert all(got.blocks[target].shape == (4, 16, 16) for target in got)


def test_a_block_size_that_peft_changed_is_told(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a", oft_block_size=9)
    got = read_rotations(directory)
    assert "declares blocks of 9, but PEFT made blocks of 8" in got.notices[0]


def test_which_transform_was_trained_is_never_assumed(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a", use_cayley_neumann=False)
    changed(directory, use_cayley_neumann=None, num_cayley_neumann_terms=None)
    with pytest.raises(ConfigError, match=r"does not record use_cayley_neumann.*State in this"):
        read_rotations(directory)


def test_drift_is_reported_as_trained_and_after_polar(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a", use_cayley_neumann=True)
    trained = read_rotations(directory)
    polar = read_rotations(directory, RotationOptions(orthogonalize="polar"))
    worst = max(float(orthogonality_error(trained.blocks[t]).max()) for t in trained)
    assert f"{worst:.1e}" in trained.notices[-1]
    assert f"{worst:.1e} before" in polar.notices[-1]
    assert worst > 1e-9
    assert max(float(orthogonality_error(polar.blocks[t]).max()) for t in polar) < 1e-14


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rank_pattern": {"o_proj": 4}}, r"not understood: rank_pattern=\{'o_proj': 4\}"),
        ({"alpha_pattern": {"o_proj": 2.0}, "oft_alpha": 3}, "alpha_pattern.*oft_alpha=3"),
        ({"oft_block_size": None}, "before PEFT 0.14"),
        ({"num_cayley_neumann_terms": "five"}, "'five', expected a number"),
        ({"oft_block_size": [8]}, "expected a number"),
        ({"coft": True, "eps": float("inf")}, "eps is inf"),
        ({"block_share": True}, "block_share.*but 8 are stored"),
    ],
)
def test_configurations_that_are_not_understood(
    llama: Path, tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a", use_cayley_neumann=True)
    with pytest.raises(RotationError, match=message):
        read_rotations(changed(directory, **entries))


def test_settings_that_are_off_are_no_obstacle(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a")
    expected = read_rotations(directory).fingerprint
    assert (
        read_rotations(changed(directory, rank_pattern={}, use_new=False)).fingerprint == expected
    )


PREFIX = "base_model.model.model"


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (f"{PREFIX}.layers.0.self_attn.o_proj.oft_R.other.weight", (8, 28), "two rotations"),
        (f"{PREFIX}.vision_tower.encoder.layers.0.q_proj.oft_R.weight", (8, 28), "vision_tower"),
        (f"{PREFIX}.lm_head.oft_R.weight", (8, 28), "lm_head.*no OFT rotation of a numbered"),
        (f"{PREFIX}.layers.0.mlp.down_proj.bias", (4,), "down_proj.bias"),
        (f"{PREFIX}.layers.0.self_attn.q_proj.oft_R.weight", (8, 27), "27 is no triangle"),
        (f"{PREFIX}.layers.0.self_attn.q_proj.oft_R.weight", (28,), r"shape \[28\]"),
        (f"{PREFIX}.layers.0.self_attn.q_proj.oft_R.weight", (0, 28), r"shape \[0, 28\]"),
    ],
)
def test_tensors_that_are_no_rotations_are_refused_by_name(
    llama: Path, tmp_path: Path, key: str, shape: tuple[int, ...], message: str
) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a")
    weights = directory / "adapter_model.safetensors"
    save_file({**load_file(str(weights)), key: np.zeros(shape)}, str(weights))
    with pytest.raises(RotationError, match=message):
        read_rotations(directory)


@pytest.mark.parametrize("neumann", [True, False])
def test_a_non_finite_adapter_names_layer_and_block(
    llama: Path, tmp_path: Path, neumann: bool
) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a", use_cayley_neumann=neumann)
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(str(weights))
    tensors[f"{PREFIX}.layers.1.self_attn.o_proj.oft_R.weight"][3, 0] = np.nan
    save_file(tensors, str(weights))
    with pytest.raises(RotationError, match=r"layer 1 self_attn\.o_proj.*block 3.*non-finite"):
        read_rotations(directory)


def test_adapters_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    directory, _ = oft_adapter(llama, tmp_path / "a")
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    save_file({}, str(weights))
    with pytest.raises(RotationError, match="holds no rotations"):
        read_rotations(directory)
    weights.unlink()
    with pytest.raises(RotationError, match=r"adapter_model\.safetensors"):
        read_rotations(directory)
    for content, message in (("[1]", "JSON object"), ("{", "JSON"), ("[" * 10**5, "JSON")):
        config.write_text(content)
        with pytest.raises(RotationError, match=message):
            read_rotations(directory)

"""Reading rotations: every source, with PEFT's own forward as the oracle for adapters."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from so8tqc.config import RotationOptions
from so8tqc.errors import ExitCode, RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.native import write_native
from so8tqc.rotations.peft_oft import neumann_series
from so8tqc.rotations.read import parse_layers, read_rotations
from so8tqc.rotations.rotation_set import RotationSet, Target, orthogonality_error, rotation_angles


def theta(layers: int = 2, blocks: int = 3, scale: float = 0.2) -> dict[Target, np.ndarray]:
    generator = np.random.default_rng(0)
    return {Target(i): generator.normal(size=(blocks, 8, 8)) * scale for i in range(layers)}


def native(path: Path, values: dict[Target, np.ndarray] | None = None, **changes: object) -> Path:
    options: dict[str, object] = {
        "parametrization": Parametrization.EXP,
        "convention": Convention.COLUMN,
        "site": Site.INPUT,
        "pet": None,
    }
    write_native(path, values or theta(), **{**options, **changes})  # type: ignore[arg-type]
    return path


def test_native_round_trip(tmp_path: Path) -> None:
    path = native(
        tmp_path / "g.safetensors",
        parametrization=Parametrization.CAYLEY,
        convention=Convention.ROW,
        pet={"strength": 0.5},
    )
    got = read_rotations(path)
    assert (got.parametrization, got.convention, got.site) == ("cayley", "row", "input")
    assert json.loads(got.metadata["pet"]) == {"strength": 0.5}
    assert got.notices == ()
    assert got.layers == (0, 1)
    for target, value in theta().items():
        np.testing.assert_array_equal(got.theta[target], value)
        np.testing.assert_allclose(got.column_blocks(target), got.blocks[target].transpose(0, 2, 1))


def test_a_flag_overrides_the_header_with_a_notice(tmp_path: Path) -> None:
    path = native(tmp_path / "g.safetensors")
    got = read_rotations(path, RotationOptions(convention=Convention.ROW))
    assert got.convention is Convention.ROW
    assert "column" in got.notices[0]
    assert "row" in got.notices[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("so8t.format_version", "2"),
        ("so8t.parametrization", "magic"),
        ("so8t.convention", "diagonal"),
        ("so8t.site", "middle"),
    ],
)
def test_unknown_words_in_the_header_are_named(tmp_path: Path, key: str, value: str) -> None:
    path = native(tmp_path / "g.safetensors")
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as handle:
        header = dict(handle.metadata())
    save_file(load_file(str(path)), str(path), metadata={**header, key: value})
    with pytest.raises(RotationError, match=key) as caught:
        read_rotations(path)
    assert value in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_INPUT


KEYS = (
    "layers.{}.rotation_gate.theta",
    "layers.{}.self_attn.rotation_gate.theta",
    "model.layers.{}.self_attn.rotation_gate.theta",
    "module.model.layers.{}.rotation_gate.theta",
    "base_model.model.model.layers.{}.self_attn.rotation_gate.theta",
)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_training_checkpoints(tmp_path: Path, key: str, container: str | None, suffix: str) -> None:
    values = theta()
    state = {key.format(t.layer): torch.from_numpy(v).float() for t, v in values.items()}
    state["model.embed_tokens.weight"] = torch.zeros(2, 2)
    path = tmp_path / f"ckpt{suffix}"
    torch.save({container: state, "step": 3} if container else state, path)
    got = read_rotations(path)
    assert got.layers == (0, 1)
    assert (got.parametrization, got.convention) == ("exp", "column")
    assert len(got.notices) == 3
    for target, value in values.items():
        np.testing.assert_array_equal(got.theta[target], value.astype(np.float32))


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, legacy: bool
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    if legacy:
        path.write_bytes(pickle.dumps(_Bomb(marker)))
    else:
        torch.save({"layers.0.rotation_gate.theta": _Bomb(marker)}, path)
    with pytest.raises(RotationError, match="nothing was run") as caught:
        read_rotations(path)
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()


def test_errors_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(RotationError, match="no such rotation file"):
        read_rotations(tmp_path / "absent.pt")
    with pytest.raises(RotationError, match="no PEFT adapter"):
        read_rotations(tmp_path)
    for name in ("junk.safetensors", "junk.pt"):
        (tmp_path / name).write_bytes(b"junk" * 10)
        with pytest.raises(RotationError, match=r"not a readable|no torch checkpoint"):
            read_rotations(tmp_path / name)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "none.pt")
    with pytest.raises(RotationError, match=r"no rotation gates.*found weight"):
        read_rotations(tmp_path / "none.pt")
    torch.save({"layers.0.rotation_gate.theta": torch.zeros(3, 8)}, tmp_path / "flat.pt")
    with pytest.raises(RotationError, match=r"theta is \[3, 8\]"):
        read_rotations(tmp_path / "flat.pt")
    both = {key.format(0): torch.zeros(1, 8, 8) for key in KEYS[:2]}
    torch.save(both, tmp_path / "two.pt")
    with pytest.raises(RotationError, match="two gates for layer 0"):
        read_rotations(tmp_path / "two.pt")


def test_non_finite_theta_names_layer_and_block(tmp_path: Path) -> None:
    values = theta()
    values[Target(1)][2, 0, 0] = np.nan
    with pytest.raises(RotationError, match=r"layer 1.*block 2.*non-finite"):
        read_rotations(native(tmp_path / "g.safetensors", values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b * 1.01, "not orthogonal"),
        (lambda b: b @ np.diag([-1.0] + [1.0] * 7), "reflection"),
        (lambda b: np.where(b == b[0, 0, 0], np.inf, b), "non-finite"),
    ],
)
def test_matrices_that_are_no_rotations(tmp_path: Path, change: object, message: str) -> None:
    good = {t: np.stack([np.eye(8)] * 2) for t in theta()}
    bad = {**good, Target(1): change(good[Target(1)])}  # type: ignore[operator]
    path = native(tmp_path / "g.safetensors", bad, parametrization=Parametrization.MATRIX)
    with pytest.raises(RotationError, match=f"layer 1.*{message}"):
        read_rotations(path)


def test_polar_replaces_a_drifted_matrix_by_the_nearest_rotation(tmp_path: Path) -> None:
    drifted = {t: np.stack([np.eye(8) * 1.01] * 2) for t in theta()}
    path = native(tmp_path / "g.safetensors", drifted, parametrization=Parametrization.MATRIX)
    got = read_rotations(path, RotationOptions(orthogonalize="polar"))
    np.testing.assert_allclose(got.blocks[Target(0)], np.stack([np.eye(8)] * 2), atol=1e-15)
    assert "before" in got.notices[0]


def test_layers_can_be_selected_and_must_exist(tmp_path: Path) -> None:
    path = native(tmp_path / "g.safetensors", theta(layers=4))
    assert read_rotations(path, RotationOptions(layers="0-1,3")).layers == (0, 1, 3)
    with pytest.raises(RotationError, match=r"no gate for layer\(s\) 7"):
        read_rotations(path, RotationOptions(layers="2,7"))
    assert parse_layers("0-2,5") == {0, 1, 2, 5}


def test_a_rotation_set_is_immutable_and_has_a_fingerprint(tmp_path: Path) -> None:
    path = native(tmp_path / "g.safetensors")
    one = read_rotations(path)
    other = read_rotations(path, RotationOptions(convention=Convention.ROW))
    assert one.fingerprint == read_rotations(path).fingerprint != other.fingerprint
    with pytest.raises(TypeError):
        one.blocks[Target(9)] = np.eye(8)[None]  # type: ignore[index]


def test_angles_of_a_known_rotation() -> None:
    block = np.eye(8)
    c, s = np.cos(0.7), np.sin(0.7)
    block[:2, :2] = [[c, -s], [s, c]]
    angles = np.sort(rotation_angles(block[None])[0])
    np.testing.assert_allclose(angles, [0, 0, 0, 0, 0, 0, 0.7, 0.7], atol=1e-12)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(RotationError, match="no rotations"):
        RotationSet({}, Convention.COLUMN, Site.INPUT, Parametrization.EXP, "nothing")


# --- PEFT -------------------------------------------------------------------------------------


def oft_adapter(model: Path, directory: Path, **options: object) -> tuple[Path, object]:
    """A trained-looking OFT adapter, saved by PEFT; returns the live PEFT model too."""
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float64)
    config = OFTConfig(r=0, **{"oft_block_size": 8, "target_modules": ["o_proj"], **options})
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
        ({"block_share": True}, "block_share"),
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

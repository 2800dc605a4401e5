"""Reading gate files and training checkpoints, and every way in which they can be wrong."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from so8tqc.errors import ConfigError, ExitCode, RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import Target


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


STATED = RotationOptions(
    parametrization=Parametrization.EXP, convention=Convention.COLUMN, site=Site.INPUT
)

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
    with pytest.raises(ConfigError, match="does not state its parametrization, convention, site"):
        read_rotations(path)
    got = read_rotations(path, STATED)
    assert got.layers == (0, 1)
    assert (got.parametrization, got.convention, got.site) == ("exp", "column", "input")
    assert got.notices == ()
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
    with pytest.raises(RotationError, match=r"no rotation gates.*none of its 1 keys"):
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
    with pytest.raises(RotationError, match=r"no gate for layer\(s\) 4, 5, .* …"):
        read_rotations(path, RotationOptions(layers="0-99999999999"))
    with pytest.raises(ConfigError, match=r"3-1 runs backwards.*1-3"):
        read_rotations(path, RotationOptions(layers="0,3-1"))


def test_polar_refuses_a_singular_block_and_a_reflection(tmp_path: Path) -> None:
    polar = RotationOptions(orthogonalize="polar")
    for value, message in ((0.0, "singular"), (-1.0, "reflection")):
        block = np.diag([value] + [1.0] * 7)
        path = native(
            tmp_path / "g.safetensors",
            {Target(0): np.stack([np.eye(8), block])},
            parametrization=Parametrization.MATRIX,
        )
        with pytest.raises(RotationError, match=f"layer 0.*block 1 is .*{message}"):
            read_rotations(path, polar)


def test_theta_too_large_for_its_rotation_is_named_without_numpy_warnings(tmp_path: Path) -> None:
    values = theta()
    values[Target(1)][2, 0, 1] = 1e300
    path = native(tmp_path / "g.safetensors", values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RotationError, match=r"layer 1.*block 2 is non-finite.*1\.0e\+300"):
            read_rotations(path)


def raw_native(path: Path, tensors: dict[str, np.ndarray], **header: str) -> Path:
    """A file as another program might write it."""
    words = {"format_version": "1", "parametrization": "exp", "convention": "column"}
    words |= {"site": "input", **header}
    save_file(tensors, str(path), metadata={f"so8t.{k}": v for k, v in words.items()})
    return path


KEY = "model.layers.0.self_attn.o_proj.theta"


def test_a_sparing_header_is_enough(tmp_path: Path) -> None:
    path = raw_native(tmp_path / "g.safetensors", {KEY: np.zeros((2, 8, 8), np.float32)})
    got = read_rotations(path)
    np.testing.assert_array_equal(got.blocks[Target(0)], np.stack([np.eye(8)] * 2))


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({KEY: np.zeros((2, 8, 8))}, {"block_size": "4"}, r"so8t\.block_size is '4'"),
        ({KEY: np.zeros((2, 8, 8))}, {"pet": "{strong"}, r"so8t\.pet is '\{strong'"),
        ({KEY: np.zeros((2, 8, 8))}, {"pet": "[1]"}, r"so8t\.pet"),
        ({KEY: np.zeros((2, 8, 8))}, {"parametrization": "matrix"}, r"does not fit .*\.rotation"),
        ({KEY: np.zeros((2, 8, 8), np.int32)}, {}, "int32, expected a float"),
        ({KEY: np.zeros((2, 8, 4))}, {}, r"shape \[2, 8, 4\]"),
        ({KEY: np.zeros((0, 8, 8))}, {}, r"shape \[0, 8, 8\]"),
        ({KEY: np.zeros((2, 0, 0))}, {}, r"shape \[2, 0, 0\]"),
        ({KEY: np.zeros((8, 8))}, {}, r"shape \[8, 8\]"),
        ({}, {}, "contains no rotations"),
        ({"lm_head.weight": np.zeros((2, 2))}, {}, "unexpected key 'lm_head.weight'"),
        (
            {KEY: np.zeros((1, 8, 8)), KEY.replace("0", "00"): np.zeros((1, 8, 8))},
            {},
            "two gates for layer 0",
        ),
    ],
)
def test_native_files_that_contradict_themselves(
    tmp_path: Path, tensors: dict[str, np.ndarray], header: dict[str, str], message: str
) -> None:
    path = raw_native(tmp_path / "g.safetensors", tensors, **header)
    with pytest.raises(RotationError, match=message) as caught:
        read_rotations(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one block size is needed"),
        ({Target(0): np.zeros((1, 8, 8)), Target(1): np.zeros((1, 4, 4))}, r"\[4, 8\]"),
        ({Target(0): np.zeros((8, 8))}, r"shape \[8, 8\]"),
        ({Target(0): np.zeros((1, 8, 8), np.float16)}, "float16"),
        (
            {t: np.zeros((1, 8, 8)) for t in (Target(0), Target(0, "self_attn.o_proj"))},
            "two gates for self_attn.o_proj",
        ),
    ],
)
def test_what_is_no_gate_file_is_not_written(
    tmp_path: Path, values: dict[Target, np.ndarray], message: str
) -> None:
    path = tmp_path / "g.safetensors"
    with pytest.raises(RotationError, match=message):
        write_native(
            path,
            values,
            parametrization=Parametrization.EXP,
            convention=Convention.COLUMN,
            site=Site.INPUT,
            pet=None,
        )
    assert list(tmp_path.iterdir()) == []


def test_other_modules_and_the_dtype_survive_a_round_trip(tmp_path: Path) -> None:
    values = {Target(3, "self_attn.q_proj"): np.full((2, 4, 4), 0.1, np.float32)}
    path = native(tmp_path / "g.safetensors", values, metadata={"trained_by": "us"})
    assert load_file(str(path))["model.layers.3.self_attn.q_proj.theta"].dtype == np.float32
    got = read_rotations(path)
    assert list(got) == list(values)
    assert got.metadata["trained_by"] == "us"


GATE = "model.layers.{}.self_attn.rotation_gate.theta"
ONE = torch.zeros(1, 8, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no rotation gates.*found nothing"),
        ([1, 2], "no rotation gates.*found nothing"),
        ({f"w{i}": ONE for i in range(9)}, "none of its 9 keys looks like a gate"),
        ({"vision_tower.encoder.layers.0.self_attn.rotation_gate.theta": ONE}, "vision_tower"),
        ({"model.layers.0.mlp.rotation_gate.theta": ONE}, r"layers\.0\.mlp.*elsewhere"),
        ({GATE.format(0): ONE, "state_dict": {GATE.format(0): ONE + 1}}, "two gates for layer 0"),
        (
            {"state_dict": {GATE.format(0): ONE}, "model_state_dict": {GATE.format(0): ONE + 1}},
            "two gates for layer 0",
        ),
        ({GATE.format(0): [1.0]}, "theta is list"),
        ({GATE.format(0): torch.zeros(1, 8, 8, dtype=torch.int64)}, "int64"),
        ({GATE.format(0): ONE.to_sparse()}, "expected a float tensor"),
        ({GATE.format(0): torch.zeros(1, 8, 4)}, r"shape \[1, 8, 4\]"),
        ({GATE.format(0): torch.zeros(0, 8, 8)}, r"shape \[0, 8, 8\]"),
    ],
)
def test_training_checkpoints_that_cannot_be_baked(
    tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "c.pt"
    torch.save(content, path)
    with pytest.raises(RotationError, match=message) as caught:
        read_rotations(path)
    assert str(path) in str(caught.value)


def test_buffers_of_a_gate_are_named_in_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    buffer = "model.layers.0.self_attn.rotation_gate.step"
    torch.save({GATE.format(0): ONE, buffer: torch.zeros(1)}, path)
    assert buffer in read_rotations(path, STATED).notices[0]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_truncated_checkpoint_is_an_error_wherever_it_ends(tmp_path: Path, zipped: bool) -> None:
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({GATE.format(0): ONE}, whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    for length in range(0, len(content) - 1, 7):
        cut.write_bytes(content[:length])
        with pytest.raises(RotationError, match=re.escape(str(cut))):
            read_rotations(cut)


@pytest.mark.parametrize("name", ["gates.npz", "gates"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(RotationError, match=r"unknown kind.*Give a \.safetensors"):
        read_rotations(tmp_path / name)

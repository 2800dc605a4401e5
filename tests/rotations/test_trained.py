"""Files that trainings save: wrappers, containers, names, and what is refused, and how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from so8tqc.errors import ConfigError, ExitCode, RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.names import unwrapped
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.read import open_raw, read_rotations
from so8tqc.rotations.readings import Reading, readings, rotation_set
from so8tqc.rotations.rotation_set import HEAD, Target
from trained_forms import rotation, thetas

STATED = RotationOptions(
    parametrization=Parametrization.EXP, convention=Convention.ROW, site=Site.INPUT
)
GATES = thetas(blocks=2)


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)  # type: ignore[arg-type]
    return path


def layered(pattern: str) -> dict[str, torch.Tensor]:
    return {pattern.format(i): gate for i, gate in enumerate(GATES)}


def found(path: Path, **options: object) -> dict[int, np.ndarray]:
    told = STATED.model_copy(update=options)
    return {target.layer: value for target, value in open_raw(path, told).theta.items()}


def assert_all(got: dict[int, np.ndarray]) -> None:
    assert sorted(got) == [0, 1, 2]
    for i, gate in enumerate(GATES):
        np.testing.assert_array_equal(got[i], gate.numpy())


WRAPPERS = [
    "_orig_mod.{}",
    "module.{}",
    "_orig_mod.module.{}",
    "base_model.model.{}",
    "base_model.{}",
    "_fsdp_wrapped_module.{}",
    "module._orig_mod.base_model.model.{}",
]
INSIDE = [
    "model.layers.{}.self_attn.rotation_gate.theta",
    "model.layers.{}._fsdp_wrapped_module.self_attn.rotation_gate.theta",
    "model.layers.{}._checkpoint_wrapped_module._orig_mod.self_attn.o_proj.gate.theta",
    "transformer.h.{}.attn.rotation_gate._orig_mod.theta",
    "model.layers.{}.self_attn.o_proj.so8_rotation",
    "model.rotation_gates.{}.theta",
    "layer_{}", "layers.{}", "{}", "so8t.layer_{}.theta",
]  # fmt: skip
CONTAINERS = [
    (),
    ("state_dict",),
    ("model_state_dict",),
    ("model",),
    ("module",),
    ("state_dict", "model"),
    ("params",),
    ("trainer", "gates"),
]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("wrapper", ["{}", *WRAPPERS])
def test_wrappers_in_names(tmp_path: Path, wrapper: str, inside: str) -> None:
    if "." not in inside:
        wrapper = "{}"
    name = wrapper.format(inside.replace("{}", "<>")).replace("<>", "{}")
    assert_all(found(saved(tmp_path / "c.pt", layered(name))))


@pytest.mark.parametrize("containers", CONTAINERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_containers(tmp_path: Path, containers: tuple[str, ...], zipped: bool) -> None:
    content: object = layered(INSIDE[0])
    for container in reversed(containers):
        content = {container: content, "step": 3, "optimizer": {"state": {0: torch.zeros(2)}}}
    path = saved(tmp_path / "c.bin", content, _use_new_zipfile_serialization=zipped)
    assert_all(found(path))


def test_safetensors_without_the_native_header(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(layered(INSIDE[0]), str(path), metadata={"format": "pt"})
    assert_all(found(path))
    with pytest.raises(ConfigError, match="does not state its parametrization, convention, site"):
        read_rotations(path)


def test_names_of_a_class_that_holds_the_model_and_of_peft() -> None:
    own = ["base_model.model.embed_tokens.weight", "base_model.lm_head.weight", "head.0.weight"]
    assert list(unwrapped(own).values()) == [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "head.0.weight",
    ]
    peft = ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    assert list(unwrapped(peft).values()) == ["model.embed_tokens.weight", "lm_head.weight"]


def test_a_module_beside_a_layers_own_gate_is_no_wrapper(tmp_path: Path) -> None:
    state = layered("model.layers.{}.rotation_gate.theta")
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    state |= {name: torch.eye(16) for name in names}
    assert sorted(open_raw(saved(tmp_path / "g.pt", state), STATED).weights) == names


def test_a_tensor_without_a_name_needs_its_layers(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.pt", GATES[0])
    with pytest.raises(ConfigError, match=r"names no layer.*--layers") as caught:
        found(one)
    assert caught.value.exit_code == ExitCode.USAGE
    got = found(one, layers="0,2")
    assert sorted(got) == [0, 2]
    np.testing.assert_array_equal(got[2], GATES[0].numpy())
    many = saved(tmp_path / "many.pt", torch.stack(GATES))
    assert_all(found(many, layers="0-2"))
    with pytest.raises(RotationError, match="3 layers, --layers names 2"):
        found(many, layers="0-1")


@pytest.mark.parametrize(
    "pattern",
    [
        "model.stack.{layer}.turn.p", "stack.{}.turn.p", "*.stack.N.turn.p", "model.stack.*.turn.p",
        r"model\.stack\.(\d+)\.turn\.p", r".*stack\.(?P<layer>\d+).*p",
    ],
)  # fmt: skip
def test_names_that_nobody_knows(tmp_path: Path, pattern: str) -> None:
    content = layered("model.stack.{}.turn.p") | {"model.stack.0.other": torch.zeros(2, 8, 8)}
    path = saved(tmp_path / "c.pt", content)
    with pytest.raises(RotationError, match=r"no rotation gates.*--key"):
        found(path)
    assert_all(found(path, key=pattern))


def test_a_key_that_names_nothing_or_is_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", layered(INSIDE[0]) | {"up.gate_proj.weight": torch.ones(1)})
    with pytest.raises(RotationError, match=r"self_attn\.rotation_gate\.theta") as caught:
        found(path, key="elsewhere.{layer}.x")
    assert "gate_proj" not in str(caught.value)
    with pytest.raises(ConfigError, match="is no pattern"):
        found(path, key="(((")


def test_a_key_chooses_between_two_sets(tmp_path: Path) -> None:
    old = {
        name.replace("rotation_gate", "old_gate"): g + 1 for name, g in layered(INSIDE[0]).items()
    }
    path = saved(tmp_path / "c.pt", layered(INSIDE[0]) | old)
    with pytest.raises(RotationError, match=r"two gates for layer 0.*--key"):
        found(path)
    assert_all(found(path, key="layers.{layer}.self_attn.rotation_gate.theta"))


OFF = [
    {"so8_rotation_gate.theta": GATES[0], "safety_head.0.weight": torch.zeros(2, 2)},
    {"safety_head.rotation_gate.theta": GATES[0]},
    {"verifier.so8_gate.theta": GATES[0], "verifier.alpha": torch.zeros(1)},
]


@pytest.mark.parametrize("content", OFF)
def test_gates_off_the_way_to_the_logits_are_refused(
    tmp_path: Path, content: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(RotationError, match="does not touch the logits") as caught:
        found(saved(tmp_path / "c.bin", content))
    assert next(iter(content)) in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_returned_states_are_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", layered("layer_{}"))
    with pytest.raises(ConfigError, match="the logits do not depend on them"):
        read_rotations(path)


def test_refusals_name_what_looks_like_a_gate(tmp_path: Path) -> None:
    content = {f"model.layers.{i}.mlp.gate_proj.weight": torch.ones(1) for i in range(9)}
    content |= {"x.my_so8_angles": torch.ones(3)}
    with pytest.raises(RotationError, match=r"x\.my_so8_angles") as caught:
        found(saved(tmp_path / "c.pt", content))
    assert "gate_proj" not in str(caught.value)
    assert "cannot be baked" not in str(caught.value)


def test_one_ranks_share_of_a_gate_is_refused_and_a_whole_one_read(tmp_path: Path) -> None:
    """Saved by processes of their own: only the file is read here, without any process group."""
    script = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
world = int(sys.argv[2])
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
mesh = DeviceMesh("cpu", list(range(world)))
value = torch.arange(128.0).reshape(2, 8, 8) / 500
shard = value if world == 1 else value[:1]
sharded = DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=value.shape,
                             stride=value.stride())
torch.save({f"model.layers.{i}.rotation_gate.theta": sharded for i in range(3)}, sys.argv[1])
"""
    for world in (1, 2):
        path = tmp_path / f"{world}.pt"
        subprocess.run([sys.executable, "-c", script, str(path), str(world)], check=True)
    got = found(tmp_path / "1.pt")
    expected = (torch.arange(128.0).reshape(2, 8, 8) / 500).numpy()
    np.testing.assert_array_equal(got[2], expected)
    with pytest.raises(RotationError, match=r"one rank's share, \[1, 8, 8\] of \[2, 8, 8\]"):
        found(tmp_path / "2.pt")
    assert not torch.distributed.is_initialized()


def test_every_reading_makes_its_rotations(tmp_path: Path) -> None:
    small = {name: gate / 4 for name, gate in layered(INSIDE[0]).items()}
    raw = open_raw(saved(tmp_path / "c.pt", small))
    possible = readings(raw)
    assert len(possible) == len(set(possible)) == 4 * 2 * 2
    assert Parametrization.MATRIX not in {reading.parametrization for reading in possible}
    for reading in possible:
        made = rotation_set(raw, reading, "c.pt")
        assert (made.parametrization, made.convention, made.site) == (
            reading.parametrization,
            reading.convention,
            reading.site,
        )
        for i, gate in enumerate(GATES):
            expected = rotation(gate / 4, reading.parametrization).numpy()
            np.testing.assert_allclose(made.blocks[Target(i)], expected, atol=1e-12)
        assert set(reading.flags) > {f"--{f}" for f in ("parametrization", "convention", "site")}
        assert reading.meaning.count(";") >= 2


def test_widths_and_what_is_known_narrow_the_readings(tmp_path: Path) -> None:
    raw = open_raw(saved(tmp_path / "c.pt", layered(INSIDE[0])))
    only_after = {Target(i): (32, 16) for i in range(3)}
    assert {r.site for r in readings(raw, only_after)} == {Site.OUTPUT}
    stated = RotationOptions(parametrization=Parametrization.EXP, convention=Convention.ROW)
    raw = open_raw(tmp_path / "c.pt", stated)
    assert readings(raw) == (
        Reading(Parametrization.EXP, Convention.ROW, Site.INPUT),
        Reading(Parametrization.EXP, Convention.ROW, Site.OUTPUT),
    )
    with pytest.raises(ConfigError, match=r"(?s)state its site, and.*exp, row, input: R = expm"):
        read_rotations(tmp_path / "c.pt", stated)


def test_orthogonal_blocks_may_be_the_matrices_themselves(tmp_path: Path) -> None:
    blocks = {k: rotation(g, "exp").float() for k, g in layered(INSIDE[0]).items()}
    raw = open_raw(saved(tmp_path / "c.pt", blocks))
    assert Parametrization.MATRIX in {reading.parametrization for reading in readings(raw)}


def test_a_head_of_blocks_has_to_be_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {"so8_rotation_gate.theta": GATES[0]})
    raw = open_raw(path, RotationOptions(site=Site.HEAD))
    assert list(raw.theta) == [HEAD]
    assert {reading.site for reading in readings(raw)} == {Site.HEAD}
    with pytest.raises(RotationError, match=r"site input does not fit|does not touch the logits"):
        read_rotations(path, STATED)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.floats(1e-9, 3.0),
    st.sampled_from([2, 4, 8]),
)
def test_scaled_taylor_is_what_the_issue_of_its_terms_says(
    seed: int, count: int, scale: float, size: int
) -> None:
    generator = np.random.default_rng(seed)
    theta = generator.normal(size=(count, size, size)) * scale
    theta *= generator.uniform(0.01, 1.0, size=(count, 1, 1))
    expected = rotation(torch.from_numpy(theta), "scaled-taylor").numpy()
    got = rotation_blocks(theta, Parametrization.SCALED_TAYLOR)
    np.testing.assert_allclose(got, expected, atol=1e-11)


def test_a_small_block_turns_further_beside_a_large_one() -> None:
    small = np.random.default_rng(1).normal(size=(3, 8, 8)) * 0.01
    large = np.random.default_rng(2).normal(size=(1, 8, 8)) * 0.3
    alone = rotation_blocks(small, Parametrization.SCALED_TAYLOR)
    beside = rotation_blocks(np.concatenate([small, large]), Parametrization.SCALED_TAYLOR)[:3]
    norm = np.linalg.norm(large[0] - large[0].T)
    times = 2 ** int(np.ceil(np.log2(norm)))
    assert times >= 2
    np.testing.assert_allclose(beside, np.linalg.matrix_power(alone, times), atol=1e-12)


def test_an_adapter_file_finds_the_configuration_beside_it(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.{}.self_attn.o_proj.so8t_rotation_gate.default.theta"
    save_file(layered(key), str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 4}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        raw = open_raw(path)
        assert raw.settings["lora_alpha"] == 3
        assert (raw.parametrization, raw.convention, raw.site) == ("cayley", "row", "input")

"""Checkpoints of trainings that would be baked into something else than was trained, were they
taken for what they look like: right, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from so8tqc.config import BakeConfig
from so8tqc.errors import ConfigError, ModelError, RotationError
from so8tqc.records import Record, Verdict
from so8tqc.services.bake import bake
from trained_forms import (
    State,
    base_state,
    divergence,
    hook,
    loaded,
    logits,
    rotation,
    thetas,
    trained_directory,
    trained_logits,
    turned,
    wrapped_state,
)

EXACT = 1e-10
MATRIX = {"parametrization": "matrix", "convention": "row"}
STATED = {"parametrization": "exp", "convention": "row", "site": "input"}


@pytest.fixture
def tied(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama whose head is its embedding."""
    return make_model("llama", "float32")


def baked(base: Path, rotations: Path | None, out: Path, **options: object) -> Record:
    record = bake(BakeConfig(base=base, rotations=rotations, out=out, **options))  # type: ignore[arg-type]
    assert record.verdict is Verdict.PASS
    return record


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def gated(base: Path, gates: list[torch.Tensor]) -> torch.Tensor:
    return trained_logits(
        base, [rotation(g, "scaled-taylor") for g in gates], convention="row", site="output"
    )


def own_head() -> State:
    generator = torch.Generator().manual_seed(6)
    return {"lm_head.weight": torch.randn(512, 64, generator=generator) * 0.1}


def test_a_head_that_is_no_longer_the_embedding(tied: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    state = wrapped_state(tied, gates) | own_head()
    with pytest.raises(RotationError, match=r"lm_head\.weight.*base's is tied"):
        baked(tied, saved(tmp_path / "c.bin", state), tmp_path / "baked")
    baked(trained_directory(tmp_path / "trained", tied, state), None, tmp_path / "baked")
    model = loaded(tied)
    model.lm_head.weight = torch.nn.Parameter(own_head()["lm_head.weight"].double())
    for layer, gate in zip(model.model.layers, gates, strict=True):
        hook(layer.self_attn.o_proj, rotation(gate, "scaled-taylor"), "row", "output")
    assert divergence(logits(model), logits(loaded(tmp_path / "baked"))) <= EXACT
    config = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["base", "directory"])
def test_lora_of_a_tied_head(tied: Path, tmp_path: Path, kind: str) -> None:
    gates = thetas(scale=0.2)
    a, b = torch.randn(2, 64), torch.randn(512, 2) * 0.1
    plain = wrapped_state(tied, gates)
    state = plain | {
        "lm_head.base_layer.weight": plain["model.embed_tokens.weight"].clone(),
        "lm_head.lora_A.default.weight": a,
        "lm_head.lora_B.default.weight": b,
    }
    if kind == "base":
        with pytest.raises(RotationError, match=r"lm_head\.weight.*base's is tied"):
            baked(tied, saved(tmp_path / "c.bin", state), tmp_path / "baked", lora_alpha=2)
        return
    trained = trained_directory(tmp_path / "trained", tied, state)
    baked(trained, None, tmp_path / "baked", lora_alpha=2)
    model = loaded(tied)
    head = model.lm_head.weight.data + b.double() @ a.double()
    model.lm_head.weight = torch.nn.Parameter(head)
    for layer, gate in zip(model.model.layers, gates, strict=True):
        hook(layer.self_attn.o_proj, rotation(gate, "scaled-taylor"), "row", "output")
    assert divergence(logits(model), logits(loaded(tmp_path / "baked"))) <= EXACT


@pytest.mark.parametrize("site", [None, "head"])
@pytest.mark.parametrize(
    "alpha", [-0.4, 1, torch.tensor(-0.4), torch.tensor([-0.4]), torch.tensor(2)]
)
def test_the_strength_of_a_heads_rotation_may_be_any_number(
    tied: Path, tmp_path: Path, alpha: float | torch.Tensor, site: str | None
) -> None:
    r = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    file = saved(tmp_path / "head.pt", {"so8_rotation": r, "alpha": alpha, "lora_alpha": 16})
    baked(tied, file, tmp_path / "baked", site=site, **MATRIX)
    model = loaded(tied)
    strength = torch.sigmoid(
        torch.tensor(float(alpha)).double()
        if isinstance(alpha, int)
        else torch.as_tensor(alpha, dtype=torch.float64)
    ).reshape(())
    model.lm_head.register_forward_pre_hook(
        lambda _, args: (args[0] + strength * turned(args[0], r.double()[None], "row"),)
    )
    assert divergence(logits(model), logits(loaded(tmp_path / "baked"))) <= EXACT


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"alpha": "weak"}, r"alpha: the strength is no number"),
        ({"alpha": torch.zeros(2)}, r"alpha: the strength is no number"),
        ({"strength": torch.tensor(0.3)}, r"strength: a number beside the rotation"),
        ({"so8_scale": 0.3}, r"so8_scale: a number beside the rotation"),
    ],
)
def test_what_is_no_known_strength_is_refused(
    tied: Path, tmp_path: Path, beside: dict[str, object], said: str
) -> None:
    file = saved(tmp_path / "head.pt", {"so8_rotation": torch.eye(64), **beside})
    with pytest.raises(RotationError, match=said):
        baked(tied, file, tmp_path / "baked", site="head", **MATRIX)


def test_a_number_that_may_weigh_a_layers_gate(tied: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    key = "model.layers.{}.rotation_gate.{}"
    state: State = {}
    for i, gate in enumerate(gates):
        state |= {key.format(i, "theta"): gate, key.format(i, "alpha"): torch.tensor(0.3)}
    file = saved(tmp_path / "g.pt", state)
    with pytest.raises(RotationError, match=r"rotation_gate\.alpha.*may weigh.*--key"):
        baked(tied, file, tmp_path / "baked", **STATED)
    named = key.format("{layer}", "theta")
    record = baked(tied, file, tmp_path / "baked", key=named, **STATED)
    assert any("not read: model.layers.0.rotation_gate.alpha" in n for n in record.notices)


@pytest.mark.parametrize("directory", [True, False])
def test_a_layer_without_a_gate_may_be_wrapped_too(
    tied: Path, tmp_path: Path, directory: bool
) -> None:
    gates = thetas(scale=0.2)
    state = wrapped_state(tied, gates)
    del state["model.layers.1.self_attn.rotation_gate.theta"]
    layers = f"0,2-{len(gates) - 1}"
    if directory:
        trained = trained_directory(tmp_path / "trained", tied, state)
        baked(trained, None, tmp_path / "baked", layers=layers)
    else:
        baked(tied, saved(tmp_path / "c.bin", state), tmp_path / "baked", layers=layers)
    still = [g if i != 1 else torch.zeros_like(g) for i, g in enumerate(gates)]
    expected = gated(tied, still)
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT


OTHERS = [
    ({"model_type": "so8t_phi4", "architectures": ["SO8TPhi4ForCausalLM"]}, "PhiForCausalLM"),
    ({"model_type": "so8t", "architectures": ["SO8TOptimizedModel"]}, "OPTForCausalLM"),
    ({"model_type": "so8t_llama4", "architectures": ["X"]}, "BASE"),
    ({"hidden_size": 32}, "another shape"),
]


@pytest.mark.parametrize(("config", "said"), OTHERS)
def test_a_class_that_the_weights_are_not_of(
    tied: Path, tmp_path: Path, config: dict[str, object], said: str
) -> None:
    state = wrapped_state(tied, thetas())
    trained = trained_directory(tmp_path / "trained", tied, state, config=config)
    with pytest.raises(ModelError, match=said) as caught:
        baked(trained, None, tmp_path / "baked")
    assert "so8tqc bake BASE" in str(caught.value)
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("lacking", ["up_proj", "layernorm", "norm.weight"])
def test_a_directory_that_lacks_weights(tied: Path, tmp_path: Path, lacking: str) -> None:
    state = {n: v for n, v in wrapped_state(tied, thetas()).items() if lacking not in n}
    trained = trained_directory(tmp_path / "trained", tied, state)
    with pytest.raises(ModelError, match=f"weights are missing, first .*{lacking}"):
        baked(trained, None, tmp_path / "baked")


def test_a_wrapper_in_a_wrapper_is_refused_by_name(tied: Path, tmp_path: Path) -> None:
    state = {
        name.replace(".base_attention.", ".base_attention.inner."): value
        for name, value in wrapped_state(tied, thetas()).items()
    }
    trained = trained_directory(tmp_path / "trained", tied, state)
    with pytest.raises(ModelError, match=r"no place in it, first .*self_attn\.inner\."):
        baked(trained, None, tmp_path / "baked")


def test_old_buffers_of_a_directory_are_no_weights(tied: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    state = wrapped_state(tied, gates) | {
        f"model.layers.{i}.self_attn.base_attention.rotary_emb.inv_freq": torch.ones(8)
        for i in range(len(gates))
    }
    baked(trained_directory(tmp_path / "trained", tied, state), None, tmp_path / "baked")
    assert divergence(gated(tied, gates), logits(loaded(tmp_path / "baked"))) <= EXACT


def test_a_directory_of_a_class_that_holds_the_model(tied: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    state = {f"model.{name}": value for name, value in wrapped_state(tied, gates).items()}
    baked(trained_directory(tmp_path / "trained", tied, state), None, tmp_path / "baked")
    assert divergence(gated(tied, gates), logits(loaded(tmp_path / "baked"))) <= EXACT
    names = load_file(str(tmp_path / "baked" / "model.safetensors")).keys()
    assert names == base_state(tied).keys()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_real_numbers(tied: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = wrapped_state(tied, thetas()) | {"model.norm.weight": torch.ones(64, dtype=dtype)}
    with pytest.raises(RotationError, match=r"model\.norm\.weight: the tensor is"):
        baked(tied, saved(tmp_path / "c.bin", state), tmp_path / "baked")


def test_two_values_of_lora_alpha_are_none(tied: Path, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.base_attention.q_proj"
    state = wrapped_state(tied, thetas()) | {
        f"{module}.lora_A.weight": torch.randn(4, 64),
        f"{module}.lora_B.weight": torch.randn(64, 4),
    }
    config = {"lora_alpha": 16, "teacher": {"lora_alpha": 32}}
    file = saved(tmp_path / "c.pt", {"model_state_dict": state, "config": config})
    with pytest.raises(ConfigError, match=r"nothing states their scale.*--lora-alpha"):
        baked(tied, file, tmp_path / "baked")

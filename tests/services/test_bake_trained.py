"""What trainings save, baked as a user would first try, against the training's own forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.provenance import read_provenance
from so8tqc.config import BakeConfig, QCConfig
from so8tqc.errors import ConfigError, ExitCode, ModelError, RotationError
from so8tqc.records import Record, Verdict
from so8tqc.services.bake import bake
from so8tqc.services.capture import capture
from so8tqc.services.longtext.service import longtext
from so8tqc.services.qc.service import qc
from trained_forms import (
    State,
    base_state,
    divergence,
    loaded,
    logits,
    lora_halves,
    rotation,
    thetas,
    trained_directory,
    trained_logits,
    turned,
    with_lora,
    wrapped_state,
)

EXACT = 1e-10
"""KL of a right bake in float32 storage."""

ModelMaker = Callable[..., Path]


@pytest.fixture
def base(make_model: ModelMaker) -> Path:
    return make_model("mistral", "float32")


def baked(base: Path, rotations: Path | None, out: Path, **options: object) -> Record:
    record = bake(BakeConfig(base=base, rotations=rotations, out=out, **options))  # type: ignore[arg-type]
    assert record.verdict is Verdict.PASS
    return record


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


WRAPPED = [
    ("base_attention", "rotation_gate", "scaled-taylor"),
    ("attention", "output_gate", "cayley"),
]


@pytest.mark.parametrize(("level", "gate", "parametrization"), WRAPPED)
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_a_wrapped_attention_is_recognised(
    base: Path, tmp_path: Path, level: str, gate: str, parametrization: str, scale: float
) -> None:
    gates = thetas(scale=scale)
    file = saved(tmp_path / "trained.bin", wrapped_state(base, gates, level=level, gate=gate))
    record = baked(base, file, tmp_path / "baked")
    expected = trained_logits(
        base, [rotation(g, parametrization) for g in gates], convention="row", site="output"
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT
    assert divergence(expected, logits(loaded(base))) > 1e-3
    assert record.metrics["reading"] == {
        "parametrization": parametrization,
        "convention": "row",
        "site": "output",
        "recognised": f"self_attn.{level} beside self_attn.{gate}.theta",
    }
    assert any(f"self_attn.{level} beside" in notice for notice in record.notices)
    provenance = read_provenance(tmp_path / "baked")
    assert provenance is not None
    assert provenance.recognised == f"self_attn.{level} beside self_attn.{gate}.theta"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_one_directory_is_base_and_gates(
    base: Path, tmp_path: Path, kind: str, shards: int
) -> None:
    gates = thetas(scale=0.2)
    trained = trained_directory(
        tmp_path / "trained",
        base,
        wrapped_state(base, gates),
        kind=kind,
        shards=shards,
        config={
            "architectures": ["SO8TMistralForCausalLM"],
            "model_type": "so8t_mistral",
            "auto_map": {"AutoModelForCausalLM": "modeling.SO8TMistralForCausalLM"},
            "so8t_init_scale": 0.05,
        },
    )
    out = tmp_path / "baked"
    record = baked(trained, None, out)
    expected = trained_logits(
        base, [rotation(g, "scaled-taylor") for g in gates], convention="row", site="output"
    )
    assert divergence(expected, logits(loaded(out))) <= EXACT
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert not {"auto_map", "so8t_init_scale"} & config.keys()
    names = {name for file in out.glob("*.safetensors") for name in load_file(str(file))}
    assert names == base_state(base).keys()
    assert len(list(out.glob("*.safetensors"))) == shards
    assert not (out / "so8t_info.json").exists()
    assert (out / "tokenizer_config.json").exists()
    assert any("base and gates in one" in notice for notice in record.notices)


def test_every_command_takes_a_trained_directory(
    base: Path, tmp_path: Path, texts_file: Path, long_texts: Path
) -> None:
    trained = trained_directory(tmp_path / "trained", base, wrapped_state(base, thetas(scale=0.2)))
    baked(trained, None, tmp_path / "baked")
    data = (str(texts_file),)
    judged = qc(
        QCConfig(
            reference=trained,
            candidates=(tmp_path / "baked",),
            data=data,
            out=tmp_path / "qc",
            resamples=100,
        )
    )
    assert judged.verdict is Verdict.PASS
    assert {c.id for c in judged.checks} > {"algebra.exact", "effect.kl", "structure.untouched"}
    from so8tqc.config import CaptureConfig, LongTextConfig

    recorded = tmp_path / "logits.safetensors"
    capture(CaptureConfig(model=trained, data=data, out=recorded))
    by_capture = qc(
        QCConfig(
            reference=recorded,
            candidates=(tmp_path / "baked",),
            out=tmp_path / "qc2",
            tokenizer=base,
            resamples=100,
        )
    )
    assert by_capture.verdict is Verdict.PASS
    found = longtext(
        LongTextConfig(
            model=tmp_path / "baked",
            reference=trained,
            data=(str(long_texts),),
            out=tmp_path / "long",
            min_tokens=64,
            max_new_tokens=0,
            resamples=100,
            png=False,
        )
    )
    assert not [c.id for c in found.checks if c.verdict is Verdict.FAIL and "kl" in c.id]
    leftovers = [p for p in tmp_path.rglob("*") if "so8tqc-partial" in p.name]
    assert leftovers == []


def peft_directory(
    out: Path, base: Path, gates: list[torch.Tensor], **config: object
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A PEFT LoRA adapter whose o_proj holds a gate in front, by PEFT's own ``save_pretrained``."""
    from peft import LoraConfig, get_peft_model

    live = get_peft_model(
        loaded(base).float(),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "o_proj"],
            init_lora_weights=False,
            **config,  # type: ignore[arg-type]
        ),
    )
    for i, gate in enumerate(gates):
        module = live.get_submodule(f"base_model.model.model.layers.{i}.self_attn.o_proj")
        module.so8t_rotation_gate = torch.nn.Module()
        module.so8t_rotation_gate.theta = torch.nn.Parameter(gate)
    live.save_pretrained(str(out))
    state = load_file(str(out / "adapter_model.safetensors"))
    halves = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            value,
            state[key.replace("lora_A", "lora_B")],
        )
        for key, value in state.items()
        if ".lora_A." in key
    }
    scale = 8 / 4**0.5 if config.get("use_rslora") else 8 / 4
    return out, with_lora(base_state(base), halves, scale)


@pytest.mark.parametrize("rslora", [False, True])
def test_gates_in_a_lora_adapter_take_the_lora_along(
    base: Path, tmp_path: Path, rslora: bool
) -> None:
    gates = thetas(scale=0.2)
    adapter, merged = peft_directory(tmp_path / "adapter", base, gates, use_rslora=rslora)
    record = baked(base, adapter, tmp_path / "baked")
    expected = trained_logits(
        base,
        [rotation(g, "cayley") for g in gates],
        convention="row",
        site="input",
        weights=merged,
    )
    without = trained_logits(
        base, [rotation(g, "cayley") for g in gates], convention="row", site="input"
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT
    assert divergence(expected, without) > 1e-3
    assert any("6 LoRA branches are merged" in notice for notice in record.notices)


def test_lora_of_another_kind_beside_gates_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    adapter, _ = peft_directory(tmp_path / "adapter", base, thetas(), use_dora=True)
    with pytest.raises(RotationError, match=r"no plain LoRA.*magnitude|use_dora") as caught:
        baked(base, adapter, tmp_path / "baked")
    assert "erge other adapters with PEFT" not in str(caught.value)
    assert not (tmp_path / "baked").exists()


def peft_checkpoint(base: Path, gates: list[torch.Tensor]) -> tuple[State, dict[str, torch.Tensor]]:
    """A whole PEFT model's state dict, LoRA and wrapped gates in it, and the merged weights."""
    plain = base_state(base)
    modules = [n.removesuffix(".weight") for n in plain if n.endswith(("_proj.weight",))]
    halves = lora_halves({m: tuple(plain[f"{m}.weight"].shape) for m in modules})  # type: ignore[misc]
    state: State = {}
    for name, value in wrapped_state(base, gates).items():
        module = name.removesuffix(".weight").replace(".base_attention.", ".")
        if module in halves:
            a, b = halves[module]
            inside = name.removesuffix(".weight")
            state |= {
                f"base_model.model.{inside}.base_layer.weight": value,
                f"base_model.model.{inside}.lora_A.default.weight": a,
                f"base_model.model.{inside}.lora_B.default.weight": b,
            }
        else:
            state[f"base_model.model.{name}"] = value
    return state, with_lora(plain, halves, 2.0)


def test_lora_and_gates_in_one_checkpoint(base: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    state, merged = peft_checkpoint(base, gates)
    file = saved(tmp_path / "c.pt", {"model_state_dict": state, "global_step": 9})
    with pytest.raises(ConfigError, match=r"nothing states their scale.*--lora-alpha.*r = 4"):
        baked(base, file, tmp_path / "baked")
    expected = trained_logits(
        base,
        [rotation(g, "scaled-taylor") for g in gates],
        convention="row",
        site="output",
        weights=merged,
    )
    baked(base, file, tmp_path / "baked", lora_alpha=8)
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT
    stating = {"model_state_dict": state, "config": {"lora": {"lora_alpha": 8}}}
    baked(base, saved(tmp_path / "stating.pt", stating), tmp_path / "again")
    assert divergence(expected, logits(loaded(tmp_path / "again"))) <= EXACT


@pytest.mark.parametrize("stated", [None, 5.0])
def test_a_stated_alpha_keeps_the_root_of_rslora(
    base: Path, tmp_path: Path, stated: float | None
) -> None:
    """α by --lora-alpha takes the place of the file's; α/√r stays where the file says so."""
    gates = thetas(scale=0.2)
    adapter, merged = peft_directory(tmp_path / "adapter", base, gates, use_rslora=True)
    plain = base_state(base)
    factor = 1.0 if stated is None else stated / 8
    weights = {
        name: plain[name].double() + factor * (value.double() - plain[name].double())
        for name, value in merged.items()
    }
    baked(base, adapter, tmp_path / "baked", lora_alpha=stated)
    expected = trained_logits(
        base,
        [rotation(g, "cayley") for g in gates],
        convention="row",
        site="input",
        weights=weights,
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT


def test_a_directory_with_lora_and_gates_is_base_lora_and_gates(base: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    state, merged = peft_checkpoint(base, gates)
    trained = trained_directory(tmp_path / "trained", base, state, kind="bin")
    baked(trained, None, tmp_path / "baked", lora_alpha=8)
    expected = trained_logits(
        base,
        [rotation(g, "scaled-taylor") for g in gates],
        convention="row",
        site="output",
        weights=merged,
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT
    kept = load_file(str(tmp_path / "baked" / "model.safetensors"))
    assert {value.dtype for value in kept.values()} == {torch.float32}


def test_changed_weights_beside_the_gates_are_taken_and_named(base: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    state = wrapped_state(base, gates)
    changed = {"model.norm.weight": state["model.norm.weight"] * 1.5}
    record = baked(base, saved(tmp_path / "c.bin", {**state, **changed}), tmp_path / "baked")
    expected = trained_logits(
        base,
        [rotation(g, "scaled-taylor") for g in gates],
        convention="row",
        site="output",
        weights=changed,
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT
    assert any("1 weights" in n and "model.norm.weight" in n for n in record.notices)


def test_a_weight_that_the_base_has_no_place_for_is_refused_by_name(
    base: Path, tmp_path: Path
) -> None:
    state = wrapped_state(base, thetas()) | {
        "model.layers.0.self_attn.base_attention.q_norm.weight": torch.ones(16)
    }
    with pytest.raises(RotationError, match=r"q_norm\.weight.*no place for"):
        baked(base, saved(tmp_path / "c.bin", state), tmp_path / "baked")


def test_a_sequence_of_gate_and_projection(base: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.2)
    state = {
        name.replace(".o_proj.", ".o_proj.1."): value for name, value in base_state(base).items()
    } | {f"model.layers.{i}.self_attn.o_proj.0.theta": g for i, g in enumerate(gates)}
    trained = trained_directory(tmp_path / "trained", base, state)
    with pytest.raises(ConfigError, match=r"does not state its parametrization, and") as caught:
        baked(trained, None, tmp_path / "baked")
    assert caught.value.exit_code == ExitCode.USAGE
    assert "convention row, site input, recognised by" in str(caught.value)
    baked(trained, None, tmp_path / "baked", parametrization="exp")
    expected = trained_logits(
        base, [rotation(g, "exp") for g in gates], convention="row", site="input"
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT


@pytest.mark.parametrize("convention", ["row", "column"])
@pytest.mark.parametrize("site", ["input", "output"])
@pytest.mark.parametrize("parametrization", ["exp", "cayley", "legacy-taylor", "scaled-taylor"])
def test_a_bare_gate_is_what_it_is_stated_to_be(
    base: Path, tmp_path: Path, convention: str, site: str, parametrization: str
) -> None:
    gates = thetas(scale=0.04)
    file = saved(
        tmp_path / "g.pt",
        {f"model.layers.{i}.rotation_gate.theta": g for i, g in enumerate(gates)},
    )
    with pytest.raises(ConfigError) as caught:
        baked(base, file, tmp_path / "baked")
    text = str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "what the training's forward computes" in text
    assert "what its bake script wrote" in text
    assert f"so8tqc identify {base} {file}" in text
    assert not (tmp_path / "baked").exists()
    stated = {"convention": convention, "site": site, "parametrization": parametrization}
    baked(base, file, tmp_path / "baked", **stated)
    expected = trained_logits(
        base, [rotation(g, parametrization) for g in gates], convention=convention, site=site
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT


HEADS = [
    ("llama", False, "column"),
    ("llama", True, "row"),
    ("mistral", True, "column"),
]


@pytest.mark.parametrize(("architecture", "reflected", "convention"), HEADS)
def test_a_rotation_in_front_of_the_head(
    make_model: ModelMaker,
    tmp_path: Path,
    texts_file: Path,
    architecture: str,
    reflected: bool,
    convention: str,
) -> None:
    base = make_model(architecture, "float32")
    generator = torch.Generator().manual_seed(1)
    r = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q.float()
    if (torch.linalg.det(r.double()) < 0) != reflected:
        r[:, 0] = -r[:, 0]
    alpha = torch.tensor(-0.4)
    file = saved(tmp_path / "head.pt", {"so8_rotation": r, "alpha": alpha})
    with pytest.raises(ConfigError, match=r"(?s)parametrization, convention.*site head"):
        baked(base, file, tmp_path / "baked")
    out = tmp_path / "baked"
    record = baked(base, file, out, convention=convention, parametrization="matrix")
    model = loaded(base)
    strength = torch.sigmoid(alpha.double())
    model.lm_head.register_forward_pre_hook(
        lambda _, args: (args[0] + strength * turned(args[0], r.double()[None], convention),)
    )
    expected = logits(model)
    assert divergence(expected, logits(loaded(out))) <= EXACT
    assert divergence(expected, logits(loaded(base))) > 1e-4
    assert any("determinant" in notice for notice in record.notices) == reflected
    tied = architecture == "llama"
    costs = f"{512 * 64 * 4:,} bytes"
    assert any(costs in notice for notice in record.notices) == tied
    if tied:
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        kept = load_file(str(out / "model.safetensors"))["model.embed_tokens.weight"]
        assert torch.equal(kept, base_state(base)["model.embed_tokens.weight"])
    judged = qc(
        QCConfig(
            reference=base,
            rotations=file,
            candidates=(out,),
            data=(str(texts_file),),
            out=tmp_path / "qc",
            resamples=100,
            rotation_options={"convention": convention, "parametrization": "matrix"},
        )
    )
    assert [c.id for c in judged.checks if c.verdict is Verdict.FAIL] == []


def test_a_trained_directory_whose_class_names_no_base_asks_for_it(
    base: Path, tmp_path: Path
) -> None:
    trained = trained_directory(
        tmp_path / "trained",
        base,
        wrapped_state(base, thetas()),
        config={"model_type": "ours", "architectures": ["OurModel"]},
    )
    with pytest.raises(ModelError, match=r"does not say of which base.*so8tqc bake BASE"):
        baked(trained, None, tmp_path / "baked")
    baked(base, trained, tmp_path / "baked")


def test_no_rotations_and_no_gates(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no rotations are given.*hold no gates"):
        baked(base, None, tmp_path / "baked")
    trained = trained_directory(tmp_path / "trained", base, wrapped_state(base, thetas()))
    other = saved(tmp_path / "g.pt", {"layers.0.rotation_gate.theta": thetas()[0]})
    stated = {"convention": "row", "site": "input", "parametrization": "exp"}
    with pytest.raises(ConfigError, match="holds gates itself"):
        baked(trained, other, tmp_path / "baked", **stated)


def test_a_checkpoint_of_another_base_is_refused(
    base: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    from so8tqc.errors import ShapeError

    state = wrapped_state(base, thetas())
    with pytest.raises(ShapeError, match="another base model"):
        baked(make_model("qwen3", "float32"), saved(tmp_path / "c.bin", state), tmp_path / "baked")


def test_gates_in_bfloat16_are_measured(base: Path, tmp_path: Path) -> None:
    gates = [g.bfloat16() for g in thetas(scale=0.2)]
    record = baked(base, saved(tmp_path / "c.bin", wrapped_state(base, gates)), tmp_path / "baked")
    expected = trained_logits(
        base, [rotation(g, "scaled-taylor") for g in gates], convention="row", site="output"
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT
    (said,) = [notice for notice in record.notices if "stored in bfloat16" in notice]
    assert "more than what rounding a weight to bfloat16 costs" in said


def test_shards_of_one_file_format_are_read_together(base: Path, tmp_path: Path) -> None:
    """A directory of shards whose index lacks a file, or names one outside."""
    state = wrapped_state(base, thetas())
    trained = trained_directory(tmp_path / "trained", base, state, shards=2)
    index = trained / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())
    mapping["weight_map"] = dict.fromkeys(mapping["weight_map"], "../x.safetensors")
    index.write_text(json.dumps(mapping))
    with pytest.raises(ModelError, match="outside the model directory"):
        baked(trained, None, tmp_path / "baked")
    shutil.rmtree(trained)
    trained = trained_directory(tmp_path / "trained", base, state, shards=2)
    save_file({}, str(trained / "model-00001-of-00002.safetensors"))
    with pytest.raises((ModelError, RotationError)):
        baked(trained, None, tmp_path / "baked")


def test_weights_that_are_the_bases_rounded_are_told(base: Path, tmp_path: Path) -> None:
    state = {
        k: v.bfloat16() if "theta" not in k else v
        for k, v in wrapped_state(base, thetas(scale=0.2)).items()
    }
    record = baked(base, saved(tmp_path / "c.bin", state), tmp_path / "baked")
    (said,) = [notice for notice in record.notices if "in bfloat16, the base's own" in notice]
    assert "30 weights" in said or "29 weights" in said


def test_a_directory_with_a_rotation_of_its_head(base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    r = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    state = base_state(base) | {"so8_rotation.weight": r, "so8_alpha": torch.tensor(0.7)}
    trained = trained_directory(tmp_path / "trained", base, state)
    baked(trained, None, tmp_path / "baked", convention="column", parametrization="matrix")
    model = loaded(base)
    strength = torch.sigmoid(torch.tensor(0.7).double())
    model.lm_head.register_forward_pre_hook(
        lambda _, args: (args[0] + strength * turned(args[0], r.double()[None], "column"),)
    )
    assert divergence(logits(model), logits(loaded(tmp_path / "baked"))) <= EXACT
    names = load_file(str(tmp_path / "baked" / "model.safetensors"))
    assert names.keys() == base_state(base).keys()


def test_a_directory_with_gates_off_the_way_says_why(base: Path, tmp_path: Path) -> None:
    state = base_state(base) | {"so8_rotation_gate.theta": thetas()[0]}
    trained = trained_directory(tmp_path / "trained", base, state)
    with pytest.raises(RotationError, match="does not touch the logits"):
        baked(trained, None, tmp_path / "baked")


def test_a_directory_whose_gates_only_a_key_names(base: Path, tmp_path: Path) -> None:
    gates = thetas(scale=0.1)
    state = base_state(base) | {f"turns.{i}.p": g for i, g in enumerate(gates)}
    trained = trained_directory(tmp_path / "trained", base, state)
    told = {"convention": "row", "site": "input", "parametrization": "cayley"}
    baked(trained, None, tmp_path / "baked", key="turns.{layer}.p", **told)
    expected = trained_logits(
        base, [rotation(g, "cayley") for g in gates], convention="row", site="input"
    )
    assert divergence(expected, logits(loaded(tmp_path / "baked"))) <= EXACT

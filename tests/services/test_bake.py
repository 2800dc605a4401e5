"""Baking tiny models: the result against transformers with hooks, and against PEFT's merge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from so8tqc.config import BakeConfig
from so8tqc.errors import InputError, ModelError, RotationError, ShapeError, ToolError
from so8tqc.records import Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake, plan
from so8tqc.sources.gated import gated
from so8tqc.sources.hf import HFModel

O_PROJ = "model.layers.{}.self_attn.o_proj.weight"
TOKENS = np.random.default_rng(0).integers(3, 500, size=40)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(str(file))
    return tensors


def logits(directory: Path) -> np.ndarray:
    model = HFModel.load(directory, dtype="float64")
    return model.head(model.hidden(TOKENS)).numpy()


def gated_logits_by_hand(directory: Path, gates: Path, attribute: str) -> np.ndarray:
    """Logits with dense block-diagonal matrices in a hook written here, not our gate code."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    rotations = read_rotations(gates)
    vision = "vision_config" in json.loads((directory / "config.json").read_text())
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto.from_pretrained(str(directory), dtype=torch.float64)

    def hook(matrix: torch.Tensor) -> Callable[..., object]:
        return lambda _module, args: (args[0] @ matrix.T,)

    for i, layer in enumerate(model.get_decoder().layers):
        dense = torch.block_diag(*torch.from_numpy(rotations.blocks[Target(i)].copy()))
        matrix = dense if rotations.convention is Convention.COLUMN else dense.T
        layer.get_submodule(attribute).register_forward_pre_hook(hook(matrix))
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "qwen2_vl"])
@pytest.mark.parametrize("convention", list(Convention))
def test_a_float32_bake_has_the_gated_models_logits(
    architecture: str,
    convention: Convention,
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = make_model(architecture)
    gates = make_gates(base, convention=convention)
    record = bake(
        BakeConfig(base=base, rotations=gates, out=tmp_path / "baked", baked_dtype="float32")
    )
    assert record.verdict is Verdict.PASS
    expected = gated_logits_by_hand(base, gates, "self_attn.o_proj")
    error = np.abs(logits(tmp_path / "baked") - expected).max()
    effect = np.abs(logits(base) - expected).max()
    assert error < 1e-4 * effect

    model = HFModel.load(base, dtype="float64")
    with gated(model, read_rotations(gates)):
        ours = model.head(model.hidden(TOKENS)).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-10)


def test_only_the_targets_change_and_provenance_tells(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "baked"
    record = bake(BakeConfig(base=llama, rotations=make_gates(llama), out=out))
    before, after = weights(llama), weights(out)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(3)}
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    for file in ("config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"):
        assert (out / file).read_bytes() == (llama / file).read_bytes()
    provenance = json.loads((out / "so8tqc.json").read_text())
    assert provenance["convention"] == "column"
    assert {t["name"] for t in provenance["tensors"]} == changed
    assert record.check("algebra.exact").value <= 0.5
    assert [p for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_elements_are_the_float64_product_rounded_once(
    dtype: str, make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model("llama", dtype)
    gates = make_gates(base)
    bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "baked"))
    rotations = read_rotations(gates)
    before, after = weights(base), weights(tmp_path / "baked")
    for i in range(3):
        name = f"model.layers.{i}.self_attn.o_proj.weight"
        dense = np.zeros((64, 64))
        for k, block in enumerate(rotations.blocks[Target(i)]):
            dense[8 * k : 8 * k + 8, 8 * k : 8 * k + 8] = block
        exact = before[name].double().numpy() @ dense
        stored = after[name].double().numpy()
        info = torch.finfo(getattr(torch, dtype))
        spacing = info.eps * np.maximum(np.abs(exact), info.tiny)
        assert (np.abs(stored - exact) <= spacing / 2 * (1 + 1e-6)).all()


def test_sharded_checkpoints_and_a_wider_baked_dtype(
    make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model("llama", "bfloat16", "60KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    out = tmp_path / "baked"
    record = bake(BakeConfig(base=base, rotations=make_gates(base), out=out, baked_dtype="float32"))
    assert record.verdict is Verdict.PASS
    before, after = weights(base), weights(out)
    for name in before:
        target = name.endswith("o_proj.weight")
        assert after[name].dtype is (torch.float32 if target else torch.bfloat16)
        assert target or torch.equal(before[name], after[name])


@pytest.mark.parametrize("neumann", [False, True])
def test_an_adapter_bakes_to_pefts_own_merge(llama: Path, tmp_path: Path, neumann: bool) -> None:
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float64)
    config = OFTConfig(
        r=0, oft_block_size=8, target_modules=["o_proj", "q_proj"], use_cayley_neumann=neumann
    )
    live = get_peft_model(base, config)
    torch.manual_seed(5)
    for name, parameter in live.named_parameters():
        if "oft_R" in name:
            parameter.data = torch.randn(parameter.shape).float().double() * 0.01
    live.save_pretrained(str(tmp_path / "adapter"))
    merged = live.merge_and_unload().state_dict()
    out = tmp_path / "baked"
    bake(BakeConfig(base=llama, rotations=tmp_path / "adapter", out=out, baked_dtype="float32"))
    for name, value in weights(out).items():
        if "o_proj" in name or "q_proj" in name:
            np.testing.assert_allclose(value.double(), merged[name], rtol=6e-8, atol=1e-9)


def test_one_fold_from_three_kinds_of_source(llama: Path, tmp_path: Path) -> None:
    """The same rotations as .pt, native and OFT adapter give byte-identical weights."""
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    generator = np.random.default_rng(3)
    # q [N, 28] in float32, so that every format holds the same numbers
    q = {i: generator.normal(size=(8, 28)).astype(np.float32) * np.float32(0.05) for i in range(3)}
    theta = {}
    for i, vector in q.items():
        block = np.zeros((8, 8, 8), dtype=np.float32)
        block[:, *np.triu_indices(8, 1)] = -2 * vector  # PEFT's Q is −A/2
        theta[i] = block
    torch.save(
        {f"layers.{i}.rotation_gate.theta": torch.from_numpy(t) for i, t in theta.items()},
        tmp_path / "gates.pt",
    )
    write_native(
        tmp_path / "gates.safetensors",
        {Target(i): t for i, t in theta.items()},
        parametrization=Parametrization.CAYLEY,
        convention=Convention.ROW,
        site=Site.INPUT,
        pet=None,
    )
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32),
        OFTConfig(r=0, oft_block_size=8, target_modules=["o_proj"], use_cayley_neumann=False),
    )
    for name, parameter in live.named_parameters():
        if "oft_R" in name:
            parameter.data = torch.from_numpy(q[int(name.split("layers.")[1].split(".")[0])])
    live.save_pretrained(str(tmp_path / "adapter"))

    explicit = {"convention": "row", "parametrization": "cayley", "site": "input"}
    results = []
    for source, options in (
        ("gates.pt", explicit),
        ("gates.safetensors", {}),
        ("adapter", {}),
    ):
        out = tmp_path / f"baked-{source}"
        bake(BakeConfig(base=llama, rotations=tmp_path / source, out=out, **options))
        results.append((out / "model.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


def test_gpt2_conv1d_and_neox_dense(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **small},
        "gpt_neox": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            **small,
        },
    }
    for kind, options in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
        base, gates = tmp_path / kind, tmp_path / f"{kind}.safetensors"
        model.save_pretrained(str(base))
        for site in (Site.INPUT, Site.OUTPUT):
            theta = {
                Target(i): np.random.default_rng(i).normal(size=(4, 8, 8)) * 0.4 for i in range(2)
            }
            write_native(
                gates,
                theta,
                parametrization=Parametrization.EXP,
                convention=Convention.COLUMN,
                site=site,
                pet=None,
            )
            out = tmp_path / f"{kind}-{site}"
            record = bake(BakeConfig(base=base, rotations=gates, out=out))
            assert record.verdict is Verdict.PASS
            tokens = TOKENS % 100
            reference = HFModel.load(base, dtype="float64")
            plain = reference.head(reference.hidden(tokens)).numpy()
            with gated(reference, read_rotations(gates)):
                expected = reference.head(reference.hidden(tokens)).numpy()
            baked = HFModel.load(out, dtype="float64")
            got = baked.head(baked.hidden(tokens)).numpy()
            assert np.abs(got - expected).max() < 1e-4 * np.abs(plain - expected).max()


def test_a_second_bake_is_refused_unless_forced(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "once"))
    again = BakeConfig(base=tmp_path / "once", rotations=gates, out=tmp_path / "twice")
    with pytest.raises(ModelError, match="already baked"):
        bake(again)
    assert not (tmp_path / "twice").exists()
    bake(again.model_copy(update={"force": True}))


def test_rotations_that_do_not_fit_are_refused(
    llama: Path, make_gates: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "baked"

    def attempt(rotations: Path, base: Path = llama, **options: object) -> None:
        bake(BakeConfig(base=base, rotations=rotations, out=out, **options))  # type: ignore[arg-type]

    with pytest.raises(RotationError, match=r"no gate for layer\(s\) 2"):
        attempt(make_gates(llama, "few", layers=2).rename(tmp_path / "few.safetensors"))
    attempt(tmp_path / "few.safetensors", layers="0-1")
    with pytest.raises(RotationError, match="gate for layer 3, the model has layers 0 to 2"):
        attempt(make_gates(llama, "many.safetensors", layers=4))
    with pytest.raises(ShapeError, match=r"cover 64 features.*has 128"):
        attempt(make_gates(llama), base=make_model("qwen3"))
    with pytest.raises(ModelError, match=r"config.json is missing"):
        attempt(make_gates(llama), base=tmp_path)


def test_a_failed_bake_leaves_what_was_there(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tensors = load_file(str(base / "model.safetensors"))
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 5] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, str(base / "model.safetensors"), metadata={"format": "pt"})
    out = tmp_path / "out" / "baked"
    out.mkdir(parents=True)
    (out / "precious.txt").write_text("keep")
    with pytest.raises(InputError, match=r"layers.2.self_attn.o_proj.weight.*NaN"):
        bake(BakeConfig(base=base, rotations=make_gates(llama), out=out))
    assert [p.name for p in out.parent.rglob("*")] == ["baked", "precious.txt"]


def test_an_index_that_points_outside_is_refused(
    make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_model("llama", "bfloat16", "60KB"), base)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="outside the model directory"):
        bake(BakeConfig(base=base, rotations=make_gates(base), out=tmp_path / "out"))


def test_unbaked_twins_are_left_behind(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    record = bake(BakeConfig(base=base, rotations=make_gates(llama), out=tmp_path / "out"))
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert any("pytorch_model.bin" in notice for notice in record.notices)


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    config = BakeConfig(
        base=llama, rotations=make_gates(llama), out=tmp_path / "out", baked_dtype="float32"
    )
    before = sorted(tmp_path.rglob("*"))
    record = plan(config)
    assert sorted(tmp_path.rglob("*")) == before
    tensors = record.metrics["tensors"]
    assert [t["name"] for t in tensors] == [O_PROJ.format(i) for i in range(3)]
    assert (tensors[0]["dtype"], tensors[0]["baked_dtype"]) == ("BF16", "F32")
    written = bake(config).metrics["bytes_written"]
    assert record.metrics["bytes_written"] == written
    assert len(record.metrics["layers"]) == 3


def test_without_verification_nothing_is_claimed_about_the_result(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    record = bake(
        BakeConfig(base=llama, rotations=make_gates(llama), out=tmp_path / "out", verify=False)
    )
    assert {check.group for check in record.checks} == {"rotation"}
    again = bake(BakeConfig(base=llama, rotations=make_gates(llama), out=tmp_path / "again"))
    assert {check.group for check in again.checks} == {"rotation", "structure", "algebra"}
    assert weights_bytes(tmp_path / "out") == weights_bytes(tmp_path / "again")


@pytest.mark.parametrize("cayley_neumann", [False, True])
def test_a_shared_block_is_repeated_as_peft_does(
    llama: Path, tmp_path: Path, cayley_neumann: bool
) -> None:
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float64),
        OFTConfig(
            r=0,
            oft_block_size=16,
            target_modules=["o_proj", "down_proj"],
            block_share=True,
            use_cayley_neumann=cayley_neumann,
        ),
    )
    torch.manual_seed(2)
    for name, parameter in live.named_parameters():
        if "oft_R" in name:
            assert parameter.shape[0] == 1
            parameter.data = torch.randn(parameter.shape).float().double() * 0.01
    live.save_pretrained(str(tmp_path / "adapter"))
    merged = live.merge_and_unload().state_dict()
    out = tmp_path / "baked"
    record = bake(
        BakeConfig(base=llama, rotations=tmp_path / "adapter", out=out, baked_dtype="float32")
    )
    assert record.verdict is Verdict.PASS
    for name, value in weights(out).items():
        if "o_proj" in name or "down_proj" in name:
            np.testing.assert_allclose(value.double(), merged[name], rtol=6e-8, atol=1e-9)


def weights_bytes(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(directory.glob("*.safetensors")))


BAKE_IN_A_PROCESS = """
import sys, torch
from pathlib import Path
import so8tqc.checkpoints.baking as baking
from so8tqc.config import BakeConfig
from so8tqc.services.bake import bake, plan
torch.set_num_threads(int(sys.argv[1]))
baking.CHUNK_ELEMENTS = int(sys.argv[2])
bake(BakeConfig(base=Path(sys.argv[3]), rotations=Path(sys.argv[4]), out=Path(sys.argv[5])))
"""


def test_the_same_bytes_whatever_the_threads_chunks_and_cpu_features(
    make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model("llama", "float32")
    gates = make_gates(base)
    results = set()
    for i, (threads, chunk, features) in enumerate(
        [(1, 1 << 19, ""), (2, 1 << 10, ""), (2, 64, "default"), (1, 1 << 19, "avx2")]
    ):
        out = tmp_path / f"baked{i}"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": features} if features else os.environ
        subprocess.run(
            [
                sys.executable,
                "-c",
                BAKE_IN_A_PROCESS,
                str(threads),
                str(chunk),
                str(base),
                str(gates),
                str(out),
            ],
            check=True,
            env=environment,
        )
        results.add(weights_bytes(out))
    assert len(results) == 1


@pytest.mark.parametrize(
    ("kind", "options", "prefix"),
    [
        ("phi3", {"pad_token_id": 0}, "model."),
        ("mistral", {"head_dim": 16}, "model."),
    ],
)
def test_other_architectures(
    kind: str, options: dict[str, object], prefix: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**small, **options})
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(str(base))
    width = weights(base)[f"{prefix}layers.0.self_attn.o_proj.weight"].shape[1]
    assert width == (64 if kind == "mistral" else 32)
    theta = {Target(i): np.random.default_rng(i).normal(size=(width // 8, 8, 8)) for i in range(2)}
    gates = tmp_path / "gates.safetensors"
    write_native(
        gates,
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    assert (
        bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "out")).verdict is Verdict.PASS
    )


def test_a_text_tower_below_another_prefix_is_found_and_others_are_left_alone(
    make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    """Newer vision-language checkpoints keep the text tower at model.language_model.layers."""
    from safetensors.torch import save_file

    llama = make_model("llama")
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tensors = {
        name.replace("model.layers", "model.language_model.layers"): value
        for name, value in load_file(str(base / "model.safetensors")).items()
    }
    tensors["model.visual.blocks.0.attn.proj.weight"] = torch.ones(64, 64)
    tensors["model.vision_tower.encoder.layers.0.self_attn.o_proj.weight"] = torch.ones(64, 64)
    save_file(tensors, str(base / "model.safetensors"), metadata={"format": "pt"})
    record = bake(BakeConfig(base=base, rotations=make_gates(llama), out=tmp_path / "out"))
    assert record.verdict is Verdict.PASS
    after = weights(tmp_path / "out")
    changed = {n for n in tensors if not torch.equal(tensors[n], after[n])}
    assert changed == {f"model.language_model.layers.{i}.self_attn.o_proj.weight" for i in range(3)}


def test_a_bias_at_the_output_site_turns_with_the_weight(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    projection = model.model.layers[0].self_attn.o_proj
    projection.bias.data.normal_()
    base, gates, out = tmp_path / "base", tmp_path / "gates.safetensors", tmp_path / "out"
    model.save_pretrained(str(base))
    theta = {Target(0): np.random.default_rng(0).normal(size=(4, 8, 8))}
    write_native(
        gates,
        theta,
        parametrization=Parametrization.CAYLEY,
        convention=Convention.ROW,
        site=Site.OUTPUT,
        pet=None,
    )
    assert bake(BakeConfig(base=base, rotations=gates, out=out)).verdict is Verdict.PASS
    blocks = read_rotations(gates).blocks[Target(0)]
    dense = torch.block_diag(*torch.from_numpy(blocks.copy()))
    before, after = weights(base), weights(out)
    key = "model.layers.0.self_attn.o_proj"
    # row convention at the output: y_row ↦ y_row·R
    for name, expected in (
        (f"{key}.bias", before[f"{key}.bias"].double() @ dense),
        (f"{key}.weight", dense.T @ before[f"{key}.weight"].double()),
    ):
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-7, atol=1e-9)


def test_a_bake_killed_while_writing_leaves_nothing_that_looks_like_a_model(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "import so8tqc.services.bake as service; from so8tqc.config import BakeConfig\n"
        "real = service.patch_files\n"
        "def die(*a):\n    real(*a)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "service.patch_files = die\n"
        "base, gates, out = map(Path, sys.argv[1:])\n"
        "service.bake(BakeConfig(base=base, rotations=gates, out=out))\n"
    )
    gates, out = make_gates(llama), tmp_path / "runs" / "baked"
    done = subprocess.run([sys.executable, "-c", code, llama, gates, out], check=False)
    assert done.returncode == -9
    assert not out.exists()
    left = [p.name for p in out.parent.iterdir()]
    assert {name.rpartition(".so8tqc")[2] for name in left} == {"-partial", ".lock"}
    assert len(left) == 2
    assert all(name.startswith(".baked.") for name in left)
    assert bake(BakeConfig(base=llama, rotations=gates, out=out)).verdict is Verdict.PASS
    assert [p.name for p in out.parent.iterdir()] == ["baked"]


def test_float16_overflow_names_the_tensor(
    make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    base = tmp_path / "base"
    shutil.copytree(make_model("llama", "float16"), base)
    tensors = load_file(str(base / "model.safetensors"))
    tensors[O_PROJ.format(1)][4] = 60000.0
    save_file(tensors, str(base / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(
        RotationError, match=r"layers.1.self_attn.o_proj.weight: element \[4, \d+\].*float16"
    ):
        bake(BakeConfig(base=base, rotations=make_gates(base), out=tmp_path / "out"))


def test_a_disk_that_is_too_small_is_found_before_writing(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("so8tqc.services.bake.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(ToolError, match="GB are free"):
        bake(BakeConfig(base=llama, rotations=make_gates(llama), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()

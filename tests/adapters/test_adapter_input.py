"""Adapter directories that cannot be baked, each refused with what, where and why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import adapter, load, shake
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from so8tqc.adapters.files import read_files
from so8tqc.adapters.plan import plan_adapters
from so8tqc.checkpoints.quantized import quantization_name
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.cli.app import app
from so8tqc.config import BakeConfig
from so8tqc.errors import ExitCode, InputError, ModelError, So8tqcError
from so8tqc.records import Verdict
from so8tqc.services.bake import bake, plan

Tensors = dict[str, torch.Tensor]
_Q = "base_model.model.model.layers.1.self_attn.q_proj"


def changed(
    directory: Path,
    tensors: Callable[[Tensors], None] | None = None,
    config: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    file = directory / "adapter_model.safetensors"
    if tensors is not None:
        held = load_file(str(file))
        tensors(held)
        save_file({k: v.contiguous() for k, v in held.items()}, str(file))
    if config is not None:
        path = directory / "adapter_config.json"
        said = json.loads(path.read_text())
        config(said)
        path.write_text(json.dumps(said))
    return directory


def _nan(t: Tensors) -> None:
    t[f"{_Q}.lora_B.weight"][3, 1] = float("nan")


def _zero(t: Tensors) -> None:
    for key in t:
        if "lora_B" in key:
            t[key] = torch.zeros_like(t[key])


def _rename(t: Tensors) -> None:
    for part in ("lora_A", "lora_B"):
        t[f"base_model.model.model.layers.9.self_attn.q_proj.{part}.weight"] = t.pop(
            f"{_Q}.{part}.weight"
        )


def _narrow(t: Tensors) -> None:
    t[f"{_Q}.lora_A.weight"] = t[f"{_Q}.lora_A.weight"][:, :-8]


def _without_b(t: Tensors) -> None:
    del t[f"{_Q}.lora_B.weight"]


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (_nan, None, ["lora_B", "[3, 1]", "not finite"]),
        (_zero, None, ["untrained", "zero"]),
        (_rename, None, ["layers.9.self_attn.q_proj", "no tensor"]),
        (_narrow, None, ["lora_A", "[4, 56]", "[4, 64]"]),
        (_without_b, None, ["lora_B.weight is missing"]),
        (None, lambda c: c.update(r=8), ["lora_A", "[4, ", "[8, "]),
        (None, lambda c: c.update(rank_pattern={"q_proj": 2}), ["q_proj", "[2, 64]"]),
        (None, lambda c: c.update(r="four"), ["r is 'four'"]),
        (None, lambda c: c.update(r=0), ["rank"]),
        (None, lambda c: c.update(lora_alpha=None), ["lora_alpha is null"]),
        (None, lambda c: c.update(rank_pattern={"(": 2}), ["no pattern"]),
        (None, lambda c: c.update(use_dora=True), ["lora_magnitude_vector"]),
        (None, lambda c: c.update(use_qalora=True), ["use_qalora"]),
        (None, lambda c: c.update(alora_invocation_tokens=[1]), ["alora_invocation_tokens"]),
        (None, lambda c: c.update(peft_type="OSF"), ["OSF", "cannot be baked"]),
        (None, lambda c: c.update(something_new=3), ["something_new"]),
        (
            None,
            lambda c: c.update(
                auto_mapping={"parent_library": "transformers.models.qwen2.modeling_qwen2"}
            ),
            ["qwen2", "llama"],
        ),
    ],
)
def test_refused(tensors, config, words: list[str], make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = changed(adapter(model, tmp_path / "a", "lora"), tensors, config)
    with pytest.raises(InputError) as caught:
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_an_adapter_of_another_base_directory(make_model, tmp_path: Path) -> None:
    model, other = make_model("llama", "bfloat16"), make_model("mistral", "bfloat16")
    directory = changed(
        adapter(model, tmp_path / "a", "lora"),
        config=lambda c: c.update(base_model_name_or_path=str(other)),
    )
    with pytest.raises(InputError, match="another model: model_type mistral there, llama here"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))


def test_another_name_of_a_hub_is_told(make_model, tmp_path: Path) -> None:
    """The same weights have several names there; what they are is not decided by a name."""
    base = tmp_path / "base"
    shutil.copytree(make_model("llama", "bfloat16"), base)
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(said | {"_name_or_path": "some/llama"}))
    directory = adapter(base, tmp_path / "a", "lora")
    for named, is_told in (("other/llama-4bit", True), ("Some/Llama", False), ("", False)):
        changed(directory, config=lambda c, n=named: c.update(base_model_name_or_path=n))
        notices = plan_adapters(open_checkpoint(base), [directory], None, dtype="keep").notices
        told = "trained on other/llama-4bit, this base that it is some/llama" in " ".join(notices)
        assert told is is_told


def test_a_module_of_transformers_is_not_always_named_as_the_type(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("openai-gpt", vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path / "base"))
    directory = saved(tmp_path / "base", tmp_path / "a", target_modules=["c_attn", "c_proj"])
    assert "transformers.models.openai." in (directory / "adapter_config.json").read_text()
    plan = plan_adapters(open_checkpoint(tmp_path / "base"), [directory], None, dtype="keep")
    assert len(plan.changed) == 3


def test_partly_untrained_is_told(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")

    def one(t: Tensors) -> None:
        t[f"{_Q}.lora_B.weight"] *= 0

    directory = changed(adapter(model, tmp_path / "a", "lora"), one)
    record = plan(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    assert any("1 of 9 modules" in notice and "untrained" in notice for notice in record.notices)


def test_a_named_folder_and_a_pickled_file_are_the_same_adapter(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", "lora")
    bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m0"))
    inside = tmp_path / "parent" / "my_adapter"
    shutil.copytree(directory, inside)
    tensors = load_file(str(inside / "adapter_model.safetensors"))
    (inside / "adapter_model.safetensors").unlink()
    # older files have the adapter's name in their keys
    named = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    torch.save(named, inside / "adapter_model.bin")
    record = bake(BakeConfig(base=model, rotations=tmp_path / "parent", out=tmp_path / "m1"))
    assert any("my_adapter" in notice for notice in record.notices)
    first, second = (load_file(str(tmp_path / m / "model.safetensors")) for m in ("m0", "m1"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    shutil.copytree(directory, tmp_path / "parent" / "other")
    with pytest.raises(InputError, match=r"several adapters: my_adapter, other"):
        bake(BakeConfig(base=model, rotations=tmp_path / "parent", out=tmp_path / "m2"))


@pytest.mark.parametrize("as_pickle", [False, True])
def test_one_adapter_given_twice_is_refused(make_model, tmp_path: Path, as_pickle: bool) -> None:
    """The same directory, or a copy in another format: the sum would be twice what was trained."""
    model = make_model("llama", "float32")
    first = adapter(model, tmp_path / "a", "lora")
    other = first
    if as_pickle:
        other = tmp_path / "copy"
        shutil.copytree(first, other)
        tensors = load_file(str(other / "adapter_model.safetensors"))
        (other / "adapter_model.safetensors").unlink()
        torch.save(tensors, other / "adapter_model.bin")
        changed(other, config=lambda said: said.update(base_model_name_or_path="elsewhere"))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="given twice") as raised:
        bake(BakeConfig(base=model, rotations=first, adapters=(other,), out=out))
    assert raised.value.where == str(other)
    assert not out.exists()


def test_two_trainings_of_one_method_are_not_one_adapter(make_model, tmp_path: Path) -> None:
    """Equal values with another strength are another adapter, and so is one element."""
    model = make_model("llama", "float32")
    first = adapter(model, tmp_path / "a", "lora")
    for name in ("strength", "element"):
        other = tmp_path / name
        shutil.copytree(first, other)
    changed(tmp_path / "strength", config=lambda said: said.update(lora_alpha=5))

    def nudge(held: Tensors) -> None:
        held[f"{_Q}.lora_B.weight"][0, 0] += 1

    changed(tmp_path / "element", nudge)
    checkpoint = open_checkpoint(model)
    for name in ("strength", "element"):
        found = plan_adapters(checkpoint, [first, tmp_path / name], None, dtype="keep")
        assert len(found.adapters) == 2


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ({".*_proj": 8, "q_proj": 64}, True),
        ({".*_proj": 8, "q_proj": 8}, False),
        ({"o_proj": 8, "q_proj": 64}, False),
    ],
)
def test_patterns_that_disagree_are_told(
    make_model, tmp_path: Path, patterns: dict[str, float], told: bool
) -> None:
    """PEFT saves patterns sorted: which of two came first in the training is lost."""
    model = make_model("llama", "float32")
    directory = adapter(model, tmp_path / "a", "lora")
    changed(directory, config=lambda said: said.update(alpha_pattern=patterns))
    found = plan_adapters(open_checkpoint(model), [directory], None, dtype="keep")
    about = [notice for notice in found.notices if "alpha_pattern" in notice]
    assert bool(about) == told
    if told:
        assert ".*_proj (8) is taken" in about[0]
        assert "q_proj (64)" in about[0]


def test_a_pickle_that_runs_code_is_refused(make_model, tmp_path: Path) -> None:
    directory = adapter(make_model("llama", "bfloat16"), tmp_path / "a", "lora")
    (directory / "adapter_model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("ran",)

    torch.save({"x": Evil()}, directory / "adapter_model.bin")
    with pytest.raises(InputError, match="code"):
        read_files(directory)


def test_runtime_names_find_stored_ones(make_model, tmp_path: Path) -> None:
    """A vision-language model's files call the text tower otherwise than its modules do."""
    model = make_model("qwen2_vl", "float32")
    directory = adapter(model, tmp_path / "a", "lora")
    old = tmp_path / "old"
    shutil.copytree(model, old)
    tensors = load_file(str(old / "model.safetensors"))
    renamed = {
        k.replace("model.language_model.", "language_model.model."): v for k, v in tensors.items()
    }
    save_file(renamed, str(old / "model.safetensors"), metadata={"format": "pt"})
    here = plan_adapters(open_checkpoint(model), [directory], None, dtype="keep")
    there = plan_adapters(open_checkpoint(old), [directory], None, dtype="keep")
    assert len(here.changed) == len(there.changed) == 9
    for a, b in zip(here.changed, there.changed, strict=True):
        assert torch.equal(a.whole_in_float64(), b.whole_in_float64())


def saved(model: Path, directory: Path, **options: Any) -> Path:
    import peft

    live = peft.get_peft_model(load(model), peft.LoraConfig(r=4, lora_alpha=8, **options))
    shake(live, 3)
    live.save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
        {"target_modules": ["lm_head", "down_proj"]},
    ],
    ids=lambda o: "-".join(map(str, o)),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_biases_saved_modules_and_embeddings(
    options: dict[str, Any], dtype: str, make_model, tmp_path: Path
) -> None:
    from peft_cases import logits, unmerged

    model = make_model("qwen2", dtype)  # q, k and v have biases, the head is a tensor of its own
    directory = saved(model, tmp_path / "a", **options)
    record = bake(
        BakeConfig(base=model, rotations=directory, out=tmp_path / "m", baked_dtype="float32")
    )
    assert record.verdict is Verdict.PASS, [c for c in record.checks if c.verdict is Verdict.FAIL]
    ids = torch.arange(7, 31)[None]
    # loaded in bfloat16 PEFT would round what it saved to bfloat16; the bake need not
    expected = logits(unmerged(model, [directory], torch.float32), ids)
    effect = float((expected - logits(load(model, torch.float64), ids)).abs().max())
    got = logits(load(tmp_path / "m", torch.float64), ids)
    assert float((got - expected).abs().max()) < 2e-5 * effect


def test_a_tied_head_is_told(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    for name, words in (("lm_head", "the head alone"), ("embed_tokens", "the embedding alone")):
        directory = saved(model, tmp_path / name, target_modules=[name])
        record = bake(BakeConfig(base=model, rotations=directory, out=tmp_path / f"m-{name}"))
        assert any("changes both" in n and words in n for n in record.notices)
    directory = saved(model, tmp_path / "s", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="tie_word_embeddings"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "ms"))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_tensor_changes_the_logits_at_both_ends(
    name: str, make_model, tmp_path: Path
) -> None:
    """The bake is what PEFT computes where the adapter's change is put at both ends."""
    from peft_cases import logits, unmerged

    model = make_model("llama", "float32")
    directory = saved(model, tmp_path / name, target_modules=[name])
    bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    ids = torch.arange(7, 31)[None]
    live = unmerged(model, [directory], torch.float32)
    one_end = logits(live, ids)
    stored = load_file(str(tmp_path / "m" / "model.safetensors"))["model.embed_tokens.weight"]
    wrapped = next(m for n, m in live.named_modules() if n.endswith(f".{name}"))
    change = wrapped.get_delta_weight("a0").detach()
    both = load(model, torch.float64)
    whole = both.get_input_embeddings().weight.data + change
    assert float((stored.double() - whole).abs().max()) <= 2.0**-24 * float(whole.abs().max())
    both.get_input_embeddings().weight.data = whole
    both.tie_weights()
    expected = logits(both, ids)
    effect = float((expected - logits(load(model, torch.float64), ids)).abs().max())
    got = logits(load(tmp_path / "m", torch.float64), ids)
    assert float((got - expected).abs().max()) < 2e-5 * effect
    assert float((got - one_end).abs().max()) > 1e-2 * effect  # which the training did not see


def tied_again(directory: Path) -> Path:
    """The head's factors are the embedding's, as ``ensure_weight_tying`` trains them."""

    def tie(t: Tensors) -> None:
        embedding = "base_model.model.model.embed_tokens.lora_embedding_"
        t["base_model.model.lm_head.lora_A.weight"] = t[f"{embedding}B"].T.clone()
        t["base_model.model.lm_head.lora_B.weight"] = t[f"{embedding}A"].T.clone()

    return changed(directory, tie)


def test_a_head_trained_with_its_embedding_is_one_change(make_model, tmp_path: Path) -> None:
    from peft_cases import logits, unmerged

    model = make_model("llama", "float32")
    directory = saved(
        model, tmp_path / "a", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    )
    with pytest.raises(InputError, match=r"in two ways.*ensure_weight_tying"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    record = bake(BakeConfig(base=model, rotations=tied_again(directory), out=tmp_path / "m"))
    assert not any("changes both" in notice for notice in record.notices)
    ids = torch.arange(7, 31)[None]
    expected = logits(unmerged(model, [directory], torch.float32), ids)
    got = logits(load(tmp_path / "m", torch.float64), ids)
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_head_saved_with_its_embedding_is_one_tensor(
    name: str, make_model, tmp_path: Path
) -> None:
    from peft_cases import logits, unmerged

    model = make_model("llama", "float32")
    directory = saved(
        model,
        tmp_path / "a",
        target_modules=["q_proj"],
        modules_to_save=[name],
        ensure_weight_tying=True,
    )
    keys = load_file(str(directory / "adapter_model.safetensors")).keys()
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} < keys
    record = bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    assert not any("changes both" in notice for notice in record.notices)
    ids = torch.arange(7, 31)[None]
    expected = logits(unmerged(model, [directory], torch.float32), ids)
    got = logits(load(tmp_path / "m", torch.float64), ids)
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_arrows_router_is_refused(make_model, tmp_path: Path) -> None:
    """Arrow weighs LoRAs token by token: an adapter that says so is no single one."""
    directory = adapter(make_model("llama", "bfloat16"), tmp_path / "a", "lora")
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["arrow_config"] is None
    arrow = {"top_k": 3, "router_temperature": 1.0, "use_gks": False}
    file.write_text(json.dumps(config | {"arrow_config": arrow}))
    with pytest.raises(InputError, match=r"arrow_config=.*top_k") as caught:
        bake(BakeConfig(base=make_model("llama", "bfloat16"), rotations=directory,
                        out=tmp_path / "m"))  # fmt: skip
    assert "not understood" in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize("targets", [None, r".*attn\.c_proj"], ids=["usual", "square alone"])
def test_conv1d_is_stored_transposed(kind: str, targets: str | None, tmp_path: Path) -> None:
    """Of any model: a square matrix does not show it, transformers' module does."""
    from peft_cases import logits, unmerged
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tmp_path / kind
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).save_pretrained(str(model))
    named = {"target_modules": targets or ["c_attn", "c_proj"]}
    for method in ("lora", "dora", "vera"):
        directory = adapter(model, tmp_path / method, method, fan_in_fan_out=True, **named)
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / f"m-{method}"))
        ids = torch.arange(7, 31)[None]
        expected = logits(unmerged(model, [directory], torch.float32), ids)
        effect = float((expected - logits(load(model, torch.float64), ids)).abs().max())
        got = logits(load(tmp_path / f"m-{method}", torch.float64), ids)
        assert float((got - expected).abs().max()) < 2e-5 * effect, method


def test_an_oft_adapter_that_was_no_rotation_in_training_is_told(
    make_model, tmp_path: Path
) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", "oft")

    def larger(t: Tensors) -> None:
        for key in t:
            t[key] = t[key] * 3

    changed(directory, larger)
    record = bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    check = next(c for c in record.checks if c.id == "rotation.orthogonality")
    assert check.verdict is Verdict.PASS
    assert float(check.value or 0) > 1e-2
    assert "The training itself computed no rotations" in check.detail


def test_one_weight_at_several_positions_is_refused(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", "lora")
    shared = tmp_path / "shared"
    shutil.copytree(model, shared)
    tensors = load_file(str(shared / "model.safetensors"))
    kept = {k: v for k, v in tensors.items() if "layers.2.self_attn" not in k}
    save_file(kept, str(shared / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(InputError, match="no single weight can hold"):
        bake(BakeConfig(base=shared, rotations=directory, out=tmp_path / "m"))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ 4-bit"),
        ({"quant_method": "awq", "bits": 4}, "AWQ 4-bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
         "FP8 (e4m3, block scales 128×128)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
         "bitsandbytes 4-bit (nf4)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"},
                                        "input_activations": None}}},
         "compressed-tensors W4A16 (pack-quantized)"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "fbgemm_fp8"}, "FBGEMM FP8 (row scales)"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3}}},
         "HQQ 3-bit"),
        ({"quant_method": "quanto", "weights": "int4"}, "Quanto (int4)"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"},
         "torchao (int4_weight_only)"),
        ({"quant_method": "eetq", "weights": "int8"}, "EETQ (int8)"),
        ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "AQLM 16-bit"),
        ({"quant_method": "spqr", "bits": 3}, "SpQR 3-bit"),
        ({"quant_method": "gguf"}, "GGUF"),
        ({"quant_method": "something-new"}, "something-new"),
        ({}, "an unnamed method"),
    ],
)  # fmt: skip
def test_quantized_bases_are_refused_by_their_name(
    said: dict[str, Any], name: str, make_model, make_gates, tmp_path: Path
) -> None:
    model = make_model("llama", "bfloat16")
    directory, gates = adapter(model, tmp_path / "a", "lora"), make_gates(model)
    base = tmp_path / "quantized"
    shutil.copytree(model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    found = quantization_name({**config, "quantization_config": said})
    assert name in str(found)
    for trained in (directory, gates):
        with pytest.raises(ModelError) as caught:
            bake(BakeConfig(base=base, rotations=trained, out=tmp_path / "m"))
        assert name in str(caught.value)
        assert "full-precision" in str(caught.value)


def test_every_method_of_transformers_has_its_name() -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    for method in QuantizationMethod:
        told = str(quantization_name({"quantization_config": {"quant_method": method.value}}))
        bare = re.sub(r"[^a-z0-9]", "", method.value.lower())
        assert bare in re.sub(r"[^a-z0-9]", "", told.lower()), method
        assert told != method.value or method.value in ("torchao", "bitsandbytes")


@pytest.mark.parametrize(
    ("tensor", "name"),
    [("qweight", "GPTQ or AWQ"), ("weight.quant_map", "bitsandbytes 4-bit"),
     ("weight_packed", "compressed-tensors"), ("SCB", "bitsandbytes 8-bit")],
)  # fmt: skip
def test_quantized_bases_whose_config_says_nothing(
    tensor: str, name: str, make_model, tmp_path: Path
) -> None:
    """Older tools wrote it to a file of their own, or nowhere."""
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", "lora")
    base = tmp_path / "quantized"
    shutil.copytree(model, base)
    tensors = load_file(str(base / "model.safetensors"))
    tensors[f"model.layers.0.mlp.up_proj.{tensor}"] = torch.zeros(2, 2, dtype=torch.int32)
    save_file(tensors, str(base / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"quantized: {name}"):
        bake(BakeConfig(base=base, rotations=directory, out=tmp_path / "m"))


def test_the_command_line(make_model, make_gates, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    first = adapter(model, tmp_path / "a", "lora")
    second = adapter(model, tmp_path / "b", "dora", seed=1)
    runner = CliRunner()

    def run(*arguments: object) -> int:
        result = runner.invoke(app, ["bake", *map(str, arguments)])
        if isinstance(result.exception, So8tqcError):
            return int(result.exception.exit_code)
        return result.exit_code

    assert run(model, first, "--out", tmp_path / "m1") == 0
    gates = make_gates(model)
    assert run(model, gates, "--adapter", first, "--adapter", second, "--out", tmp_path / "m2") == 0
    said = json.loads((tmp_path / "m2" / "so8tqc.json").read_text())
    assert [a["kind"] for a in said["adapters"]] == ["LORA", "LORA"]
    assert said["convention"] == "column"
    assert run(model, first, "--out", tmp_path / "m3", "--dry-run") == 0
    assert not (tmp_path / "m3").exists()
    changed(first, _nan)
    assert run(model, first, "--out", tmp_path / "m4") == 3

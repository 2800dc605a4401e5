"""Adapters as trainings really configure them: parts of a model, other inits, other methods."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import METHODS, adapter, effective, in_float64, load, logits, shake, unmerged
from safetensors.torch import load_file, save_file

from so8tqc.adapters.files import read_files
from so8tqc.adapters.plan import plan_adapters
from so8tqc.adapters.settings import require_understood
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig
from so8tqc.errors import InputError, ModelError
from so8tqc.records import Verdict
from so8tqc.services.bake import bake
from so8tqc.sources.unmerged import load_unmerged

IDS = torch.arange(7, 31)[None]


def trained(model: Path, directory: Path, kind: str, *, seed: int = 3, **options: Any) -> Path:
    """An adapter of any configuration whose every part has moved."""
    import peft

    live = peft.get_peft_model(load(model), getattr(peft, f"{kind}Config")(**options))
    shake(live, seed)
    live.save_pretrained(str(directory))
    return directory


def judged(model: Path, directory: Path, out: Path) -> float:
    """Bake; the distance of its logits from PEFT's unmerged ones, as a share of the effect."""
    record = bake(BakeConfig(base=model, rotations=directory, out=out, baked_dtype="float32"))
    assert record.verdict is Verdict.PASS, [c for c in record.checks if c.verdict is Verdict.FAIL]
    expected = logits(unmerged(model, [directory], torch.float32), IDS)
    effect = float((expected - logits(load(model, torch.float64), IDS)).abs().max())
    got = logits(load(out, torch.float64), IDS)
    return float((got - expected).abs().max()) / effect


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Lora", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
        ("Lora", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
        ("Lora", {"target_modules": "all-linear", "r": 3, "use_rslora": True, "lora_alpha": 5}),
        ("Lora", {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal", "r": 4}),
        ("IA3", {"target_modules": ["q_proj", "k_proj", "down_proj"],
                 "feedforward_modules": ["down_proj"]}),
        ("IA3", {"target_modules": ["v_proj"], "feedforward_modules": ["v_proj"]}),
        ("OFT", {"target_modules": ["lm_head", "o_proj"], "oft_block_size": 8, "r": 0}),
        ("LNTuning", {"task_type": "CAUSAL_LM"}),
        ("LoHa", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["norm"]}),
        ("LoKr", {"target_modules": ["gate_proj"], "decompose_factor": 4, "r": 1}),
        ("AdaLora", {"target_modules": ["q_proj"], "total_step": 9, "lora_alpha": 900}),
        ("Beft", {"target_modules": ["q_proj", "v_proj"]}),
        ("Miss", {"target_modules": ["q_proj"], "r": 7, "modules_to_save": ["norm"]}),
        ("Hira", {"target_modules": ["embed_tokens", "v_proj"], "r": 2}),
        ("Gralora", {"target_modules": ["gate_proj"], "r": 4, "hybrid_r": 1}),
        ("Delora", {"target_modules": ["q_proj"], "r": 2, "delora_lambda": -3, "bias": "all"}),
    ],
    ids=lambda o: "-".join(map(str, o.items())) if isinstance(o, dict) else o,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_model(
    kind: str, options: dict[str, Any], dtype: str, make_model, tmp_path: Path
) -> None:
    model = make_model("qwen2", dtype)  # q, k and v have biases
    directory = trained(model, tmp_path / "a", kind, **options)
    assert judged(model, directory, tmp_path / "m") < 2e-5


_WIDTHS = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
}  # fmt: skip
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("width", [32, 48, 64])
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("aria_text", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
        ("llama4_text", {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 96,
                         "num_experts_per_tok": 1}),
    ],
)  # fmt: skip
def test_experts_are_stored_either_way(
    kind: str, own: dict[str, Any], width: int, tmp_path: Path
) -> None:
    """[out, in] or [in, out], with either of the two parameters square or none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, intermediate_size=width, **_WIDTHS | own)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.data.fill_(1.0)
    model.save_pretrained(str(tmp_path / "base"))
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "target_parameters": _EXPERTS}
    directory = trained(tmp_path / "base", tmp_path / "a", "Lora", **options)
    assert judged(tmp_path / "base", directory, tmp_path / "m") < 2e-5


def test_pruned_ranks_of_adalora(make_model, tmp_path: Path) -> None:
    """PEFT saves what its allocator left, also nothing, and scales by the rank before."""
    import peft

    model = make_model("llama", "float32")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=800, total_step=9, target_modules=["q_proj", "o_proj"]
    )
    live = peft.get_peft_model(load(model), config)
    shake(live, 5)
    kept = {"q_proj": [True, False, True, True], "o_proj": [False] * 4}
    live.peft_config["default"].rank_pattern = {
        f"model.layers.{i}.self_attn.{name}.lora_E": ranks
        for i in range(3)
        for name, ranks in kept.items()
    }
    live.save_pretrained(str(tmp_path / "a"))
    parts = read_files(tmp_path / "a").parts
    shapes = {tuple(p["lora_E.weight"].shape) for p in parts.values()}
    assert shapes == {(3, 1), (0, 1)}
    assert judged(model, tmp_path / "a", tmp_path / "m") < 2e-5


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_inits_that_change_the_base(init: str, make_model, tmp_path: Path) -> None:
    """Unconverted, the adapter belongs to another base; converted, it is a LoRA of this one."""
    import peft

    model = make_model("llama", "float32")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=init)
    live = peft.get_peft_model(load(model), config)
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(str(tmp_path / "initial"))
    live.peft_config["default"].init_lora_weights = init
    shake(live, 5)
    live.save_pretrained(str(tmp_path / "as-it-is"))
    with pytest.raises(InputError, match=f"initialised by {init}.*left of the base") as caught:
        bake(BakeConfig(base=model, rotations=tmp_path / "as-it-is", out=tmp_path / "no"))
    assert "path_initial_model_for_weight_conversion" in str(caught.value)
    live.save_pretrained(
        str(tmp_path / "converted"),
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    expected = logits(live.double(), IDS)
    bake(BakeConfig(base=model, rotations=tmp_path / "converted", out=tmp_path / "m"))
    got = logits(load(tmp_path / "m", torch.float64), IDS)
    effect = float((expected - logits(load(model, torch.float64), IDS)).abs().max())
    assert float((got - expected).abs().max()) < 1e-4 * effect  # float32 SVD, converted in float32


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "PiSSA"])
def test_other_inits_that_change_the_base(init: str, make_model, tmp_path: Path) -> None:
    directory = adapter(make_model("llama", "bfloat16"), tmp_path / "a", "lora")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    with pytest.raises(InputError, match=init):
        require_understood(read_files(directory))


def test_every_method_of_peft_is_baked_or_refused_with_its_reason(
    make_model, tmp_path: Path
) -> None:
    import peft

    directory = adapter(make_model("llama", "bfloat16"), tmp_path / "a", "lora")
    path = directory / "adapter_config.json"
    baked, in_front = set(), set()
    for kind in peft.PeftType:
        path.write_text(json.dumps({"peft_type": kind.value}))
        try:
            require_understood(read_files(directory))
            baked.add(kind.value)
        except InputError as error:
            told = str(error)
            assert kind.value in told
            assert ("no weight can hold" in told) or "closed form" in told
            if "no weight can hold" in told:
                in_front.add(kind.value)
    assert baked == {
        "LORA", "ADALORA", "OFT", "BOFT", "HRA", "PSOFT", "ROAD", "VERA", "LOHA", "LOKR", "IA3",
        "LN_TUNING", "BEFT", "MISS", "SHIRA", "C3A", "DELORA", "HIRA", "GRALORA", "RANDLORA",
        "VBLORA", "FOURIERFT", "WAVEFT", "TRAINABLE_TOKENS", "PVERA",
    }  # fmt: skip
    assert in_front == {
        "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
        "CARTRIDGE", "ADAPTION_PROMPT", "XLORA", "POLY", "LILY",
    }  # fmt: skip


SUMMED = ["pvera", "miss", "miss-bat", "shira", "delora", "hira", "gralora", "randlora", "vblora",
          "fourierft", "waveft"]  # fmt: skip


@pytest.mark.parametrize("method", SUMMED)
def test_two_adapters_of_one_method(method: str, make_model, tmp_path: Path) -> None:
    model = make_model("llama", "float32")
    pair = [adapter(model, tmp_path / f"a{i}", method, seed=i) for i in (1, 2)]
    record = bake(BakeConfig(base=model, rotations=pair[0], adapters=[pair[1]], out=tmp_path / "m"))
    assert record.verdict is Verdict.PASS
    expected = logits(unmerged(model, pair, torch.float32), IDS)
    one = logits(unmerged(model, pair[:1], torch.float32), IDS)
    effect = float((expected - one).abs().max())
    got = logits(load(tmp_path / "m", torch.float64), IDS)
    assert float((got - expected).abs().max()) < 1e-4 * effect


@pytest.mark.parametrize(
    ("methods", "words"),
    [(("c3a", "c3a"), "several C3A"), (("miss", "miss-bat"), "different forms")],
)
def test_pairs_whose_forward_is_no_merge_are_refused(
    methods: tuple[str, str], words: str, make_model, tmp_path: Path
) -> None:
    model = make_model("llama", "float32")
    pair = [adapter(model, tmp_path / f"a{i}", m, seed=i) for i, m in enumerate(methods)]
    with pytest.raises(InputError, match=words):
        bake(BakeConfig(base=model, rotations=pair[0], adapters=[pair[1]], out=tmp_path / "m"))


@pytest.mark.parametrize("method", METHODS)
def test_any_method_after_another_is_pefts_nested_forward(
    method: str, make_model, tmp_path: Path
) -> None:
    """Weight by weight in float64; what PEFT's forward leaves out, or does not nest, is refused."""
    model = make_model("llama", "float32")
    first = "lora" if method.removesuffix("-patterns") not in ("lora", "dora") else "loha"
    pair = [
        adapter(model, tmp_path / "first", first, target_modules=["q_proj", "o_proj"]),
        adapter(model, tmp_path / "second", method, seed=4),
    ]
    if method in ("hra", "hra-gs", "miss-bat"):
        with pytest.raises(InputError, match="leaves the other out"):
            plan_adapters(open_checkpoint(model), pair, None, dtype="keep")
        return
    if method == "shira":
        with pytest.raises(ModelError, match="nested"):
            load_unmerged(model, pair)
        return
    live = in_float64(load_unmerged(model, pair, dtype="float32").module)
    for changed in plan_adapters(open_checkpoint(model), pair, None, dtype="keep").changed:
        weight = changed.whole_in_float64()
        module = live.get_submodule(changed.entry.name.removesuffix(".weight"))
        own = load_file(str(model / "model.safetensors"))[changed.entry.name].double()
        off = effective(module, weight.shape[1]) - weight
        assert float(off.norm()) < 1e-6 * float((weight - own).norm())


def test_wavelets_of_no_file_are_refused(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", "waveft", wavelet_family="db2")
    with pytest.raises(InputError, match=r"'db2'.*filters stand in PEFT's code"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))


def test_what_pvera_draws_is_refused(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    for name, options, words in (
        ("drawn", {"save_projection": False}, "pvera_B are missing.*save_projection"),
        ("sampled", {"sample_at_inference": True}, "at random each time"),
    ):
        directory = adapter(model, tmp_path / name, "pvera", **options)
        with pytest.raises(InputError, match=words):
            bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))


def test_bases_that_were_not_saved_are_asked_for(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", "randlora", save_projection=False)
    with pytest.raises(InputError, match=r"randlora_B were not saved.*save_projection"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))


def test_a_bias_that_the_base_does_not_have(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = trained(model, tmp_path / "a", "Beft", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"adds to a bias.*q_proj\.bias"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))


def test_turned_embeddings_are_refused(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "oft", "oft")
    file = directory / "adapter_model.safetensors"
    tensors = load_file(str(file))
    key = next(iter(tensors))
    tensors["base_model.model.model.embed_tokens.oft_embedding_R.weight"] = tensors.pop(key)
    save_file(tensors, str(file))
    with pytest.raises(InputError, match="rotates an embedding"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))


@pytest.mark.parametrize(
    ("method", "part", "change", "words"),
    [
        ("loha", "hada_w1_a", lambda t: t[:-1], ["hada_w1_a", "[63, 3]", "[64, 3]"]),
        ("loha", "hada_w2_b", lambda t: t * torch.nan, ["hada_w2_b", "not finite"]),
        ("lokr", "lokr_w1", lambda t: t[:-1], ["lokr_w1 and lokr_w2", "64 × 64"]),
        ("ia3", "ia3_l", lambda t: t[:-1], ["ia3_l", "[63, 1]", "[64, 1]"]),
        ("pvera", "pvera_lambda_d", lambda t: t[1:], ["pvera_lambda_d", "[11]", "[12]"]),
        ("adalora", "lora_E", lambda t: t[:-1], ["lora_E", "[4, 1]", "[5, 1]"]),
        ("miss", "miss_block", lambda t: t[:, 1:], ["miss_block", "[6, 63]", "[6, 64]"]),
        ("miss-bat", "miss_block", lambda t: t[0], ["miss_block", "[8, 8, 8]"]),
        ("shira", "shira_indices", lambda t: t * 70, ["places outside of 64 × 64"]),
        ("shira", "shira_indices", lambda t: t * 0, ["a place twice"]),
        ("shira", "shira_weight", lambda t: t[1:], ["shira_indices", "[2, 255]"]),
        ("c3a", "c3a_kernel", lambda t: t[1:], ["c3a_kernel's blocks", "[56, 64]"]),
        ("delora", "delora_w_norm", lambda t: t[1:], ["delora_w_norm", "[63]"]),
        ("hira", "hira_B", lambda t: t[1:], ["hira_B", "[63, 3]"]),
        ("gralora", "gralora_A", lambda t: t[1:], ["gralora_A", "[2, 32, 6]"]),
        ("randlora", "randlora_lambda", lambda t: t[1:], ["randlora_lambda", "[5, 13]"]),
        ("vblora", "vblora_logits_A", lambda t: t[1:], ["vblora_logits_A", "[3, 8, 9]"]),
        ("vblora-topk", "logits_B_topk_indices", lambda t: t + 9, ["vectors that are none"]),
        ("fourierft", "spectrum", lambda t: t.repeat(200), ["8000 numbers for 4096 places"]),
        ("waveft", "spectrum", lambda t: t * torch.inf, ["spectrum", "not finite"]),
    ],
)
def test_parts_that_do_not_fit(
    method: str, part: str, change: Any, words: list[str], make_model, tmp_path: Path
) -> None:
    model = make_model("llama", "bfloat16")
    directory = adapter(model, tmp_path / "a", method)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(str(file))
    key = next(k for k in tensors if "layers.1.self_attn.q_proj" in k and part in k)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, str(file))
    with pytest.raises(InputError) as caught:
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    for word in (*words, "layers.1.self_attn.q_proj"):
        assert word in str(caught.value)


@pytest.mark.parametrize("method", ["adalora", "ia3", "loha", "lokr"])
def test_untrained_adapters_are_refused(method: str, make_model, tmp_path: Path) -> None:
    import peft
    from peft_cases import METHODS

    model = make_model("llama", "bfloat16")
    options = {k: v for k, v in METHODS[method].items() if k != "kind"}
    if method == "ia3":
        options["feedforward_modules"] = []
    kind = getattr(peft, f"{METHODS[method]['kind']}Config")
    live = peft.get_peft_model(load(model), kind(target_modules=["q_proj"], **options))
    live.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(InputError, match="untrained"):
        bake(BakeConfig(base=model, rotations=tmp_path / "a", out=tmp_path / "m"))


def test_a_block_that_layers_share_is_refused(
    tokenizer_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zamba2 runs one block at several positions; adapters of two of them have no one weight."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "architectures"))
    tiny_models = importlib.import_module("tiny_models")
    model = tmp_path / "base"
    tiny_models.build("zamba2", model, tokenizer_files, 512)
    directory = trained(model, tmp_path / "a", "Lora", target_modules=["o_proj"], r=2)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(str(file))
    first = next(k.split("lora_")[0] for k in tensors)
    for part in ("A", "B"):
        other = torch.randn_like(tensors[f"{first}lora_{part}.weight"])
        number = next(w for w in first.split(".") if w.isdigit())
        twin = first.replace(f".{number}.", f".{int(number) + 2}.", 1)
        tensors[f"{twin}lora_{part}.weight"] = other
    save_file(tensors, str(file))
    with pytest.raises(InputError, match="no single weight can hold"):
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))

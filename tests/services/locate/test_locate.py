"""Where two model directories part: the layer and the operation, and which mistake it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from parted import changed, located, places, wrong

from so8tqc.cli.main import run
from so8tqc.config import BakeConfig
from so8tqc.record_kinds.locate import LocateMetrics
from so8tqc.records import Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake

ModelOf = Callable[[str], Path]
L1 = "model.layers.1."


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3_text", "mixtral",
                                          "phi3"])  # fmt: skip
def test_a_model_does_not_part_from_itself(
    parted_model: ModelOf, architecture: str, tmp_path: Path
) -> None:
    model = parted_model(architecture)
    record = located(model, model, tmp_path / "out")
    found = LocateMetrics.of(record)
    assert (record.verdict, wrong(record), record.diagnosis) == (Verdict.PASS, [], ())
    assert {row.error for row in found.operations} == {0.0}
    assert [row.layer for row in found.layers] == [0, 1, 2, None]
    words = {row.operation for row in found.operations if row.layer == 1}
    projections = {"q, k, v"} if architecture == "phi3" else {"q", "k"}
    assert words >= {"norm", "v", "rope", "attention", "o", "residual"} | projections
    assert ("experts" in words, "router" in words) == ((architecture == "mixtral"),) * 2
    around = [row.operation for row in found.operations if row.layer is None]
    assert around == ["embedding", "embedding scale", "norm", "head", "soft cap"]


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_another_storage_dtype_is_explained(
    parted_model: ModelOf, dtype: str, tmp_path: Path
) -> None:
    kind = {"F32": torch.float32, "F16": torch.float16}[dtype]

    def cast(weights: dict) -> None:
        weights |= {name: value.to(kind) for name, value in weights.items()}

    model = parted_model("qwen2")
    fine = changed(model, tmp_path / "fine", lambda w: w.update(
        {n: v.float() * 1.001 for n, v in w.items()}))  # fmt: skip
    record = located(fine, changed(fine, tmp_path / "cast", cast), tmp_path / "out")
    assert wrong(record) == []
    assert record.verdict is Verdict.PASS


def scaled(name: str, factor: float) -> Callable[[dict], None]:
    return lambda weights: weights[name].mul_(factor)


def exchange(one: str, other: str) -> Callable[[dict], None]:
    def change(weights: dict) -> None:
        for name in [name for name in weights if one in name]:
            there = name.replace(one, other)
            weights[name], weights[there] = weights[there], weights[name]

    return change


def set_to(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def change(weights: dict) -> None:
        weights[name] = value(weights[name]).contiguous()

    return change


Q, O, NORM = (L1 + n for n in ("self_attn.q_proj.weight", "self_attn.o_proj.weight",
                               "input_layernorm.weight"))  # fmt: skip
BIAS = L1 + "self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("architecture", "change", "operation", "cause"),
    [
        ("llama", scaled(Q, 1.005), "q", "times the reference's"),
        ("gemma2", scaled(Q, 1.2), "q", "1.2.* times the reference's"),
        ("qwen2", scaled(Q, 1.05), "q", r"its weights are 1\.0\d* times .* its bias is not"),
        ("llama", scaled(L1 + "self_attn.v_proj.weight", 0.5), "v", r"0\.5 times"),
        ("llama", scaled(L1 + "mlp.down_proj.weight", 1.02), "mlp", "times"),
        ("mixtral", scaled(L1 + "mlp.gate.weight", 1.02), "router", "times"),
        ("qwen2", set_to(BIAS, torch.zeros_like), "k", "its bias is lost"),
        ("qwen2", lambda weights: weights.pop(BIAS), "k", "its bias is lost"),
        ("llama", set_to(NORM, lambda w: w - 1), "norm", "the norm's 1 was not added"),
        ("gemma3_text", set_to(NORM, lambda w: w - 1), "norm", "the norm's 1 was not added"),
        ("gemma2", set_to(NORM, lambda w: w + 1), "norm", "the norm's 1 was added twice"),
        ("llama", set_to(O, lambda w: w.T), "o", "its matrix is transposed"),
        ("llama", set_to(Q, lambda w: w.roll(1, 0)), "q", "output features hold others"),
        (
            "llama",
            set_to(Q, lambda w: w.reshape(4, 2, 32, -1).transpose(1, 2).reshape(w.shape)),
            "q",
            "order of rope over neighbours",
        ),
        (
            "llama",
            set_to(Q, lambda w: w.reshape(4, 32, 2, -1).transpose(1, 2).reshape(w.shape)),
            "q",
            "order of rope over halves",
        ),
        ("llama", exchange("layers.1.mlp.up_proj", "layers.1.mlp.gate_proj"), "mlp",
         "it has the weights of mlp.up_proj"),
        ("llama", exchange("layers.1.self_attn.v_proj", "layers.2.self_attn.v_proj"), "v",
         "it has the weights of layer 2"),
        ("mixtral", exchange("layers.1.mlp.experts.0.", "layers.1.mlp.experts.2."), "experts",
         "expert 0 holds 2, expert 2 holds 0"),
        ("mixtral", scaled("model.layers.1.mlp.experts.3.w2.weight", 1.5), "experts",
         r"other weights in 1 of its 4 experts \(3\)"),
        ("llama", set_to(Q, torch.zeros_like), "q", "its values are all 0"),
        ("llama", set_to(Q, lambda w: w.fill_(torch.nan)), "q", "NaN or infinite"),
    ],
)  # fmt: skip
def test_a_fault_in_one_operation_is_named_with_its_cause(
    parted_model: ModelOf,
    architecture: str,
    change: Callable[[dict], None],
    operation: str,
    cause: str,
    tmp_path: Path,
) -> None:
    model = parted_model(architecture)
    if architecture == "mixtral":
        change = _under_mlp(change)
    record = located(model, changed(model, tmp_path / "bad", change), tmp_path / "out")
    assert record.verdict is Verdict.FAIL
    first = wrong(record)[0]
    assert (first.layer, first.operation) == (1, operation)
    assert np.isnan(first.error) or first.error > first.limit
    assert re.search(cause, first.cause), first.cause
    others = {place for place in places(record) if place != (1, operation)}
    assert others <= {(2, operation)}  # only where two layers were exchanged
    assert record.diagnosis[0].code == "wrong_operation"
    assert 1 in record.diagnosis[0].layers


def _under_mlp(change: Callable[[dict], None]) -> Callable[[dict], None]:
    """A change of a mixtral's tensors, which are stored below another name than its modules."""

    def renamed(weights: dict) -> None:
        known = {name.replace("block_sparse_moe", "mlp"): name for name in weights}
        plain = {new: weights[old] for new, old in known.items()}
        change(plain)
        weights.update({known[name]: value for name, value in plain.items()})

    return renamed


def rope(config: dict) -> None:
    config["rope_parameters"]["rope_theta"] *= 1.05


@pytest.mark.parametrize(
    ("architecture", "change", "expected", "cause"),
    [
        ("llama", rope, {(i, "rope") for i in range(3)}, "rope_theta is 10500, not 10000"),
        ("llama", lambda c: c.update(rms_norm_eps=1e-5),
         {(None, "norm"), *((i, "norm") for i in range(3))}, "rms_norm_eps is 1e-05, not 1e-06"),
        ("gemma2", lambda c: c.update(attn_logit_softcapping=None),
         {(i, "attention") for i in range(3)}, "attn_logit_softcapping is None, not 50"),
        ("gemma2", lambda c: c.update(final_logit_softcapping=None),
         {(None, "soft cap")}, "final_logit_softcapping is None, not 30"),
        ("gemma2", lambda c: c.update(sliding_window=17),
         {(0, "attention"), (2, "attention")}, "sliding_window is 17, not 16"),
        ("gemma3_text", lambda c: c["rope_parameters"]["full_attention"].update(rope_theta=1e4),
         {(1, "rope")}, "rope_theta is 10000, not 1000000"),
        ("mixtral", lambda c: c.update(num_experts_per_tok=1),
         {(i, "router") for i in range(3)}, "num_experts_per_tok is 1, not 2"),
    ],
)  # fmt: skip
def test_another_key_is_named_with_the_operations_that_it_changes(
    parted_model: ModelOf,
    architecture: str,
    change: Callable[[dict], None],
    expected: set,
    cause: str,
    tmp_path: Path,
) -> None:
    model = parted_model(architecture)
    record = located(model, changed(model, tmp_path / "bad", None, change), tmp_path / "out")
    assert record.verdict is Verdict.FAIL
    assert places(record) == expected
    assert {row.cause for row in wrong(record)} == {cause}


def test_layers_exchanged_are_both_named_and_what_follows_is_not(
    parted_model: ModelOf, tmp_path: Path
) -> None:
    model = parted_model("mixtral")
    bad = changed(model, tmp_path / "bad", exchange("layers.0.", "layers.1."))
    record = located(model, bad, tmp_path / "out")
    found = LocateMetrics.of(record)
    assert {row.layer for row in found.wrong} == {0, 1}
    for row in found.wrong:
        assert row.cause == f"it has the weights of layer {1 - (row.layer or 0)}"
    assert [row.wrong for row in found.layers] == [True, True, False, False]
    assert found.layers[2].error > 0.1  # inherited
    assert found.layers[2].own == 0.0


def test_the_embeddings_scale_and_another_head_are_named(
    parted_model: ModelOf, tmp_path: Path
) -> None:
    gemma, llama = parted_model("gemma3_text"), parted_model("llama")
    bad = changed(gemma, tmp_path / "bad", scaled("model.embed_tokens.weight", 1 / 16))
    first = wrong(located(gemma, bad, tmp_path / "out"))[0]
    assert first.operation == "embedding"
    assert first.cause == "the embedding's scale √256 is missing"

    def tie(weights: dict) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    (row,) = wrong(located(llama, changed(llama, tmp_path / "tied", tie), tmp_path / "out"))
    assert (row.operation, row.cause) == ("head", "it has the weights of the embedding")


def test_errors_are_those_of_transformers_hidden_states(
    parted_model: ModelOf, tmp_path: Path
) -> None:
    """Against both models run whole, and one layer of the candidate on the reference's state."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from so8tqc.sources.inputs.prepared import prepare

    model = parted_model("llama")
    bad = changed(model, tmp_path / "bad", scaled(Q, 1.3))
    found = LocateMetrics.of(located(model, bad, tmp_path / "out", texts=1))
    texts = prepare(("builtin:validation-quick",), AutoTokenizer.from_pretrained(model), 40).texts
    ids = torch.from_numpy(texts[0].tokens)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (model, bad)
    )
    with torch.no_grad():
        one, other = (
            m(input_ids=ids, output_hidden_states=True, use_cache=False) for m in (ours, theirs)
        )
        position = torch.arange(ids.shape[1])[None]
        rotary = theirs.model.rotary_emb(one.hidden_states[1], position)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        layer = theirs.model.layers[1]
        own = layer(one.hidden_states[1], position_embeddings=rotary, attention_mask=mask)
        x = ours.model.layers[1].input_layernorm(one.hidden_states[1])[0].double().numpy()

    def relative(found: torch.Tensor, known: torch.Tensor) -> float:
        a, b = found.double().numpy(), known.double().numpy()
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    rows = found.layers
    assert rows[0].error == 0.0
    assert rows[1].error == pytest.approx(
        relative(other.hidden_states[2], one.hidden_states[2]), rel=1e-4
    )
    assert rows[1].own == pytest.approx(relative(own, one.hidden_states[2]), rel=1e-4)
    assert rows[3].error == pytest.approx(relative(other.logits, one.logits), rel=1e-4)
    W, W2 = (
        m.model.layers[1].self_attn.q_proj.weight.detach().double().numpy() for m in (ours, theirs)
    )
    (row,) = found.wrong
    expected = np.linalg.norm(x @ (W2 - W).T) / np.linalg.norm(x @ W.T)
    assert row.error == pytest.approx(expected, rel=1e-4)
    gain = np.vdot(x @ W2.T, x @ W.T) / np.vdot(x @ W.T, x @ W.T)
    assert row.gain == pytest.approx(gain, rel=1e-4)


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    theta = {Target(i): generator.normal(size=(32, 8, 8)) * 0.3 for i in range(3)}
    path = tmp_path / "gates.safetensors"
    write_native(
        path, theta, parametrization=Parametrization.EXP, convention=Convention.COLUMN,
        site=Site.INPUT, pet=None,
    )  # fmt: skip
    return path


def test_a_bake_is_held_against_the_gated_model(
    parted_model: ModelOf, gates: Path, tmp_path: Path
) -> None:
    model = parted_model("llama")
    baked = tmp_path / "baked"
    bake(BakeConfig(base=model, rotations=gates, out=baked))
    record = located(model, baked, tmp_path / "out", rotations=gates)
    assert (record.verdict, wrong(record)) == (Verdict.PASS, [])
    found = LocateMetrics.of(record)
    o = next(row for row in found.operations if (row.layer, row.operation) == (1, "o"))
    assert 0 < o.error <= o.limit < 0.01

    def unbaked(weights: dict) -> None:
        from safetensors.torch import load_file

        weights[O] = load_file(model / "model.safetensors")[O]

    part = changed(baked, tmp_path / "part", unbaked)
    record = located(model, part, tmp_path / "out", rotations=gates)
    (row,) = wrong(record)
    assert (row.layer, row.operation, row.cause) == (1, "o", "the gate was not folded")

    turned = tmp_path / "turned"
    bake(BakeConfig(base=model, rotations=_row(gates, tmp_path), out=turned))
    record = located(model, turned, tmp_path / "out", rotations=gates)
    assert places(record) == {(i, "o") for i in range(3)}
    assert {row.cause for row in wrong(record)} == {"the transposed gate was folded"}


def _row(gates: Path, folder: Path) -> Path:
    """The same thetas, told to be of the other convention."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(gates, "np") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["so8t.convention"] = "row"
    path = folder / "row.safetensors"
    save_file(tensors, path, metadata)
    return path


def test_a_merged_adapter_is_held_against_peft(parted_model: ModelOf, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = parted_model("llama")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    trained = peft.get_peft_model(
        whole, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapter = tmp_path / "adapter"
    trained.save_pretrained(str(adapter))
    merged = tmp_path / "merged"
    bake(BakeConfig(base=model, rotations=adapter, out=merged))
    record = located(model, merged, tmp_path / "out", rotations=adapter)
    assert (record.verdict, wrong(record)) == (Verdict.PASS, [])
    record = located(model, model, tmp_path / "out", rotations=adapter)
    assert places(record) == {(i, "q") for i in range(3)}
    assert {row.cause for row in wrong(record)} == {"the adapter was not merged"}


def test_only_some_layers_are_looked_at(parted_model: ModelOf, tmp_path: Path) -> None:
    model = parted_model("llama")
    bad = changed(model, tmp_path / "bad", scaled(Q, 2.0))
    found = LocateMetrics.of(located(model, bad, tmp_path / "out", only_layers="0,2"))
    assert found.wrong == []
    assert {row.layer for row in found.operations} == {None, 0, 2}
    assert [row.wrong for row in found.layers] == [False, True, False, False]


def test_the_command_says_it_and_exits_with_its_verdict(
    parted_model: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = parted_model("llama")
    quick = ["--data", "builtin:validation-quick", "--max-tokens", "16", "--texts", "1"]
    out = tmp_path / "out"
    assert run(["locate", str(model), str(model), "--out", str(out), *quick]) == 0
    bad = changed(model, tmp_path / "bad", scaled(Q, 1.05))
    assert run(["locate", str(model), str(bad), "--out", str(out), *quick]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "layer 1, q (self_attn.q_proj)" in said
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["kind"] == "locate"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Where the models part" in page
    assert "times the reference" in page


def test_what_cannot_be_compared_is_bad_input(parted_model: ModelOf, tmp_path: Path) -> None:
    llama, qwen = parted_model("llama"), parted_model("qwen2")
    out = str(tmp_path / "out")
    assert run(["locate", str(llama), str(qwen), "--out", out]) == 3
    assert run(["locate", str(llama), str(tmp_path / "none"), "--out", out]) == 3
    assert run(["locate", str(tmp_path / "a.gguf"), str(llama), "--out", out]) == 3
    assert run(["locate", str(llama), str(llama), "--out", out, "--only-layers", "7"]) == 2
    shorter = changed(
        llama,
        tmp_path / "shorter",
        lambda w: [w.pop(n) for n in list(w) if ".layers.2." in n],
        lambda c: c.update(num_hidden_layers=2),
    )
    assert run(["locate", str(llama), str(shorter), "--out", out]) == 3
    moved = changed(llama, tmp_path / "moved")
    tokenizer = json.loads((moved / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, other = [piece for piece in vocabulary if piece.isalpha()][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert run(["locate", str(llama), str(moved), "--out", out]) == 3

"""Rows of an embedding or a head that were trained alone, against PEFT's own forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import load, logits, shake, unmerged
from safetensors.torch import load_file, save_file

from so8tqc.adapters.plan import plan_adapters
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig
from so8tqc.errors import InputError
from so8tqc.records import Verdict
from so8tqc.services.bake import bake

IDS = torch.arange(7, 31)[None]
ROWS = [21, 9, 14]
"""Not in order, and among those that are run."""


def trained(model: Path, out: Path, kind: str, seed: int = 3, **options: Any) -> Path:
    import peft

    live = peft.get_peft_model(load(model), getattr(peft, f"{kind}Config")(**options))
    shake(live, seed)
    for name, parameter in live.named_parameters():
        if "trainable_tokens_delta" in name:  # a change that is seen beside the base's own size
            parameter.data += 0.3
    live.save_pretrained(str(out))
    return out


def untied(model: Path, out: Path) -> Path:
    """The same model with a head of its own."""
    live = load(model, torch.float32)
    live.config.tie_word_embeddings = False
    live.lm_head.weight = torch.nn.Parameter(live.lm_head.weight.detach().clone() * 0.9)
    live.save_pretrained(str(out))
    for file in model.iterdir():
        if not (out / file.name).exists() and not file.name.endswith(".safetensors"):
            shutil.copy(file, out / file.name)
    return out


def distance(model: Path, adapters: list[Path], out: Path) -> float:
    """Of a float32 bake's logits from PEFT's unmerged ones, as a share of the effect."""
    record = bake(
        BakeConfig(
            base=model,
            rotations=adapters[0],
            adapters=adapters[1:],
            out=out,
            baked_dtype="float32",
        )
    )
    assert record.verdict is Verdict.PASS, [c for c in record.checks if c.verdict is Verdict.FAIL]
    expected = logits(unmerged(model, adapters, torch.float32), IDS)
    effect = float((expected - logits(load(model, torch.float64), IDS)).abs().max())
    return float((logits(load(out, torch.float64), IDS) - expected).abs().max()) / effect


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("TrainableTokens", {"token_indices": ROWS}),
    "lora": ("Lora", {"target_modules": ["q_proj", "o_proj"], "trainable_token_indices": ROWS}),
    "named": ("Lora", {"target_modules": ["o_proj"],
                       "trainable_token_indices": {"embed_tokens": ROWS}}),
    "adalora": ("AdaLora", {"target_modules": ["o_proj"], "total_step": 9,
                            "trainable_token_indices": ROWS}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("phi3", "bfloat16"), ("gemma3_text", "float32"),
     ("qwen2_vl", "float32")],
)  # fmt: skip
def test_a_bake_is_pefts_forward(
    case: str, architecture: str, dtype: str, make_model, tmp_path: Path
) -> None:
    model = make_model(architecture, dtype)
    kind, options = CASES[case]
    directory = trained(model, tmp_path / "a", kind, **options)
    assert distance(model, [directory], tmp_path / "m") < 2e-5
    plan = plan_adapters(open_checkpoint(model), [directory], None, dtype="keep")
    (changed,) = (c for c in plan.changed if "embed_tokens" in c.entry.name)
    live = unmerged(model, [directory], torch.float32).get_input_embeddings()
    layer = getattr(live, "token_adapter", live)
    assert torch.equal(changed.whole_in_float64(), layer.get_merged_weights(["a0"]))
    stored = load_file(str(model / "model.safetensors"))[changed.entry.name].double()
    moved = (changed.whole_in_float64() != stored).any(dim=1).nonzero().flatten().tolist()
    assert moved == sorted(ROWS)
    assert not any("the base ties" in notice for notice in plan.notices)  # PEFT ties, too


@pytest.mark.parametrize(
    "indices",
    [{"embed_tokens": ROWS}, {"lm_head": ROWS}, {"embed_tokens": ROWS, "lm_head": [30, 2]}],
    ids=["embedding", "head", "both"],
)
def test_a_base_with_a_head_of_its_own(
    indices: dict[str, list[int]], make_model, tmp_path: Path
) -> None:
    model = untied(make_model("llama", "float32"), tmp_path / "base")
    directory = trained(
        model, tmp_path / "a", "Lora", target_modules=["o_proj"], trainable_token_indices=indices
    )
    assert distance(model, [directory], tmp_path / "m") < 2e-5
    plan = plan_adapters(open_checkpoint(model), [directory], None, dtype="keep")
    names = [c.entry.name.removesuffix(".weight").rsplit(".", 1)[-1] for c in plan.changed]
    assert {n for n in names if n != "o_proj"} == set(indices)


def test_a_tied_base(make_model, tmp_path: Path) -> None:
    model = make_model("llama", "float32")
    options: dict[str, Any] = {"target_modules": ["o_proj"]}
    head = trained(
        model, tmp_path / "h", "Lora", **options, trainable_token_indices={"lm_head": ROWS}
    )
    plan = plan_adapters(open_checkpoint(model), [head], None, dtype="keep")
    assert any("The bake changes both" in notice for notice in plan.notices)
    both = {"embed_tokens": ROWS, "lm_head": ROWS}
    same = trained(model, tmp_path / "s", "Lora", **options, trainable_token_indices=both)
    assert distance(model, [same], tmp_path / "m") < 2e-5
    apart = {"embed_tokens": ROWS, "lm_head": [30, 2]}
    other = trained(model, tmp_path / "o", "Lora", **options, trainable_token_indices=apart)
    with pytest.raises(InputError, match="no single weight can hold"):
        plan_adapters(open_checkpoint(model), [other], None, dtype="keep")


def test_several_adapters(make_model, tmp_path: Path) -> None:
    model = untied(make_model("llama", "float32"), tmp_path / "base")

    def alone(name: str, indices: list[int]) -> Path:
        return trained(model, tmp_path / name, "TrainableTokens", token_indices=indices)

    def lora(name: str, target: str, indices: list[int] | None) -> Path:
        options = {"target_modules": [target], "trainable_token_indices": indices}
        return trained(model, tmp_path / name, "Lora", seed=len(name), **options)

    first = alone("a", ROWS)
    assert distance(model, [first, alone("b", [30, 11])], tmp_path / "m") < 2e-5
    beside = lora("l", "o_proj", ROWS)
    for one, other, words in (
        (first, alone("c", [14, 2]), "both train token 14"),
        (beside, lora("ll", "o_proj", [30]), "both train single tokens"),
        (beside, lora("lll", "embed_tokens", None), "PEFT's forward does not run both"),
    ):
        with pytest.raises(InputError, match=words):
            plan_adapters(open_checkpoint(model), [one, other], None, dtype="keep")


def edited(directory: Path, change: Any, **config: Any) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(str(file))
    key = next(k for k in tensors if "trainable_tokens_delta" in k)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, str(file))
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("change", "indices", "words"),
    [
        (lambda t: t, [21, 9, 100_000], ["trainable_tokens_delta", "[3, 64]", "token 100000"]),
        (lambda t: t, [21, -1, 14], ["token -1", "tokens 0 to"]),
        (lambda t: t, [21, 9, 9], ["token 9 twice"]),
        (lambda t: t, [21, 9], ["trainable_tokens_delta", "[3, 64]", "[2, 64]"]),
        (lambda t: t[:, 1:], ROWS, ["trainable_tokens_delta", "[3, 63]", "[3, 64]"]),
        (lambda t: t[0], ROWS, ["[64]", "[3, 64]"]),
        (lambda t: t * torch.nan, ROWS, ["trainable_tokens_delta", "not finite"]),
        (lambda t: t, None, ["trainable_token_indices is None"]),
        (lambda t: t, [21, True, 14], ["expected whole numbers"]),
        (lambda t: t, {"lm_head": ROWS}, ["lm_head", "embed_tokens"]),
    ],
)
def test_bad_input(change: Any, indices: Any, words: list[str], make_model, tmp_path: Path) -> None:
    model = make_model("llama", "bfloat16")
    kind, options = CASES["lora"]
    directory = trained(model, tmp_path / "a", kind, **options)
    edited(directory, change, trainable_token_indices=indices)
    with pytest.raises(InputError) as caught:
        bake(BakeConfig(base=model, rotations=directory, out=tmp_path / "m"))
    for word in words:
        assert word in str(caught.value)


def test_untrained_rows_and_a_resized_vocabulary(make_model, tmp_path: Path) -> None:
    import peft

    model = make_model("llama", "bfloat16")
    config = peft.TrainableTokensConfig(token_indices=ROWS)
    live = peft.get_peft_model(load(model), config)
    live.save_pretrained(str(tmp_path / "none"))
    with pytest.raises(InputError, match="untrained"):
        bake(BakeConfig(base=model, rotations=tmp_path / "none", out=tmp_path / "m"))
    base = load(model)
    size = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(size + 8)
    live = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=[size + 1]))
    shake(live, 1)
    for save, words in ((True, str(size + 8)), (False, f"token {size + 1}")):
        live.save_pretrained(str(tmp_path / f"{save}"), save_embedding_layers=save)
        with pytest.raises(InputError, match="resized the vocabulary") as caught:
            bake(BakeConfig(base=model, rotations=tmp_path / f"{save}", out=tmp_path / "m"))
        assert words in str(caught.value)


def test_rows_saved_with_the_whole_embedding(make_model, tmp_path: Path) -> None:
    import peft

    model = make_model("llama", "float32")
    kind, options = CASES["lora"]
    live = peft.get_peft_model(load(model), getattr(peft, f"{kind}Config")(**options))
    shake(live, 5)
    live.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    assert distance(model, [tmp_path / "a"], tmp_path / "m") < 2e-5

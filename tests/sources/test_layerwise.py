"""A model run a layer at a time gives what the resident one gives, bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from so8tqc.errors import DataError, ModelError, ToolError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import HEAD
from so8tqc.sources.folded import FoldedSource
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.layerwise.lanes import Folded, Gated, Plain
from so8tqc.sources.layerwise.model import StreamedModel
from so8tqc.sources.layerwise.shell import UnstreamableError
from so8tqc.sources.layerwise.walk import LayerPass
from so8tqc.sources.protocol import EncodedText, LogitSource

_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

UNUSUAL: dict[str, dict[str, Any]] = {
    # layers with and without attention, two kinds of rope, a soft cap
    "gemma3_text": {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 7},
    "gemma2": {"head_dim": 32, "sliding_window": 16},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 16,
    },
    "mamba": {},
    # keys and values of earlier layers, four streams, an embedding for each layer
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2, "head_dim": 16,
        "sliding_window": 16, "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "bloom": {"n_head": 4, "n_layer": 4},
    "gpt2": {"n_head": 4, "n_layer": 4, "n_embd": 64, "n_positions": 512},
}  # fmt: skip


def texts() -> list[EncodedText]:
    generator = np.random.default_rng(0)
    return [
        EncodedText(f"t{i}", generator.integers(3, 500, size=n)) for i, n in enumerate((40, 7, 65))
    ]


def made(architecture: str, folder: Path, **options: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, **(_TINY | UNUSUAL.get(architecture, {}) | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(str(folder), max_shard_size="60KB")
    return folder


def logits(source: LogitSource, first: int = 0) -> list[torch.Tensor]:
    return [
        torch.cat([block.clone() for block in source.logits(text.tokens, 16, first)])
        for text in texts()
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "mixtral", "qwen2_vl"])
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_streamed_is_resident(
    architecture: str, budget: int, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(architecture, shard="60KB")
    streamed = StreamedModel.open(model, tmp_path / "states")
    streamed._budget = budget
    source = streamed.source(Plain(), "streamed")
    streamed.run(texts())
    resident = HFSource(HFModel.load(model), "resident")
    assert same(logits(source), logits(resident))
    assert same(logits(source, 3), logits(resident, 3))
    streamed.close()
    assert list((tmp_path / "states").rglob("*.states"))
    streamed.remove()
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("architecture", UNUSUAL)
def test_whatever_the_model_hands_from_layer_to_layer(architecture: str, tmp_path: Path) -> None:
    model = made(architecture, tmp_path / "model")
    streamed = StreamedModel.open(model, tmp_path / "states")
    source = streamed.source(Plain(), "streamed")
    streamed.run(texts())
    assert same(logits(source), logits(HFSource(HFModel.load(model), "resident")))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_arithmetic(dtype: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("llama")
    streamed = StreamedModel.open(model, tmp_path / "states", dtype=dtype)
    source = streamed.source(Plain(), "streamed")
    streamed.run(texts())
    assert same(logits(source), logits(HFSource(HFModel.load(model, dtype=dtype), "resident")))


@pytest.mark.parametrize("site", ["input", "head"])
def test_lanes_share_every_byte(
    site: str, make_model: Callable[..., Path], make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model("qwen3", shard="60KB")
    rotations = read_rotations(make_gates(model) if site == "input" else _head_gates(tmp_path))
    streamed = StreamedModel.open(model, tmp_path / "states")
    lanes = [Gated(rotations), Plain(), Folded(rotations, "bfloat16"), Folded(rotations, None)]
    sources = [streamed.source(lane, lane.key) for lane in lanes]
    streamed.run(texts())
    resident = HFModel.load(model)
    expected = [
        GatedSource(resident, rotations, "g"),
        HFSource(resident, "b"),
        FoldedSource(resident, rotations, "r", "bfloat16"),
        FoldedSource(resident, rotations, "u", None),
    ]
    found = [logits(source) for source in sources]
    for ours, theirs in zip(found, expected, strict=True):
        assert same(ours, logits(theirs)), theirs.name
    assert not same(found[0], found[1])
    size = sum(e.end - e.start for e in streamed._weights.checkpoint.tensors.values())
    assert streamed.bytes_read == size  # once, for four sources


def _head_gates(folder: Path) -> Path:
    """A rotation before the output head."""
    theta = {HEAD: np.random.default_rng(0).normal(size=(8, 8, 8)) * 0.3}
    write_native(
        folder / "head.safetensors",
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.HEAD,
        pet=None,
    )
    return folder / "head.safetensors"


class _KilledError(Exception):
    pass


@pytest.fixture
def killed_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Have a pass die before it runs a layer; None: live."""
    through = LayerPass._through

    def kill(layer: int | None) -> None:
        def dying(self: LayerPass, now: int) -> None:
            if now == layer:
                raise _KilledError
            through(self, now)

        monkeypatch.setattr(LayerPass, "_through", dying)

    return kill


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon_h1", "gemma3n_text"])
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_killed_at_every_layer_it_goes_on_there(
    architecture: str, budget: int, killed_before: Callable[[int | None], None], tmp_path: Path
) -> None:
    model = made(architecture, tmp_path / "model")
    lanes = [Plain(), Plain()]

    def run() -> tuple[StreamedModel, list[list[torch.Tensor]]]:
        streamed = StreamedModel.open(model, tmp_path / "states")
        streamed._budget = budget
        sources = [streamed.source(lane, str(i)) for i, lane in enumerate(lanes)]
        streamed.run(texts())
        return streamed, [logits(source) for source in sources]

    killed_before(None)
    whole, expected = run()
    layers = len(whole._shell.layers)
    whole.remove()
    goes_on = architecture != "gemma3n_text"  # layers hand keys and values on besides the state
    for layer in range(layers):
        killed_before(layer)
        with pytest.raises(_KilledError):
            run()
        killed_before(None)
        again, found = run()
        assert again.begun == (layer if goes_on else 0)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        again.remove()


def test_damaged_or_foreign_states_are_not_gone_on_with(
    make_model: Callable[..., Path],
    killed_before: Callable[[int | None], None],
    tmp_path: Path,
) -> None:
    model = make_model("llama")

    def run(*, more: int = 0) -> int:
        streamed = StreamedModel.open(model, tmp_path / "states")
        for _ in range(1 + more):
            streamed.source(Plain(), "x")
        streamed.run(texts())
        return streamed.begun

    killed_before(2)
    for spoil in (None, "bytes", "lanes"):
        shutil.rmtree(tmp_path / "states", ignore_errors=True)
        killed_before(2)
        with pytest.raises(_KilledError):
            run()
        killed_before(None)
        (states,) = (tmp_path / "states").rglob("*.states")
        if spoil == "bytes":
            states.write_bytes(states.read_bytes()[:-1] + b"\x7f")
        assert run(more=spoil == "lanes") == (2 if spoil is None else 0)


def test_a_file_that_changes_meanwhile_is_refused(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_model("llama", shard="60KB"), model)
    through = LayerPass._through

    def changing(self: LayerPass, layer: int) -> None:
        through(self, layer)
        if layer == 1:
            shard = sorted(model.glob("*.safetensors"))[0]
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)

    monkeypatch.setattr(LayerPass, "_through", changing)
    streamed = StreamedModel.open(model, tmp_path / "states")
    streamed.source(Plain(), "x")
    with pytest.raises(ModelError, match="changed while the model was run"):
        streamed.run(texts())


def test_a_disk_too_small_for_the_states_is_told_first(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    streamed = StreamedModel.open(make_model("llama"), tmp_path / "states")
    streamed.source(Plain(), "x")
    with pytest.raises(ToolError, match="hidden states between two layers need"):
        streamed.run(texts())


def test_layers_that_share_weights_cannot_be_streamed(tmp_path: Path) -> None:
    model = made(
        "zamba2",
        tmp_path / "model",
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=16, n_mamba_heads=8, mamba_ngroups=1, mamba_headdim=16, num_mem_blocks=1,
    )  # fmt: skip
    with pytest.raises(UnstreamableError, match=r"shared with .* in another layer"):
        StreamedModel.open(model, tmp_path / "states")


def test_a_layer_that_is_run_twice_cannot_be_streamed(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def twice(self: Any, *arguments: Any, **named: Any) -> Any:
        forward(self, *arguments, **named)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(LlamaModel, "forward", twice)
    streamed = StreamedModel.open(make_model("llama"), tmp_path / "states")
    streamed.source(Plain(), "x")
    with pytest.raises(UnstreamableError, match="runs layer 0 where layer 3 is due"):
        streamed.run(texts())


def test_what_is_missing_is_told_as_of_a_resident_model(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(make_model("llama"), model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    streamed = StreamedModel.open(model, tmp_path / "states")
    streamed.source(Plain(), "x")
    with pytest.raises(ModelError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        streamed.run(texts())


def test_a_text_that_was_not_run_or_is_too_long(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    streamed = StreamedModel.open(make_model("llama"), tmp_path / "states")
    source = streamed.source(Plain(), "x")
    with pytest.raises(DataError, match="more than the model's context of 512"):
        streamed.run([EncodedText("long", np.ones(600, np.int64))])
    streamed.run(texts())
    with pytest.raises(DataError, match="was not run"):
        next(source.logits(np.arange(5), 4))
    assert json.loads((tmp_path / "states/rank-0/journal.json").read_text())["layer"] == 2

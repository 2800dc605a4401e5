"""What the converter did to a model directory is undone: the directory's own tensors come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from so8tqc.checkpoints.safetensors_index import load_any, open_checkpoint
from so8tqc.config import ExportConfig
from so8tqc.errors import ModelError
from so8tqc.gguf.conversion import Conversion
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.tensor_map import interleave_rope
from so8tqc.services.export.service import write_gguf
from so8tqc.sources.converted.history import traced
from so8tqc.sources.gguf_weights import GGUFWeights, require_architecture

pytestmark = pytest.mark.llama


def exported(model: Path, out: Path, type_: str = "f32") -> Path:
    write_gguf(ExportConfig(model=model, out=out, type=type_))  # type: ignore[arg-type]
    return out


def opened(path: Path, model: Path) -> GGUFWeights:
    file, checkpoint = open_gguf(path), open_checkpoint(model)
    conversion = traced(checkpoint)
    require_architecture(file, conversion, model)
    return GGUFWeights(file, checkpoint, conversion)


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen2_vl"]
)
def test_every_stored_tensor_comes_back(
    architecture: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(architecture)
    path = exported(model, tmp_path / "x.gguf")
    weights = opened(path, model)
    entries = {
        name: entry
        for name, entry in weights.checkpoint.tensors.items()
        if ".visual." not in name and not name.startswith("visual.")
    }
    unread = entries.keys() - weights.names
    assert unread <= {"lm_head.weight"}, unread  # a copy of the embedding
    found = weights.read(sorted(entries.keys() - unread))
    assert weights.bytes_read == sum(
        t.bytes for n, t in weights.file.tensors.items() if weights.conversion.sources.get(n)
    )
    for name, values in found.items():
        own = load_any(entries[name]).float()
        assert values.dtype == torch.float32
        # the norms of gemma are stored with 1 added, which float32 rounds
        close = torch.allclose(values, own, rtol=0, atol=2**-24 * 4)
        assert close if "norm" in name else torch.equal(values, own), name


def test_state_space_models_exponentials_are_undone(tmp_path: Path) -> None:
    """A_log is stored as −exp(A_log): the step back is no line."""
    conversion, checkpoint = _made_by_hand(tmp_path, [("exp", 0), ("__neg__", 1)])
    own = load_any(checkpoint.tensors["a"]).double()
    file = _file_of(tmp_path, -own.exp().float())
    found = GGUFWeights(file, checkpoint, conversion).read(["a"])["a"]
    torch.testing.assert_close(found.double(), own, rtol=1e-6, atol=1e-6)


def test_scaled_and_repeated_values_are_undone(tmp_path: Path) -> None:
    conversion, checkpoint = _made_by_hand(tmp_path, [("__mul__", 0, 3.0), ("repeat", 1, 2, 1)])
    own = load_any(checkpoint.tensors["a"])
    file = _file_of(tmp_path, (own * 3.0).repeat(2, 1))
    found = GGUFWeights(file, checkpoint, conversion).read(["a"])["a"]
    torch.testing.assert_close(found, own, rtol=1e-6, atol=0)


def test_what_cannot_be_undone_is_named(tmp_path: Path) -> None:
    conversion, checkpoint = _made_by_hand(tmp_path, [("__mul__", 0, 0.0)])
    file = _file_of(tmp_path, torch.zeros(4, 8))
    with pytest.raises(ModelError, match="only a part"):
        GGUFWeights(file, checkpoint, conversion).read(["a"])


def test_a_quantized_files_values_in_transformers_order(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Against gguf-py's own dequantization and the permutation of the published formula."""
    model = make_model("llama")
    path = exported(model, tmp_path / "x.gguf", "q8_0")
    name = "model.layers.1.self_attn.q_proj.weight"
    own = load_any(open_checkpoint(model).tensors[name]).float().numpy()
    tensor = open_gguf(path).tensors["blk.1.attn_q.weight"]
    assert tensor.type == "Q8_0"
    weights = opened(path, model)
    assert weights.gguf_names(name) == ("blk.1.attn_q.weight",)
    found = weights.read([name])[name].numpy()
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType.Q8_0
    there = dequantize(quantize(interleave_rope(own, 4), kind), kind)
    np.testing.assert_array_equal(interleave_rope(found, 4), there.reshape(own.shape))
    assert 0 < np.abs(found - own).max() < 0.05 * np.abs(own).max()


def test_another_architectures_directory_is_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = exported(make_model("llama"), tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="exported from"):
        opened(path, make_model("qwen3"))


def _made_by_hand(folder: Path, steps: list[tuple[object, ...]]) -> tuple[Conversion, object]:
    """A conversion of one tensor of 4 × 8 by these operations, and its directory."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    folder = folder / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": torch.randn(4, 8)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    entry = checkpoint.tensors["a"]
    place = (entry.file.name, entry.start)
    nodes = [{"op": "load", "args": [{"source": [str(entry.file), entry.start]}]}]
    for op, index, *rest in steps:
        nodes.append({"op": op, "args": [{"node": index}, *rest]})
    outputs = {"x.weight": {"node": len(nodes) - 1}}
    return Conversion("llama", {}, tuple(nodes), outputs, {place: "a"}), checkpoint


def _file_of(folder: Path, values: torch.Tensor):  # type: ignore[no-untyped-def]
    import gguf

    writer = gguf.GGUFWriter(str(folder / "x.gguf"), "llama")
    writer.add_tensor("x.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(folder / "x.gguf")

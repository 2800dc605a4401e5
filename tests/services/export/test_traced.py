"""The replayed history of a conversion: right files are explained, faults are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.config import ExportConfig
from so8tqc.errors import ModelError
from so8tqc.gguf.conversion import Conversion, UntraceableError, read_conversion
from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.llama.converter import convert
from so8tqc.llama.vendor import find_converter, is_vendored
from so8tqc.services.export.service import export
from so8tqc.services.export.traced import compare_traced
from so8tqc.services.qc.conversion import conversion_fault
from so8tqc.services.quantize.proof import as_stored, squared_error
from so8tqc.sources.converted.history import places_of

needs_converter = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


@pytest.fixture(scope="module")
def converted(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, GGUFFile, Conversion]:
    """A tiny Llama, its F16 file, and the history of its conversion."""
    if not is_vendored():
        pytest.skip("run `so8tqc vendor` first")
    folder = tmp_path_factory.mktemp("traced")
    checkpoint = open_checkpoint(make_model("llama"))
    convert(
        find_converter(),
        checkpoint.directory,
        folder / "x.gguf",
        "f16",
        folder / "log",
        trace=folder / "trace.json",
    )
    conversion = read_conversion(folder / "trace.json", places_of(checkpoint))
    assert conversion is not None
    return checkpoint, open_gguf(folder / "x.gguf"), conversion


def altered(gguf: GGUFFile, **values: np.ndarray) -> GGUFFile:
    changed = {
        name: dataclasses.replace(old, data=np.ascontiguousarray(v.astype(old.data.dtype)))
        for name, v in values.items()
        for old in [gguf.tensors[name]]
    }
    return dataclasses.replace(gguf, tensors=gguf.tensors | changed)


@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_every_tensor_of_a_right_file_is_explained(
    _marked: int, converted: tuple[Checkpoint, GGUFFile, Conversion]
) -> None:
    checkpoint, gguf, conversion = converted
    found = compare_traced(checkpoint, gguf, conversion)
    assert (found.different, found.missing, found.extra, found.untraced) == ([], [], [], [])
    assert found.equal["model.layers.0.self_attn.q_proj.weight"] == "rows reordered"
    assert found.equal["model.layers.0.self_attn.o_proj.weight"] == "unchanged"
    assert conversion.sources["blk.0.attn_q.weight"] == ("model.layers.0.self_attn.q_proj.weight",)


FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "transposed": ("blk.0.attn_output.weight", lambda v: v.T),
    "unscaled": ("blk.1.attn_norm.weight", lambda v: v * 2),
    "unpermuted": ("blk.0.attn_q.weight", lambda v: np.roll(v, 8, axis=0)),
    "one row of another": ("blk.2.ffn_down.weight", lambda v: np.concatenate([v[1:2], v[1:]])),
    "one bit": ("blk.2.ffn_up.weight", lambda v: np.nextafter(v, np.float16(9), dtype=v.dtype)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_a_planted_fault_is_different(
    _marked: int, fault: str, converted: tuple[Checkpoint, GGUFFile, Conversion]
) -> None:
    checkpoint, gguf, conversion = converted
    name, change = FAULTS[fault]
    wrong = altered(gguf, **{name: change(gguf.tensors[name].data)})
    assert compare_traced(checkpoint, wrong, conversion).different == [name]


@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_lost_and_invented_tensors_are_named(
    _marked: int, converted: tuple[Checkpoint, GGUFFile, Conversion]
) -> None:
    checkpoint, gguf, conversion = converted
    tensors = dict(gguf.tensors)
    lost = tensors.pop("blk.1.ffn_gate.weight")
    tensors["blk.9.odd.weight"] = lost
    found = compare_traced(checkpoint, dataclasses.replace(gguf, tensors=tensors), conversion)
    assert found.extra == ["blk.9.odd.weight"]
    assert found.missing == ["blk.1.ffn_gate.weight", "model.layers.1.mlp.gate_proj.weight"]


@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_a_converter_that_drops_a_part_of_a_tensor_shows(
    _marked: int, converted: tuple[Checkpoint, GGUFFile, Conversion]
) -> None:
    """Its history is what it did; that not all of the source went in is seen by counting."""
    checkpoint, gguf, conversion = converted
    name, old = "blk.0.ffn_up.weight", gguf.tensors["blk.0.ffn_up.weight"]
    half = dataclasses.replace(
        old, shape=(old.shape[0] // 2, *old.shape[1:]), data=old.data[: old.shape[0] // 2]
    )
    found = compare_traced(
        checkpoint, dataclasses.replace(gguf, tensors=gguf.tensors | {name: half}), conversion
    )
    assert "model.layers.0.mlp.up_proj.weight (a part of it)" in found.missing


@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_the_first_tensor_that_was_converted_wrongly_is_named(
    _marked: int, converted: tuple[Checkpoint, GGUFFile, Conversion], tmp_path: Path
) -> None:
    checkpoint, gguf, _ = converted
    path = tmp_path / "wrong.gguf"
    content = bytearray(gguf.path.read_bytes())
    for name in ("blk.2.ffn_down.weight", "blk.1.attn_k.weight"):
        tensor = gguf.tensors[name]
        flipped = tensor.data[::-1].tobytes()
        content[tensor.offset : tensor.offset + tensor.bytes] = flipped
    path.write_bytes(bytes(content))
    said = conversion_fault(path, checkpoint, baked=())
    first = min(("blk.2.ffn_down.weight", "blk.1.attn_k.weight"), key=list(gguf.tensors).index)
    assert first in said
    assert "1 more" in said
    assert "every tensor is what" in conversion_fault(gguf.path, checkpoint, baked=())


@pytest.mark.parametrize("_marked", [pytest.param(0, marks=needs_converter)])
def test_a_weight_beyond_f16_names_itself_and_the_type(
    _marked: int, llama: Path, tmp_path: Path
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tensors = load_file(str(model / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 70000.0
    save_file(tensors, str(model / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}.*65,504.*--type bf16"):
        export(ExportConfig(model=model, out=tmp_path / "x.gguf"))
    assert not (tmp_path / "x.gguf").exists()


def test_a_history_with_an_unknown_operation_is_not_repeated() -> None:
    nodes = (
        {"op": "load", "args": [{"source": ["/m/a.safetensors", 8]}]},
        {"op": "system", "args": [{"node": 0}]},
    )
    conversion = Conversion("x", {}, nodes, {"t": {"node": 1}}, {("a.safetensors", 8): "w"})
    assert conversion.sources["t"] == ("w",)
    with pytest.raises(UntraceableError, match="'system'"):
        conversion.replay("t", lambda *_: torch.ones(2))


def test_operations_are_repeated_as_torch_does_them() -> None:
    nodes = (
        {"op": "load", "args": [{"source": ["a", 8]}]},
        {"op": "item 1 of split", "args": [{"node": 0}, {"list": [1, 2]}], "kwargs": {"dim": 0}},
        {"op": "attribute T", "args": [{"node": 1}]},
        {"op": "__add__", "args": [{"node": 2}, 1]},
        {"op": "stack", "args": [{"list": [{"node": 3}, {"node": 3}]}], "kwargs": {"dim": 0}},
        {
            "op": "__getitem__",
            "args": [{"node": 4}, {"tuple": [{"slice": [None, 1, None]}, {"ellipsis": True}]}],
        },
    )
    conversion = Conversion("x", {}, nodes, {"t": {"node": 5}}, {("a", 8): "w"})
    source = torch.arange(6.0).reshape(3, 2)
    expected = np.stack([source.numpy()[1:].T + 1] * 2)[:1]
    np.testing.assert_array_equal(conversion.replay("t", lambda *_: source).numpy(), expected)
    assert conversion.done("t") == "split, transposed, added to, stacked"


def test_leading_ones_and_large_squares_are_no_difference() -> None:
    """libllama writes [1, 8] as [8], and the square of 1e30 has no room in float32."""
    assert as_stored((1, 1, 8)) == as_stored((8,)) == (8,)
    values = np.array([1e30, 1.0, 0, 0, 0, 0, 0, 0], np.float32)
    tensor = GGUFTensor("rope_freqs.weight", "F32", (8,), 32, 0, values)
    found = squared_error(tensor, dataclasses.replace(tensor, data=values * np.float32(0.5)))
    assert found.relative == pytest.approx(0.5)

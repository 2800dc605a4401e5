"""How a converter renames and rearranges tensors, repeated for comparison.

The converter renames (gguf-py's name map), stacks the matrices of experts, reorders the rows
of q and k for a rope that rotates neighbours, adds 1 to the norms of architectures that
store the offset from 1, transposes Conv1D, and rounds to the stored type.

Which of these is right depends on the architecture, and a wrong one must not pass for a
right one: a square matrix that was transposed, or q left in the order of transformers, has
the same values. So for the architectures whose layout is known exactly one arrangement is accepted.
For others every arrangement is tried, and the caller has to say that none is known to be right.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.architectures import Layout, gguf_layout

FloatArray = npt.NDArray[np.float32]

GENERATED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that a converter computes from the config; no source tensor corresponds to them."""


_ANY = Layout(interleaved=True, norm_offset=True, conv1d=True)
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def gguf_names(names: Collection[str], architecture: str, layers: int) -> dict[str, str | None]:
    """Source tensor name → GGUF tensor name, None if gguf-py's map does not know it.

    The experts of a layer share one name: their matrices are stacked.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    codes = {name: code for code, name in MODEL_ARCH_NAMES.items()}
    if architecture not in codes:
        return dict.fromkeys(names)
    table = get_tensor_name_map(codes[architecture], layers)
    return {name: _mapped(name, table) for name in names}


def _mapped(name: str, table: Any) -> str | None:
    name = _EXPERT.sub(".experts.", name)
    # vision-language checkpoints keep the text tower one level deeper than the map expects
    for spelling in (name, name.replace("language_model.", ""), name.removeprefix("model.")):
        if found := table.get_name(spelling, try_suffixes=(".weight", ".bias")):
            return str(found)
    return None


def expert_index(name: str) -> int | None:
    """Which expert a source tensor belongs to, None if to none or to all of them."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def arrangements(
    values: FloatArray, source: str, gguf_name: str, architecture: str, config: Mapping[str, Any]
) -> Iterator[tuple[str, FloatArray]]:
    """(what was done, values) for what a converter may make of a tensor.

    One arrangement where the architecture's layout is known, else all there are.

    Args:
        values: the source tensor.
        source: its name.
        gguf_name: the name it got.
        architecture: ``general.architecture`` of the GGUF.
        config: the text model's config.json.
    """
    layout = gguf_layout(architecture)
    rearranged = list(_rearranged(values, source, gguf_name, layout or _ANY, config))
    if layout is None or not rearranged:
        yield "unchanged", values
    yield from rearranged


def _rearranged(
    values: FloatArray, source: str, gguf_name: str, layout: Layout, config: Mapping[str, Any]
) -> Iterator[tuple[str, FloatArray]]:
    if layout.interleaved and (".attn_q." in gguf_name or ".attn_k." in gguf_name):
        heads = int(config.get("num_attention_heads") or 0)
        if ".attn_k." in gguf_name:
            heads = int(config.get("num_key_value_heads") or heads)
        if heads and values.shape[0] % (2 * heads) == 0:
            yield "rope rows interleaved", interleave_rope(values, heads)
    if layout.norm_offset and "norm" in gguf_name:
        yield "one added", values + np.float32(1)
    if layout.conv1d and source.endswith(_CONV1D):
        yield "transposed", np.ascontiguousarray(values.T)


def interleave_rope(values: FloatArray, heads: int) -> FloatArray:
    """Rows of each head from [first half, second half] to pairs (first_i, second_i).

    transformers rotates feature i with feature i + d/2, llama.cpp's NORM rope rotates
    neighbours; reordering the rows of q and k makes both the same.
    """
    shape = values.shape
    halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def stored_as(values: FloatArray, type_: str) -> npt.NDArray[Any]:
    """The bytes or numbers a GGUF tensor of this type holds for these values."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    match type_:  # torch rounds as gguf-py does, several times as fast
        case "F16":
            return torch.from_numpy(values).to(torch.float16).numpy()
        case "BF16":
            rounded = torch.from_numpy(values).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint8)
        case _:
            array: npt.NDArray[Any] = quantize(values, GGMLQuantizationType[type_])
            return array

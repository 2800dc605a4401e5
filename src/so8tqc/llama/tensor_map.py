"""How a converter renames and rearranges tensors, undone for comparison.

The converter renames (gguf-py's name map), reorders the rows of Llama's q and k for its
rope (halves interleaved within each head), adds 1 to Gemma's norms, and rounds to the
stored type. What a tensor may have become is listed here; a comparison succeeds only
if one of these, rounded, equals the stored bytes exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

GENERATED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that a converter computes from the config; no source tensor corresponds to them."""


def gguf_names(names: Collection[str], architecture: str, layers: int) -> dict[str, str | None]:
    """Source tensor name → GGUF tensor name, None if gguf-py's map does not know it."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    codes = {name: code for code, name in MODEL_ARCH_NAMES.items()}
    if architecture not in codes:
        return dict.fromkeys(names)
    table = get_tensor_name_map(codes[architecture], layers)
    return {name: _mapped(name, table) for name in names}


def _mapped(name: str, table: Any) -> str | None:
    # vision-language checkpoints keep the text tower one level deeper than the map expects
    for spelling in (name, name.replace("language_model.", ""), name.removeprefix("model.")):
        if found := table.get_name(spelling, try_suffixes=(".weight", ".bias")):
            return str(found)
    return None


def possible_values(
    values: FloatArray, gguf_name: str, config: Mapping[str, Any]
) -> Iterator[tuple[str, FloatArray]]:
    """(what was done, values) for everything a converter may have made of a tensor."""
    yield "unchanged", values
    if ".attn_q." in gguf_name or ".attn_k." in gguf_name:
        heads = int(config["num_attention_heads"])
        if ".attn_k." in gguf_name:
            heads = int(config.get("num_key_value_heads") or heads)
        if values.shape[0] % (2 * heads) == 0:
            yield "rope rows interleaved", interleave_rope(values, heads)
    if "norm" in gguf_name:
        yield "one added", values + np.float32(1)
    if values.ndim == 2:
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
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    array: npt.NDArray[Any] = quantize(values, GGMLQuantizationType[type_])
    return array

"""Bytes of the block formats: back and forth, against gguf-py and ggml's own row functions."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from so8tqc.gguf.file import block_layout
from so8tqc.quantizers.grids import GRIDS, Grid
from so8tqc.quantizers.packing import Blocks, decode, pack, unpack

_BLOCKS = 300


def _any_content(grid: Grid, seed: int = 3) -> Blocks:
    """Every code, scale and min that a format can say, with halves of either sign."""
    draw = np.random.default_rng(seed)
    low, high = grid.scales or (1, 1)
    least, most = grid.mins or ((-1, -1) if grid.has_min else (0, 0))
    halves = draw.normal(size=(2, _BLOCKS)).astype(np.float16)
    halves[:, 0], halves[:, 1], halves[:, 2] = 0, 6e-8, 65504
    return Blocks(
        draw.integers(grid.lowest_code, len(grid.levels), (_BLOCKS, grid.block)).astype(np.uint8),
        draw.integers(low, high + 1, (_BLOCKS, grid.groups)).astype(np.int16),
        draw.integers(least, most + 1, (_BLOCKS, grid.groups)).astype(np.int16),
        halves[0],
        halves[1] if grid.has_min else np.zeros(_BLOCKS, np.float16),
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_what_is_packed_is_unpacked(grid: Grid) -> None:
    content = _any_content(grid)
    stored = pack(content, grid)
    assert (grid.block, grid.bytes) == block_layout(grid.name)
    assert stored.shape == (_BLOCKS, grid.bytes)
    assert stored.dtype == np.uint8
    back = unpack(stored, grid)
    for part in ("codes", "scales", "mins", "d", "dmin"):
        np.testing.assert_array_equal(getattr(back, part), getattr(content, part), err_msg=part)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_any_bytes_come_back_as_they_were(grid: Grid) -> None:
    stored = np.random.default_rng(5).integers(0, 256, (_BLOCKS, grid.bytes)).astype(np.uint8)
    again = pack(unpack(stored, grid), grid)
    np.testing.assert_array_equal(again, stored)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_decoded_as_gguf_py_decodes(grid: Grid) -> None:
    content = _any_content(grid)
    kind = gguf.GGMLQuantizationType[grid.name]
    expected = dequantize(pack(content, grid).reshape(-1), kind).reshape(_BLOCKS, grid.block)
    np.testing.assert_array_equal(
        decode(content, grid).view(np.uint32), expected.view(np.uint32), strict=True
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_decoded_as_ggml_decodes(grid: Grid) -> None:
    pytest.importorskip("llama_cpp")
    from so8tqc.llama.ggml import dequantizer

    content = _any_content(grid)
    expected = np.empty(_BLOCKS * grid.block, np.float32)
    dequantizer(grid.name)(pack(content, grid).reshape(-1), expected)
    ours = decode(content, grid).reshape(-1)
    np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32), strict=True)

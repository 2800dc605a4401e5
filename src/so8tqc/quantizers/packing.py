"""Codes and scales to a format's bytes, and back.

Layouts are those of ``ggml-common.h`` (``block_q4_0`` …), little-endian. What :func:`decode` gives
is bit by bit what ggml's row functions and gguf-py give: products of a half-precision number and
the small integers here are exact in float32, so that only the last subtraction rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from so8tqc.quantizers.grids import Grid

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int16]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Blocks:
    """The content of B blocks of one format.

    Attributes:
        codes: [B, block] indices into the grid's levels.
        scales: [B, groups] integer scales, 1 where the format has none.
        mins: [B, groups] integer mins; −1 where ``dmin`` is the min itself, 0 where there is none.
        d: [B].
        dmin: [B], 0 where there is none.
    """

    codes: Bytes
    scales: Integers
    mins: Integers
    d: Halves
    dmin: Halves


def decode(blocks: Blocks, grid: Grid) -> npt.NDArray[np.float32]:
    """[B, block] weights: (d · scale) · level − (dmin · min), each step in float32."""
    levels = grid.values.astype(np.float32)[blocks.codes]
    shape = (len(blocks.codes), grid.groups, grid.group)
    scale = blocks.d.astype(np.float32)[:, None] * blocks.scales.astype(np.float32)
    weights = scale[:, :, None] * levels.reshape(shape)
    if grid.has_min:
        least = blocks.dmin.astype(np.float32)[:, None] * blocks.mins.astype(np.float32)
        weights = weights - least[:, :, None]
    return weights.reshape(len(blocks.codes), grid.block)


def pack(blocks: Blocks, grid: Grid) -> Bytes:
    """[B, bytes] as stored."""
    return _PACKERS[grid.name](blocks)


def unpack(stored: Bytes, grid: Grid) -> Blocks:
    """[B, bytes] as stored → their content."""
    return _UNPACKERS[grid.name](stored, grid)


def _half_bytes(numbers: Halves) -> Bytes:
    return numbers.astype("<f2").reshape(-1, 1).view(np.uint8)


def _halves(stored: Bytes) -> Halves:
    return np.ascontiguousarray(stored).view("<f2").astype(np.float16).reshape(-1)


def _shifted(codes: Bytes, bits: int, lanes: int) -> Bytes:
    """[B, n] → [B, n / m]: within each ``lanes`` · m codes, code i·lanes + l is at bit i·bits of
    byte l; m = 8 / bits of them share a byte."""
    parts = 8 // bits
    split = codes.reshape(len(codes), -1, parts, lanes)
    packed = np.zeros((len(codes), split.shape[1], lanes), dtype=np.uint8)
    for part in range(parts):
        packed |= split[:, :, part] << np.uint8(part * bits)
    return packed.reshape(len(codes), -1)


def _unshifted(stored: Bytes, bits: int, lanes: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    split = stored.reshape(len(stored), -1, 1, lanes) >> shifts
    return (split & np.uint8((1 << bits) - 1)).reshape(len(stored), -1)


def _pack_32(blocks: Blocks, *, high: bool, least: bool) -> Bytes:
    """Blocks of 32 with 4 or 5 bits: d, [m], [fifth bits], nibbles."""
    parts = [_half_bytes(blocks.d)]
    if least:
        parts.append(_half_bytes(blocks.dmin))
    if high:
        parts.append(np.packbits(blocks.codes >> np.uint8(4), axis=1, bitorder="little"))
    parts.append(_shifted(blocks.codes & np.uint8(15), 4, 16))
    return np.concatenate(parts, axis=1)


def _unpack_32(stored: Bytes, *, high: bool, least: bool) -> Blocks:
    at = 4 if least else 2
    codes = _unshifted(stored[:, -16:], 4, 16)
    if high:
        fifth = np.unpackbits(stored[:, at : at + 4], axis=1, bitorder="little")
        codes |= fifth << np.uint8(4)
    count = len(stored)
    dmin = _halves(stored[:, 2:4]) if least else np.zeros(count, np.float16)
    mins = np.full((count, 1), -1 if least else 0, np.int16)
    return Blocks(codes, np.ones((count, 1), np.int16), mins, _halves(stored[:, :2]), dmin)


def _pack_q8_0(blocks: Blocks) -> Bytes:
    return np.concatenate([_half_bytes(blocks.d), blocks.codes ^ np.uint8(128)], axis=1)


def _unpack_q8_0(stored: Bytes, _: Grid) -> Blocks:
    count = len(stored)
    return Blocks(
        stored[:, 2:] ^ np.uint8(128),
        np.ones((count, 1), np.int16),
        np.zeros((count, 1), np.int16),
        _halves(stored[:, :2]),
        np.zeros(count, np.float16),
    )


def _pack_six_bits(blocks: Blocks) -> Bytes:
    """Eight scales and eight mins in twelve bytes (``get_scale_min_k4``)."""
    scales, mins = blocks.scales.astype(np.uint8), blocks.mins.astype(np.uint8)
    return np.concatenate(
        [
            scales[:, :4] | (scales[:, 4:] >> 4) << 6,
            mins[:, :4] | (mins[:, 4:] >> 4) << 6,
            (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4,
        ],
        axis=1,
    )


def _unpack_six_bits(stored: Bytes) -> tuple[Integers, Integers]:
    first, second, third = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return scales.astype(np.int16), mins.astype(np.int16)


def _pack_q2_k(blocks: Blocks) -> Bytes:
    scales = (blocks.scales | blocks.mins << 4).astype(np.uint8)
    return np.concatenate(
        [scales, _shifted(blocks.codes, 2, 32), _half_bytes(blocks.d), _half_bytes(blocks.dmin)],
        axis=1,
    )


def _unpack_q2_k(stored: Bytes, _: Grid) -> Blocks:
    scales = stored[:, :16]
    return Blocks(
        _unshifted(stored[:, 16:80], 2, 32),
        (scales & 15).astype(np.int16),
        (scales >> 4).astype(np.int16),
        _halves(stored[:, 80:82]),
        _halves(stored[:, 82:84]),
    )


def _pack_q3_k(blocks: Blocks) -> Bytes:
    scales = (blocks.scales + 32).astype(np.uint8)
    low = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    high = _shifted(scales >> np.uint8(4), 2, 4)
    return np.concatenate(
        [
            _shifted(blocks.codes >> np.uint8(2), 1, 32),
            _shifted(blocks.codes & np.uint8(3), 2, 32),
            low,
            high,
            _half_bytes(blocks.d),
        ],
        axis=1,
    )


def _unpack_q3_k(stored: Bytes, _: Grid) -> Blocks:
    high, low = _unshifted(stored[:, :32], 1, 32), _unshifted(stored[:, 32:96], 2, 32)
    nibbles = stored[:, 96:104]
    scales = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    scales = scales | _unshifted(stored[:, 104:108], 2, 4) << 4
    return Blocks(
        low | high << np.uint8(2),
        scales.astype(np.int16) - 32,
        np.zeros((len(stored), 16), np.int16),
        _halves(stored[:, 108:110]),
        np.zeros(len(stored), np.float16),
    )


def _pack_q4_k(blocks: Blocks) -> Bytes:
    return np.concatenate(
        [
            _half_bytes(blocks.d),
            _half_bytes(blocks.dmin),
            _pack_six_bits(blocks),
            _shifted(blocks.codes, 4, 32),
        ],
        axis=1,
    )


def _unpack_q4_k(stored: Bytes, _: Grid) -> Blocks:
    scales, mins = _unpack_six_bits(stored[:, 4:16])
    codes = _unshifted(stored[:, 16:], 4, 32)
    return Blocks(codes, scales, mins, _halves(stored[:, :2]), _halves(stored[:, 2:4]))


def _pack_q5_k(blocks: Blocks) -> Bytes:
    return np.concatenate(
        [
            _half_bytes(blocks.d),
            _half_bytes(blocks.dmin),
            _pack_six_bits(blocks),
            _shifted(blocks.codes >> np.uint8(4), 1, 32),
            _shifted(blocks.codes & np.uint8(15), 4, 32),
        ],
        axis=1,
    )


def _unpack_q5_k(stored: Bytes, _: Grid) -> Blocks:
    scales, mins = _unpack_six_bits(stored[:, 4:16])
    high, low = _unshifted(stored[:, 16:48], 1, 32), _unshifted(stored[:, 48:], 4, 32)
    codes = low | high << np.uint8(4)
    return Blocks(codes, scales, mins, _halves(stored[:, :2]), _halves(stored[:, 2:4]))


def _pack_q6_k(blocks: Blocks) -> Bytes:
    return np.concatenate(
        [
            _shifted(blocks.codes & np.uint8(15), 4, 64),
            _shifted(blocks.codes >> np.uint8(4), 2, 32),
            blocks.scales.astype(np.int8).view(np.uint8),
            _half_bytes(blocks.d),
        ],
        axis=1,
    )


def _unpack_q6_k(stored: Bytes, _: Grid) -> Blocks:
    low, high = _unshifted(stored[:, :128], 4, 64), _unshifted(stored[:, 128:192], 2, 32)
    scales = np.ascontiguousarray(stored[:, 192:208]).view(np.int8).astype(np.int16)
    return Blocks(
        low | high << np.uint8(4),
        scales,
        np.zeros_like(scales),
        _halves(stored[:, 208:210]),
        np.zeros(len(stored), np.float16),
    )


def _pack_iq4_xs(blocks: Blocks) -> Bytes:
    scales = (blocks.scales + 32).astype(np.uint8)
    low = (scales[:, ::2] & 15) | (scales[:, 1::2] & 15) << 4
    high = _shifted(scales >> np.uint8(4), 2, 1)
    return np.concatenate([_half_bytes(blocks.d), high, low, _shifted(blocks.codes, 4, 16)], axis=1)


def _unpack_iq4_xs(stored: Bytes, _: Grid) -> Blocks:
    low, high = _unshifted(stored[:, 4:8], 4, 1), _unshifted(stored[:, 2:4], 2, 1)
    scales = (low | high << 4).astype(np.int16) - 32
    return Blocks(
        _unshifted(stored[:, 8:], 4, 16),
        scales,
        np.zeros_like(scales),
        _halves(stored[:, :2]),
        np.zeros(len(stored), np.float16),
    )


_PACKERS: Mapping[str, Callable[[Blocks], Bytes]] = {
    "Q4_0": lambda blocks: _pack_32(blocks, high=False, least=False),
    "Q4_1": lambda blocks: _pack_32(blocks, high=False, least=True),
    "Q5_0": lambda blocks: _pack_32(blocks, high=True, least=False),
    "Q5_1": lambda blocks: _pack_32(blocks, high=True, least=True),
    "Q8_0": _pack_q8_0,
    "IQ4_NL": lambda blocks: _pack_32(blocks, high=False, least=False),
    "IQ4_XS": _pack_iq4_xs,
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k,
    "Q6_K": _pack_q6_k,
}

_UNPACKERS: Mapping[str, Callable[[Bytes, Grid], Blocks]] = {
    "Q4_0": lambda stored, _: _unpack_32(stored, high=False, least=False),
    "Q4_1": lambda stored, _: _unpack_32(stored, high=False, least=True),
    "Q5_0": lambda stored, _: _unpack_32(stored, high=True, least=False),
    "Q5_1": lambda stored, _: _unpack_32(stored, high=True, least=True),
    "Q8_0": _unpack_q8_0,
    "IQ4_NL": lambda stored, _: _unpack_32(stored, high=False, least=False),
    "IQ4_XS": _unpack_iq4_xs,
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
}

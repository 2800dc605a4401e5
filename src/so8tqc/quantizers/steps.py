"""The step of every group of stored weights, read from a block's head without its codes.

A weight is stored as w = s · level − m, with s and m shared by a group (see ``grids``). Given s
and m, a code that was rounded says of the weight it stands for that it lies within half a step of
it: ``rules`` has what an encoder of each type leaves open beside that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.quantizers.grids import GRIDS, NON_LINEAR

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_LEVELS_MXFP4 = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
_SMALLEST_HALF = 2.0**-24
HALF_PRECISION = 2.0**-11
"""Relative error of a number that is rounded to half precision, above its subnormals."""


class Groups(NamedTuple):
    """Of B blocks: what the weights of each group share.

    Attributes:
        scale: [B, groups] s.
        least: [B, groups] m; 0 where nothing is subtracted.
        unit: [B] what one step of a group's integer scale is worth; the scale itself where the
            type has no integer scales.
        least_unit: [B] likewise of the integer min.
    """

    scale: Floats
    least: Floats
    unit: Floats
    least_unit: Floats


@dataclass(frozen=True)
class Rule:
    """How the codes of a type relate to its stored scales.

    Attributes:
        name: GGML type.
        block, group, bytes: as in :class:`~so8tqc.quantizers.grids.Grid`.
        levels: integers that codes stand for, ascending.
        rounded_after: codes are chosen by a scale (and min) that is rounded to half precision
            only then; in the other types by what is stored.
        refitted: with an importance matrix, scale and min are fitted once more after the codes
            were chosen, so that some scale near the stored one explains the codes.
    """

    name: str
    block: int
    group: int
    bytes: int
    levels: tuple[int, ...]
    rounded_after: bool = False
    refitted: bool = False

    @property
    def reach(self) -> int:
        """The largest magnitude of a level."""
        return max(-self.levels[0], self.levels[-1])

    @cached_property
    def borders(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """For each integer from the lowest level to the highest: how far below and above it, in
        units of the scale, a weight may lie that is stored as it. NaN where there is no level."""
        count = self.levels[-1] - self.levels[0] + 1
        below, above = np.full((2, count), np.nan)
        for i, level in enumerate(self.levels):
            at = level - self.levels[0]
            below[at] = (level - self.levels[i - 1]) / 2 if i else np.inf
            above[at] = (self.levels[i + 1] - level) / 2 if level != self.levels[-1] else np.inf
        return below, above


def _rules() -> Mapping[str, Rule]:
    after = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"}
    again = {"Q4_0", "Q4_1", "Q5_0", "Q5_1"}
    rules = {
        name: Rule(
            name,
            grid.block,
            grid.group,
            grid.bytes,
            grid.levels[grid.lowest_code :],
            name in after,
            name in again,
        )
        for name, grid in GRIDS.items()
    }
    rules["MXFP4"] = Rule("MXFP4", 32, 32, 17, _LEVELS_MXFP4)
    rules["TQ1_0"] = Rule("TQ1_0", 256, 256, 54, (-1, 0, 1), rounded_after=True)
    rules["TQ2_0"] = Rule("TQ2_0", 256, 256, 66, (-1, 0, 1), rounded_after=True)
    return MappingProxyType(rules)


RULES: Mapping[str, Rule] = _rules()
"""GGML type → its rule, for every type whose codes are rounded one by one."""

assert RULES["IQ4_NL"].levels == NON_LINEAR


def groups_of(stored: Bytes, rule: Rule) -> Groups:
    """[B, bytes] of whole blocks → what their groups share."""
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
        return _READERS[rule.name](stored)


def largest_dead(groups: Groups, rule: Rule) -> Floats:
    """[B, groups] how far a weight may lie from the only value of a group whose scale is 0.

    The integer scale that was rounded to 0 was below one half, the min within one half; a scale
    without integers is below the smallest half-precision number.
    """
    span = rule.levels[-1] - rule.levels[0]
    unit = np.maximum(np.abs(groups.unit), _SMALLEST_HALF) * (span / 2)
    allowed = unit + np.maximum(np.abs(groups.least_unit), _SMALLEST_HALF) / 2
    return np.broadcast_to(allowed.astype(np.float32)[:, None], groups.scale.shape)


def scale_slack(groups: Groups, rule: Rule) -> npt.NDArray[np.float64]:
    """[B, groups] relative error by which the scale that chose the codes may differ."""
    if not rule.rounded_after:
        return np.zeros(groups.scale.shape)
    unit = np.maximum(np.abs(groups.unit.astype(np.float64)), _SMALLEST_HALF / 4)
    slack = np.maximum(HALF_PRECISION, _SMALLEST_HALF / 2 / unit)
    return np.broadcast_to(slack[:, None], groups.scale.shape)


def _halves(stored: Bytes, at: int) -> Floats:
    part = np.ascontiguousarray(stored[:, at : at + 2])
    return part.view("<f2").astype(np.float32).reshape(-1)


def _alone(at: int, least_at: int | None = None) -> Callable[[Bytes], Groups]:
    """A type with one scale a block, and perhaps a min that is added."""

    def read(stored: Bytes) -> Groups:
        d = _halves(stored, at)
        least = np.zeros_like(d) if least_at is None else -_halves(stored, least_at)
        return Groups(d[:, None], least[:, None], d, least)

    return read


def _scaled(d: Floats, scales: npt.NDArray[np.int16]) -> Groups:
    none = np.zeros_like(d)
    scale = d[:, None] * scales.astype(np.float32)
    return Groups(scale, np.zeros_like(scale), d, none)


def _with_mins(d: Floats, dmin: Floats, scales: npt.NDArray[Any], mins: npt.NDArray[Any]) -> Groups:
    scale = d[:, None] * scales.astype(np.float32)
    return Groups(scale, dmin[:, None] * mins.astype(np.float32), d, dmin)


def _six_bits(stored: Bytes) -> Groups:
    first, second, third = stored[:, 4:8], stored[:, 8:12], stored[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return _with_mins(_halves(stored, 0), _halves(stored, 2), scales, mins)


def _q2_k(stored: Bytes) -> Groups:
    both = stored[:, :16]
    return _with_mins(_halves(stored, 80), _halves(stored, 82), both & 15, both >> 4)


def _q3_k(stored: Bytes) -> Groups:
    nibbles, high = stored[:, 96:104], stored[:, 104:108]
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    top = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _scaled(_halves(stored, 108), (low | top << 4).astype(np.int16) - 32)


def _q6_k(stored: Bytes) -> Groups:
    scales = np.ascontiguousarray(stored[:, 192:208]).view(np.int8).astype(np.int16)
    return _scaled(_halves(stored, 208), scales)


def _iq4_xs(stored: Bytes) -> Groups:
    nibbles = stored[:, 4:8]
    low = np.stack([nibbles & 15, nibbles >> 4], axis=2).reshape(len(stored), 8)
    high = np.ascontiguousarray(stored[:, 2:4]).view("<u2").astype(np.uint16)
    top = (high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    return _scaled(_halves(stored, 0), (low | top << 4).astype(np.int16) - 32)


def _mxfp4(stored: Bytes) -> Groups:
    d = np.ldexp(np.float32(1), stored[:, 0].astype(np.int32) - 128).astype(np.float32)
    return Groups(d[:, None], np.zeros_like(d)[:, None], d, np.zeros_like(d))


_READERS: Mapping[str, Callable[[Bytes], Groups]] = {
    "Q4_0": _alone(0),
    "Q4_1": _alone(0, 2),
    "Q5_0": _alone(0),
    "Q5_1": _alone(0, 2),
    "Q8_0": _alone(0),
    "IQ4_NL": _alone(0),
    "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _six_bits,
    "Q5_K": _six_bits,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
    "TQ1_0": _alone(52),
    "TQ2_0": _alone(64),
}

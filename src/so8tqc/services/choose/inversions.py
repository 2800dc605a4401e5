"""Whether more bytes bring more quality, and if not, what the measured record says about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.record_kinds.choose import Inversion, Row
from so8tqc.record_kinds.pairs import Comparisons, Pair

_BLOCK = 32
_FOUR_BIT_LEVELS = 16
_BLOCKS_SAMPLED = 512
_ON_A_GRID = 0.5
"""Share of blocks with at most 16 values from which on weights are said to come from a 4-bit file:
a block of 32 weights that were never quantized practically never has so few."""


def inversions(
    rows: Mapping[str, Row],
    files: Mapping[str, Mapping[str, Any]],
    comparisons: Comparisons | None,
    source: GGUFFile,
) -> list[Inversion]:
    """Neighbours in size of which the larger one has the higher KL.

    Args:
        rows: type → its measured row.
        files: type → its entry in the record of ``quantize``, as JSON.
        comparisons: all pairs, by type.
        source: the unquantized file.
    """
    order = sorted(rows, key=lambda name: rows[name]["bytes"])
    return [
        _inversion(smaller, larger, files, _pair(comparisons, smaller, larger), source)
        for smaller, larger in pairwise(order)
        if rows[larger]["kl_mean"] > rows[smaller]["kl_mean"]
    ]


def _pair(comparisons: Comparisons | None, smaller: str, larger: str) -> Pair:
    assert comparisons is not None  # two rows make a pair
    return next(p for p in comparisons["pairs"] if {p["a"], p["b"]} == {smaller, larger})


def _inversion(
    smaller: str,
    larger: str,
    files: Mapping[str, Mapping[str, Any]],
    pair: Pair,
    source: GGUFFile,
) -> Inversion:
    before, after = files[smaller]["tensors"], files[larger]["tensors"]
    differ = [name for name in before if before[name]["type"] != after[name]["type"]]
    worse = [name for name in differ if _error(after[name]) > _error(before[name])]
    fell = [after[name]["fallback"] for name in worse if after[name]["fallback"]]
    sign = 1.0 if pair["a"] == larger else -1.0
    interval = pair["kl"]["ci95"]
    if interval is not None and sign < 0:
        interval = (-interval[1], -interval[0])
    found: Inversion = {
        "smaller": smaller,
        "larger": larger,
        "difference": sign * pair["kl"]["difference"],
        "ci95": interval,
        "supported": pair["winner"] == smaller,
        "compared": len(differ),
        "worse": len(worse),
        "error_smaller": _mean(_error(before[name]) for name in worse),
        "error_larger": _mean(_error(after[name]) for name in worse),
        "types_smaller": sorted({before[name]["type"] for name in worse}),
        "types_larger": sorted({after[name]["type"] for name in worse}),
        "fallbacks": len(fell),
        "columns": sorted({fallback["columns"] for fallback in fell}),
        "block": max((fallback["block"] for fallback in fell), default=None),
        "four_bit_share": _mean(four_bit_share(source.tensors[name]) for name in worse),
        "sentence": "",
    }
    found["sentence"] = _sentence(found)
    return found


def _error(tensor: Mapping[str, Any]) -> float:
    return float(tensor["relative_error"] or 0.0)


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return float(np.mean(listed)) if listed else None


def four_bit_share(tensor: GGUFTensor) -> float:
    """Share of a matrix's blocks of 32 columns that hold at most 16 distinct values.

    Blocks are sampled evenly; 0 where the columns do not divide into such blocks.
    """
    if tensor.shape[-1] % _BLOCK:
        return 0.0
    blocks = tensor.values().reshape(-1, _BLOCK)
    blocks = np.sort(blocks[:: max(1, len(blocks) // _BLOCKS_SAMPLED)], axis=1)
    distinct = 1 + (np.diff(blocks, axis=1) != 0).sum(axis=1)
    return float((distinct <= _FOUR_BIT_LEVELS).mean())


def _sentence(found: Inversion) -> str:
    larger, smaller = found["larger"], found["smaller"]
    interval = found["ci95"]
    span = "" if interval is None else f" ({interval[0]:.3g} … {interval[1]:.3g})"
    said = [
        f"{larger} is larger than {smaller} and further from the reference: its mean KL is "
        f"higher by {found['difference']:.3g} nats{span}."
    ]
    if not found["supported"]:
        said.append("The interval does not exclude that they are alike.")
    if found["worse"]:
        said.append(
            f"{found['worse']} of the {found['compared']} tensors that they store differently "
            f"have the larger weight error in {larger} ({_types(found, 'larger')} instead of "
            f"{_types(found, 'smaller')}, on average)."
        )
    elif found["compared"]:
        said.append(f"Yet each tensor's weight error is smaller in {larger}.")
    if found["fallbacks"]:
        columns = ", ".join(str(count) for count in found["columns"])
        said.append(
            f"{found['fallbacks']} of these fell back to such types, since their {columns} columns "
            f"are no multiple of {found['block']}."
        )
    share = found["four_bit_share"]
    if share is not None and share > _ON_A_GRID:
        said.append(
            f"And in the input {share:.0%} of their blocks of 32 weights hold at most 16 distinct "
            "values: the weights come from a 4-bit file, and its steps fit the smaller file's "
            "types better.".replace("%", " %")
        )
    return " ".join(said)


def _types(found: Inversion, side: str) -> str:
    """``Q5_1 with 0.047``."""
    types = found["types_larger"] if side == "larger" else found["types_smaller"]
    error = found["error_larger"] if side == "larger" else found["error_smaller"]
    return f"{', '.join(types)} with {error:.4g}"

"""Tensors that change their type together: one kind of tensor in one third of the layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from so8tqc.gguf.file import GGUFFile

_LAYER = re.compile(r"^blk\.(\d+)\.(.+?)(?:\.weight|\.bias)?$")


@dataclass(frozen=True)
class Group:
    """Tensors that are lowered together."""

    name: str
    tensors: tuple[str, ...]
    bytes: int


def groups(low: GGUFFile, high: GGUFFile, limit: int) -> list[Group]:
    """Tensors that are smaller in ``low``, by kind and depth, in at most ``limit`` groups.

    Each kind of tensor in the layers is cut into equally many parts by depth: as many as the
    limit allows. If there are more kinds than that, the last ones are one group.
    """
    saved = {
        name: high.tensors[name].bytes - tensor.bytes
        for name, tensor in low.tensors.items()
        if tensor.bytes < high.tensors[name].bytes
    }
    kinds: dict[str, dict[int, str]] = {}
    alone: list[str] = []
    for name in saved:
        if match := _LAYER.match(name):
            kinds.setdefault(match[2], {})[int(match[1])] = name
        else:
            alone.append(name)
    parts = max(1, (limit - len(alone)) // len(kinds)) if kinds else 1
    made: dict[str, tuple[str, ...]] = {name: (name,) for name in alone}
    for kind, layers in kinds.items():
        for chunk in _parts(sorted(layers), parts):
            span = f"{chunk[0]}–{chunk[-1]}" if len(chunk) > 1 else str(chunk[0])
            made[f"{kind} {span}"] = tuple(layers[layer] for layer in chunk)
    names = list(made)
    if len(names) > limit:
        rest = names[limit - 1 :]
        made[" + ".join(rest)] = tuple(tensor for name in rest for tensor in made.pop(name))
    return [
        Group(name, tensors, sum(saved[tensor] for tensor in tensors))
        for name, tensors in made.items()
    ]


def _parts(layers: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    count = min(count, len(layers))
    edges = [round(i * len(layers) / count) for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield layers[start:stop]

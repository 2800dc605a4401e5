"""Groups of tensors that change their type together: a partition, by kind and depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.services.choose.groups import groups


def file_of(sizes: dict[str, int]) -> GGUFFile:
    tensors = {n: GGUFTensor(n, "Q8_0", (1,), size, 0, np.empty(0)) for n, size in sizes.items()}
    return GGUFFile(Path("x.gguf"), {}, tensors)


@given(
    layers=st.integers(1, 9),
    kinds=st.integers(1, 6),
    limit=st.integers(1, 30),
    equal=st.sets(st.integers(0, 8)),
)
def test_groups_partition_the_tensors_that_are_smaller(
    layers: int, kinds: int, limit: int, equal: set[int]
) -> None:
    names = [f"blk.{i}.k{k}.weight" for i in range(layers) for k in range(kinds)]
    names += ["output.weight", "token_embd.weight"]
    high = dict.fromkeys(names, 20)
    low = {name: 20 if i in equal else 12 for i, name in enumerate(names)}
    made = groups(file_of(low), file_of(high), limit)
    assert len(made) <= limit
    members = [tensor for group in made for tensor in group.tensors]
    assert sorted(members) == sorted(name for name in names if low[name] < high[name])
    if limit >= kinds + 2:
        assert not any(" + " in group.name for group in made)  # none needs to be joined
    assert all(group.bytes == 8 * len(group.tensors) for group in made)


def test_a_kind_is_cut_by_depth_and_named_by_its_layers() -> None:
    names = [f"blk.{i}.ffn_down.weight" for i in range(10)] + ["output.weight"]
    low, high = file_of(dict.fromkeys(names, 1)), file_of(dict.fromkeys(names, 3))
    made = {group.name: group for group in groups(low, high, 4)}
    assert list(made) == ["output.weight", "ffn_down 0–2", "ffn_down 3–6", "ffn_down 7–9"]
    assert made["ffn_down 3–6"].tensors == tuple(names[3:7])
    assert made["ffn_down 3–6"].bytes == 2 * 4
    assert [group.name for group in groups(low, high, 1)] == ["output.weight + ffn_down 0–9"]

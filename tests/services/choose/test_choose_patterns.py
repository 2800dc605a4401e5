"""Patterns that give exactly the tensors their types, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.services.choose.patterns import quantized_types
from so8tqc.services.quantize.patterns import override_patterns


@given(
    st.dictionaries(
        st.sampled_from(
            [f"blk.{i}.{k}.weight" for i in range(12) for k in ("attn_q", "attn_qkv", "ffn_down")]
            + ["output.weight", "token_embd.weight"]
        ),
        st.sampled_from(["Q8_0", "Q5_K"]),
    )
)
def test_patterns_name_exactly_the_tensors(tensors: dict[str, str]) -> None:
    every = [
        f"blk.{i}.{k}.weight"
        for i in range(12)
        for k in ("attn_q", "attn_qkv", "attn_output", "ffn_down")
    ]
    every += ["output.weight", "token_embd.weight", "output_norm.weight", "v.blk.0.attn_q.weight"]
    pairs = [pattern.rpartition("=")[::2] for pattern in override_patterns(tensors)]
    for name in every:
        found = [kind for pattern, kind in pairs if re.search(pattern, name)]
        assert found == ([tensors[name]] if name in tensors else [])


def typed(**types: str) -> GGUFFile:
    tensors = {n: GGUFTensor(n, kind, (1,), 1, 0, np.empty(0)) for n, kind in types.items()}
    return GGUFFile(Path("x.gguf"), {}, tensors)


def test_a_mixture_lists_what_is_quantized_raised_or_not() -> None:
    low = typed(a="Q4_K", b="Q4_K", norm="F32", half="F16")
    high = typed(a="Q6_K", b="Q6_K", norm="F32", half="F16")
    assert quantized_types(low, high, {"b", "norm"}) == {"a": "Q4_K", "b": "Q6_K"}
    assert quantized_types(low, high, ()) == {"a": "Q4_K", "b": "Q4_K"}

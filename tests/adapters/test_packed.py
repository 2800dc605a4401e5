"""Quantized weights as data: what the libraries that write them make of them, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from so8tqc.checkpoints.packed import PackedMatrix, is_packed, unpacked, values_of
from so8tqc.errors import ModelError

GOLDEN = Path(__file__).with_name("packed.safetensors")


def _read() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """What ``write_packed_golden.py`` wrote: case → stored parts with ``expected``, settings."""
    with safe_open(str(GOLDEN), framework="pt") as handle:
        settings = {k: json.loads(v) for k, v in handle.metadata().items() if k != "versions"}
        found: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
            case: ({}, said) for case, said in settings.items()
        }
        for key in handle.keys():  # noqa: SIM118
            case, name = key.split(":", 1)
            found[case][0][name] = handle.get_tensor(key)
    return found


CASES = _read()


def matrix(case: str) -> PackedMatrix:
    parts, settings = CASES[case]
    rows, columns = parts["expected"].shape
    return PackedMatrix(case, (rows, columns), settings, parts.get)


def test_every_library_is_there() -> None:
    methods = {said["quant_method"] for _, said in CASES.values()}
    assert methods == {"bitsandbytes", "compressed-tensors", "gptq", "awq"}
    assert len(CASES) == 16


@pytest.mark.parametrize("case", sorted(CASES))
def test_values_are_those_of_the_library(case: str) -> None:
    given = matrix(case)
    assert is_packed(given.settings, lambda part: given.find(part) is not None)
    expected = CASES[case][0]["expected"].float()
    assert len(expected.unique()) > 2
    assert torch.equal(values_of(given), expected)


@given(bits=st.integers(1, 8), count=st.integers(1, 70), columns=st.integers(1, 5), data=st.data())
def test_integers_lie_densely_in_words(
    bits: int, count: int, columns: int, data: st.DataObject
) -> None:
    """Packed here as one long number a column, which is cut into words."""
    value = st.integers(0, 2**bits - 1)
    wanted = [data.draw(st.lists(value, min_size=count, max_size=count)) for _ in range(columns)]
    height = -(-count * bits // 32)
    words = torch.empty((height, columns), dtype=torch.int32)
    for j, column in enumerate(wanted):
        number = sum(v << (i * bits) for i, v in enumerate(column))
        raw = bytearray(number.to_bytes(4 * height, "little"))
        words[:, j] = torch.frombuffer(raw, dtype=torch.int32)
    assert unpacked(words, bits, count).T.tolist() == wanted


def test_zeros_of_gptq_v2_are_stored_as_they_are() -> None:
    given = matrix("gptq-4")
    v2 = dataclasses.replace(given, settings={**given.settings, "checkpoint_format": "gptq_v2"})
    parts = CASES["gptq-4"][0]
    scales = parts["scales"].float()[parts["g_idx"].long()].T
    steps = (values_of(v2) - values_of(given)) / scales
    assert torch.allclose(steps, torch.ones_like(steps), atol=1e-2)  # one zero less: a step more


def test_gptq_without_an_index_takes_groups_in_order() -> None:
    parts, settings = CASES["gptq-4"]
    without = {k: v for k, v in parts.items() if k != "g_idx"}
    given = PackedMatrix("x", matrix("gptq-4").shape, settings, without.get)
    assert torch.equal(values_of(given), parts["expected"].float())
    one_group = dataclasses.replace(given, settings={**settings, "group_size": -1})
    assert not torch.equal(values_of(one_group), parts["expected"].float())


@pytest.mark.parametrize(
    ("shape", "block"), [((1, 1), None), ((64, 1), None), ((64,), None), ((2, 3), [40, 48])]
)
def test_fp8_scales_of_everything_of_rows_and_of_blocks(
    shape: tuple[int, ...], block: list[int] | None
) -> None:
    """Also where the last blocks are not whole."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=generator) + 0.5
    parts = {"weight": weight, "weight_scale": scales}
    settings = {"quant_method": "fp8", "weight_block_size": block}
    got = values_of(PackedMatrix("x", (64, 128), settings, parts.get))
    for i, j in ((0, 0), (39, 47), (40, 48), (63, 127), (41, 95), (10, 96)):
        if block is None:
            scale = scales.reshape(-1)[i if scales.numel() > 1 else 0]
        else:
            scale = scales[i // block[0], j // block[1]]
        assert float(got[i, j]) == float(weight[i, j].float() * scale)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_8_bit_integers_are_scaled(
    dtype: torch.dtype, groups: int, zeros: bool
) -> None:
    """``weight`` whole, int8: (q − z)·s, z and s of a row, or of a group of a row's columns."""
    generator = torch.Generator().manual_seed(groups)
    weight = torch.randint(-128, 128, (24, 32), generator=generator, dtype=torch.int8)
    scales = (torch.rand((24, groups), generator=generator) + 0.5).to(dtype)
    offsets = torch.randint(-9, 9, (24, groups), generator=generator, dtype=torch.int8)
    parts = {"weight": weight, "weight_scale": scales}
    if zeros:
        parts["weight_zero_point"] = offsets
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    got = values_of(PackedMatrix("x", (24, 32), settings, parts.get))
    for i, j in ((0, 0), (0, 31), (23, 7), (23, 8), (11, 15), (12, 16), (5, 24)):
        group = j * groups // 32
        step = int(weight[i, j]) - (int(offsets[i, group]) if zeros else 0)
        # the product of a whole number and the scale, rounded once to the scale's dtype
        exact = torch.tensor(step * float(scales[i, group]), dtype=torch.float64)
        assert float(got[i, j]) == float(exact.to(dtype)), (i, j)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_8_bit_floats_are_scaled(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """``weight`` whole, float8: q·s, s of everything or of a row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 32, generator=generator).to(torch.float8_e4m3fn)
    scales = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    parts = {"weight": weight, "weight_scale": scales}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    got = values_of(PackedMatrix("x", (24, 32), settings, parts.get))
    for i, j in ((0, 0), (0, 31), (23, 7), (11, 15)):
        scale = float(scales.reshape(-1)[i if scales.numel() > 1 else 0])
        exact = torch.tensor(float(weight[i, j]) * scale, dtype=torch.float64)
        assert float(got[i, j]) == pytest.approx(float(exact), rel=torch.finfo(dtype).eps), (i, j)
        assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("case", "part", "change", "words"),
    [
        ("gptq-4", "qweight", lambda t: t[:-1], ["qweight", "[15, 64]", "[16, 64]"]),
        ("gptq-4", "qzeros", None, ["qzeros is missing"]),
        ("gptq-4", "qweight", lambda t: t.float(), ["qweight", "float32", "integer"]),
        ("gptq-4", "g_idx", lambda t: t + 9, ["g_idx", "not there"]),
        ("awq", "scales", lambda t: t[:, :-8], ["scales", "[4, 56]", "[4, 64]"]),
        ("awq", "scales", lambda t: t * torch.inf, ["not finite"]),
        ("nf4", "weight", lambda t: t[:-3], ["weight holds 8186 elements", "64 × 128"]),
        ("nf4", "weight.absmax", lambda t: t[:-1], ["weight.absmax", "[127]", "[128]"]),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda t: t[:-1], ["quant_state"]),
        ("nf4-nested", "weight.nested_quant_map", None, ["nested_quant_map is missing"]),
        ("int8", "weight_format", lambda t: t + 2, ["another order"]),
        ("compressed", "weight_packed", lambda t: t[:, 1:], ["weight_packed", "[64, 15]"]),
        ("compressed", "weight_scale", lambda t: t[:, :3], ["weight_scale", "[64, 3]"]),
        ("compressed-zero", "weight_zero_point", lambda t: t[1:], ["weight_zero_point", "[7, 4]"]),
    ],
)  # fmt: skip
def test_malformed_parts_are_named(case: str, part: str, change: Any, words: list[str]) -> None:
    parts = dict(CASES[case][0])
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    with pytest.raises(ModelError) as caught:
        values_of(dataclasses.replace(matrix(case), find=parts.get))
    for word in (*words, case):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("awq", {"version": "gemv"}, "version gemv"),
        ("awq", {"bits": 3}, "3 bits"),
        ("gptq-4", {"bits": 5}, "5 bits"),
        ("gptq-4", {"bits": None}, "says no bits"),
        ("gptq-4", {"bits": "four"}, "says no bits"),
        ("awq", {"group_size": 0}, "groups of 0"),
        ("compressed", {"config_groups": {}}, "no single num_bits"),
    ],
)
def test_unknown_layouts_are_refused(case: str, changes: dict[str, Any], words: str) -> None:
    given = matrix(case)
    with pytest.raises(ModelError, match=words):
        values_of(dataclasses.replace(given, settings={**given.settings, **changes}))

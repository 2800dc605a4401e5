"""Tensors beside those made again: another build's rounding is told from an edit, by the block."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.services.attest.requantize import Likeness, compare_tensors, other_keys
from so8tqc.services.quantize.derivation import tensor_digests
from tiny_gguf import write_llama

BLOCK, BYTES = 32, 34
W = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)


def file_of(**tensors: GGUFTensor) -> GGUFFile:
    return GGUFFile(Path("x.gguf"), {}, tensors)


def plain(values: np.ndarray) -> GGUFTensor:
    return GGUFTensor("w", "F32", values.shape, values.nbytes, 0, values)


def q8(values: np.ndarray) -> GGUFTensor:
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    return GGUFTensor("w", "Q8_0", values.shape, data.nbytes, 0, data)


def stepped(tensor: GGUFTensor, block: int, weight: int, steps: int) -> GGUFTensor:
    """The tensor with one weight of one block moved by whole steps of its scale."""
    data = tensor.raw.copy().reshape(-1, BYTES)
    data[block, 2 + weight] = (data[block, 2 + weight].view(np.int8) + steps).view(np.uint8)
    shaped = data.reshape(tensor.data.shape)
    return GGUFTensor(tensor.name, tensor.type, tensor.shape, tensor.bytes, 0, shaped)


def compared(theirs: GGUFTensor, *, recorded: bool = True, same_build: bool = False) -> object:
    file, made = file_of(w=theirs), file_of(w=q8(W))
    digests = tensor_digests(file)
    told = digests if recorded else tensor_digests(made)
    return compare_tensors(file, digests, made, file_of(w=plain(W)), told, same_build)


def tie() -> tuple[int, int, int]:
    """A weight that lies nearest to halfway between two steps, and the step to the other side."""
    exact = W.reshape(-1, BLOCK)
    stored = q8(W).values().reshape(-1, BLOCK)
    scale = q8(W).raw.reshape(-1, BYTES)[:, :2].copy().view(np.float16).astype(np.float32)
    off = (exact - stored) / scale
    block, weight = np.unravel_index(int(np.abs(off).argmax()), off.shape)
    return int(block), int(weight), int(np.sign(off[block, weight]))


def test_equal_bytes_are_identical() -> None:
    assert compared(q8(W)) == {}


def test_a_tie_that_another_build_rounds_otherwise_is_within_rounding() -> None:
    other = stepped(q8(W), *tie())
    assert compared(other) == {"w": {"link": Likeness.WITHIN_ROUNDING, "blocks": 1}}


def test_on_the_same_build_or_against_the_record_nothing_is_excused() -> None:
    other = stepped(q8(W), *tie())
    different = {"w": {"link": Likeness.DIFFERENT, "blocks": 1}}
    assert compared(other, same_build=True) == different
    assert compared(other, recorded=False) == different


@pytest.mark.parametrize("steps", [2, -2, 20])
def test_a_step_away_from_the_weight_is_an_edit(steps: int) -> None:
    block, weight, side = tie()
    other = stepped(q8(W), block, weight, -side * abs(steps))
    assert compared(other) == {"w": {"link": Likeness.DIFFERENT, "blocks": 1}}


def test_another_type_shape_or_name_has_no_blocks_to_count() -> None:
    nothing = {"link": Likeness.DIFFERENT, "blocks": None}
    assert compared(plain(W)) == {"w": nothing}
    assert compared(q8(W.reshape(6, 32))) == {"w": nothing}
    file, made = file_of(w=q8(W), more=q8(W)), file_of(w=q8(W), lost=q8(W))
    found = compare_tensors(file, tensor_digests(file), made, file_of(), {}, same_build=False)
    assert found == {"lost": nothing, "more": nothing}


def test_keys_that_calibrate_sets_later_are_no_difference(tmp_path: Path) -> None:
    one, other = write_llama(tmp_path / "a.gguf"), write_llama(tmp_path / "b.gguf")
    assert other_keys(one, other) == []
    content = other.read_bytes()
    other.write_bytes(content.replace(b"tiny", b"tInY"))
    assert other_keys(one, other) == ["general.name"]
    assert "general.sampling.temp" in open_gguf(one).fields  # a key that comes later
    at = content.index(b"general.sampling.temp") + len(b"general.sampling.temp") + 4
    other.write_bytes(content[:at] + b"\0\0\0\x3f" + content[at + 4 :])
    assert other_keys(one, other) == []

"""Quantized matrices as data: what the numbers in a quantized checkpoint stand for.

Each layout as its own library writes it, dequantized with that library's arithmetic: the product is
rounded to the dtype that it rounds to, so that the values are those of the training's own forward.

* **Packed integers** lie densely in 32-bit words: element i is in the bits i·b … i·b + b − 1, the
  least significant bit of the first word first.
* **GPTQ** (auto-gptq 0.7): ``qweight`` [in·b/32, out] is packed down the inputs, ``qzeros``
  [groups, out·b/32] across the outputs, ``scales`` [groups, out], ``g_idx`` [in] the group of each
  input. W_oi = s_go·(q_io − z_go), where zeros are stored less one (not in format ``gptq_v2``).
* **AWQ** (autoawq 0.2, version ``gemm``): ``qweight`` [in, out/8] and ``qzeros`` [groups, out/8],
  four bits each, the eight of a word in the order 0 2 4 6 1 3 5 7; ``scales`` [groups, out].
* **compressed-tensors**, ``pack-quantized``: ``weight_packed`` [out, in·b/32], signed less 2^(b−1);
  ``weight_scale`` [out, groups], ``weight_zero_point`` packed down the outputs, ``weight_g_idx``.
  ``int-quantized`` and ``float-quantized``: ``weight`` in 8 bits, with ``weight_scale``.
* **bitsandbytes**, four bits: ``weight`` [out·in/2, 1], the first element of a byte in its upper
  half, an index into ``quant_map``, times the ``absmax`` of its block; these may be quantized, too,
  in 256 levels, ``nested_absmax`` and an offset. Eight bits: ``weight`` in rows, times ``SCB``/127.
* **FP8**: ``weight`` times ``weight_scale_inv`` of its block, or ``weight_scale`` of its row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from so8tqc.errors import ModelError

if TYPE_CHECKING:
    import torch

_WORD = 32
_PIECE = 1 << 20
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INT8_STEP = 1 / 127
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class PackedMatrix:
    """The stored parts of one module's weight.

    Attributes:
        module: its name, for messages.
        shape: [out, in] of the weight.
        settings: ``quantization_config``.
        find: name of a part → its tensor; None: there is none.
    """

    module: str
    shape: tuple[int, int]
    settings: Mapping[str, Any]
    find: Callable[[str], torch.Tensor | None]

    def part(self, name: str, *shape: int, kind: str = "any") -> torch.Tensor:
        """A part that must be there.

        Args:
            name: of the part.
            shape: what it must be; nothing: anything.
            kind: ``integer`` or ``float``: of its dtype.

        Raises:
            ModelError: it is not there, or not so.
        """
        tensor = self.find(name)
        if tensor is None:
            raise ModelError(f"{name} is missing", where=self.module)
        if shape and tuple(tensor.shape) != shape:
            raise ModelError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} for a weight of "
                f"{self.shape[0]} × {self.shape[1]} (out × in)",
                where=self.module,
            )
        if kind != "any" and tensor.is_floating_point() != (kind == "float"):
            raise ModelError(f"{name} is {tensor.dtype}, expected {kind}", where=self.module)
        return tensor

    def setting(self, *names: str) -> int:
        """A whole number of the configuration, under the first of several names that is there.

        Raises:
            ModelError: none is, or it is no whole number.
        """
        for name in names:
            if isinstance(value := self.settings.get(name), int):
                return value
        raise ModelError(f"quantization_config says no {names[0]}", where=self.module)

    def groups(self, size: int) -> torch.Tensor:
        """[in]: the group of each input, ``size`` after one another; −1: one group.

        Raises:
            ModelError: no positive size.
        """
        import torch

        if size != -1 and size < 1:
            raise ModelError(f"groups of {size}", where=self.module)
        inputs = torch.arange(self.shape[1])
        return torch.zeros_like(inputs) if size == -1 else inputs // size

    def require_index(self, index: torch.Tensor, count: int, name: str) -> torch.Tensor:
        """Indices, as int64.

        Raises:
            ModelError: one is not below ``count``.
        """
        index = index.long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise ModelError(f"{name} names a group that is not there", where=self.module)
        return index


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Integers out of 32-bit words, column by column.

    Args:
        words: [words, m] int32.
        bits: 1 … 8.
        count: elements of a column; their bits must be in the words.

    Returns:
        [count, m] uint8.
    """
    import torch

    start = torch.arange(count) * bits
    word, offset = start // _WORD, (start % _WORD)[:, None]
    following = (word + 1).clamp_max(words.shape[0] - 1)
    out = torch.empty((count, words.shape[1]), dtype=torch.uint8)
    step = max(1, _PIECE // max(1, count))
    for at in range(0, words.shape[1], step):
        piece = words[:, at : at + step].to(torch.int64) & 0xFFFFFFFF
        low = piece[word] >> offset
        high = (piece[following] << _WORD) >> offset
        out[:, at : at + step] = ((low | high) & ((1 << bits) - 1)).to(torch.uint8)
    return out


def _gptq(m: PackedMatrix) -> torch.Tensor:
    bits, (rows, columns) = m.setting("bits", "w_bit"), m.shape
    if bits not in (2, 3, 4, 8) or columns * bits % _WORD or rows * bits % _WORD:
        raise ModelError(f"GPTQ with {bits} bits of {rows} × {columns}", where=m.module)
    scales = m.part("scales", kind="float")
    count = scales.shape[0]
    m.part("scales", count, rows)
    packed = m.part("qweight", columns * bits // _WORD, rows, kind="integer")
    stored = m.part("qzeros", count, rows * bits // _WORD, kind="integer")
    zeros = unpacked(stored.T, bits, rows).T.to(scales.dtype)
    if str(m.settings.get("checkpoint_format") or m.settings.get("format")) != "gptq_v2":
        zeros = zeros + 1
    if m.find("g_idx") is not None:
        groups = m.part("g_idx", columns, kind="integer")
    else:
        groups = m.groups(m.setting("group_size", "q_group_size"))
    groups = m.require_index(groups, count, "g_idx")
    weight = unpacked(packed, bits, columns).to(scales.dtype)
    return (scales[groups] * (weight - zeros[groups])).T


def _awq(m: PackedMatrix) -> torch.Tensor:
    import torch

    version = str(m.settings.get("version") or m.settings.get("format") or "gemm").lower()
    bits, (rows, columns) = m.setting("bits", "w_bit"), m.shape
    if version != "gemm" or bits != 4 or rows % 8:
        raise ModelError(f"AWQ, version {version}, {bits} bits of {rows} outputs", where=m.module)
    scales = m.part("scales", kind="float")
    count = scales.shape[0]
    m.part("scales", count, rows)
    place = torch.argsort(torch.tensor(_AWQ_ORDER))
    order = (torch.arange(0, rows, 8)[:, None] + place).reshape(-1)

    def across(name: str, height: int) -> torch.Tensor:
        words = m.part(name, height, rows // 8, kind="integer")
        return unpacked(words.T, bits, rows)[order].T.to(scales.dtype)

    groups = m.groups(m.setting("group_size", "q_group_size"))
    groups = m.require_index(groups, count, "group_size")
    weight, zeros = across("qweight", columns), across("qzeros", count)
    return ((weight - zeros[groups]) * scales[groups]).T


def _compressed(m: PackedMatrix) -> torch.Tensor:
    import torch

    rows, columns = m.shape
    scale = m.part("weight_scale", kind="float")
    zero = m.find("weight_zero_point")
    if m.find("weight_packed") is None:
        weight = m.part("weight", rows, columns)
        if weight.is_floating_point():
            return _scaled(m, weight, scale)
    else:
        bits = _weight_bits(m)
        words = m.part("weight_packed", rows, -(-columns * bits // _WORD), kind="integer")
        weight = unpacked(words.T.contiguous(), bits, columns).T.to(torch.int16) - (1 << bits - 1)
        if zero is not None and scale.ndim == 2 and zero.shape[0] != scale.shape[0]:
            zero = m.part("weight_zero_point", -(-rows * bits // _WORD), scale.shape[1])
            zero = unpacked(zero, bits, rows).to(torch.int16) - (1 << bits - 1)
    scale = scale.reshape(-1, scale.shape[-1]) if scale.ndim else scale.reshape(1, 1)
    if scale.shape[0] not in (1, rows) or columns % scale.shape[1]:
        m.part("weight_scale", rows, 1)  # says what it is, and what it should be
    groups = torch.arange(columns) // (columns // scale.shape[1])
    if (index := m.find("weight_g_idx")) is not None and bool((index >= 0).all()):
        groups = m.require_index(index, scale.shape[1], "weight_g_idx")
    values = weight.to(scale.dtype)
    if zero is not None:
        values = values - zero.reshape(scale.shape).to(scale.dtype)[:, groups]
    return values * scale[:, groups]


def _weight_bits(m: PackedMatrix) -> int:
    """``num_bits`` that all groups of modules have.

    Raises:
        ModelError: they do not.
    """
    groups = m.settings.get("config_groups")
    found = {
        weights.get("num_bits")
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(weights := group.get("weights"), dict)
    }
    if len(found) != 1 or not isinstance(bits := found.pop(), int) or not 1 <= bits <= 8:
        raise ModelError("config_groups says no single num_bits of the weights", where=m.module)
    return bits


def _bitsandbytes(m: PackedMatrix) -> torch.Tensor:
    rows, columns = m.shape
    if m.find("SCB") is not None:
        scales = m.part("SCB", rows, kind="float")
        order = m.find("weight_format")
        if order is not None and order.any():
            raise ModelError("8-bit rows in another order than row by row", where=m.module)
        weight = m.part("weight", rows, columns, kind="integer")
        return weight.float() * scales.float()[:, None] * _INT8_STEP
    state = _state(m)
    codes = m.part("weight").reshape(-1).view(_uint8())
    if codes.numel() * 2 != rows * columns:
        raise ModelError(
            f"weight holds {codes.numel() * 2} elements, expected {rows} × {columns}",
            where=m.module,
        )
    import torch

    indices = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1).long()
    block = _positive(m, state, "blocksize")
    absmax = _absmax(m, state, -(-indices.numel() // block))
    values = m.part("weight.quant_map", 16, kind="float").float()[indices]
    values = values * absmax.repeat_interleave(block)[: values.numel()]
    dtype = str(state.get("dtype"))
    if dtype not in _FLOATS:
        raise ModelError(f"quant_state says the dtype {dtype!r}", where=m.module)
    return values.to(getattr(torch, dtype)).reshape(rows, columns)


def _uint8() -> torch.dtype:
    import torch

    return torch.uint8


def _state(m: PackedMatrix) -> Mapping[str, Any]:
    """What bitsandbytes stores as JSON in a tensor of bytes."""
    for kind in ("nf4", "fp4"):
        held = m.find(f"weight.quant_state.bitsandbytes__{kind}")
        if held is None:
            continue
        try:
            state = json.loads(bytes(held.reshape(-1).tolist()).decode("utf-8"))
        except (ValueError, RecursionError, TypeError):
            state = None
        if isinstance(state, dict):
            return state
        raise ModelError("quant_state is no JSON object", where=m.module)
    raise ModelError("weight.quant_state is missing", where=m.module)


def _positive(m: PackedMatrix, state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"quant_state says {name} {value!r}", where=m.module)
    return value


def _absmax(m: PackedMatrix, state: Mapping[str, Any], blocks: int) -> torch.Tensor:
    """[blocks] float32: the largest magnitude of each block."""
    if m.find("weight.nested_absmax") is None:
        return m.part("weight.absmax", blocks, kind="float").float()
    block = _positive(m, state, "nested_blocksize")
    offset = state.get("nested_offset")
    if not isinstance(offset, float):
        raise ModelError(f"quant_state says nested_offset {offset!r}", where=m.module)
    codes = m.part("weight.absmax", blocks, kind="integer").long()
    levels = m.part("weight.nested_quant_map", 256, kind="float").float()
    outer = m.part("weight.nested_absmax", -(-blocks // block), kind="float").float()
    return levels[codes] * outer.repeat_interleave(block)[:blocks] + offset


def _fp8(m: PackedMatrix) -> torch.Tensor:
    weight = m.part("weight", *m.shape, kind="float")
    name = "weight_scale" if m.find("weight_scale_inv") is None else "weight_scale_inv"
    return _scaled(m, weight, m.part(name, kind="float"))


def _scaled(m: PackedMatrix, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """8-bit floats times the scale of their block, row, or all, in float32.

    Raises:
        ModelError: the scales are not those of whole blocks.
    """
    rows, columns = m.shape
    s = scale.float()
    s = s.reshape(-1, 1) if s.ndim < 2 else s  # one a row, or one for all
    down, across = _block(m)
    if tuple(s.shape) not in ((rows, 1), (1, 1)):
        if tuple(s.shape) != (-(-rows // down), -(-columns // across)):
            raise ModelError(
                f"scales of shape {list(scale.shape)} are not those of {rows} × {columns} in "
                f"blocks of {down} × {across}",
                where=m.module,
            )
        s = s.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
    return weight.float() * s


def _block(m: PackedMatrix) -> tuple[int, int]:
    """Rows and columns that share a scale; the whole weight, where nothing is said."""
    said = m.settings.get("weight_block_size")
    groups = m.settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if said is None and isinstance(weights, dict):
            said = weights.get("block_structure")
    if isinstance(said, (list, tuple)) and len(said) == 2:
        down, across = said
        if isinstance(down, int) and isinstance(across, int) and down > 0 < across:
            return down, across
    return m.shape


_READERS: Mapping[str, tuple[tuple[str, ...], Callable[[PackedMatrix], torch.Tensor]]] = {
    "gptq": (("qweight", "qzeros"), _gptq),
    "awq": (("qweight", "qzeros"), _awq),
    "compressed-tensors": (("weight_scale",), _compressed),
    "bitsandbytes": (("weight.quant_map", "SCB"), _bitsandbytes),
    "fp8": (("weight_scale_inv", "weight_scale"), _fp8),
    "fbgemm_fp8": (("weight_scale",), _fp8),
}
"""quant_method → parts of which a quantized module has one, and what reads it."""

READABLE = "GPTQ, AWQ (gemm), compressed-tensors, bitsandbytes as saved, FP8 with scales"
"""For people."""


def is_packed(settings: Mapping[str, Any], has: Callable[[str], bool]) -> bool:
    """Whether a module's weight is stored quantized, by a method that can be read.

    Args:
        settings: ``quantization_config``.
        has: whether a part of this name is there.
    """
    marks, _ = _READERS.get(str(settings.get("quant_method", "")).lower(), ((), None))
    return any(map(has, marks))


def values_of(matrix: PackedMatrix) -> torch.Tensor:
    """[out, in] in float32: the numbers that a quantized weight stands for.

    Raises:
        ModelError: parts are missing or malformed, or the layout is none that is known.
    """
    method = str(matrix.settings.get("quant_method", "")).lower()
    values = _READERS[method][1](matrix).float().contiguous()
    if not bool(values.isfinite().all()):
        raise ModelError("dequantized, it is not finite", where=matrix.module)
    return values

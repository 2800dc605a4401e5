"""What ggml's CPU backend makes of activations before it multiplies them with a stored weight.

A matrix product's second operand is rounded to the type that the weight's dot product takes
(``vec_dot_type`` in ggml's table): half precision beside F16, blocks of 8-bit integers beside
quantized weights, Q8_0 and Q8_1 by 32, Q8_K by 256.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_BY_32 = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"})
_LEVELS = 127


def rounded(values: Array, type_: str) -> Array:
    """[..., n] inputs of a product as ggml multiplies them with a weight of a type.

    Args:
        values: n a multiple of the type's block.
        type_: GGML type of the weight.
    """
    if type_ == "F32":
        return values
    if type_ == "F16":
        return values.astype(np.float16).astype(np.float32)
    if type_ == "BF16":
        return _bfloat16(values)
    size = 32 if type_ in _BY_32 else 256
    blocks = values.reshape(*values.shape[:-1], -1, size)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / _LEVELS
    codes = np.rint(np.divide(blocks, step, out=np.zeros_like(blocks), where=step != 0))
    if size == 32:  # its scale is stored in half precision, after the codes were chosen
        step = step.astype(np.float16).astype(np.float32)
    made: Array = (codes * step).reshape(values.shape).astype(np.float32)
    return made


def _bfloat16(values: Array) -> Array:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    made: Array = even.view(np.float32)
    return made

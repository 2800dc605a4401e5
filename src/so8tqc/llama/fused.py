"""Whether this libllama's quantizers round as they are written, or fuse products and sums.

A compiler may contract a·b + c to one operation that rounds once: on x86-64 where it is told to use
what newer CPUs have, on aarch64 always. Scales then differ in their last bit, codes follow, and a
quantized file differs from the one that another machine makes. Built with ``-ffp-contract=off``,
gcc's and clang's quantizers give the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.llama.ggml import ggml

_TYPES = ("Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q5_1")
"""Between them, fused builds of gcc and clang differ in hundreds of the sample's blocks."""

_ROWS, _COLUMNS = 256, 1024

AS_WRITTEN = "6728ceeb9e6c1bc41de8726f8843f337a7aec21db68ed72808498644fe66d421"
"""SHA-256 of the sample as quantizers store it that fuse nothing."""


def quantizers_fuse() -> bool:
    """Whether the quantizers of the libllama that is installed here fuse products and sums.

    Raises:
        MissingToolError: there is none.
    """
    return stored_digest(ggml()) != AS_WRITTEN


def stored_digest(library: Any) -> str:
    """SHA-256 of a fixed sample, stored in several types with and without importance.

    Args:
        library: ggml, loaded by ctypes.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    weights = _sample(_ROWS * _COLUMNS)
    importance = np.square(_sample(_COLUMNS)) + np.float32(2**-10)
    digest = hashlib.sha256()
    for name in _TYPES:
        kind = GGMLQuantizationType[name]
        block, size = GGML_QUANT_SIZES[kind]
        stored = np.zeros(weights.size // block * size, np.uint8)
        for weighed in (None, importance.ctypes.data):
            chunk(kind, weights.ctypes.data, stored.ctypes.data, 0, _ROWS, _COLUMNS, weighed)
            digest.update(stored.tobytes())
    return digest.hexdigest()


def _sample(count: int) -> npt.NDArray[np.float32]:
    """Numbers like weights, the same everywhere: sums of four integers from a multiplier."""
    steps = np.arange(1, 4 * count + 1, dtype=np.uint64)
    mixed = steps * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    parts = (mixed >> np.uint64(48)).astype(np.int64).reshape(count, 4)
    found: npt.NDArray[np.float32] = (parts.sum(axis=1) - 2 * 0xFFFF).astype(np.float32)
    return found * np.float32(2.0**-20)

"""ggml through ctypes: tensors of a running graph, and rows of any type back to float32."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ToolError
from so8tqc.llama.libllama import bindings

_DIMENSIONS, _SOURCES, _NAME_LENGTH, _PARAMETERS = 4, 10, 64, 16


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of the pinned libllama (``ggml.h``)."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _DIMENSIONS),
    ("nb", ctypes.c_size_t * _DIMENSIONS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * _PARAMETERS),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * _SOURCES),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * _NAME_LENGTH),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    )


@functools.cache
def ggml() -> Any:
    """The ggml library that libllama uses.

    Raises:
        MissingToolError: llama-cpp-python is not installed or does not load.
    """
    bindings()
    from llama_cpp._ggml import libggml

    libggml.ggml_op_name.argtypes = [ctypes.c_int]
    libggml.ggml_op_name.restype = ctypes.c_char_p
    libggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    libggml.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    libggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    libggml.ggml_get_name.restype = ctypes.c_char_p
    libggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
    libggml.ggml_nbytes.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    libggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, pointer, count, count, count, pointer,
    ]  # fmt: skip
    libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    libggml.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    return libggml


def require_layout(tensor: Tensor) -> None:
    """See that this library's tensors are laid out as :class:`Tensor` says.

    Raises:
        ToolError: another name than ggml itself gives for it.
    """
    if ggml().ggml_get_name(ctypes.addressof(tensor)) != tensor.name:
        raise ToolError(
            "this libllama lays its tensors out in another way",
            remedy="Install the pinned version of llama-cpp-python.",
        )


def strided(tensor: Tensor, dtype: type[np.float32] | type[np.int32]) -> npt.NDArray[Any]:
    """A view [ne3, ne2, ne1, ne0] of a tensor's values of 4 bytes, whatever its strides.

    Raises:
        ToolError: it does not lie in this process's memory.
    """
    if not (tensor.data and ggml().ggml_backend_buffer_is_host(tensor.buffer)):
        raise ToolError(f"the tensor {tensor.name.decode()} is not in this machine's memory")
    size = ggml().ggml_nbytes(ctypes.addressof(tensor))
    memory = (ctypes.c_char * size).from_address(tensor.data)
    shape = tuple(reversed(list(tensor.ne)))
    return np.ndarray(shape, dtype, buffer=memory, strides=tuple(reversed(list(tensor.nb))))


_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_VECTORIZED = {"F16": "ggml_cpu_fp16_to_fp32", "BF16": "ggml_cpu_bf16_to_fp32"}
"""The plain types' conversion in the part of libggml that is compiled for the CPU, where it is ten
times as fast as in the base; some builds have that part under other names."""


def _vectorized(type_: str) -> Callable[[int, int, int], None] | None:
    if type_ not in _VECTORIZED:
        return None
    ggml()
    from llama_cpp import _ggml
    from llama_cpp._ctypes_extensions import load_shared_library

    try:
        library = load_shared_library("ggml-cpu", _ggml.libggml_base_path)
        library.ggml_cpu_init()  # its table of halves, on CPUs that do not convert them
        return _SIGNATURE((_VECTORIZED[type_], library))
    except (FileNotFoundError, RuntimeError, AttributeError):
        return None


Dequantizer = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.float32]], None]


@functools.cache
def dequantizer(type_: str) -> Dequantizer:
    """libggml's own function from stored bytes to float32, an order faster than gguf-py's.

    Args:
        type_: GGML type name, e.g. ``Q5_K``.

    Returns:
        A function of the bytes of whole blocks and a float32 array to fill.

    Raises:
        ToolError: libggml cannot dequantize this type.
    """
    from gguf import GGMLQuantizationType

    if type_ == "F32":
        return lambda stored, out: np.copyto(out, stored.reshape(-1).view(np.float32))
    to_float = _vectorized(type_)
    if to_float is None:
        traits = ggml().ggml_get_type_traits(int(GGMLQuantizationType[type_]))
        if not traits or not traits.contents.to_float:
            raise ToolError(f"libggml cannot dequantize {type_}")
        to_float = _SIGNATURE(traits.contents.to_float)

    def run(stored: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None:
        to_float(stored.ctypes.data, out.ctypes.data, out.size)

    return run


def encode(
    values: npt.NDArray[np.float32],
    type_: str,
    importance: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """What ggml's own encoder stores for whole rows.

    Args:
        values: [rows, n], n a multiple of the type's block.
        type_: GGML type name.
        importance: [n] of an importance matrix; None: plain rounding. The types below three bits
            have no plain rounding: all columns then weigh the same.

    Returns:
        [rows, bytes].

    Raises:
        MissingToolError: libggml is not installed.
        ToolError: it did not fill the rows.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[type_]
    weights, size = GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    values = np.ascontiguousarray(values, dtype=np.float32)
    if importance is None and type_ in _NEED_IMPORTANCE:
        importance = np.ones(columns, np.float32)
    stored = np.zeros((rows, columns // weights * size), np.uint8)
    filled = ggml().ggml_quantize_chunk(
        int(kind),
        values.ctypes.data,
        stored.ctypes.data,
        0,
        rows,
        columns,
        None if importance is None else np.ascontiguousarray(importance).ctypes.data,
    )
    if filled != stored.size:
        raise ToolError(f"libggml stored {filled} bytes of {type_} where {stored.size} were due")
    return stored


_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})

"""Kernels compiled by numba: once for a machine, or in each process where that cannot be kept."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

from numba import njit

_NOT_KEPT = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    MemoryError,
)
"""What numba raises where there is no room to keep a kernel, or the file of one is damaged."""


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What threads call: it holds no lock of Python's."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    plain = njit(**options)(kernel)
    try:
        kept = njit(cache=True, **options)(kernel)
    except RuntimeError:  # numba finds no folder
        return plain  # type: ignore[no-any-return]

    @functools.wraps(kernel)
    def call(*arguments: Any) -> Any:
        try:
            return kept(*arguments)
        except _NOT_KEPT:
            return plain(*arguments)

    return call

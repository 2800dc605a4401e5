"""Memory for blocks of logits, used again once no tensor shares it."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]


class BlockMemory:
    """Hands out tensors whose memory returns when the last tensor that shares it is gone.

    A fresh block of a hundred megabytes comes from the operating system page by page, and
    that takes a tenth or more of the time of the matrix product that fills it.
    """

    def __init__(self) -> None:
        self._spare: list[Bytes] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the CPU."""
        import torch

        size = math.prod(shape) * dtype.itemsize
        fitting = [i for i, memory in enumerate(self._spare) if memory.size >= size]
        if fitting:
            memory = self._spare.pop(fitting[0])
        else:
            self._spare.clear()
            memory = np.empty(size, np.uint8)
        lent = memory[:size]  # an object of its own, which the tensor's storage keeps alive
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

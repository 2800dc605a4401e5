"""Token rows of logits that lie on a GPU, computed there.

The same numbers as ``metrics.distributions`` and ``metrics.divergence``, whose definitions hold;
the kernels are in ``metrics.gpu_kernels``. Nothing here waits for the GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from so8tqc.metrics.columns import Column, Side

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GpuDistribution:
    """One model's side of a block of rows, on the GPU.

    Attributes:
        logits: [t, V] as they came, any float dtype.
        numbers: [t, len(Side)] float64, by the positions of ``columns.Side``.
        places: [t, 6] int32: the first logit that is not finite, V if all are; then the five most
            likely tokens in order.
    """

    logits: torch.Tensor
    numbers: torch.Tensor
    places: torch.Tensor

    @property
    def broken(self) -> torch.Tensor:
        """[t] the first logit of each row that is not finite, V if all are."""
        return self.places[:, 0]


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether Triton is there and can build kernels for a GPU, tried once.

    It needs a C compiler and Python's headers, which are not everywhere.
    """
    import torch

    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    logits = torch.zeros(1, 8, device=device)
    try:
        side = gpu_distribution(logits, torch.zeros(1, dtype=torch.int64, device=device))
        gpu_token_rows(side, side, torch.zeros(1, dtype=torch.int64, device=device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return False
    return True


def gpu_distribution(logits: torch.Tensor, targets: torch.Tensor) -> GpuDistribution:
    """Softmax and what follows from it.

    Args:
        logits: [t, V], any float dtype.
        targets: [t] the token that really follows, on the same device.
    """
    import torch

    from so8tqc.metrics import gpu_kernels as kernels

    if logits.stride(1) != 1:
        logits = logits.contiguous()
    height, width = logits.shape
    numbers = logits.new_empty((height, len(Side)), dtype=torch.float64)
    places = logits.new_empty((height, 1 + kernels.LEADERS), dtype=torch.int32)
    with _on(logits.device):
        kernels.side_kernel[(height,)](
            logits,
            logits.stride(0),
            targets,
            numbers,
            places,
            width,
            BLOCK=kernels.BLOCK,
            COLUMNS=kernels.columns(width),
            num_warps=kernels.WARPS,
        )
    return GpuDistribution(logits, numbers, places)


def gpu_token_rows(
    reference: GpuDistribution, candidate: GpuDistribution, targets: torch.Tensor
) -> torch.Tensor:
    """One row of ``columns.Column`` for each position: [t, len(Column)] float64, on the GPU.

    Args:
        reference: of t positions.
        candidate: of the same positions, on the same device.
        targets: [t] the token that really follows, there, too.
    """
    from so8tqc.metrics import gpu_kernels as kernels

    height, width = reference.logits.shape
    rows = reference.numbers.new_empty((height, len(Column)))
    with _on(rows.device):
        kernels.pair_kernel[(height,)](
            reference.logits,
            reference.logits.stride(0),
            candidate.logits,
            candidate.logits.stride(0),
            targets,
            reference.numbers,
            candidate.numbers,
            reference.places,
            candidate.places,
            rows,
            width,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
        )
    return rows


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device."""
    import torch

    return torch.cuda.device(device if device.type == "cuda" else -1)

"""What common quantizers make of a weight and back: NF4, FP4 and 8-bit, block by block.

bitsandbytes takes blocks of 64 consecutive elements, divides by the largest magnitude, and stores
the nearest of 16 levels. Those of NF4 are quantiles of a normal distribution (Dettmers et al.,
QLoRA, NeurIPS 2023, appendix E), those of FP4 a sign, two bits of exponent and one of mantissa.
LLM.int8 stores rows by their largest magnitude in 127 steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 64

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = (
    -1.0,
    -0.6666666666666666,
    -0.5,
    -0.3333333333333333,
    -0.25,
    -0.16666666666666666,
    -0.005208333333333333,
    0.0,
    0.005208333333333333,
    0.16666666666666666,
    0.25,
    0.3333333333333333,
    0.5,
    0.6666666666666666,
    1.0,
)


def dequantized(weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of each quantizer, there and back.

    Args:
        weight: [rows, in] float32, the leading rows of a matrix; for the block quantizers their
            elements must be whole blocks.
    """
    if weight.numel() % BLOCK == 0:
        yield "NF4, blocks of 64", _by_levels(weight, NF4)
        yield "FP4, blocks of 64", _by_levels(weight, FP4)
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    yield "8-bit, row by row", (weight / scale).round() * scale


def _by_levels(weight: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    import torch

    table = torch.tensor(levels, dtype=torch.float32)
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize((blocks / largest).contiguous(), middles)
    return (table[nearest] * largest).reshape(weight.shape)

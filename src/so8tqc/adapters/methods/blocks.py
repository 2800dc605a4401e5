"""MiSS, C3A and GraLoRA: changes made of blocks.

* **MiSS** (``miss/layer.py``; called Bone before): x is summed in groups of r and multiplied by D
  [r, out], so ΔW[i, j] = D[j mod r, i]; an incomplete last group is filled with zeros. ``mini``: D
  is [r, mini_r], repeated along the outputs. ``bat``: M [out / r, r, r], and each block W_ba of
  r × r becomes W_ba + W_ba·M_b + M_b.
* **C3A** (``c3a/layer.py``): x block by block is convolved circularly with a kernel and divided by
  the number of inputs. PEFT does so by FFT: fft(ifft(x)·fft(w))_k = Σ_j x_j·w_{(j − k) mod b}, so a
  block of ΔW is circulant, its elements the kernel's, and no FFT is needed.
* **GraLoRA** (``gralora/layer.py``): N × N blocks, block (j, n) of ΔW the product of parts of B_j
  and A_n; and a LoRA of rank ``hybrid_r`` over all. s = alpha/(r + hybrid_r).
"""

from __future__ import annotations

import numpy as np

from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.patterns import AddCirculants, AddGrid, AddTiles, MixBlocks
from so8tqc.adapters.steps import AddLowRank, Step
from so8tqc.errors import RotationError, ShapeError


def miss(c: Context) -> ModuleSteps:
    """Steps of a MiSS module, of whichever of its three forms."""
    c.only("miss_block.weight")
    block = c.take("miss_block.weight")
    rank, form = int(c.setting("r", 64)), c.files.config.get("init_weights")
    if rank < 1:
        raise RotationError(f"r is {rank}", where=c.where)
    zero = not block.any()
    if form == "bat":
        if c.shape.out % rank or c.shape.into % rank:
            raise ShapeError(
                f"{c.shape.out} × {c.shape.into} is not made of blocks of {rank}", where=c.where
            )
        c.require("miss_block", block.shape, (c.shape.out // rank, rank, rank))
        return ModuleSteps((MixBlocks(block),), zero=zero)
    width = int(c.setting("mini_r", 1)) if form == "mini" else c.shape.out
    if width < 1 or c.shape.out % width:
        raise ShapeError(f"mini_r {width} does not divide {c.shape.out} outputs", where=c.where)
    c.require("miss_block", block.shape, (rank, width))
    return ModuleSteps((AddTiles(np.ascontiguousarray(block.T)),), zero=zero)


def c3a(c: Context) -> ModuleSteps:
    """Steps of a C3A module; w/in is rounded once."""
    c.only("c3a_kernel.weight")
    kernel = c.take("c3a_kernel.weight")
    if kernel.ndim != 3 or 0 in kernel.shape:
        raise ShapeError(f"c3a_kernel has shape {list(kernel.shape)}, not [m, n, b]", where=c.where)
    m, n, size = kernel.shape
    c.require("c3a_kernel's blocks", (m * size, n * size), (c.shape.out, c.shape.into))
    return ModuleSteps((AddCirculants(kernel / c.shape.into),), zero=not kernel.any())


def gralora(c: Context) -> ModuleSteps:
    """Steps of a GraLoRA module; s·B is rounded once."""
    count, rank = int(c.setting("gralora_k", 2)), int(c.setting("r", 32))
    extra = int(c.setting("hybrid_r", 0))
    if count < 1 or rank < 1 or extra < 0 or rank % count:
        raise RotationError(f"gralora_k {count}, r {rank}, hybrid_r {extra}", where=c.where)
    if c.shape.out % count or c.shape.into % count:
        raise ShapeError(
            f"{c.shape.out} × {c.shape.into} is not made of {count} × {count} blocks", where=c.where
        )
    a, b = c.take("gralora_A.weight"), c.take("gralora_B.weight")
    c.require("gralora_A", a.shape, (count, c.shape.into // count, rank))
    c.require("gralora_B", b.shape, (count, rank, c.shape.out // count))
    scale = c.setting("alpha", 64) / (rank + extra)
    steps: list[Step] = [AddGrid(a, b * scale)]
    zero = scale == 0 or not a.any() or not b.any()
    names = ["gralora_A.weight", "gralora_B.weight"]
    if extra:
        names += ["gralora_A_general.weight", "gralora_B_general.weight"]
        first, second = c.tensor(names[2]), c.tensor(names[3])
        c.require("gralora_A_general", tuple(first.shape), (extra, c.shape.into))
        c.require("gralora_B_general", tuple(second.shape), (c.shape.out, extra))
        steps.append(AddLowRank(second, first, scale))
        zero = zero and not (first.any() and second.any() and scale)
    c.only(*names)
    return ModuleSteps(tuple(steps), zero=zero)

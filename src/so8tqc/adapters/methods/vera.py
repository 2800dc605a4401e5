"""VeRA (``vera/layer.py``): y + λ_b·(B·(λ_d·(A·x))), so W' = W + (λ_b·B)·(λ_d·A).

A and B are the leading parts of one pair for all modules, stored or drawn from
``projection_prng_key``.

PVeRA (``pvera/layer.py``): λ_d·(A·x) are 2r numbers, means μ and logarithms of variances; outside
of a training, and unless ``sample_at_inference``, y + λ_b·(B·μ): the same with the first r alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from so8tqc.adapters.files import AdapterFiles, array, number
from so8tqc.adapters.methods.context import Context, ModuleSteps, Shape
from so8tqc.adapters.steps import AddLowRank
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.files.peft_config import CONFIG_NAME


def vera(c: Context) -> ModuleSteps:
    """The step of a VeRA module."""
    return _scaled_projections(c, "vera", of_a_rank=1)


def pvera(c: Context) -> ModuleSteps:
    """The step of a PVeRA module.

    Raises:
        RotationError: it is sampled from, at inference, too.
    """
    if c.files.config.get("sample_at_inference"):
        raise RotationError(
            "sample_at_inference: the adapter draws its output at random each time, which no "
            "weight can hold",
            where=str(c.files.directory / CONFIG_NAME),
            remedy="Set it to false in this file to bake what the adapter gives on average.",
        )
    return _scaled_projections(c, "pvera", of_a_rank=2)


def _scaled_projections(c: Context, name: str, of_a_rank: int) -> ModuleSteps:
    """(λ_b·B)·(λ_d·A), of A's and λ_d's ``of_a_rank``·r rows the first r."""
    c.only(f"{name}_lambda_b.weight", f"{name}_lambda_d.weight")
    b, d = c.take(f"{name}_lambda_b.weight"), c.take(f"{name}_lambda_d.weight")
    rank = int(c.setting("r", 256))
    rows = of_a_rank * rank
    c.require(f"{name}_lambda_b", b.shape, (c.shape.out,))
    c.require(f"{name}_lambda_d", d.shape, (rows,))
    shared = c.files.shared
    if {f"{name}_A", f"{name}_B"} - shared.keys():
        raise RotationError(
            f"the projections {name}_A and {name}_B are missing",
            where=c.where,
            remedy="Save the adapter with save_projection: true.",
        )
    a_all, b_all = array(shared[f"{name}_A"]), array(shared[f"{name}_B"])
    high, wide = a_all.shape[0] >= rows, a_all.shape[1] >= c.shape.into
    if not (high and wide) or b_all.shape[0] < c.shape.out or b_all.shape[1] < rank:
        raise ShapeError(
            f"{name}_A {list(a_all.shape)} and {name}_B {list(b_all.shape)} are too small for "
            f"{c.shape.out} × {c.shape.into} at rank {rank}",
            where=c.where,
        )
    d = d[:rank]
    # products of two float32 numbers are float64 numbers, exactly
    left = np.ascontiguousarray(b[:, None] * b_all[: c.shape.out, :rank])
    right = np.ascontiguousarray(d[:, None] * a_all[:rank, : c.shape.into])
    return ModuleSteps((AddLowRank(left, right),), zero=not b.any() or not d.any())


def vera_projections(
    files: AdapterFiles, shapes: Iterable[Shape]
) -> tuple[torch.Tensor, torch.Tensor]:
    """vera_A and vera_B drawn as PEFT draws them where they were not saved.

    Kaiming-uniform from a CPU generator seeded with ``projection_prng_key``: A first, [r, largest
    in], then B [largest out, r] (``VeraModel._init_vera_A_vera_B``).
    """
    where = str(files.directory / CONFIG_NAME)
    shapes = list(shapes)
    rank = int(number(files.config, "r", 256, where))
    key = int(number(files.config, "projection_prng_key", 0, where))
    generator = torch.Generator(device="cpu").manual_seed(key)
    drawn = []
    for size in ((rank, max(s.into for s in shapes)), (max(s.out for s in shapes), rank)):
        std = math.sqrt(2) / math.sqrt(size[1])
        bound = math.sqrt(3.0) * std
        drawn.append(torch.empty(size).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]

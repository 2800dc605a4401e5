"""VeRA (``vera/layer.py``): y + λ_b·(B·(λ_d·(A·x))), so W' = W + (λ_b·B)·(λ_d·A).

A and B are the leading parts of one pair for all modules, stored or drawn from
``projection_prng_key``.
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
    c.only("vera_lambda_b.weight", "vera_lambda_d.weight")
    b, d = c.take("vera_lambda_b.weight"), c.take("vera_lambda_d.weight")
    rank = int(c.setting("r", 256))
    c.require("vera_lambda_b", b.shape, (c.shape.out,))
    c.require("vera_lambda_d", d.shape, (rank,))
    shared = c.files.shared
    if {"vera_A", "vera_B"} - shared.keys():
        raise RotationError("the projections vera_A and vera_B are missing", where=c.where)
    a_all, b_all = array(shared["vera_A"]), array(shared["vera_B"])
    if a_all.shape[0] < rank or a_all.shape[1] < c.shape.into or b_all.shape[0] < c.shape.out:
        raise ShapeError(
            f"vera_A {list(a_all.shape)} and vera_B {list(b_all.shape)} are too small for "
            f"{c.shape.out} × {c.shape.into}",
            where=c.where,
        )
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

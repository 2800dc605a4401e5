"""LoHa, LoKr and HiRA: changes that are products of smaller matrices, element by element.

* **LoHa** (``loha/layer.py``): W' = W + s·(A₁·B₁)∘(A₂·B₂), s = alpha/r, which PEFT
  keeps as a float32 number.
* **LoKr** (``lokr/layer.py``): W' = W + s·(w₁ ⊗ w₂), s = alpha/r; each of the two is stored, or is
  a product of two thin matrices.
* **HiRA** (``hira/layer.py``): W' = W + W∘(B·A), without a scale; of an embedding (B·A)ᵀ.

r and alpha by ``rank_pattern`` and ``alpha_pattern``, as of LoRA.
"""

from __future__ import annotations

import numpy as np

from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.methods.lora import declared_rank, lora_scale
from so8tqc.adapters.patterns import AddTimesBase
from so8tqc.adapters.products import AddProducts, Factor
from so8tqc.errors import RotationError, ShapeError


def loha(c: Context) -> ModuleSteps:
    """Steps of a LoHa module."""
    c.only(*(f"hada_w{i}_{side}.weight" for i in (1, 2) for side in "ab"))
    rank, scale = lora_scale(c.files, c.module, alpha="alpha")
    factors = []
    for i in (1, 2):
        left, right = (c.take(f"hada_w{i}_{side}.weight") for side in "ab")
        c.require(f"hada_w{i}_a", left.shape, (c.shape.out, rank))
        c.require(f"hada_w{i}_b", right.shape, (rank, c.shape.into))
        factors.append(Factor(left, right))
    step = AddProducts(factors[0], factors[1], float(np.float32(scale)))
    return ModuleSteps((step,), zero=not (step.first.any and step.second.any and scale))


def lokr(c: Context) -> ModuleSteps:
    """Steps of a LoKr module."""
    names = [f"lokr_w{i}{side}.weight" for i in (1, 2) for side in ("", "_a", "_b")]
    c.only(*names)
    rank, scale = lora_scale(c.files, c.module, alpha="alpha")
    step = AddProducts(_factor(c, 1, rank), _factor(c, 2, rank), scale, kronecker=True)
    c.require("the product of lokr_w1 and lokr_w2", step.shape, (c.shape.out, c.shape.into))
    return ModuleSteps((step,), zero=not (step.first.any and step.second.any and scale))


def _factor(c: Context, number: int, rank: int) -> Factor:
    name = f"lokr_w{number}"
    if f"{name}.weight" in c.parts:
        if f"{name}_a.weight" in c.parts:
            raise RotationError(f"{name} is there whole and in two parts", where=c.where)
        whole = c.take(f"{name}.weight")
        if whole.ndim != 2:
            raise ShapeError(f"{name} has shape {list(whole.shape)}, not a matrix", where=c.where)
        return Factor(whole)
    left, right = c.take(f"{name}_a.weight"), c.take(f"{name}_b.weight")
    c.require(f"{name}_a", left.shape, (*left.shape[:1], rank))
    c.require(f"{name}_b", right.shape, (rank, *right.shape[1:2]))
    return Factor(left, right)


def hira(c: Context) -> ModuleSteps:
    """Steps of a HiRA module, or of an embedding.

    peft 0.21.2 heeds ``rank_pattern`` only where a layer already has another adapter.
    """
    part = "hira_embedding_A" if "hira_embedding_A.weight" in c.parts else "hira_A"
    rank = declared_rank(c.files, c.module, 32)
    if c.tensor(f"{part}.weight").shape[0] != rank:
        rank = int(c.setting("r", 32))
    if part == "hira_embedding_A":
        c.only("hira_embedding_A.weight", "hira_embedding_B.weight")
        a, b = c.take("hira_embedding_A.weight"), c.take("hira_embedding_B.weight")
        c.require("hira_embedding_A", a.shape, (rank, c.shape.out))
        c.require("hira_embedding_B", b.shape, (c.shape.into, rank))
        factor = Factor(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
    else:
        c.only("hira_A.weight", "hira_B.weight")
        a, b = c.take("hira_A.weight"), c.take("hira_B.weight")
        c.require("hira_A", a.shape, (rank, c.shape.into))
        c.require("hira_B", b.shape, (c.shape.out, rank))
        factor = Factor(b, a)
    return ModuleSteps((AddTimesBase(factor),), zero=not factor.any)

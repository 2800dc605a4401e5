"""RandLoRA and VB-LoRA: factors made of what all modules share.

* **RandLoRA** (``randlora/layer.py``): with n = ⌈min(out, in)/r⌉, shared bases B [larger, n, r] and
  A [r, 1, smaller] and a module's λ [r, n] and γ [n, smaller], the change is s·B·(λ·A·γ), or its
  transpose where the outputs are fewer than the inputs; s = alpha/r. B's columns are counted basis
  after basis, the other's rows rank after rank: as PEFT multiplies them.
* **VB-LoRA** (``vblora/layer.py``): W' = W + B·A, both in pieces of ``vector_length``, each piece a
  mean of the k vectors of the bank with the largest logits, weighed by the softmax of these. Where
  only the weights were saved, PEFT takes float32 logarithms of them, and so do we.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from so8tqc.adapters.files import array
from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.patterns import AddScaledBases
from so8tqc.adapters.steps import AddLowRank
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.rotation_set import FloatArray

_SERIES = 24
"""Terms of eˣ: with |x| ≤ 1/8 the rest is below 2⁻¹⁵⁰."""


def randlora(c: Context) -> ModuleSteps:
    """Steps of a RandLoRA module."""
    c.only("randlora_lambda.weight", "randlora_gamma.weight")
    strengths, weights = c.take("randlora_lambda.weight"), c.tensor("randlora_gamma.weight")
    rank = int(c.setting("r", 32))
    if rank < 1:
        raise RotationError(f"r is {rank}", where=c.where)
    small, large = sorted((c.shape.out, c.shape.into))
    count = -(-small // rank)
    c.require("randlora_lambda", strengths.shape, (rank, count))
    c.require("randlora_gamma", tuple(weights.shape), (count, small))
    shared = c.files.shared
    if {"randlora_A", "randlora_B"} - shared.keys():
        raise RotationError(
            "the bases randlora_A and randlora_B were not saved",
            where=c.where,
            remedy="Load the adapter by PEFT and save it again with save_projection true.",
        )
    a, b = shared["randlora_A"], shared["randlora_B"]
    fits = a.ndim == b.ndim == 3 and tuple(a.shape[:2]) == (rank, 1) and b.shape[2] == rank
    if not fits or a.shape[2] < small or b.shape[0] < large or b.shape[1] < count:
        raise ShapeError(
            f"randlora_A {list(a.shape)} and randlora_B {list(b.shape)} do not fit "
            f"{c.shape.out} × {c.shape.into} and r {rank}",
            where=c.where,
        )
    scaled = strengths * (c.setting("randlora_alpha", 640) / rank)
    step = AddScaledBases(b, a[:, 0], scaled, weights, wide=c.shape.out < c.shape.into)
    return ModuleSteps((step,), zero=not scaled.any() or not bool(weights.any()))


def vblora(c: Context) -> ModuleSteps:
    """Steps of a VB-LoRA module; A and B are rounded once."""
    bank = c.files.shared.get("vblora_vector_bank")
    if bank is None:
        raise RotationError("vblora_vector_bank is missing", where=c.where)
    count, length = int(c.setting("num_vectors", 256)), int(c.setting("vector_length", 256))
    if length < 1 or c.shape.out % length or c.shape.into % length:
        raise RotationError(f"vector_length is {length}", where=c.where)
    c.require("vblora_vector_bank", tuple(bank.shape), (count, length))
    rank, vectors = int(c.setting("r", 4)), array(bank)
    logits = {side: _logits(c, side, count) for side in "AB"}
    c.require("vblora_logits_A", tuple(logits["A"].shape), (rank, c.shape.into // length, count))
    c.require("vblora_logits_B", tuple(logits["B"].shape), (c.shape.out // length, rank, count))
    top = int(c.setting("topk", 2))
    if not 0 < top <= count:
        raise RotationError(f"topk is {top} of {count} vectors", where=c.where)
    a = _means(logits["A"], vectors, top).reshape(rank, -1)
    b = _means(logits["B"], vectors, top).transpose(0, 2, 1).reshape(-1, rank)
    right, left = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return ModuleSteps((AddLowRank(left, right),), zero=not a.any() or not b.any())


def _logits(c: Context, side: str, count: int) -> torch.Tensor:
    """[., ., vectors] as stored, or as PEFT restores them."""
    name = f"vblora_logits_{side}"
    if not c.files.config.get("save_only_topk_weights"):
        c.only("vblora_logits_A.weight", "vblora_logits_B.weight")
        return c.tensor(f"{name}.weight")
    c.only(*(f"vblora_logits_{s}_topk_{w}.weight" for s in "AB" for w in ("indices", "weights")))
    places = c.tensor(f"{name}_topk_indices.weight").long()
    weights = c.tensor(f"{name}_topk_weights.weight")
    c.require(
        f"{name}_topk_weights", tuple(weights.shape), (*places.shape[:2], places.shape[2] - 1)
    )
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < count:
        raise RotationError(f"{name}_topk_indices name vectors that are none", where=c.where)
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    if bool((weights < 0).any()):
        raise RotationError(f"{name}_topk_weights sum to more than one", where=c.where)
    none = torch.full((*places.shape[:2], count), -math.inf, dtype=weights.dtype)
    return none.scatter(-1, places, weights.log())


def _means(logits: torch.Tensor, vectors: FloatArray, top: int) -> FloatArray:
    """Σ_k softmax(l)_k·v_k over the ``top`` largest logits, rounded once: [., ., length]."""
    largest, places = (part.numpy() for part in logits.double().topk(top, dim=-1))
    with np.errstate(invalid="ignore"):
        exponents = _exponential(largest - largest[..., :1])
    total = dd.DoubleDouble(exponents.hi[..., 0], exponents.lo[..., 0])
    for k in range(1, top):
        total = dd.add(total, dd.DoubleDouble(exponents.hi[..., k], exponents.lo[..., k]))
    shape = (*places.shape[:2], vectors.shape[1])
    mean = dd.from_float64(np.zeros(shape))
    for k in range(top):
        weight = dd.divide(dd.DoubleDouble(exponents.hi[..., k], exponents.lo[..., k]), total)
        spread = dd.DoubleDouble(*(np.broadcast_to(w[..., None], shape) for w in weight))
        mean = dd.add(mean, dd.multiply(spread, dd.from_float64(vectors[places[..., k]])))
    return dd.to_float64(mean)


def _exponential(x: FloatArray) -> dd.DoubleDouble:
    """eˣ of x ≤ 0 in double-double: the series of a small part of x, squared again and again."""
    gone = x < -745.0  # below float64's smallest number
    x = np.where(gone, 0.0, x)
    largest = float(np.abs(x).max(initial=0.0))
    halvings = max(0, math.ceil(math.log2(largest * 8))) if largest > 0.125 else 0
    small = dd.from_float64(x * 2.0**-halvings)
    term = total = dd.from_float64(np.ones_like(x))
    for n in range(1, _SERIES):
        divisor = dd.from_float64(np.full_like(x, float(n)))
        term = dd.divide(dd.multiply(term, small), divisor)
        total = dd.add(total, term)
    for _ in range(halvings):
        total = dd.multiply(total, total)
    return dd.DoubleDouble(*(np.where(gone, 0.0, part) for part in total))

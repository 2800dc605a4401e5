"""LoRA, DoRA and AdaLoRA, also of embeddings and of experts.

* **LoRA** (``lora/layer.py``): y + s·B·(A·x), so W' = W + s·B·A, s = alpha/r or, with rsLoRA,
  alpha/√r; r and alpha by ``rank_pattern`` and ``alpha_pattern``, whose first regular expression
  that matches the end of the module's name counts. An embedding adds s·(B·A)ᵀ to its rows.
  ``lora_bias`` adds s times B's bias to b.
* **DoRA** (``lora/dora.py``): W' = m/‖W + s·B·A‖ · (W + s·B·A), the norm of each row; the bias is
  left out of the scaling. Of an embedding the norm is over the vocabulary, for each feature.
* **AdaLoRA** (``adalora/layer.py``): W' = W + s·B·diag(E)·A, s = alpha/(r + 1e-5), where r is
  ``init_r``, whatever ranks are left after pruning; alpha 0 stands for r.
"""

from __future__ import annotations

import math
import re

import numpy as np

from so8tqc.adapters.files import AdapterFiles, array, number
from so8tqc.adapters.methods.context import Context, ModuleSteps, Parts
from so8tqc.adapters.steps import AddLowRank, NormalisedAdd, Step
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.files.peft_config import CONFIG_NAME

_ADALORA_EPS = 1e-5
"""What PEFT adds to the rank, lest it be zero."""


def lora(c: Context) -> ModuleSteps:
    if c.embedding:
        return _lora_embedding(c)
    c.only("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector.weight")
    a, b = c.tensor("lora_A.weight"), c.tensor("lora_B.weight")
    rank, scale = lora_scale(c.files, c.module)
    c.require("lora_A", tuple(a.shape), (rank, c.shape.into))
    c.require("lora_B", tuple(b.shape), (c.shape.out, rank))
    branch = AddLowRank(b, a, scale)
    step: Step = branch
    if c.files.config.get("use_dora"):
        step = _dora(c, branch, c.shape.out)
    elif "lora_magnitude_vector.weight" in c.parts:
        raise RotationError("has magnitudes, but use_dora is not set", where=c.where)
    bias = c.parts.get("lora_B.bias")
    added = None if bias is None else array(bias) * scale
    zero = not bool(b.any()) or not bool(a.any()) or scale == 0
    return ModuleSteps((step,), bias=added, zero=zero and added is None)


def adalora(c: Context) -> ModuleSteps:
    """Steps of an AdaLoRA module; none, where all of its ranks were pruned."""
    c.only("lora_A.weight", "lora_B.weight", "lora_E.weight")
    a, b, e = (c.take(f"lora_{part}.weight") for part in "ABE")
    rank, first = a.shape[0], c.setting("init_r", 12)
    c.require("lora_A", a.shape, (rank, c.shape.into))
    c.require("lora_B", b.shape, (c.shape.out, rank))
    c.require("lora_E", e.shape, (rank, 1))
    if not 0 <= rank <= first:
        raise RotationError(f"the rank is {rank}, but init_r {first:g}", where=c.where)
    alpha = c.setting("lora_alpha", 8)
    scale = (alpha if alpha > 0 else first) / (first + _ADALORA_EPS)
    right = e * a  # products of two float32 numbers are float64 numbers, exactly
    if not b.any() or not right.any():
        return ModuleSteps((), zero=True)
    return ModuleSteps((AddLowRank(b, right, scale),))


def _lora_embedding(c: Context) -> ModuleSteps:
    c.only("lora_embedding_A.weight", "lora_embedding_B.weight", "lora_magnitude_vector.weight")
    a, b = c.take("lora_embedding_A.weight"), c.take("lora_embedding_B.weight")
    rank, scale = lora_scale(c.files, c.module)
    c.require("lora_embedding_A", a.shape, (rank, c.shape.out))
    c.require("lora_embedding_B", b.shape, (c.shape.into, rank))
    zero = not a.any() or not b.any() or scale == 0
    if c.files.config.get("use_dora"):
        step = _dora(c, AddLowRank(b, a, scale), c.shape.into)
        return ModuleSteps((step,), zero=zero, columnwise=True)
    left, right = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    return ModuleSteps((AddLowRank(left, right, scale),), zero=zero)


def _dora(c: Context, branch: AddLowRank, rows: int) -> NormalisedAdd:
    magnitude = c.take("lora_magnitude_vector.weight").reshape(-1)
    c.require("lora_magnitude_vector", magnitude.shape, (rows,))
    return NormalisedAdd(branch, magnitude)


def lora_scale(files: AdapterFiles, module: str, *, alpha: str = "lora_alpha") -> tuple[int, float]:
    """(r, s) that the configuration declares for a module.

    Args:
        files: the adapter.
        module: its name.
        alpha: what the configuration calls alpha.

    Raises:
        RotationError: no whole positive rank, or a pattern that is none.
    """
    config, where = files.config, str(files.directory / CONFIG_NAME)
    rank = declared_rank(files, module)
    strength = _pattern(config.get("alpha_pattern"), module, f"{where}, alpha_pattern")
    if strength is None and alpha in config and config[alpha] is None:
        raise RotationError(f"{alpha} is null, expected a number", where=where)
    strength = number(config, alpha, 8, where) if strength is None else strength
    return rank, strength / (math.sqrt(rank) if config.get("use_rslora") else rank)


def declared_rank(files: AdapterFiles, module: str, default: int = 8) -> int:
    """r that the configuration declares for a module.

    Args:
        files: the adapter.
        module: its name.
        default: what PEFT takes where the configuration says nothing.

    Raises:
        RotationError: no whole positive number, or a pattern that is none.
    """
    config, where = files.config, str(files.directory / CONFIG_NAME)
    rank = _pattern(config.get("rank_pattern"), module, f"{where}, rank_pattern")
    rank = number(config, "r", default, where) if rank is None else rank
    if rank < 1 or rank != int(rank):
        raise RotationError(f"the rank of {module} is {rank:g}", where=where)
    return int(rank)


def _pattern(patterns: object, module: str, where: str) -> float | None:
    """Value of the first pattern that matches the end of a module's name, as PEFT matches it."""
    if not patterns:
        return None
    if not isinstance(patterns, dict):
        raise RotationError("expected a mapping of patterns", where=where)
    for pattern in patterns:
        try:
            match = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise RotationError(f"{pattern!r} is no pattern: {error}", where=where) from None
        if match:
            return number(patterns, pattern, 0.0, where)
    return None


def ambiguous_alphas(files: AdapterFiles) -> str | None:
    """What to say of modules that several ``alpha_pattern``s match, which disagree; else None.

    The first match wins, and ``save_pretrained`` sorts the patterns (peft 0.21.2): which came first
    while the adapter was trained, its file does not tell. (Ranks are told by the shapes.)
    """
    patterns = files.config.get("alpha_pattern")
    if not isinstance(patterns, dict):
        return None
    where = f"{files.directory / CONFIG_NAME}, alpha_pattern"
    for module in sorted(files.parts):
        one_by_one = {p: _pattern({p: v}, module, where) for p, v in patterns.items()}
        found = {p: v for p, v in one_by_one.items() if v is not None}
        if len(set(found.values())) > 1:
            taken, *others = (f"{p} ({v:g})" for p, v in found.items())
            return (
                f"{files.directory}: alpha_pattern {taken} is taken for {module}, as PEFT takes it "
                f"when it loads this adapter, but {', '.join(others)} matches, too. PEFT sorts the "
                "patterns when it saves, so that the training may have used another: compare "
                "with the training's own configuration."
            )
    return None


def expert_steps(
    files: AdapterFiles, module: str, parts: Parts, experts: int, rows: slice | None = None
) -> list[AddLowRank]:
    """LoRA of a 3D parameter, expert by expert: (s·B_e·A_e)[rows].

    ``lora_A`` is [E·r, in], expert after expert; ``lora_B`` [out, r·E], in which the expert is the
    *last* index (``ParamWrapper.get_delta_factors``).

    Raises:
        ShapeError: the rank disagrees.
    """
    where = f"{files.directory}, {module}"
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    rank, scale = lora_scale(files, module)
    if a.shape[0] != experts * rank or b.shape[1] != experts * rank:
        raise ShapeError(
            f"lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}: expected {experts} "
            f"experts of rank {rank}",
            where=where,
        )
    by_expert = b.reshape(b.shape[0], rank, experts)
    chosen = slice(None) if rows is None else rows
    return [
        AddLowRank(
            by_expert[chosen, :, e],
            a[e * rank : (e + 1) * rank],
            scale,
        )
        for e in range(experts)
    ]

"""Each method's parts as steps, with its formula as peft 0.21.2 computes it.

W [out, in] is the weight of the module, y = W·x + b; x_row is x as PEFT multiplies it, from the
left. A PEFT layer that computes ``x_row @ M`` before the base layer makes W·Mᵀ.

* **LoRA** (``lora/layer.py``): y + s·B·(A·x), so W' = W + s·B·A, s = alpha/r or, with rsLoRA,
  alpha/√r; r and alpha by ``rank_pattern`` and ``alpha_pattern``, whose first regular expression
  that matches the end of the module's name counts. An embedding adds s·(B·A)ᵀ to its rows.
  ``lora_bias`` adds s times B's bias to b.
* **DoRA** (``lora/dora.py``): W' = m/‖W + s·B·A‖ · (W + s·B·A), the norm of each row; the bias is
  left out of the scaling. Of an embedding the norm is over the vocabulary, for each feature.
* **OFT** (``oft/layer.py``): x_row·R by blocks, W' = W·Rᵀ; see ``rotations.files.peft_oft``.
* **BOFT** (``boft/layer.py``): S = (X − Xᵀ)/2, Q = (I − S)(I + S)⁻¹, which is the Cayley transform
  (I − A/2)⁻¹(I + A/2) of A = −2S, hence of θ = −X in A = θ − θᵀ. With P the matrix of butterfly i,
  F_i = P·diag(Q)·Pᵀ and x_row·(F_m … F_1): W' = diag(s)·W·F_1ᵀ … F_mᵀ. W·P takes the columns of W
  in the inverse order of P's, so each factor is a block product on reordered columns.
* **HRA** (``hra/layer.py``): W' = W·H, H = H_1 … H_r with H_i = I − 2·u_i·u_iᵀ/‖u_i‖². A product of
  reflections is I − U·T·Uᵀ (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989): adding
  H_i appends the column −τ·T·(Uᵀu_i) and the diagonal element τ = 2/‖u_i‖² to T. With
  ``apply_GS`` the u are orthonormalised first, which keeps their span: H = I − 2·U·(UᵀU)⁻¹·Uᵀ.
* **PSOFT** (``psoft/layer.py``): W' = W + s·B·(R − I)·A, where B and A are the leading singular
  vectors of the *base* weight, as torch's float32 SVD gives them when the adapter is loaded; they
  are stored nowhere. R = diag(b)·(I + Q)(I − Q)⁻¹·diag(a), the Cayley transform of A = 2Q, or the
  truncated series, or a free matrix.
* **RoAd** (``road/layer.py``): the output is taken in groups, each half the partner of the other:
  y_i' = p_i·y_i − q_i·y_j in a group's first half, p_i·y_i + q_i·y_j in its second, with p =
  α·cos θ and q = α·sin θ. It multiplies W and b alike.
* **VeRA** (``vera/layer.py``): y + λ_b·(B·(λ_d·(A·x))): W' = W + (λ_b·B)·(λ_d·A), A and B the
  leading parts of one pair for all modules, stored or drawn from ``projection_prng_key``.

Of several adapters of one method PEFT's forward adds the deltas of LoRA, VeRA and PSOFT; applies
DoRA's scalings one after the other, each norm that of the stored weight; computes x_row·R_1·R_2 for
OFT, hence W·R_2ᵀ·R_1ᵀ (``merge_and_unload`` gives the other order); W·H_1·H_2 for HRA; and
W·F_1ᵀ·F_2ᵀ for BOFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from so8tqc.adapters.files import AdapterFiles, array, number
from so8tqc.adapters.steps import (
    AddLowRank,
    BlockColumns,
    MixRowPairs,
    NormalisedAdd,
    ScaleRows,
    Step,
    SubtractProjection,
)
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.files.peft_config import CONFIG_NAME
from so8tqc.rotations.files.peft_oft import neumann_series, oft_blocks
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import FloatArray

_NEUMANN_TERMS = 5
_MOST_TERMS = 1000


@dataclass(frozen=True)
class Shape:
    """[out, in] of a module's logical weight."""

    out: int
    into: int


@dataclass(frozen=True)
class ModuleSteps:
    """What an adapter does to one module.

    Attributes:
        steps: of its weight.
        bias: added to its bias, [out]; None: nothing.
        mix: a step of its bias, too (RoAd); None: none.
        zero: the effect is nil, whatever the input: untrained.
        columnwise: the steps are of the transposed weight (DoRA of an embedding).
    """

    steps: tuple[Step, ...]
    bias: FloatArray | None = None
    mix: MixRowPairs | None = None
    zero: bool = False
    columnwise: bool = False


Parts = Mapping[str, torch.Tensor]
Weight = Callable[[], torch.Tensor]
"""Loads the logical weight [out, in]; only PSOFT asks for it."""


def module_steps(
    files: AdapterFiles, module: str, parts: Parts, shape: Shape, weight: Weight, *, embedding: bool
) -> ModuleSteps:
    """The steps of one module.

    Args:
        files: the adapter.
        module: its name, as the adapter has it.
        parts: its tensors.
        shape: of the weight they belong to.
        weight: loads that weight.
        embedding: it is an embedding's, [vocabulary, features].

    Raises:
        RotationError: parts are missing, superfluous or singular.
        ShapeError: their shapes disagree with each other, the declared rank, or the weight.
    """
    try:
        method = _METHODS[files.kind]
    except KeyError:
        raise RotationError(f"{files.kind} has no fold", where=str(files.directory)) from None
    return method(_Context(files, module, parts, shape, weight, embedding))


@dataclass(frozen=True)
class _Context:
    files: AdapterFiles
    module: str
    parts: Parts
    shape: Shape
    weight: Weight
    embedding: bool

    @property
    def where(self) -> str:
        return f"{self.files.directory}, {self.module}"

    def take(self, name: str) -> FloatArray:
        return array(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.parts:
            raise RotationError(
                f"{name} is missing (there is {', '.join(sorted(self.parts))})", where=self.where
            )
        return self.parts[name]

    def only(self, *names: str) -> None:
        if extra := sorted(self.parts.keys() - set(names)):
            raise RotationError(
                f"{', '.join(extra)}: no part of {self.files.kind} here", where=self.where
            )

    def setting(self, key: str, default: float) -> float:
        return number(self.files.config, key, default, str(self.files.directory / CONFIG_NAME))

    def require(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise ShapeError(
                f"{name} has shape {list(found)}, expected {list(expected)} for a weight of "
                f"{self.shape.out} × {self.shape.into} (out × in)",
                where=self.where,
                remedy="The adapter belongs to another base model, or its configuration does not "
                "belong to its tensors.",
            )


def lora_scale(files: AdapterFiles, module: str) -> tuple[int, float]:
    """(r, s) that the configuration declares for a module."""
    config, where = files.config, str(files.directory / CONFIG_NAME)
    rank = number(config, "r", 8, where)
    alpha = number(config, "lora_alpha", 8, where)
    for key, patterns in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        found = _pattern(config.get(key), module, f"{where}, {key}")
        if found is not None and patterns == "r":
            rank = found
        elif found is not None:
            alpha = found
    if rank < 1 or rank != int(rank):
        raise RotationError(f"the rank of {module} is {rank:g}", where=where)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return int(rank), scale


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


def _lora(c: _Context) -> ModuleSteps:
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


def _lora_embedding(c: _Context) -> ModuleSteps:
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


def _dora(c: _Context, branch: AddLowRank, rows: int) -> NormalisedAdd:
    magnitude = c.take("lora_magnitude_vector.weight").reshape(-1)
    c.require("lora_magnitude_vector", magnitude.shape, (rows,))
    return NormalisedAdd(branch, magnitude)


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


def _oft(c: _Context) -> ModuleSteps:
    c.only("oft_R.weight")
    blocks = oft_blocks(c.files.config, c.take("oft_R.weight"), c.files.directory, c.where)
    count, size, _ = blocks.shape
    if c.files.config.get("block_share") and count == 1 and c.shape.into % size == 0:
        blocks = np.repeat(blocks, c.shape.into // size, axis=0)
    c.require("oft_R's blocks", (blocks.shape[0] * size,), (c.shape.into,))
    columns = np.ascontiguousarray(blocks.transpose(0, 2, 1))
    return ModuleSteps((BlockColumns(columns),), zero=bool((blocks == np.eye(size)).all()))


def _boft(c: _Context) -> ModuleSteps:
    c.only("boft_R.weight", "boft_s.weight")
    x, s = c.take("boft_R.weight"), c.take("boft_s.weight").reshape(-1)
    if x.ndim != 4 or x.shape[2] != x.shape[3] or 0 in x.shape:
        raise ShapeError(f"boft_R has shape {list(x.shape)}, expected [m, N, b, b]", where=c.where)
    factors, count, size, _ = x.shape
    c.require("boft_R's blocks", (count * size,), (c.shape.into,))
    c.require("boft_s", s.shape, (c.shape.out,))
    steps: list[Step] = []
    for i in range(factors):
        q = rotation_blocks(-x[i], Parametrization.CAYLEY)
        order = None if factors == 1 else butterfly(c.shape.into, count >> i, size // 2)
        # (W·P)_c = W_a where P[a, c] = 1, that is where order[a] = c
        taken = None if order is None else np.argsort(order)
        steps.append(BlockColumns(np.ascontiguousarray(q.transpose(0, 2, 1)), taken))
    steps.append(ScaleRows(s))
    return ModuleSteps(tuple(steps), zero=not x.any() and bool((s == 1).all()))


def butterfly(features: int, blocks: int, half: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """The order of a butterfly factor: in each of ``blocks`` equal parts, pieces of ``half``
    features, the even ones first, then the odd ones (``BOFTLayer.block_butterfly_perm``)."""
    part = features // blocks
    pieces = np.arange(part).reshape(-1, half)
    one = np.concatenate([pieces[0::2], pieces[1::2]]).reshape(-1)
    order: np.ndarray[tuple[int], np.dtype[np.intp]] = (
        np.arange(0, features, part)[:, None] + one[None]
    ).reshape(-1)
    return order


def _hra(c: _Context) -> ModuleSteps:
    c.only("hra_u.weight")
    u = c.take("hra_u.weight")
    rank = int(c.setting("r", 8))
    c.require("hra_u", u.shape, (c.shape.into, rank))
    if not (norms := np.linalg.norm(u, axis=0)).all():
        raise RotationError(
            f"u_{int(np.argmin(norms))} is zero: it names no reflection (PEFT gives NaN)",
            where=c.where,
        )
    orthonormal = bool(c.files.config.get("apply_GS"))
    step = span_reflection(u) if orthonormal else reflections(u)
    if step is None:
        raise RotationError(
            "the u are linearly dependent: orthonormalising them divides by zero", where=c.where
        )
    return ModuleSteps((step,), zero=not orthonormal and _cancels(u))


def reflections(u: FloatArray) -> SubtractProjection:
    """H_1 … H_r of the columns of u [in, r], none of them zero."""
    return SubtractProjection(dd.to_float64(_times(u, _reflections_middle(u))), u)


def span_reflection(u: FloatArray) -> SubtractProjection | None:
    """I − 2·U·(UᵀU)⁻¹·Uᵀ, of orthonormalised columns; None if they are linearly dependent."""
    if np.linalg.matrix_rank(u) < u.shape[1]:
        return None
    middle = dd.scale(dd.invert(_gram(u)), 2.0)
    return SubtractProjection(dd.to_float64(_times(u, middle)), u)


def _cancels(u: FloatArray) -> bool:
    """Whether reflections come in equal neighbouring pairs, as PEFT initialises them."""
    return u.shape[1] % 2 == 0 and bool((u[:, 0::2] == u[:, 1::2]).all())


def _gram(u: FloatArray) -> dd.DoubleDouble:
    """UᵀU in double-double, [r, r, 1]: pairs of rows are added until one is left."""
    left = dd.from_float64(np.ascontiguousarray(u.T)[:, None, :])
    right = dd.from_float64(np.ascontiguousarray(u.T)[None, :, :])
    terms = dd.multiply(left, right)  # [r, r, D]
    while (count := terms.hi.shape[2]) > 1:
        half = count // 2
        a = dd.DoubleDouble(terms.hi[:, :, :half], terms.lo[:, :, :half])
        b = dd.DoubleDouble(terms.hi[:, :, half : 2 * half], terms.lo[:, :, half : 2 * half])
        summed = dd.add(a, b)
        if count % 2:
            summed = dd.DoubleDouble(
                np.concatenate([summed.hi, terms.hi[:, :, -1:]], axis=2),
                np.concatenate([summed.lo, terms.lo[:, :, -1:]], axis=2),
            )
        terms = summed
    return terms


def _reflections_middle(u: FloatArray) -> dd.DoubleDouble:
    """T of I − U·T·Uᵀ = H_1 … H_r, upper triangular, [r, r, 1]."""
    gram = _gram(u)
    rank = u.shape[1]
    t = dd.from_float64(np.zeros((rank, rank, 1)))
    for i in range(rank):
        norm = dd.DoubleDouble(gram.hi[i, i], gram.lo[i, i])
        tau = dd.divide(dd.from_float64(np.array([2.0])), norm)
        t.hi[i, i], t.lo[i, i] = tau.hi, tau.lo
        if i:
            head = dd.DoubleDouble(t.hi[:i, :i], t.lo[:i, :i])
            against = dd.DoubleDouble(gram.hi[:i, i : i + 1], gram.lo[:i, i : i + 1])
            column = dd.negate(dd.multiply(dd.matmul(head, against), tau))
            t.hi[:i, i : i + 1], t.lo[:i, i : i + 1] = column.hi, column.lo
    return t


def _times(u: FloatArray, middle: dd.DoubleDouble) -> dd.DoubleDouble:
    """U·M in double-double: [D, r] and [r, r, 1] → [D, r]."""
    rows = dd.from_float64(np.ascontiguousarray(u.T)[None])  # [1, r, D]
    shape = (*middle.hi.shape[:2], u.shape[0])
    spread = dd.DoubleDouble(np.broadcast_to(middle.hi, shape), np.broadcast_to(middle.lo, shape))
    product = dd.matmul(rows, spread)  # [1, r, D]
    return dd.DoubleDouble(*(np.ascontiguousarray(part[0].T) for part in product))


def _psoft(c: _Context) -> ModuleSteps:
    names = {"psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"}
    c.only(*names)
    rank = int(c.setting("r", 32))
    if not 0 < rank <= min(c.shape.out, c.shape.into):
        raise RotationError(f"r is {rank}", where=c.where)
    scale = c.setting("psoft_alpha", 32) / rank
    r = _psoft_matrix(c, rank)
    left, right = singular_factors(c.weight(), rank, scale, c.files)
    change = _times_matrix(r, right)
    return ModuleSteps((AddLowRank(left, change, scale),), zero=not change.any())


def _psoft_matrix(c: _Context, rank: int) -> dd.DoubleDouble:
    """R − I, [r, r] in double-double."""
    config, weight = c.files.config, c.take("psoft_R.weight")
    if config.get("psoft_orth", True):
        c.require("psoft_R", weight.shape, (rank * (rank - 1) // 2,))
        q = np.zeros((1, rank, rank))
        q[:, *np.triu_indices(rank, 1)] = weight
        if config.get("use_cayley_neumann"):
            r = _psoft_series(c, q - q.transpose(0, 2, 1))
        else:
            r = rotation_blocks(2.0 * q, Parametrization.CAYLEY)[0]
    else:
        c.require("psoft_R", weight.shape, (rank, rank))
        r = weight
    scaled = dd.from_float64(r)
    for name, axis in (("psoft_R.vector_b", 0), ("psoft_R.vector_a", 1)):
        if name in c.parts:
            vector = c.take(name)
            c.require(name, vector.shape, (rank,))
            spread = np.ascontiguousarray(
                np.broadcast_to(np.expand_dims(vector, 1 - axis), (rank, rank))
            )
            scaled = dd.multiply(scaled, dd.from_float64(spread))
    return dd.add(scaled, dd.from_float64(-np.eye(rank)))


def _psoft_series(c: _Context, skew: FloatArray) -> FloatArray:
    """The truncated series, of Q shortened to ``cayley_neumann_eps`` where that is set."""
    eps = c.setting("cayley_neumann_eps", 0)
    norm = float(np.linalg.norm(skew))
    if eps and norm > eps:
        skew = skew * (eps / (norm + 1e-12))
    terms = c.setting("num_cayley_neumann_terms", _NEUMANN_TERMS)
    if not 0 <= terms <= _MOST_TERMS or terms != int(terms):
        raise RotationError(f"num_cayley_neumann_terms is {terms:g}", where=c.where)
    blocks: FloatArray = neumann_series(skew, int(terms), last_term_halved=True)[0]
    return blocks


def _times_matrix(r: dd.DoubleDouble, a: FloatArray) -> FloatArray:
    """(R − I)·A, rounded once: [r, r] and [r, in]."""
    spread = (r.hi.shape[0], r.hi.shape[1], a.shape[1])
    left = dd.DoubleDouble(*(np.broadcast_to(part[:, :, None], spread) for part in r))
    product: FloatArray = dd.to_float64(dd.matmul(left, dd.from_float64(a[:, None, :])))[:, 0]
    return product


def singular_factors(
    weight: torch.Tensor, rank: int, scale: float, files: AdapterFiles
) -> tuple[FloatArray, FloatArray]:
    """B [out, r] and A [r, in] as PEFT makes them of the base weight when it loads the adapter.

    float32, by torch's SVD with PEFT's own settings, since nothing else has its signs.
    """
    config, where = files.config, str(files.directory / CONFIG_NAME)
    w = weight.to(torch.float32)
    if config.get("psoft_svd", "full") == "full":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(number(config, "random_seed", 0, where)))
            rounds = int(number(config, "psoft_svd_lowrank_niter", 10, where))
            u, s, v = torch.svd_lowrank(w, q=rank, niter=rounds)
        u, s, vh = u[:, :rank], s[:rank], v[:, :rank].t()
    s = s / scale
    if config.get("ab_svd_init", "psoft_init") == "pissa_init":
        root = torch.sqrt(s)
        return array(u @ torch.diag(root)), array(torch.diag(root) @ vh)
    return array(u @ torch.diag(s)), array(vh)


def _road(c: _Context) -> ModuleSteps:
    c.only("road_theta.weight", "road_alpha.weight")
    theta, alpha = c.take("road_theta.weight"), c.take("road_alpha.weight")
    group, variant = int(c.setting("group_size", 64)), str(c.files.config.get("variant", "road_1"))
    sizes = {"road_1": c.shape.out // 2, "road_2": c.shape.out, "road_4": 2 * c.shape.out}
    if variant not in sizes or group < 2 or group % 2 or c.shape.out % group:
        raise RotationError(
            f"variant {variant!r} with groups of {group} on {c.shape.out} features", where=c.where
        )
    c.require("road_theta", theta.shape, (sizes[variant],))
    c.require("road_alpha", alpha.shape, (sizes[variant],))
    cosine, sine = cos_sin(theta)
    if variant == "road_1":  # one pair of numbers for both halves of a group
        p, q = (
            _rounded_product(alpha, t).reshape(-1, 1, group // 2).repeat(2, axis=1).reshape(-1)
            for t in (cosine, sine)
        )
    elif variant == "road_2":
        p, q = _rounded_product(alpha, cosine), _rounded_product(alpha, sine)
    else:
        p = _rounded_product(alpha, cosine).reshape(-1, 2, group)[:, 0].reshape(-1)
        q = _rounded_product(alpha, sine).reshape(-1, 2, group)[:, 1].reshape(-1)
    signs = np.tile(np.repeat([-1.0, 1.0], group // 2), c.shape.out // group)
    step = MixRowPairs(p, q * signs, group)
    return ModuleSteps((step,), mix=step, zero=bool((p == 1).all() and not q.any()))


def cos_sin(angles: FloatArray) -> tuple[dd.DoubleDouble, dd.DoubleDouble]:
    """cos and sin in double-double: Taylor series of a small part of the angle, then doubled.

    With x = angle/2^k ≤ 1/8 and 18 terms of each series the rest is below 2⁻¹²⁰; c' = 1 − 2s²,
    s' = 2·s·c, k times. Only IEEE operations: the same on every machine.
    """
    largest = float(np.abs(angles).max(initial=0.0))
    k = max(0, math.ceil(math.log2(largest * 8))) if largest > 0.125 else 0
    x = dd.from_float64(angles * 2.0**-k)
    square = dd.multiply(x, x)
    one = dd.from_float64(np.ones_like(angles))
    sine, cosine = x, one
    term_s, term_c = x, one
    for n in range(1, 19):
        term_c = dd.negate(_over(dd.multiply(term_c, square), (2 * n - 1) * (2 * n)))
        term_s = dd.negate(_over(dd.multiply(term_s, square), (2 * n) * (2 * n + 1)))
        cosine, sine = dd.add(cosine, term_c), dd.add(sine, term_s)
    for _ in range(k):
        product = dd.scale(dd.multiply(sine, cosine), 2.0)
        cosine = dd.add(one, dd.negate(dd.scale(dd.multiply(sine, sine), 2.0)))
        sine = product
    return cosine, sine


def _over(a: dd.DoubleDouble, number: int) -> dd.DoubleDouble:
    return dd.divide(a, dd.from_float64(np.full_like(a.hi, float(number))))


def _rounded_product(alpha: FloatArray, values: dd.DoubleDouble) -> FloatArray:
    return dd.to_float64(dd.multiply(dd.from_float64(alpha), values))


def _vera(c: _Context) -> ModuleSteps:
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


_METHODS: dict[str, Callable[[_Context], ModuleSteps]] = {
    "LORA": _lora,
    "OFT": _oft,
    "BOFT": _boft,
    "HRA": _hra,
    "PSOFT": _psoft,
    "ROAD": _road,
    "VERA": _vera,
}

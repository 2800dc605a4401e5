"""PSOFT (``psoft/layer.py``): W' = W + s·B·(R − I)·A.

B and A are the leading singular vectors of the *base* weight, as torch's float32 SVD gives them
when the adapter is loaded; they are stored nowhere. R = diag(b)·(I + Q)(I − Q)⁻¹·diag(a), the
Cayley transform of A = 2Q, or the truncated series, or a free matrix.
"""

from __future__ import annotations

import numpy as np
import torch

from so8tqc.adapters.files import AdapterFiles, array, number
from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.steps import AddLowRank
from so8tqc.errors import RotationError
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.files.peft_config import CONFIG_NAME
from so8tqc.rotations.files.peft_oft import neumann_series
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import FloatArray

_NEUMANN_TERMS = 5
_MOST_TERMS = 1000


def psoft(c: Context) -> ModuleSteps:
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


def _psoft_matrix(c: Context, rank: int) -> dd.DoubleDouble:
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


def _psoft_series(c: Context, skew: FloatArray) -> FloatArray:
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

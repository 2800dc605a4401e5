"""Next-token distributions of a block of positions, and divergences between two of them.

With logits z (reference) and w (candidate), p and q their softmax, L_z and L_w their
log-normalisers, d = w − z and m = Σ p d:

* KL(p‖q) = (L_w − L_z) − m,  KL(q‖p) = Σ q d − (L_w − L_z);
* the Jensen-Shannon divergence JS = ½ KL(p‖(p+q)/2) + ½ KL(q‖(p+q)/2)
  = H((p + q)/2) − ½ (H(p) + H(q)) = ln 2 − ½ Σ (p + q) ln(p + q) − ½ (H(p) + H(q)).

These are differences of numbers of about 1 to 100, good to about 1e-14. Where the models are
closer than ``CLOSE``, the centred difference e = d − m is used, for which Σ p e = 0:

* KL(p‖q) = ln Σ p e^e = ln(1 + Σ p (e^e − 1 − e)), a sum of non-negative terms: nothing
  cancels, and KL of 1e-13 is as accurate as of 1;
* ln(q/p) = x = e − KL, and q = p e^e e^(−KL), hence
  KL(q‖p) = Σ q x = e^(−KL) Σ p (e^e − 1) e − KL;
* with h = ln((1 + e^x)/2) = ln(((p + q)/2)/p), JS = ½ (KL(q‖p) − Σ p h − Σ q h).

Where they are closer than ``NEAR``, a series takes the place of e^e − 1 − e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORKING_SET_BYTES = 1 << 20
"""Rows are taken so few at a time that a float64 block of them stays near the CPU's caches."""

LEADERS = 5
"""How many of the most likely tokens are compared (top-5 overlap)."""

CLOSE = 1e-6
"""nats; below, the plain differences have fewer than eight digits."""

NEAR = 1e-10
"""nats; below, e^e − 1 − e loses digits: its rounding is about 2⁻⁵²|e|, its value e²/2."""

_SERIES = 2.0**-10
"""|e| up to which the series' first omitted terms are below 1e-12 of the whole."""

_LARGEST = 700.0
"""e^700 is just representable in float64."""

_SMALLEST = 1e-300
"""Stands for a probability of zero, of which no logarithm can be taken."""

_BLOCK = 64
"""Vocabulary entries of which only the largest is looked at, unless it may lead."""


class Workspace:
    """Float64 blocks that are used again and again.

    A fresh block of a megabyte comes from the operating system page by page, which
    costs several times the arithmetic done on it. What ``take`` returns is valid
    until the same name is taken again.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> torch.Tensor:
        """An uninitialised float64 block of a shape [t, V]."""
        import torch

        block = self._blocks.get(name)
        if block is None or block.shape[0] < shape[0] or block.shape[1] != shape[1]:
            block = self._blocks[name] = torch.empty(shape, dtype=torch.float64)
        return block[: shape[0]]


@dataclass(frozen=True)
class Distribution:
    """One model's side of a block of rows, computed once and compared many times.

    Attributes:
        logits: [t, V] float64.
        probabilities: [t, V] float64.
        log_normaliser: [t], L = ln Σ e^z.
        leaders: [t, min(5, V)] the most likely tokens, in no order.
        top: [t] index of the largest logit; of equal ones the lowest.
        nll, entropy, max_prob, max_logit, brier: [t]; brier = Σ_v (p_v − 1[v is the target])².
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    log_normaliser: torch.Tensor
    leaders: torch.Tensor
    top: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    max_prob: torch.Tensor
    max_logit: torch.Tensor
    brier: torch.Tensor


def distribution(
    logits: torch.Tensor, targets: torch.Tensor, workspace: Workspace | None = None
) -> Distribution:
    """Softmax and what follows from it.

    Args:
        logits: [t, V] float32 or float64.
        targets: [t] the token that really follows.
        workspace: where the two [t, V] arrays of the result live; None for their own.
    """
    import torch

    workspace = workspace or Workspace()
    z = workspace.take("logits", logits.shape).copy_(logits)
    leaders, values = leading(z)
    largest = values.amax(dim=1)
    top = torch.where(values == largest[:, None], leaders, z.shape[1]).amin(dim=1)
    probabilities = torch.sub(z, largest[:, None], out=workspace.take("probabilities", z.shape))
    total = probabilities.exp_().sum(dim=1)
    probabilities.mul_(total.reciprocal()[:, None])
    log_normaliser = largest + total.log()
    entropy = log_normaliser - _dot(probabilities, z)
    p_target = probabilities.gather(1, targets[:, None])[:, 0]
    # Σ(p − y)² = Σp² − 2·p_target + 1 for a one-hot y
    brier = _dot(probabilities, probabilities) - 2 * p_target + 1
    return Distribution(
        logits=z,
        probabilities=probabilities,
        log_normaliser=log_normaliser,
        leaders=leaders,
        top=top,
        nll=log_normaliser - z.gather(1, targets[:, None])[:, 0],
        entropy=entropy,
        max_prob=total.reciprocal(),
        max_logit=largest,
        brier=brier,
    )


def leading(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of each row's largest logits, both [t, min(5, V)].

    The five largest lie in the five blocks with the largest maxima, so that one pass
    for the blocks' maxima is all that is done to the whole row.
    """
    import torch

    height, width = logits.shape
    count = min(LEADERS, width)
    blocks = width // _BLOCK
    if blocks < 4 * LEADERS:
        values, indices = logits.topk(count, dim=1)
        return indices, values
    whole = logits[:, : blocks * _BLOCK].view(height, blocks, _BLOCK)
    best = whole.amax(dim=2).topk(LEADERS, dim=1).indices
    indices = (best[:, :, None] * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    rest = torch.arange(blocks * _BLOCK, width).expand(height, -1)
    indices = torch.cat([indices, rest], dim=1)
    values, at = logits.gather(1, indices).topk(LEADERS, dim=1)
    return indices.gather(1, at), values


@dataclass(frozen=True)
class Divergences:
    """How far a candidate is from a reference, each [t].

    Attributes:
        kl: KL(reference‖candidate), nats.
        kl_reverse: KL(candidate‖reference), nats.
        js: Jensen-Shannon divergence, nats, at most ln 2 (Lin, Divergence measures based
            on the Shannon entropy, IEEE Trans. Inf. Theory 37:1, 1991).
        max_abs_logit, sum_abs_logit, sum_square_logit: of the V logit differences.
    """

    kl: torch.Tensor
    kl_reverse: torch.Tensor
    js: torch.Tensor
    max_abs_logit: torch.Tensor
    sum_abs_logit: torch.Tensor
    sum_square_logit: torch.Tensor


def divergences(
    reference: Distribution, candidate: Distribution, workspace: Workspace | None = None
) -> Divergences:
    """Divergences of each row (see the module's docstring for the formulas).

    Args:
        reference: of t rows.
        candidate: of the same rows.
        workspace: scratch memory; None for its own.
    """
    import torch

    workspace = workspace or Workspace()
    shape = reference.logits.shape
    d = torch.sub(candidate.logits, reference.logits, out=workspace.take("difference", shape))
    scratch = torch.abs(d, out=workspace.take("scratch", shape))
    largest, total, square = scratch.amax(dim=1), scratch.sum(dim=1), _dot(d, d)
    mean = _dot(reference.probabilities, d)
    shift = candidate.log_normaliser - reference.log_normaliser
    kl = shift - mean
    reverse = _dot(candidate.probabilities, d) - shift
    close = kl < CLOSE
    if bool(close.all()):
        centred = _centred(reference, candidate, d.sub_(mean[:, None]), workspace)
        return Divergences(*centred, largest, total, square)
    js = _js_by_entropies(reference, candidate, workspace)
    if bool(close.any()):
        centred = _centred(reference, candidate, d.sub_(mean[:, None]), workspace)
        kl, reverse, js = (
            torch.where(close, fine, plain)
            for fine, plain in zip(centred, (kl, reverse, js), strict=True)
        )
    return Divergences(kl, reverse, js, largest, total, square)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot product of each row: [t, V], [t, V] → [t]. (``vecdot`` makes a [t, V] product.)"""
    import torch

    return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)])


def _js_by_entropies(
    reference: Distribution, candidate: Distribution, workspace: Workspace
) -> torch.Tensor:
    import torch

    shape = reference.logits.shape
    both = torch.add(
        reference.probabilities, candidate.probabilities, out=workspace.take("growth", shape)
    ).clamp_(min=_SMALLEST)
    logarithm = torch.log(both, out=workspace.take("scratch", shape))
    entropies = reference.entropy + candidate.entropy
    return math.log(2) - (_dot(both, logarithm) + entropies) / 2


def _centred(
    reference: Distribution, candidate: Distribution, e: torch.Tensor, workspace: Workspace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL, reverse KL and JS of close rows from the centred difference; e is overwritten."""
    import torch

    p, q = reference.probabilities, candidate.probabilities
    # where e^e would overflow, p is zero in float64, and must stay so in a product
    e.clamp_(max=_LARGEST)
    growth = torch.expm1(e, out=workspace.take("growth", e.shape))
    scratch = workspace.take("scratch", e.shape)
    kl = _dot(p, torch.sub(growth, e, out=scratch)).log1p()
    reverse = (-kl).exp() * _dot(p, torch.mul(growth, e, out=scratch)) - kl
    # e^x − 1 = (e^e − 1) e^(−KL) + (e^(−KL) − 1)
    half = torch.mul(growth, (-kl).exp()[:, None] / 2, out=scratch)
    h = half.add_(torch.expm1(-kl)[:, None] / 2).log1p_()
    js = (reverse - _dot(p, h) - _dot(q, h)) / 2
    near = kl < NEAR
    if bool(near.any()):
        rows = (p, e, growth) if bool(near.all()) else (p[near], e[near], growth[near])
        for value, better in zip((kl, reverse, js), _near(*rows, scratch), strict=True):
            value[near] = better
    return kl, reverse, js


def _near(
    p: torch.Tensor, e: torch.Tensor, growth: torch.Tensor, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL, reverse KL and JS of rows that hardly differ, by series; e and scratch are overwritten.

    e^e − 1 − e = e²(1/2 + e/6 + e²/24 + …). With t = x/2,
    JS = Σ (p + q)/2 · (t tanh t − ln cosh t) = Σ p x²/8 (1 + x/2 + x²/8 + …).
    """
    import torch

    if float(e.max()) >= _SERIES or float(e.min()) <= -_SERIES:
        return _near_but_for_some(p, e, growth)
    terms = scratch[: e.shape[0]]
    torch.mul(e, 1 / 24, out=terms).add_(1 / 6).mul_(e).add_(1 / 2).mul_(e).mul_(e)
    kl = _dot(p, terms).log1p()
    reverse = (-kl).exp() * _dot(p, torch.mul(growth, e, out=terms)) - kl
    x = e.sub_(kl[:, None])
    torch.mul(x, 1 / 8, out=terms).add_(1 / 2).mul_(x).add_(1).mul_(x).mul_(x)
    return kl, reverse, _dot(p, terms) / 8


def _near_but_for_some(
    p: torch.Tensor, e: torch.Tensor, growth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same where tokens of next to no probability differ more than the series allows."""
    import torch

    small = e.abs() < _SERIES
    series = e.square() * (0.5 + e * (1 / 6 + e / 24))
    kl = _dot(p, torch.where(small, series, growth - e)).log1p()
    reverse = (-kl).exp() * _dot(p, growth * e) - kl
    x = e - kl[:, None]
    t = x.abs() / 2
    spread = t * t.tanh() - t - (-2 * t).exp().log1p() + math.log(2)
    series = x.square() / 8 * (1 + x / 2 + x.square() / 8)
    js = _dot(p, torch.where(small, series, (1 + torch.expm1(x) / 2) * spread))
    return kl, reverse, js


def rows_per_block(vocab_size: int) -> int:
    """How many rows of float64 logits fit the working set; at least one."""
    return max(1, WORKING_SET_BYTES // (8 * vocab_size))

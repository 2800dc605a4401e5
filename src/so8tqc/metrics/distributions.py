"""Next-token distributions of a block of positions, and divergences between two of them.

With logits z (reference) and w (candidate), p and q their softmax, L_z and L_w their
log-normalisers, d = w − z and m = Σ p d:

* KL(p‖q) = (L_w − L_z) − m,  KL(q‖p) = Σ q d − (L_w − L_z);
* the Jensen-Shannon divergence JS = ½ KL(p‖(p+q)/2) + ½ KL(q‖(p+q)/2)
  = H((p + q)/2) − ½ (H(p) + H(q)) = ln 2 − ½ Σ (p + q) ln(p + q) − ½ (H(p) + H(q)).

These are differences of numbers of about 1 to 100, good to about 1e-13. Where the models are
closer than ``CLOSE``, ``metrics.nearness`` computes them without cancellation.

All arithmetic on whole rows is in float64: float32 exponentials would leave the plain
differences an error of about 1e-7. numpy's exponential takes 0.8 ns an entry on an AMD processor
with AVX-512, torch's 1.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.nearness import close_divergences, dot

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]

WORKING_SET_BYTES = 4 << 20
"""Rows are taken so few at a time that a float64 block of them stays near the CPU's caches, and
so many that threads seldom wait for each other between two operations: with two threads, 1 MiB
takes 1.6 times as long at V = 49,152, 16 MiB 1.1 times."""

LEADERS = 5
"""How many of the most likely tokens are compared (top-5 overlap)."""

CLOSE = 4e-4
"""nats; below, the plain differences would have fewer than nine digits. (JS is a fourth of KL.)"""

_UNSHIFTED = 300.0
"""e^±300, its square, and sums of these over any vocabulary are representable in float64."""

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
        weights: [t, V] float64, e^z, or e^(z − max z) where the former is out of range.
        total: [t], Σ of the weights; probabilities are weights / total.
        log_normaliser: [t], L = ln Σ e^z.
        leaders: [t, min(5, V)] int64, the most likely tokens, in no order.
        top: [t] index of the largest logit; of equal ones the lowest.
        nll, entropy, max_prob, max_logit, brier: [t]; brier = Σ_v (p_v − 1[v is the target])².
    """

    logits: torch.Tensor
    weights: torch.Tensor
    total: FloatArray
    log_normaliser: FloatArray
    leaders: npt.NDArray[np.int64]
    top: npt.NDArray[np.int64]
    nll: FloatArray
    entropy: FloatArray
    max_prob: FloatArray
    max_logit: FloatArray
    brier: FloatArray

    def mean(self, values: torch.Tensor) -> FloatArray:
        """Expectation of each row: [t, V] → [t], Σ_v p_v values_v."""
        return dot(self.weights, values) / self.total


def distribution(
    logits: torch.Tensor, targets: torch.Tensor, workspace: Workspace | None = None
) -> Distribution:
    """Softmax and what follows from it.

    Args:
        logits: [t, V], any float dtype.
        targets: [t] the token that really follows.
        workspace: where the two [t, V] arrays of the result live; None for their own.
    """
    import torch

    workspace = workspace or Workspace()
    if logits.dtype in (torch.bfloat16, torch.float16):  # numpy has no bfloat16
        logits = logits.float()
    leaders, values = (found.numpy() for found in leading(logits))
    largest = values.max(axis=1)
    top = np.where(values == largest[:, None], leaders, logits.shape[1]).min(axis=1)
    largest = largest.astype(np.float64)
    z = workspace.take("logits", logits.shape).copy_(logits)
    weights = workspace.take("weights", z.shape)
    if (np.abs(largest) < _UNSHIFTED).all():
        shift = np.zeros_like(largest)
        np.exp(z.numpy(), out=weights.numpy())
    else:
        shift = largest
        torch.sub(z, torch.from_numpy(shift)[:, None], out=weights)
        np.exp(weights.numpy(), out=weights.numpy())
    total = weights.sum(dim=1).numpy()
    log_normaliser = shift + np.log(total)
    z_target = z.numpy()[np.arange(z.shape[0]), targets.numpy()]
    p_target = np.exp(z_target - log_normaliser)
    return Distribution(
        logits=z,
        weights=weights,
        total=total,
        log_normaliser=log_normaliser,
        leaders=leaders,
        top=top,
        nll=log_normaliser - z_target,
        entropy=log_normaliser - dot(weights, z) / total,
        max_prob=np.exp(largest - log_normaliser),
        max_logit=largest,
        # Σ(p − y)² = Σp² − 2·p_target + 1 for a one-hot y
        brier=dot(weights, weights) / np.square(total) - 2 * p_target + 1,
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
    best = whole.amax(dim=2).topk(LEADERS, dim=1, sorted=False).indices.numpy()
    inside = (best[:, :, None] * _BLOCK + np.arange(_BLOCK)).reshape(height, -1)
    rest = np.broadcast_to(np.arange(blocks * _BLOCK, width), (height, width - blocks * _BLOCK))
    at = np.concatenate([inside, rest], axis=1)
    rows = np.arange(height)[:, None]
    found = logits.numpy()[rows, at]
    five = np.argpartition(found, -LEADERS, axis=1)[:, -LEADERS:]
    return torch.from_numpy(at[rows, five]), torch.from_numpy(found[rows, five])


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
    largest, total = scratch.amax(dim=1), scratch.sum(dim=1)
    square = dot(d, d)
    mean = reference.mean(d)
    shift = candidate.log_normaliser - reference.log_normaliser
    kl = shift - mean
    near = kl < CLOSE
    if near.all():
        reverse, js = np.empty_like(kl), np.empty_like(kl)
        rows: slice | npt.NDArray[np.int64] = slice(None)
    else:
        reverse = candidate.mean(d) - shift
        js = _js_by_entropies(reference, candidate, workspace)
        rows = np.flatnonzero(near)
    if near.any():
        kl[rows], reverse[rows], js[rows] = close_divergences(
            reference.weights[rows],
            reference.total[rows],
            reference.logits[rows],
            reference.log_normaliser[rows],
            d.sub_(torch.from_numpy(mean)[:, None])[rows],
            (largest.numpy() + np.abs(mean))[rows],
            scratch[: int(near.sum())],
            workspace.take("growth", shape)[: int(near.sum())],
        )
    return Divergences(
        kl=torch.from_numpy(kl),
        kl_reverse=torch.from_numpy(reverse),
        js=torch.from_numpy(js),
        max_abs_logit=largest,
        sum_abs_logit=total,
        sum_square_logit=torch.from_numpy(square),
    )


def _js_by_entropies(
    reference: Distribution, candidate: Distribution, workspace: Workspace
) -> FloatArray:
    import torch

    # normalised before the logarithm: those of e^z itself are up to 300, and would be cut off there
    both = workspace.take("growth", reference.logits.shape)
    torch.mul(reference.weights, torch.from_numpy(1 / reference.total)[:, None], out=both)
    both.addcmul_(candidate.weights, torch.from_numpy(1 / candidate.total)[:, None])
    both.clamp_(min=_SMALLEST)
    logarithm = workspace.take("scratch", both.shape)
    np.log(both.numpy(), out=logarithm.numpy())
    mean = dot(both, logarithm)
    entropies: FloatArray = reference.entropy + candidate.entropy
    js: FloatArray = math.log(2) - (mean + entropies) / 2
    return js


def rows_per_block(vocab_size: int) -> int:
    """How many rows of float64 logits fit the working set; at least one."""
    return max(1, WORKING_SET_BYTES // (8 * vocab_size))

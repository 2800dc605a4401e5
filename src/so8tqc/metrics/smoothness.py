"""How much a layer's hidden states oscillate from token to token, as PET measures it.

With h_t ∈ R^D a layer's output at token t, two shares of its energy Σ_t |h_t|²:

* second-difference energy: mean |Δ²h|² / mean |h|², what the PET penalty is (``rotations.pet``): 6
  for white noise, near 0 for a slow signal;
* high-frequency share: the part of Σ|h|² at periods below 4 tokens (by Parseval's theorem, of h
  without its mean): ½ for white noise, near 0 for a slow signal.

Both are quotients of sums over tokens, so that a paired block bootstrap gives the change from
one model to another an interval. The first tokens do not count: many models park a huge state
there (an attention sink, Xiao et al., 2023, arXiv:2309.17453), which in SmolLM2-135M is up to
93 % of a layer's energy and hides what the text does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.oscillation import HIGH_FREQUENCY, Change, block_interval

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]

SINK_TOKENS = 4
"""Tokens at the beginning that do not count."""

_COLUMNS = 128  # features that are filtered at once: a few MiB of complex numbers
ENERGY, HIGH = 1, 2  # columns of the sums, over column 0


def hidden_sums(hidden: torch.Tensor) -> FloatArray:
    """What each token adds: [T, D] → [T − 4, 3], |h|², |Δ²h|² and |high-pass h|², over D.

    Second differences are scaled by n/(n − 2), so that their sum over n tokens is n times their
    mean.

    Raises:
        ValueError: fewer than 7 tokens.
    """
    import torch

    if hidden.shape[0] < SINK_TOKENS + 3:
        raise ValueError(f"{hidden.shape[0]} tokens: {SINK_TOKENS + 3} are needed")
    h = hidden[SINK_TOKENS:].double()
    n = h.shape[0]
    sums = torch.zeros(n, 3, dtype=torch.float64, device=h.device)
    low = torch.fft.rfftfreq(n, device=h.device) < HIGH_FREQUENCY
    for part in torch.split(h, _COLUMNS, dim=1):
        sums[:, 0] += part.square().sum(dim=1)
        second = part[2:] - 2 * part[1:-1] + part[:-2]
        sums[1:-1, ENERGY] += second.square().sum(dim=1) * (n / (n - 2))
        spectrum = torch.fft.rfft(part, dim=0)
        spectrum[low] = 0
        sums[:, HIGH] += torch.fft.irfft(spectrum, n=n, dim=0).square().sum(dim=1)
    result: FloatArray = sums.cpu().numpy()
    return result


def share(sums: FloatArray, column: int) -> FloatArray:
    """Share of energy in each layer: [L, T, 3] → [L]; ``column`` is ENERGY or HIGH."""
    totals = sums.sum(axis=1)
    result: FloatArray = totals[:, column] / totals[:, 0]
    return result


def mean_change(
    reference: FloatArray, candidate: FloatArray, column: int, *, resamples: int, seed: int
) -> Change:
    """Relative change of a share, as its geometric mean over layers.

    Args:
        reference, candidate: [L, T, 3] sums on the same tokens.
        column: ENERGY or HIGH.
        resamples, seed: of the block bootstrap.
    """
    parts = np.concatenate(
        [run[:, :, i].T for run in (candidate, reference) for i in (column, 0)], axis=1
    )  # [T, 4 L]
    layers = len(reference)

    def relative(totals: FloatArray) -> FloatArray:
        ours, all_ours, theirs, all_theirs = np.split(np.log(totals), 4, axis=-1)
        change: FloatArray = np.expm1((ours - all_ours - theirs + all_theirs).sum(-1) / layers)
        return change

    with np.errstate(divide="ignore", invalid="ignore"):
        whole = float(relative(parts.sum(axis=0)))
    return Change(
        reference=float(share(reference, column).mean()),
        candidate=float(share(candidate, column).mean()),
        relative=whole,
        ci95=block_interval(parts, relative, resamples, seed),
    )

"""How far one model's next-token distributions are from another's, token by token.

Definitions follow ``llama-perplexity --kl-divergence`` so that numbers can be laid side
by side; all sums are over the vocabulary, all logarithms natural (nats):

* KL(p‖q) = Σ_v p_v (ln p_v − ln q_v), p the reference, q the candidate;
* Δp = q(next token) − p(next token);
* same top: whether argmax p = argmax q;
* nll = −ln p(next token); perplexity = exp(mean nll).

With logits z (reference) and w (candidate), d = w − z and the log-normalisers L_z, L_w,
KL = Σ p (L_w − L_z − d) = (L_w − L_z) − Σ p d. To avoid cancellation between L_w − L_z and
Σ p d when the models are close, use L_w − L_z = ln Σ p e^d: with d shifted by m = Σ p d,
KL = ln Σ p e^(d − m) = ln(1 + Σ p (e^(d−m) − 1 − (d−m))), since Σ p (d−m) = 0. Every term
of that sum is non-negative, so nothing cancels and KL of 1e-13 is as accurate as of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]

WORKING_SET_BYTES = 1 << 20
"""Rows are taken so few at a time that a float64 block of them stays near the CPU's caches."""

COLUMNS = (
    "nll_reference",
    "nll_candidate",
    "entropy_reference",
    "entropy_candidate",
    "max_prob_reference",
    "max_prob_candidate",
    "max_logit_reference",
    "max_logit_candidate",
    "brier_reference",
    "brier_candidate",
    "kl",
    "delta_p",
    "same_top",
    "correct_reference",
    "correct_candidate",
    "max_abs_logit",
    "sum_abs_logit",
    "sum_square_logit",
)
"""Columns of a token table, in order.

``max_abs_logit``, ``sum_abs_logit`` and ``sum_square_logit`` are over the V logit
differences of one position. Positions whose next token is unknown (the last) are not rows.
"""


@dataclass(frozen=True)
class Distribution:
    """One model's side of a block of rows, computed once and compared many times.

    Attributes:
        logits: [t, V] float64.
        probabilities: [t, V] float64.
        log_normaliser: [t], L = ln Σ e^z.
        top: [t] index of the largest logit.
        nll, entropy, max_prob, max_logit, brier: [t]; brier = Σ_v (p_v − 1[v is the target])².
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    log_normaliser: torch.Tensor
    top: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    max_prob: torch.Tensor
    max_logit: torch.Tensor
    brier: torch.Tensor


def distribution(logits: torch.Tensor, targets: torch.Tensor) -> Distribution:
    """Softmax and what follows from it.

    Args:
        logits: [t, V] float32 or float64.
        targets: [t] the token that really follows.
    """
    import torch

    z = logits.to(torch.float64)
    largest, top = z.max(dim=1)
    exponentials = (z - largest[:, None]).exp_()
    total = exponentials.sum(dim=1)
    probabilities = exponentials.div_(total[:, None])
    log_normaliser = largest + total.log()
    entropy = log_normaliser - torch.linalg.vecdot(probabilities, z)
    p_target = probabilities.gather(1, targets[:, None])[:, 0]
    # Σ(p − y)² = Σp² − 2·p_target + 1 for a one-hot y
    brier = torch.linalg.vecdot(probabilities, probabilities) - 2 * p_target + 1
    return Distribution(
        logits=z,
        probabilities=probabilities,
        log_normaliser=log_normaliser,
        top=top,
        nll=log_normaliser - z.gather(1, targets[:, None])[:, 0],
        entropy=entropy,
        max_prob=total.reciprocal(),
        max_logit=largest,
        brier=brier,
    )


def kl_divergence(reference: Distribution, difference: torch.Tensor) -> torch.Tensor:
    """KL(reference‖candidate) of each row without cancellation (see the module's docstring).

    Args:
        reference: of t rows.
        difference: [t, V] float64, the candidate's logits minus the reference's.

    Returns:
        [t] nats, never negative.
    """
    import torch

    p = reference.probabilities
    d = difference - torch.linalg.vecdot(p, difference)[:, None]
    # e^x − 1 − x loses digits for small x; x²/2 + x³/6 + x⁴/24 is exact to 1e-16·x² below 2⁻¹⁰
    small = d.abs() < 2.0**-10
    series = d.square() * (0.5 + d * (1 / 6 + d / 24))
    terms = torch.where(small, series, torch.expm1(d) - d)
    kl: torch.Tensor = torch.linalg.vecdot(p, terms).log1p()
    return kl


def token_rows(
    reference: Distribution, candidate: Distribution, targets: torch.Tensor
) -> torch.Tensor:
    """One row of ``COLUMNS`` for each position: [t, len(COLUMNS)] float64."""
    import torch

    d = candidate.logits - reference.logits
    p_reference, p_candidate = (-reference.nll).exp(), (-candidate.nll).exp()
    absolute = d.abs()
    return torch.stack(
        [
            reference.nll,
            candidate.nll,
            reference.entropy,
            candidate.entropy,
            reference.max_prob,
            candidate.max_prob,
            reference.max_logit,
            candidate.max_logit,
            reference.brier,
            candidate.brier,
            kl_divergence(reference, d),
            p_candidate - p_reference,
            (reference.top == candidate.top).double(),
            (reference.top == targets).double(),
            (candidate.top == targets).double(),
            absolute.amax(dim=1),
            absolute.sum(dim=1),
            d.square().sum(dim=1),
        ],
        dim=1,
    )


@dataclass(frozen=True)
class TokenTable:
    """Per-token statistics of one candidate against one reference.

    Attributes:
        columns: name → [n] float64, the names of ``COLUMNS``.
        text: [n] index of the text of each token.
        position: [n] position of the *predicting* token in its text.
        vocab_size: V.
        texts: ids of the texts.
    """

    columns: Mapping[str, FloatArray]
    text: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    vocab_size: int
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.text.shape[0])

    def per_text(self, *names: str) -> FloatArray:
        """Sums of the named columns over each text, then the token counts: [texts, k + 1]."""
        n = len(self.texts)
        sums = [np.bincount(self.text, self.columns[name], minlength=n) for name in names]
        return np.stack([*sums, np.bincount(self.text, minlength=n).astype(np.float64)], axis=1)


KL_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)


def summarise(table: TokenTable) -> dict[str, object]:
    """Statistics of a token table, as ``llama-perplexity --kl-divergence`` prints them.

    Returns:
        tokens, texts, kl_mean, kl_max, kl_percentiles, top1 (share of equal argmax), dp_mean,
        dp_rms, dp_percentiles, nll_*, ppl_*, ln_ppl_ratio, nll_correlation, accuracy_*,
        entropy_*, max_abs, mean_abs, rms (of logit differences over all tokens and V).
    """
    c = table.columns
    elements = len(table) * table.vocab_size
    return {
        "tokens": len(table),
        "texts": len(table.texts),
        "kl_mean": float(c["kl"].mean()),
        "kl_max": float(c["kl"].max()),
        "kl_percentiles": _percentiles(c["kl"]),
        "top1": float(c["same_top"].mean()),
        "dp_mean": float(c["delta_p"].mean()),
        "dp_rms": float(np.sqrt(np.square(c["delta_p"]).mean())),
        "dp_percentiles": _percentiles(c["delta_p"]),
        "nll_reference": float(c["nll_reference"].mean()),
        "nll_candidate": float(c["nll_candidate"].mean()),
        "ppl_reference": float(np.exp(c["nll_reference"].mean())),
        "ppl_candidate": float(np.exp(c["nll_candidate"].mean())),
        "ln_ppl_ratio": float((c["nll_candidate"] - c["nll_reference"]).mean()),
        "nll_correlation": _correlation(c["nll_reference"], c["nll_candidate"]),
        "accuracy_reference": float(c["correct_reference"].mean()),
        "accuracy_candidate": float(c["correct_candidate"].mean()),
        "entropy_reference": float(c["entropy_reference"].mean()),
        "entropy_candidate": float(c["entropy_candidate"].mean()),
        "max_abs": float(c["max_abs_logit"].max()),
        "mean_abs": float(c["sum_abs_logit"].sum() / elements),
        "rms": float(np.sqrt(c["sum_square_logit"].sum() / elements)),
    }


def rows_per_block(vocab_size: int) -> int:
    """How many rows of float64 logits fit the working set; at least one."""
    return max(1, WORKING_SET_BYTES // (8 * vocab_size))


def _percentiles(values: FloatArray) -> dict[str, float]:
    quantiles = np.percentile(values, KL_PERCENTILES)
    return {f"{p:g}": float(q) for p, q in zip(KL_PERCENTILES, quantiles, strict=True)}


def _correlation(a: FloatArray, b: FloatArray) -> float:
    if a.size < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

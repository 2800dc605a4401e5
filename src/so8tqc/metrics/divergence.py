"""How far one model's next-token distributions are from another's, token by token.

Definitions follow ``llama-perplexity --kl-divergence`` so that numbers can be laid side
by side; all sums are over the vocabulary, all logarithms natural (nats):

* KL(p‖q) = Σ_v p_v (ln p_v − ln q_v), p the reference, q the candidate;
* Δp = q(next token) − p(next token);
* same top: whether argmax p = argmax q;
* nll = −ln p(next token); perplexity = exp(mean nll).

How they are computed is derived in ``metrics.distributions``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.columns import COLUMNS, ROW, SIDE_ROW, as_records
from so8tqc.metrics.distributions import Distribution

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]


def token_rows(reference: Distribution, candidate: Distribution) -> torch.Tensor:
    """One row of ``metrics.columns.COLUMNS`` for each position: [t, len(COLUMNS)] float64.

    Args:
        reference: of t positions.
        candidate: of the same positions.

    Raises:
        ValueError: the two are of different positions or vocabularies.
    """
    import torch

    from so8tqc.metrics import cpu_kernels as kernels

    if reference.logits.shape != candidate.logits.shape:
        raise ValueError(f"{reference.logits.shape} and {candidate.logits.shape} logits differ")
    rows = np.empty((reference.logits.shape[0], len(COLUMNS)))
    kernels.pair_rows(
        reference.logits,
        candidate.logits,
        reference.weights,
        candidate.weights,
        as_records(reference.numbers, SIDE_ROW),
        as_records(candidate.numbers, SIDE_ROW),
        reference.leaders,
        candidate.leaders,
        reference.targets,
        as_records(rows, ROW),
    )
    return torch.from_numpy(rows)


@dataclass(frozen=True)
class TokenTable:
    """Per-token statistics of one candidate against one reference.

    Attributes:
        columns: name → [n] float64, the names of ``metrics.columns.COLUMNS``.
        text: [n] index of the text of each token.
        position: [n] position of the *predicting* token in its text.
        vocab_size: V.
        texts: ids of the texts.
        image: [n] positions of pictures in front of each predicting token, 0 where only text is;
            None in a table without pictures. Positions that are pictures are in no row.
        tie: [n] whether rounding may turn the predicting token's choice of experts; None where the
            reference chooses none, or was not watched.
    """

    columns: Mapping[str, FloatArray]
    text: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    vocab_size: int
    texts: tuple[str, ...]
    image: npt.NDArray[np.int32] | None = None
    tie: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return int(self.text.shape[0])

    @property
    def sees(self) -> npt.NDArray[np.bool_]:
        """[n] whether a picture stands in front of the token."""
        return np.zeros(len(self), dtype=bool) if self.image is None else self.image > 0

    def where(self, rows: npt.NDArray[np.bool_]) -> TokenTable:
        """Some of the rows, and the texts that these are of.

        Args:
            rows: [n] which.
        """
        kept, text = np.unique(self.text[rows], return_inverse=True)
        return TokenTable(
            {name: values[rows] for name, values in self.columns.items()},
            text.astype(np.int32),
            self.position[rows],
            self.vocab_size,
            tuple(self.texts[i] for i in kept),
            None if self.image is None else self.image[rows],
            None if self.tie is None else self.tie[rows],
        )

    def per_text(self, *names: str) -> FloatArray:
        """Sums of the named columns over each text, then the token counts: [texts, k + 1]."""
        n = len(self.texts)
        sums = [np.bincount(self.text, self.columns[name], minlength=n) for name in names]
        return np.stack([*sums, np.bincount(self.text, minlength=n).astype(np.float64)], axis=1)


def joined(parts: Sequence[TokenTable]) -> TokenTable:
    """Tables of the same pair over different texts, one behind the other, as one."""
    first = parts[0]
    offsets = np.cumsum([0, *(len(part.texts) for part in parts[:-1])], dtype=np.int32)
    texts = [part.text + offset for part, offset in zip(parts, offsets, strict=True)]
    return TokenTable(
        columns={n: np.concatenate([p.columns[n] for p in parts]) for n in first.columns},
        text=np.concatenate(texts, dtype=np.int32),
        position=np.concatenate([part.position for part in parts]),
        vocab_size=first.vocab_size,
        texts=tuple(name for part in parts for name in part.texts),
        tie=None
        if any(part.tie is None for part in parts)
        else np.concatenate([part.tie for part in parts if part.tie is not None]),
    )


KL_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DELTA_P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


def summarise(table: TokenTable) -> dict[str, object]:
    """Statistics of a token table; where ``llama-perplexity`` has one, by its definition.

    Percentiles interpolate linearly between order statistics, as that tool's do.

    Returns:
        tokens, texts, kl_{mean,max,min,percentiles}, kl_reverse_mean, js_mean, top1 (share of
        equal argmax), top5_overlap, dp_{mean,rms,max,min,percentiles}, nll_*, ppl_*,
        ln_ppl_ratio, nll_correlation, accuracy_*, entropy_*, entropy_difference, max_abs,
        mean_abs, rms (of logit differences over all tokens and V).
    """
    c = table.columns
    elements = len(table) * table.vocab_size
    return {
        "tokens": len(table),
        "texts": len(table.texts),
        **_spread("kl", c["kl"], KL_PERCENTILES),
        "kl_reverse_mean": float(c["kl_reverse"].mean()),
        "js_mean": float(c["js"].mean()),
        "top1": float(c["same_top"].mean()),
        "top5_overlap": float(c["top5_overlap"].mean()),
        **_spread("dp", c["delta_p"], DELTA_P_PERCENTILES),
        "dp_rms": float(np.sqrt(np.square(c["delta_p"]).mean())),
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
        "entropy_difference": float((c["entropy_candidate"] - c["entropy_reference"]).mean()),
        "max_abs": float(c["max_abs_logit"].max()),
        "mean_abs": float(c["sum_abs_logit"].sum() / elements),
        "rms": float(np.sqrt(c["sum_square_logit"].sum() / elements)),
    }


def _spread(name: str, values: FloatArray, percentiles: tuple[float, ...]) -> dict[str, object]:
    """Mean, extremes and percentiles of a column."""
    quantiles = np.percentile(values, percentiles)
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_max": float(values.max()),
        f"{name}_min": float(values.min()),
        f"{name}_percentiles": {
            f"{p:g}": float(q) for p, q in zip(percentiles, quantiles, strict=True)
        },
    }


def _correlation(a: FloatArray, b: FloatArray) -> float:
    if a.size < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

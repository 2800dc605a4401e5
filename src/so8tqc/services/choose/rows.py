"""One row of a comparison of quantizations, and the budget that rows are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np

from so8tqc.metrics.bootstrap import paired_bootstrap, quantile_interval, ratio_of_sums
from so8tqc.metrics.divergence import TokenTable
from so8tqc.services.qc.judging import Bootstrap, survival_check

Interval = tuple[float, float] | None


_FACTS = ("type", "path", "bits_per_weight", "types")


class Row(TypedDict):
    """A file's size and quality. Intervals are of 95 %, None with too few texts.

    ``kl_99`` is the 99th percentile of the tokens' KL; ``ppl_ratio`` the file's perplexity over the
    reference's. ``survival`` is the upper end of KL(reference‖file) − KL(base‖file): the gate
    survives if it is negative.
    """

    bytes: int
    kl_mean: float
    kl_ci95: Interval
    kl_99: float
    kl_99_ci95: Interval
    top1: float
    top1_ci95: Interval
    ppl_ratio: float
    ppl_ratio_ci95: Interval
    survival: NotRequired[float]
    survives: NotRequired[bool]


def measured_row(
    size: int, table: TokenTable, to_base: TokenTable | None, bootstrap: Bootstrap
) -> Row:
    """The row of one file.

    Args:
        size: of the file, bytes.
        table: the file against the reference.
        to_base: the file against the base, if the reference is base plus gates.
        bootstrap: for intervals.
    """
    columns = table.columns
    log_ratio = columns["nll_candidate"] - columns["nll_reference"]
    ratio = _mean_interval(table, "nll_candidate", bootstrap, minus="nll_reference")
    kl = columns["kl"]
    row: Row = {
        "bytes": size,
        "kl_mean": float(kl.mean()),
        "kl_ci95": _mean_interval(table, "kl", bootstrap),
        "kl_99": float(np.percentile(kl, 99)),
        "kl_99_ci95": _known(
            quantile_interval(
                kl, table.text, len(table.texts), 0.99,
                resamples=bootstrap.resamples, seed=bootstrap.seed,
            )
        ),
        "top1": float(columns["same_top"].mean()),
        "top1_ci95": _mean_interval(table, "same_top", bootstrap),
        "ppl_ratio": float(np.exp(log_ratio.mean())),
        "ppl_ratio_ci95": None if ratio is None else (
            float(np.exp(ratio[0])), float(np.exp(ratio[1]))
        ),
    }  # fmt: skip
    if to_base is not None:
        survival = survival_check(table, to_base, "", bootstrap)
        assert survival.value is not None  # never a skipped check
        row["survival"] = survival.value
        row["survives"] = survival.value < 0
    return row


def described(
    rows: Mapping[str, Row], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, object]]:
    """The rows as a record shows them: the smallest first, with what each file is.

    Args:
        rows: name → its row.
        files: name → its entry in the record of ``quantize``.
    """
    return {
        name: {**row, **{key: files[name][key] for key in _FACTS}}
        for name, row in sorted(rows.items(), key=lambda item: item[1]["bytes"])
    }


def scope(tables: Mapping[str, TokenTable]) -> dict[str, int]:
    """How much text the files of one pass were measured on."""
    first = next(iter(tables.values()))
    return {"texts": len(first.texts), "tokens": len(first)}


def _mean_interval(
    table: TokenTable, column: str, bootstrap: Bootstrap, minus: str | None = None
) -> Interval:
    sums = table.per_text(column, *([minus] if minus else []))
    if minus:
        sums = np.stack([sums[:, 0] - sums[:, 1], sums[:, 2]], axis=1)
    return _known(
        paired_bootstrap(sums, ratio_of_sums, resamples=bootstrap.resamples, seed=bootstrap.seed)
    )


def _known(interval: tuple[float, float]) -> Interval:
    return None if np.isnan(interval[0]) else interval

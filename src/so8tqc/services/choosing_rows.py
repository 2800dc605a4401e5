"""One row of a comparison of quantizations, and the budget that rows are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np

from so8tqc.config import ChoiceOptions
from so8tqc.metrics.bootstrap import paired_bootstrap, quantile_interval, ratio_of_sums
from so8tqc.metrics.divergence import TokenTable
from so8tqc.reports import format as fmt
from so8tqc.services.judging import Bootstrap, survival_check

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


@dataclass(frozen=True)
class Budget:
    """What is asked of a file; None asks nothing.

    Attributes:
        max_kl: nats.
        min_top1: share.
        max_bytes: of the file.
        by_interval: whether the whole 95 % interval must keep the budget, not only the value.
    """

    max_kl: float | None
    min_top1: float | None
    max_bytes: int | None
    by_interval: bool

    @property
    def asks_quality(self) -> bool:
        """Whether anything but the size is asked."""
        return self.max_kl is not None or self.min_top1 is not None

    def kl(self, row: Row) -> float:
        """The KL that is judged."""
        return row["kl_ci95"][1] if self.by_interval and row["kl_ci95"] else row["kl_mean"]

    def top1(self, row: Row) -> float:
        """The share of top tokens that is judged."""
        return row["top1_ci95"][0] if self.by_interval and row["top1_ci95"] else row["top1"]

    def missed_quality(self, row: Row) -> list[str]:
        """What a row misses, its size aside; empty if nothing."""
        missed = []
        if self.max_kl is not None and not self.kl(row) <= self.max_kl:
            missed.append(f"KL {self.kl(row):.4g} > {self.max_kl:g}")
        if self.min_top1 is not None and not self.top1(row) >= self.min_top1:
            missed.append(f"same top {fmt.percent(self.top1(row))} < {fmt.percent(self.min_top1)}")
        if row.get("survives") is False:
            missed.append("the gate does not survive")
        return missed

    def missed(self, row: Row) -> list[str]:
        """All that a row misses."""
        missed = self.missed_quality(row)
        if self.max_bytes is not None and row["bytes"] > self.max_bytes:
            missed.append(f"{fmt.size(row['bytes'])} > {fmt.size(self.max_bytes)}")
        return missed

    def __str__(self) -> str:
        parts = []
        if self.max_kl is not None:
            parts.append(f"mean KL ≤ {self.max_kl:g}")
        if self.min_top1 is not None:
            parts.append(f"same top ≥ {fmt.percent(self.min_top1)}")
        if self.max_bytes is not None:
            parts.append(f"size ≤ {fmt.size(self.max_bytes)}")
        said = ", ".join(parts)
        return f"{said}, by the whole 95 % interval" if self.by_interval else said


def budget_of(config: ChoiceOptions) -> Budget:
    """The budget that was asked for."""
    return Budget(
        config.max_kl,
        config.min_top1,
        None if config.max_size is None else int(config.max_size),
        config.judge_by == "interval",
    )

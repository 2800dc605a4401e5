"""One row of a comparison of quantizations, and the budget that rows are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from so8tqc.metrics.bootstrap import paired_bootstrap, quantile_interval, ratio_of_sums
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_kinds.base import Interval
from so8tqc.record_kinds.choose import DescribedRow, Row
from so8tqc.record_kinds.quantize import QuantizedFile, QuantizeMetrics
from so8tqc.records import Record
from so8tqc.services.qc.judging import Bootstrap, survival_check


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
                kl,
                table.text,
                len(table.texts),
                0.99,
                resamples=bootstrap.resamples,
                seed=bootstrap.seed,
            )
        ),
        "top1": float(columns["same_top"].mean()),
        "top1_ci95": _mean_interval(table, "same_top", bootstrap),
        "ppl_ratio": float(np.exp(log_ratio.mean())),
        "ppl_ratio_ci95": None
        if ratio is None
        else (float(np.exp(ratio[0])), float(np.exp(ratio[1]))),
    }
    if to_base is not None:
        survival = survival_check(table, to_base, "", bootstrap)
        assert survival.value is not None  # never a skipped check
        row["survival"] = survival.value
        row["survives"] = survival.value < 0
    return row


def described(
    rows: Mapping[str, Row], files: Mapping[str, QuantizedFile]
) -> dict[str, DescribedRow]:
    """The rows as a record shows them: the smallest first, with what each file is.

    Args:
        rows: name → its row.
        files: name → its entry in the record of ``quantize``.
    """
    return {
        name: _described(row, files[name])
        for name, row in sorted(rows.items(), key=lambda item: item[1]["bytes"])
    }


def _described(row: Row, file: QuantizedFile) -> DescribedRow:
    assert file.type is not None
    assert file.path is not None
    assert file.bits_per_weight is not None
    return {
        **row,
        "type": file.type,
        "path": file.path,
        "bits_per_weight": file.bits_per_weight,
        "types": file.types,
    }


def files_by_type(made: Record) -> dict[str, QuantizedFile]:
    """Type → what the record of a quantization says of its file."""
    return {str(file.type): file for file in QuantizeMetrics.of(made).files.values()}


def written_paths(files: Mapping[str, QuantizedFile]) -> dict[str, Path]:
    """Name → where its file was written."""
    return {name: Path(str(file.path)) for name, file in files.items()}


def as_recorded(files: Mapping[str, QuantizedFile]) -> dict[str, dict[str, JsonValue]]:
    """The files as the record shows them."""
    return {name: file.as_json() for name, file in files.items()}


def scope(tables: Mapping[str, TokenTable]) -> tuple[int, int]:
    """How many texts and tokens the files of one pass were measured on."""
    first = next(iter(tables.values()))
    return len(first.texts), len(first)


def _mean_interval(
    table: TokenTable, column: str, bootstrap: Bootstrap, minus: str | None = None
) -> Interval | None:
    sums = table.per_text(column, *([minus] if minus else []))
    if minus:
        sums = np.stack([sums[:, 0] - sums[:, 1], sums[:, 2]], axis=1)
    return _known(
        paired_bootstrap(sums, ratio_of_sums, resamples=bootstrap.resamples, seed=bootstrap.seed)
    )


def _known(interval: tuple[float, float]) -> Interval | None:
    return None if np.isnan(interval[0]) else interval

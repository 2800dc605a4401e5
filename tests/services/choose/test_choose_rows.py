"""A row of a comparison against means that numpy takes of the same columns."""

from __future__ import annotations

import numpy as np
import pytest

from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_kinds.quantize import QuantizedFile
from so8tqc.services.choose.rows import described, measured_row, scope
from so8tqc.services.qc.judging import Bootstrap

BOOTSTRAP = Bootstrap(200, 0)


def table(seed: int, texts: int = 8, tokens: int = 30, shift: float = 0.0) -> TokenTable:
    make = np.random.default_rng(seed)
    n = texts * tokens
    columns = {name: make.exponential(size=n) + shift for name in COLUMNS}
    columns["same_top"] = (make.uniform(size=n) < 0.8).astype(np.float64)
    return TokenTable(
        columns,
        np.repeat(np.arange(texts, dtype=np.int32), tokens),
        np.tile(np.arange(tokens, dtype=np.int32), texts),
        100,
        tuple(f"t{i}" for i in range(texts)),
    )


def test_its_numbers_are_those_of_the_columns() -> None:
    one = table(0)
    c = one.columns
    row = measured_row(1234, one, None, BOOTSTRAP)
    assert row["bytes"] == 1234
    assert row["kl_mean"] == pytest.approx(c["kl"].mean(), rel=1e-14)
    assert row["kl_99"] == pytest.approx(np.quantile(c["kl"], 0.99), rel=1e-14)
    assert row["top1"] == pytest.approx(c["same_top"].mean(), rel=1e-14)
    ratio = np.exp(c["nll_candidate"].mean()) / np.exp(c["nll_reference"].mean())
    assert row["ppl_ratio"] == pytest.approx(ratio, rel=1e-12)
    for value, interval in (
        (row["kl_mean"], row["kl_ci95"]),
        (row["top1"], row["top1_ci95"]),
        (row["ppl_ratio"], row["ppl_ratio_ci95"]),
        (row["kl_99"], row["kl_99_ci95"]),
    ):
        assert interval is not None
        assert interval[0] < value < interval[1]
    assert "survival" not in row


def test_few_texts_have_no_interval() -> None:
    row = measured_row(1, table(0, texts=3), None, BOOTSTRAP)
    assert row["kl_ci95"] is row["top1_ci95"] is row["ppl_ratio_ci95"] is row["kl_99_ci95"] is None


def test_the_gate_survives_where_the_gated_model_is_nearer() -> None:
    near, far = table(0), table(0, shift=0.5)
    survives = measured_row(1, near, far, BOOTSTRAP)
    assert survives["survives"] is True
    assert survives["survival"] == pytest.approx(-0.5)  # the same in every text
    erased = measured_row(1, far, near, BOOTSTRAP)
    assert erased["survives"] is False
    assert measured_row(1, near, near, BOOTSTRAP)["survives"] is False  # no nearer is not nearer


def test_rows_are_shown_by_size_with_what_each_file_is() -> None:
    file = QuantizedFile(
        type="T",
        path="p",
        bytes=9,
        bits_per_weight=4.5,
        types={"Q4_K": 3},
        fallbacks={},
        tensors={},
        layer_error={},
        attention_output_error={},
    )
    rows = {
        name: measured_row(size, table(0), None, BOOTSTRAP)
        for name, size in (("big", 9), ("small", 2))
    }
    shown = described(rows, dict.fromkeys(rows, file))
    assert list(shown) == ["small", "big"]
    assert shown["big"]["types"] == {"Q4_K": 3}
    assert "tensors" not in shown["big"]
    assert scope({"a": table(0), "b": table(1)}) == (8, 240)

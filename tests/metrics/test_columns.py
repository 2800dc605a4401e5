"""Rows are written by name: whatever the order of the columns, and whatever kernel was kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from so8tqc.metrics.columns import COLUMNS, ROW, SIDE_ROW, Column, Side, as_records

_ROWS = """
import json, sys
import numpy as np, torch
from so8tqc.metrics import columns
if sys.argv[1] == "reversed":
    columns.COLUMNS = columns.COLUMNS[::-1]
    columns.ROW = np.dtype([(name, np.float64) for name in columns.COLUMNS])
from so8tqc.metrics.distributions import distribution
from so8tqc.metrics.divergence import token_rows
z = torch.tensor([[0.0, 1.0, -2.0, 0.5, 3.0, 0.25], [2.0, 1.0, 0.0, -1.0, 4.0, 4.5]])
w = torch.tensor([[0.5, 1.0, -1.0, 0.5, 2.0, 0.5], [2.0, 1.5, 0.0, -1.0, 5.0, 4.5]])
targets = torch.tensor([4, 0])
rows = token_rows(distribution(z, targets), distribution(w, targets)).numpy()
print(json.dumps({name: rows[:, i].tolist() for i, name in enumerate(columns.COLUMNS)}))
"""


def rows(order: str, cache: Path) -> dict[str, list[float]]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", _ROWS, order],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def test_a_kept_kernel_does_not_write_by_an_older_order(tmp_path: Path) -> None:
    usual = rows("usual", tmp_path)
    assert list(tmp_path.rglob("*.nbi"))
    turned = rows("reversed", tmp_path)
    assert list(turned) == list(usual)[::-1] == list(COLUMNS)[::-1]
    assert turned == usual
    assert usual["kl"] != usual["kl_reverse"]


def test_names_and_positions_agree() -> None:
    assert tuple(ROW.names or ()) == COLUMNS
    assert [Column[name.upper()] for name in COLUMNS] == list(range(len(COLUMNS)))
    assert [Side[name.upper()] for name in SIDE_ROW.names or ()] == list(range(len(Side)))


def test_records_are_the_same_memory() -> None:
    numbers = np.arange(2.0 * len(Side)).reshape(2, -1)
    as_records(numbers, SIDE_ROW)["entropy"] = -1.0
    assert (numbers[:, Side.ENTROPY] == -1.0).all()
    assert (numbers == -1.0).sum() == 2
    assert as_records(np.empty((0, len(Column))), ROW).shape == (0,)

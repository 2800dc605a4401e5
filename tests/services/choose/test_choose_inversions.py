"""A larger file that is worse: found, and told by what was measured of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.services.choose.inversions import four_bit_share, inversions
from so8tqc.services.choose.rows import Row
from so8tqc.services.qc.pairwise import Comparisons


def row(size: int, kl: float) -> Row:
    return {
        "bytes": size,
        "kl_mean": kl,
        "kl_ci95": None,
        "kl_99": kl,
        "kl_99_ci95": None,
        "top1": 0.9,
        "top1_ci95": None,
        "ppl_ratio": 1.0,
        "ppl_ratio_ci95": None,
    }


def tensor(values: np.ndarray, name: str = "w") -> GGUFTensor:
    data = values.astype(np.float32)
    return GGUFTensor(name, "F32", data.shape, data.nbytes, 0, data)


def stored(kind: str, error: float, fallback: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": kind, "relative_error": error, "fallback": fallback}


def comparison(
    a: str, b: str, difference: float, ci95: tuple[float, float] | None, winner: str | None
) -> Comparisons:
    measure: Any = {"difference": difference, "ci95": ci95, "p": 0.01}
    pair: Any = {
        "a": a,
        "b": b,
        "kl": measure,
        "nll": measure,
        "top1": measure,
        "winner": winner,
        "sentence": "",
    }
    return {"method": "", "texts": 9, "critical": 2.0, "pairs": [pair]}


SOURCE = GGUFFile(
    Path("x.gguf"),
    {},
    {name: tensor(np.random.default_rng(0).normal(size=(4, 64)), name) for name in ("a", "b", "c")},
)
FILES = {
    "Q4": {"tensors": {"a": stored("Q4_K", 0.1), "b": stored("Q4_K", 0.1), "c": stored("F32", 0)}},
    "Q5": {"tensors": {
        "a": stored("Q5_0", 0.2, {"wanted": "Q5_K", "stored": "Q5_0", "columns": 64, "block": 256}),
        "b": stored("Q5_K", 0.05), "c": stored("F32", 0),
    }},
}  # fmt: skip


def test_it_is_told_whichever_way_round_the_pair_was_compared() -> None:
    rows = {"Q4": row(40, 0.1), "Q5": row(50, 0.3)}
    straight = comparison("Q5", "Q4", 0.2, (0.1, 0.3), "Q4")
    turned = comparison("Q4", "Q5", -0.2, (-0.3, -0.1), "Q4")
    (found,) = inversions(rows, FILES, straight, SOURCE)
    assert inversions(rows, FILES, turned, SOURCE) == [found]
    assert (found["smaller"], found["larger"], found["supported"]) == ("Q4", "Q5", True)
    assert (found["difference"], found["ci95"]) == (0.2, (0.1, 0.3))
    assert (found["compared"], found["worse"]) == (2, 1)
    assert (found["error_smaller"], found["error_larger"]) == (0.1, 0.2)
    assert (found["fallbacks"], found["columns"], found["block"]) == (1, [64], 256)
    assert found["four_bit_share"] == 0.0
    assert "1 of the 2 tensors" in found["sentence"]
    assert "64 columns are no multiple of 256" in found["sentence"]


def test_an_interval_that_holds_zero_is_said() -> None:
    rows = {"Q4": row(40, 0.1), "Q5": row(50, 0.11)}
    (found,) = inversions(rows, FILES, comparison("Q5", "Q4", 0.01, (-0.1, 0.1), None), SOURCE)
    assert not found["supported"]
    assert "does not exclude that they are alike" in found["sentence"]


def test_a_ladder_that_falls_has_none() -> None:
    rows = {"Q4": row(40, 0.3), "Q5": row(50, 0.3), "Q6": row(60, 0.1)}
    assert inversions(rows, FILES, None, SOURCE) == []


def test_a_4_bit_grid_is_told_from_weights_that_were_never_quantized() -> None:
    make = np.random.default_rng(1)
    grid = make.integers(0, 16, size=(8, 64)) * make.uniform(size=(8, 1))
    assert four_bit_share(tensor(grid)) == 1.0
    assert four_bit_share(tensor(make.normal(size=(8, 64)))) == 0.0
    half = np.concatenate([grid, make.normal(size=(8, 64))])
    assert four_bit_share(tensor(half)) == 0.5
    assert four_bit_share(tensor(grid[:, :48])) == 0.0  # 48 columns are no blocks of 32

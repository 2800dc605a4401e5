"""Speeds are medians over repeats, files take turns, and the first round does not count."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from captured_gguf import write_model
from so8tqc.errors import DataError
from so8tqc.llama import speed
from so8tqc.llama.speed import measure_speeds


class Clockwork:
    """A model whose calls take known times: 100 s in the warm-up, then 1, 4, 2 s a call."""

    calls: ClassVar[list[tuple[str, int, int]]] = []

    def __init__(self, path: Path, *, threads: int | None, context: int) -> None:
        self.name = path.name
        self.closed = False
        self._rounds = iter((100.0, 1.0, 4.0, 2.0))
        self._now = 0.0

    def begin(self, length: int) -> None:
        self._now = next(self._rounds)

    def time(self, tokens: np.ndarray, position: int) -> float:
        self.calls.append((self.name, int(tokens.size), position))
        return self._now

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    monkeypatch.setattr(speed, "IsolatedModel", Clockwork)
    Clockwork.calls = []
    return Clockwork.calls


def test_the_median_and_the_spread_of_the_rounds_that_count(
    clockwork: list[tuple[str, int, int]],
) -> None:
    files = {"a": Path("a"), "b": Path("b")}
    found = measure_speeds(files, np.arange(14), new_tokens=4, repeats=3)
    for name in files:
        assert found[name]["prompt"] == {"median": 5.0, "low": 2.5, "high": 10.0}
        assert found[name]["generation"] == {"median": 0.5, "low": 0.25, "high": 1.0}
    one = [(10, 0), (1, 10), (1, 11), (1, 12), (1, 13)]
    assert clockwork == [(name, *call) for _ in range(4) for name in files for call in one]


@pytest.mark.llama
def test_a_real_file_has_a_speed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny-F16.gguf")
    found = measure_speeds({"m": model}, np.arange(40), new_tokens=8, repeats=2, threads=1)
    for rate in found["m"].values():
        assert 0 < rate["low"] <= rate["median"] <= rate["high"] < 1e7
    with pytest.raises(DataError, match="65 tokens are more than the model's context of 64"):
        measure_speeds({"m": model}, np.zeros(65, int), new_tokens=8, repeats=1, threads=1)

"""The monitor as llama-cpp-python's callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from so8tqc import OscillationMonitor


@pytest.mark.llama
def test_in_llama_cpp_python(tiny_gguf: Callable[[int], Path]) -> None:
    """The callbacks of the installed package: 1-D numpy arrays, one sequence."""
    from llama_cpp import Llama, LogitsProcessorList, StoppingCriteriaList

    llm = Llama(str(tiny_gguf(256)), n_ctx=256, n_threads=1, verbose=False)
    monitor = OscillationMonitor(loops=(16, 3, 24), on_alarm=lambda _: None)
    largest: list[float] = []

    def loop(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        largest.append(float(scores.max()))
        if len(ids) >= 24:
            scores[7] = 1e4
        return scores

    tokens = list(
        llm.generate(
            [1, 17, 42, 9],
            temp=0.0,
            logits_processor=LogitsProcessorList([monitor, loop]),
            stopping_criteria=StoppingCriteriaList([monitor.stopping("loop")]),
        )
    )
    assert tokens[-25:] == [7] * 25
    assert len(tokens) == 20 + 25
    assert [alarm.kind for alarm in monitor.alarms] == ["loop"]
    assert monitor._rows[0].step == len(largest) - 1
    llm.close()

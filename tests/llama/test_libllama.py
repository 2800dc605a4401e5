"""What the process must survive: large blocks, and Ctrl-C while a model loads."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from so8tqc.llama import libllama
from so8tqc.llama.child import reason


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def interrupt(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that Python raises, even where the tests run as a job that ignores Ctrl-C."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_an_interruption_is_held_back_not_lost(interrupt: signal.Signals) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), libllama._interrupts_deferred():
        signal.raise_signal(interrupt)
        reached.append(True)
    assert reached == [True]
    assert signal.getsignal(interrupt) is signal.default_int_handler


def test_the_cause_is_preferred_to_the_conclusion() -> None:
    lines = ["load: 0 tokens", "error loading model: no vocabulary", "failed to load model"]
    assert reason(lines) == "error loading model: no vocabulary"
    assert reason(["a", "failed to quantize: disk", "done"]) == "failed to quantize: disk"
    assert reason([]) == "no output"


@pytest.mark.llama
def test_a_block_may_be_as_long_as_the_text(tiny_gguf: Callable[[int], Path]) -> None:
    """libllama aborts the whole process when a batch exceeds its n_batch."""
    from so8tqc.sources.gguf import GGUFSource

    path = tiny_gguf(1024)
    tokens = np.random.default_rng(0).integers(0, 64, size=800)
    source = GGUFSource(path, "long", threads=1)
    (whole,) = (block.numpy().copy() for block in source.logits(tokens, 800))
    parts = np.concatenate([block.numpy().copy() for block in source.logits(tokens, 100)])
    source.close()
    assert whole.shape == (800, 64)
    np.testing.assert_allclose(whole, parts, atol=0.05)

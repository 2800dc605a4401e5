"""The monitor inside generate() and by hand; tests/llama has it inside llama-cpp-python."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from so8tqc import OscillationMonitor
from so8tqc.metrics.sequential import OscillationChart
from so8tqc.monitor import Alarm, OscillationWarning

PROMPT = torch.tensor([[1, 17, 42, 99]])


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(make_model("llama")), dtype=torch.float32)


def feed(monitor: OscillationMonitor, series: np.ndarray, start: int = 3) -> Iterator[int]:
    """Steps of one sequence with distinct tokens, as llama.cpp's callback gets them."""
    text = np.arange(start + series.size, dtype=np.intc)
    for i, x in enumerate(series):
        scores = np.full(8, x - 5, dtype=np.float32)
        scores[i % 8] = x
        assert monitor(text[: start + i], scores) is scores
        yield i


def restless(seed: int, size: int = 900, begin: int = 600) -> np.ndarray:
    generator = np.random.default_rng(seed)
    x = 15 + generator.normal(size=size)
    x[begin:] += 2 * np.where(np.arange(size - begin) % 2, 1.0, -1.0)
    return x


def test_warns_once_at_the_step_at_which_the_chart_alarms() -> None:
    x = restless(0)
    chart = OscillationChart()
    expected = [i for i, value in enumerate(x) if chart.update(float(np.float32(value)))]
    assert len(expected) == 1
    assert 600 <= expected[0] < 700
    monitor = OscillationMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in feed(monitor, x):
            pass
    assert [w.category for w in caught] == [OscillationWarning]
    assert f"after {expected[0]} new tokens: the largest logit oscillates" in str(caught[0].message)
    assert list(monitor.alarms) == [Alarm("oscillation", 0, expected[0])]


def test_in_generate_every_sequence_has_its_own_state_and_nothing_changes(model: Any) -> None:
    """Scores as generate() returns them, charted again by hand, row by row."""
    found: list[Alarm] = []
    monitor = OscillationMonitor(
        batch=4, run_length=200, loops=None, on_alarm=found.append, eos_token_id=2
    )
    options = {
        "max_new_tokens": 200,
        "do_sample": True,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    prompts = torch.tensor([[1, 17, 42, 99], [1, 5, 6, 7], [1, 300, 200, 100]])
    torch.manual_seed(0)
    plain = model.generate(prompts, **options)
    torch.manual_seed(0)
    watched = model.generate(prompts, logits_processor=[monitor], **options)
    assert torch.equal(plain.sequences, watched.sequences)

    expected = []
    for row in range(3):
        chart = OscillationChart(batch=4, run_length=200)
        for step, logits in enumerate(watched.logits):
            if 2 in watched.sequences[row, 4 : 4 + step]:
                break
            if chart.update(float(logits[row].max())):
                expected.append(Alarm("oscillation", row, step))
    assert len(expected) >= 2
    assert sorted(found, key=lambda a: (a.row, a.step)) == expected


def test_a_loop_stops_its_own_sequence_only(model: Any) -> None:
    """Token 7 is forced upon the first sequence from its 20th step on."""
    monitor = OscillationMonitor(loops=(16, 3, 24), eos_token_id=2, on_alarm=lambda _: None)

    def loop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 2] = -torch.inf
        if ids.shape[1] >= 24:
            scores[0, 7] = 1e4
        return scores

    torch.manual_seed(1)
    out = model.generate(
        PROMPT.repeat(2, 1),
        max_new_tokens=80,
        do_sample=True,
        pad_token_id=0,
        logits_processor=[monitor, loop],
        stopping_criteria=[monitor.stopping("loop")],
    )
    (alarm,) = monitor.alarms
    assert (alarm.kind, alarm.row, alarm.period) == ("loop", 0, 1)
    # 25 sevens make a run of 24; one more token is drawn before the sequence ends
    assert (out[0] == 7).sum() == 26
    assert (out[0, 4 + 20 + 26 :] == 0).all()
    assert (out[1, 4:] != 0).sum() > 75


def test_the_padding_of_a_finished_sequence_is_no_loop(model: Any) -> None:
    monitor = OscillationMonitor(loops=(4, 2, 8), eos_token_id=[2])

    def end_first(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[0, 2], scores[1, 2] = 1e4, -torch.inf
        return scores

    torch.manual_seed(0)
    out = model.generate(
        PROMPT.repeat(2, 1),
        max_new_tokens=60,
        do_sample=True,
        pad_token_id=0,
        logits_processor=[end_first, monitor],
    )
    assert out.shape[1] == 64
    assert not [alarm for alarm in monitor.alarms if alarm.row == 0]


def test_beams_are_refused(model: Any) -> None:
    monitor = OscillationMonitor(on_alarm=lambda _: None)
    with pytest.raises(ValueError, match="changed places: OscillationMonitor needs decoding"):
        model.generate(
            PROMPT, max_new_tokens=60, num_beams=4, pad_token_id=0, logits_processor=[monitor]
        )


def test_assisted_decoding_is_refused(model: Any, make_model: Callable[..., Path]) -> None:
    """The assistant's guesses are mostly wrong, so tokens are taken back."""
    from transformers import AutoModelForCausalLM

    assistant = AutoModelForCausalLM.from_pretrained(
        str(make_model("llama", "float32")), dtype=torch.float32
    )
    for parameter in assistant.parameters():
        parameter.data.roll(1, 0) if parameter.ndim == 1 else parameter.data.mul_(-1)
    with pytest.raises(ValueError, match=r"taken back: OscillationMonitor needs decoding"):
        model.generate(
            PROMPT,
            max_new_tokens=60,
            pad_token_id=0,
            assistant_model=assistant,
            do_sample=False,
            logits_processor=[OscillationMonitor(on_alarm=lambda _: None)],
        )


def test_another_call_begins_anew(model: Any) -> None:
    """Also with the same prompt, and with one that is one token longer."""
    monitor = OscillationMonitor(on_alarm=lambda _: None)
    for prompt in (PROMPT, PROMPT, torch.tensor([[1, 2, 3]]), PROMPT.repeat(2, 1)):
        model.generate(
            prompt, max_new_tokens=10, do_sample=True, pad_token_id=0, logits_processor=[monitor]
        )
        assert len(monitor._rows) == prompt.shape[0]
        assert max(row.step for row in monitor._rows) == 9
    longer = torch.arange(100, 100 + monitor._length + 1)[None].repeat(2, 1)
    model.generate(longer, max_new_tokens=1, logits_processor=[monitor], pad_token_id=0)
    assert monitor._rows[0].step == 0


def test_a_series_from_elsewhere_is_the_reference() -> None:
    generator = np.random.default_rng(3)
    calm = 15 + generator.normal(size=1000)
    always = restless(4, size=300, begin=0)
    alone = OscillationMonitor()
    informed = OscillationMonitor(reference=iter(calm), on_alarm=lambda _: None)
    for monitor in (alone, informed):
        for _ in feed(monitor, always):
            pass
    assert not alone.alarms
    assert [alarm.kind for alarm in informed.alarms] == ["oscillation"]


def test_logits_that_are_not_finite_are_reported_once_an_episode() -> None:
    x = restless(5, begin=900)
    x[100:110], x[200] = np.nan, np.inf
    monitor = OscillationMonitor(on_alarm=lambda _: None)
    for _ in feed(monitor, x):
        pass
    assert [(a.kind, a.step) for a in monitor.alarms] == [("non_finite", 100), ("non_finite", 200)]


def test_nothing_is_looked_at_after_the_end_of_text() -> None:
    """Token 53 is the end; after it the logits are what padding gives."""
    x = restless(6, size=300, begin=300)
    x[51:] = np.nan
    for ends, alarms in ((53, 0), (54, 1)):
        monitor = OscillationMonitor(eos_token_id=ends, on_alarm=lambda _: None)
        for _ in feed(monitor, x):
            pass
        assert len(monitor.alarms) == alarms


def test_memory_does_not_grow() -> None:
    monitor = OscillationMonitor()
    x = np.random.default_rng(6).normal(size=4000) + 15
    sizes = [len(pickle.dumps(monitor._rows)) for i in feed(monitor, x) if i in (999, 3999)]
    assert sizes[1] <= sizes[0] + 16


def test_a_criterion_needs_its_monitor(model: Any) -> None:
    with pytest.raises(ValueError, match="hand it to logits_processor, too"):
        model.generate(
            PROMPT,
            max_new_tokens=4,
            pad_token_id=0,
            stopping_criteria=[OscillationMonitor().stopping()],
        )


def test_wrong_arguments_show_at_once() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        OscillationMonitor(batch=2)
    with pytest.raises(ValueError, match="a loop needs"):
        OscillationMonitor(loops=(8, 1, 8))
    with pytest.raises(ValueError, match="a value of the series is nan"):
        OscillationMonitor(reference=[1.0, float("nan")])


def test_stopping_at_an_alarm_that_is_never_given_is_an_error() -> None:
    with pytest.raises(ValueError, match="no alarm of kind 'loops'; there are oscillation, loop"):
        OscillationMonitor().stopping("loop", "loops")  # type: ignore[arg-type]

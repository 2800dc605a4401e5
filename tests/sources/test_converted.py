"""The converter is asked in one way: what it misses, and the model says, is given to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.errors import ToolError
from so8tqc.llama.converter import trace_conversion
from so8tqc.llama.vendor import find_converter, is_vendored
from so8tqc.services.tensors.expected import history_of
from so8tqc.sources.converted.history import NO_MTP, Told, traced, until_understood
from so8tqc.sources.converted.unasked_keys import unasked


@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
def test_whoever_asks_for_the_history_gets_what_an_export_would(
    make_vision_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A saved Idefics 3 does not name its text model's class, which the converter asks for."""
    model = make_vision_model("idefics3")
    checkpoint = open_checkpoint(model)
    with pytest.raises(ToolError, match="not supported"):
        trace_conversion(find_converter(), model, tmp_path / "t.json", unasked(checkpoint))
    conversion = traced(checkpoint)
    read = {source for sources in conversion.sources.values() for source in sources}
    assert {name for name in checkpoint.tensors if "text_model" in name} <= read
    found = history_of(checkpoint)
    assert found.untraced == ""
    assert found.conversion is not None
    assert found.conversion.outputs.keys() == conversion.outputs.keys()


def test_a_key_that_is_missed_is_given_once(make_model: Callable[..., Path]) -> None:
    seen: list[Told] = []

    def attempt(told: Told) -> None:
        seen.append(Told(dict(told.keys), list(told.arguments)))
        if "rotary_pct" not in told.keys:
            raise ToolError("the converter failed (1): KeyError: 'rotary_pct'")

    told = until_understood(attempt, open_checkpoint(make_model("llama")), ["--verbose"])
    assert told.keys["rotary_pct"] == 1.0
    assert told.arguments == ["--verbose"]
    assert len(seen) == 2


def test_layers_of_further_tokens_are_left_out_once(make_model: Callable[..., Path]) -> None:
    given: list[list[str]] = []

    def attempt(told: Told) -> None:
        given.append(list(told.arguments))
        raise ToolError("the converter failed (1): AssertionError")

    with pytest.raises(ToolError):
        until_understood(attempt, open_checkpoint(make_model("llama")))
    assert given == [[], [NO_MTP]]


def test_what_the_model_does_not_say_is_not_made_up(make_model: Callable[..., Path]) -> None:
    tried = 0

    def attempt(told: Told) -> None:
        nonlocal tried
        tried += 1
        raise ToolError("the converter failed (1): KeyError: 'moons_of_jupiter'")

    with pytest.raises(ToolError, match="moons_of_jupiter"):
        until_understood(attempt, open_checkpoint(make_model("llama")))
    assert tried == 1

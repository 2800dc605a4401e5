"""Chat templates as fixed text around messages: what the Go template says is what jinja says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfile import execute, read

from so8tqc.errors import ModelError
from so8tqc.services.serving.facts import Serving, Temperature, Token
from so8tqc.services.serving.runtimes import modelfile
from so8tqc.services.serving.turns import render, turns_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}[SYS]{{ m.content }}[/SYS]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_IN_THE_FIRST_TURN = (
    "{{ bos_token }}{% set ns = namespace(lead='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.lead = m.content + '\n\n' %}{% else %}"
    "<turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ ns.lead }}{{ m.content }}</turn>\n"
    "{% set ns.lead = '' %}{% endif %}{% endfor %}<turn>model\n"
)
FIXED = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "llama 3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "system in the first turn": SYSTEM_IN_THE_FIRST_TURN,
}

OTHER = {
    "numbers its turns": "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}A:",
    "shows the last answer alone": (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.index0 > 1 %}"
        "<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}<a>"
    ),
    "changes the content": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
    ),
    "today": "Today {{ strftime_now('%d') }}" + CHATML,
    "malformed": "{% for m in messages %}",
    "refuses": "{{ raise_exception('never') }}",
    "lengths": (
        "{% for m in messages %}{{ m.role }}{{ m.content|length }}{{ m.content }}{% endfor %}"
    ),
}

_TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)


def serving(template: str, *, adds_bos: bool = False) -> Serving:
    return Serving(
        gguf=Path("/models/a.gguf"),
        name="a",
        temperature=Temperature(None, "None."),
        sampling={},
        template=template,
        bos=Token(1, "<s>"),
        adds_bos=adds_bos,
        stops=(Token(2, "</s>"),),
        declared={"eos": 2},
        notices=(),
    )


@pytest.mark.parametrize("name", FIXED)
@given(
    contents=st.lists(_TEXT, min_size=5, max_size=5), system=st.booleans(), turns=st.integers(0, 1)
)
@settings(max_examples=25, deadline=None)
def test_ollama_is_told_what_the_template_renders(
    name: str, contents: list[str], system: bool, turns: int
) -> None:
    if name == "gemma":
        system = False
    roles = ["system"] * system + ["user", "assistant"] * turns + ["user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    written = modelfile(serving(FIXED[name]))
    (go,) = [value for key, value in read(written.text) if key == "TEMPLATE"]
    assert execute(go, messages) == render(FIXED[name], messages, SPECIAL)


def test_a_bos_that_the_runtime_adds_is_left_out() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for adds, start in ((True, ""), (False, "<s>")):
        written = modelfile(serving(LLAMA3, adds_bos=adds))
        (go,) = [value for key, value in read(written.text) if key == "TEMPLATE"]
        assert execute(go, messages) == start + render(LLAMA3, messages, SPECIAL)[3:]


@pytest.mark.parametrize("name", OTHER)
def test_a_template_that_does_more_is_not_approximated(name: str) -> None:
    assert turns_of(OTHER[name], SPECIAL) is None
    written = modelfile(serving(OTHER[name]))
    assert not [value for key, value in read(written.text) if key == "TEMPLATE"]
    assert "Ollama looks for one that it knows" in written.notices[0]


def test_what_go_would_read_as_an_action_is_not_written() -> None:
    template = "{% for m in messages %}{{ '{{' }}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    assert turns_of(template, SPECIAL) is not None
    assert "TEMPLATE" not in modelfile(serving(template)).text


def test_no_place_for_a_system_message_is_told() -> None:
    assert "no place for a system message" in modelfile(serving(GEMMA)).notices[0]


def test_a_path_that_no_modelfile_can_hold_is_refused() -> None:
    odd = dataclasses.replace(serving(""), gguf=Path('/a"""b.gguf'))
    with pytest.raises(ModelError, match="cannot hold"):
        modelfile(odd)
    quoted = dataclasses.replace(serving(""), gguf=Path('/a "b" c.gguf'))
    assert read(modelfile(quoted).text)[0] == ("FROM", '/a "b" c.gguf')

"""Each runtime's own form of what it is to be told."""

from __future__ import annotations

import json
import shlex
from typing import NamedTuple

from pydantic import JsonValue

from so8tqc.errors import ModelError
from so8tqc.services.serving.facts import Serving
from so8tqc.services.serving.turns import Turns, turns_of


class Written(NamedTuple):
    """A runtime's file, and what is to be said of it."""

    text: str
    notices: tuple[str, ...] = ()


def modelfile(serving: Serving) -> Written:
    """Ollama's Modelfile: FROM, the template in Go's language, parameters.

    Ollama's own TEMPLATE is left out where the chat template cannot be put into it; Ollama then
    looks for one that it knows by the file's.

    Raises:
        ModelError: a path or a token that a Modelfile cannot hold.
    """
    lines = [f"# {_one_line(serving.temperature.origin)}", f"FROM {_quoted(str(serving.gguf))}"]
    notices = []
    if serving.template:
        turns = turns_of(serving.template, _special(serving))
        go = None if turns is None else _go(turns, serving)
        if go is None:
            notices.append(
                "The chat template is more than fixed text around each message, or cannot be "
                "written in Ollama's language: Ollama looks for one that it knows."
            )
        else:
            lines.append(f'TEMPLATE """{go}"""')
            if turns is not None and "system" not in turns.before:
                notices.append("The chat template has no place for a system message.")
    if serving.temperature.value is not None:
        lines.append(f"PARAMETER temperature {_number(serving.temperature.value)}")
    lines += [f"PARAMETER {name} {_number(value)}" for name, value in serving.sampling.items()]
    lines += [f"PARAMETER stop {_quoted(token.text)}" for token in serving.stops]
    return Written("\n".join(lines) + "\n", tuple(notices))


def llama_server(serving: Serving) -> Written:
    """llama-server's command line. The file brings its chat template, and the tokens that it names
    as ends; one more of each kind that it does not name can be told."""
    words = ["llama-server", "--model", str(serving.gguf)]
    if serving.template:
        words.append("--jinja")
    if serving.temperature.value is not None:
        words += ["--temp", _number(serving.temperature.value)]
    names = {"top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p"}
    for name, value in serving.sampling.items():
        words += [names[name], _number(value)]
    free = [name for name in ("eot", "eom") if name not in serving.declared]
    notices = []
    for token in serving.stops:
        if token.id in serving.declared.values():
            continue
        if free:
            key = f"tokenizer.ggml.{free.pop(0)}_token_id=int:{token.id}"
            words += ["--override-kv", key]
        else:
            notices.append(
                f"{token.text} ends an answer by the model's generation config, and there is no "
                "key left to say so: give it as stop with each request."
            )
    return Written(f"# {_one_line(serving.temperature.origin)}\n{shlex.join(words)}\n", (*notices,))


def llama_cpp_python(serving: Serving) -> Written:
    """A script that loads the file and answers its argument."""
    sampling = {**serving.sampling}
    if serving.temperature.value is not None:
        sampling = {"temperature": serving.temperature.value, **sampling}
    stop = [token.text for token in serving.stops]
    given = "".join(f"    {name}={value!r},\n" for name, value in sampling.items())
    if serving.template:
        call = 'create_chat_completion(\n    messages=[{"role": "user", "content": sys.argv[1]}],\n'
        shown = 'reply["choices"][0]["message"]["content"]'
    else:
        call, shown = "create_completion(\n    sys.argv[1],\n", 'reply["choices"][0]["text"]'
    return Written(
        f"# {_one_line(serving.temperature.origin)}\n"
        "import sys\n\nfrom llama_cpp import Llama\n\n"
        f"model = Llama(model_path={str(serving.gguf)!r}, n_ctx=0, verbose=False)\n"
        f"reply = model.{call}{given}    stop={stop!r},\n    max_tokens=None,\n)\n"
        f"print({shown})\n"
    )


def transformers_config(serving: Serving) -> Written:
    """transformers' ``generation_config.json``, for a model directory or a GGUF that it loads."""
    config: dict[str, JsonValue] = {"so8tqc": serving.temperature.origin}
    if serving.temperature.value is not None:
        config |= {"do_sample": True, "temperature": serving.temperature.value}
    config.update(serving.sampling)
    config["eos_token_id"] = [token.id for token in serving.stops]
    if serving.bos is not None:
        config["bos_token_id"] = serving.bos.id
    return Written(_json(config))


def lm_studio(serving: Serving) -> Written:
    """LM Studio's preset."""
    fields: list[JsonValue] = []

    def add(key: str, value: JsonValue) -> None:
        fields.append({"key": f"llm.prediction.{key}", "value": value})

    if serving.temperature.value is not None:
        add("temperature", serving.temperature.value)
    for name, key in (("top_p", "topPSampling"), ("min_p", "minPSampling")):
        if name in serving.sampling:
            add(key, {"checked": True, "value": serving.sampling[name]})
    if "top_k" in serving.sampling:
        add("topKSampling", serving.sampling["top_k"])
    add("stopStrings", [token.text for token in serving.stops])
    if serving.template:
        special = _special(serving)
        jinja: JsonValue = {
            "template": serving.template,
            "bosToken": special.get("bos_token", ""),
            "eosToken": special.get("eos_token", ""),
        }
        add("promptTemplate", {"type": "jinja", "jinjaPromptTemplate": jinja, "stopStrings": []})
    name = f"{serving.name}: {serving.temperature.origin}"
    return Written(
        _json(
            {
                "identifier": f"@local:{serving.name}",
                "name": name,
                "changed": False,
                "operation": {"fields": fields},
                "load": {"fields": []},
            }
        )
    )


def _special(serving: Serving) -> dict[str, str]:
    """What a chat template calls BOS and EOS; the file's own."""
    eos = serving.declared.get("eos")
    texts = {token.id: token.text for token in serving.stops}
    special = {} if serving.bos is None else {"bos_token": serving.bos.text}
    return special if eos is None else {**special, "eos_token": texts[eos]}


def _go(turns: Turns, serving: Serving) -> str | None:
    """The turns in Go's template language; None if a text has what would be read as an action."""
    opening = turns.opening
    if serving.adds_bos and serving.bos is not None:
        opening = opening.removeprefix(serving.bos.text)  # Ollama puts it in front by itself
    around = (*turns.before.values(), *turns.after.values())
    texts = (opening, turns.without_system, turns.prompt, *around)
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    parts = [opening]
    if turns.without_system:
        parts.append(f"{{{{ if not .System }}}}{turns.without_system}{{{{ end }}}}")
    parts.append("{{ range .Messages }}")
    word = "if"
    for role, before in turns.before.items():
        parts.append(f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}')
        parts.append(turns.after[role])
        word = "else if"
    return "".join((*parts, "{{ end }}{{ end }}", turns.prompt))


def _quoted(text: str) -> str:
    """A value of a Modelfile, which knows no escapes."""
    if "\n" in text or "\r" in text or '"""' in text:
        raise ModelError(f"a Modelfile cannot hold {text!r}")
    if '"' in text:
        return f'"""{text}"""'
    return f'"{text}"'


def _number(value: float) -> str:
    """The shortest decimal of what the file holds in float32; whole numbers without a point."""
    return f"{value:.7g}"


def _json(value: dict[str, JsonValue]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())

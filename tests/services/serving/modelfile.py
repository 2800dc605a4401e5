"""Strict readers of what Ollama reads: a Modelfile, and a template in the part of Go in use.

The grammar is that of Ollama's documentation: a line is a comment, or an instruction and its
value; a value is bare, in double quotes, or in three of them over several lines; nothing is
escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE")
FLOATS = {"temperature", "top_p", "min_p"}
INTEGERS = {"top_k", "num_ctx"}


def read(text: str) -> list[tuple[str, str]]:
    """(instruction, value) in order; of PARAMETER the value is ``name=value``.

    Raises:
        ValueError: something that is none.
    """
    found = []
    while text:
        line = re.match(r"#[^\n]*\n|\s+", text)
        if line:
            text = text[line.end() :]
            continue
        head = re.match(r"([A-Z]+) (?:(?<=PARAMETER )([a-z_]+) )?", text)
        if head is None or head[1] not in INSTRUCTIONS:
            raise ValueError(f"no instruction: {text[:40]!r}")
        value, text = _value(text[head.end() :])
        if head[1] == "PARAMETER":
            if head[2] in FLOATS:
                float(value)
            elif head[2] in INTEGERS:
                int(value)
            elif head[2] != "stop":
                raise ValueError(f"no parameter: {head[2]}")
            value = f"{head[2]}={value}"
        found.append((head[1], value))
    return found


def _value(text: str) -> tuple[str, str]:
    for quote in ('"""', '"'):
        if text.startswith(quote):
            inside, end, rest = text[len(quote) :].partition(quote)
            if not end or not rest.startswith("\n") or (quote == '"' and "\n" in inside):
                raise ValueError(f"a quote without an end: {text[:40]!r}")
            return inside, rest[1:]
    bare, _, rest = text.partition("\n")
    return bare, rest


def execute(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """A Go template of ``if``, ``else if``, ``range .Messages`` and ``.Content``, run.

    Raises:
        ValueError: an action that is none of these.
    """
    words = iter(re.split(r"\{\{ (.*?) \}\}", template))
    tree, ended = _parse(words)
    assert ended == ""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return _run(tree, {"system": system, "messages": messages})


def _parse(words: Iterator[str]) -> tuple[list[object], str]:
    """Text, actions and blocks up to the action that ends this one, which is returned, too."""
    tree: list[object] = [next(words)]
    for action in words:
        if action == "end" or action.startswith("else"):
            return tree, action
        if action.startswith(("if ", "range ")):
            branches, ended = [], action
            while ended != "end":
                body, after = _parse(words)
                branches.append((ended.removeprefix("else "), body))
                ended = after
            tree.append(branches)
        else:
            tree.append((action,))
        tree.append(next(words))
    return tree, ""


def _run(tree: list[object], scope: Mapping[str, object]) -> str:
    parts = []
    for node in tree:
        if isinstance(node, str):
            parts.append(node)
        elif isinstance(node, tuple):
            if node != (".Content",):
                raise ValueError(f"no action: {node}")
            parts.append(str(scope["content"]))
        elif node[0][0] == "range .Messages":
            parts += [_run(node[0][1], {**scope, **message}) for message in scope["messages"]]
        else:
            chosen = next((body for test, body in node if _holds(test, scope)), [])
            parts.append(_run(chosen, scope))
    return "".join(parts)


def _holds(test: str, scope: Mapping[str, object]) -> bool:
    if test == "if not .System":
        return not scope["system"]
    role = re.fullmatch(r'if eq \.Role "([a-z]+)"', test)
    if role is None:
        raise ValueError(f"no condition: {test}")
    return scope["role"] == role[1]

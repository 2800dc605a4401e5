"""A chat template that is fixed text around each message, found by rendering it.

Ollama's templates are Go's, and there is no translation of jinja. But most chat templates only put
something in front of a message and behind it, by its role. What they put there is read off
renderings of marked messages; that this is all they do is checked on conversations of other shapes.
A template that does more has no turns, and that is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from so8tqc.errors import ModelError

Message = Mapping[str, str]

_MARKS = {"system": "ⓢ¹ⓢ", "user": "ⓤ²ⓤ", "assistant": "ⓐ³ⓐ"}
_OF_THE_DAY = "strftime_now"
"""What a template calls for today's date, which no fixed text is."""


class Turns(NamedTuple):
    """Fixed text: a conversation is ``opening``, the turns, ``prompt``.

    ``without_system`` stands where a conversation has no system message; ``before`` and ``after``
    are what stands around a message, by its role; without a role, it has no place in the template.
    """

    opening: str
    without_system: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a message of the user, and the prompt for an answer."""
        system = messages[0]["role"] == "system"
        parts = [self.opening, "" if system else self.without_system]
        for message in messages:
            role = message["role"]
            parts += [self.before[role], message["content"], self.after[role]]
        return "".join((*parts, self.prompt))


def render(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """A conversation and the prompt for an answer, in transformers' sandbox.

    Raises:
        ModelError: the template cannot be rendered with these messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=True,
            **special,
        )
    except Exception as error:  # noqa: BLE001  a template may raise whatever jinja2 does
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"its chat template cannot be rendered: {reason[0][:300]}") from None
    return str(rendered[0])


def turns_of(template: str, special: Mapping[str, str]) -> Turns | None:
    """The turns of a template; None where it is more, or other, than fixed text around messages.

    Args:
        template: jinja.
        special: what the template may ask for: ``bos_token``, ``eos_token``.
    """
    if _OF_THE_DAY in template:
        return None
    try:
        found = _read_off(template, special)
        if found is None:
            return None
        probes = [c for c in _PROBES if "system" in found.before or c[0]["role"] != "system"]
        same = all(render(template, probe, special) == found.render(probe) for probe in probes)
    except ModelError:
        return None
    return found if same else None


def _read_off(template: str, special: Mapping[str, str]) -> Turns | None:
    """Where a text between two messages ends the one and begins the other is chosen so that it fits
    both neighbours: the longest beginning, or end, that they have in common."""
    alone = _around(template, ("user",), special)
    spoken = _around(template, ("user", "assistant", "user"), special)
    if alone is None or spoken is None:
        return None
    try:
        told = _around(template, ("system", "user"), special)
    except ModelError:  # the template has no place for one
        told = None
    start, end = alone
    _, to_answer, to_user, _ = spoken
    opening = start if told is None else _common_start(start, told[0])
    after_user = _common_start(to_answer, end)
    own = start.removeprefix(opening)
    before_user = _common_end(own, to_user) if told is None else _common_end(own, to_user, told[1])
    before = {"user": before_user, "assistant": to_answer.removeprefix(after_user)}
    after = {"user": after_user, "assistant": to_user[: len(to_user) - len(before_user)]}
    if told is not None:
        before["system"] = told[0].removeprefix(opening)
        after["system"] = told[1][: len(told[1]) - len(before_user)]
    without = own[: len(own) - len(before_user)]
    return Turns(opening, without, before, after, end.removeprefix(after_user))


def _around(
    template: str, roles: Sequence[str], special: Mapping[str, str]
) -> tuple[str, ...] | None:
    """The texts before, between and after messages of these roles; None if one is not there once.

    Raises:
        ModelError: the template refuses them.
    """
    rest = render(template, [{"role": role, "content": _MARKS[role]} for role in roles], special)
    parts = []
    for role in roles:
        part, mark, rest = rest.partition(_MARKS[role])
        if not mark:
            return None
        parts.append(part)
    return None if any(mark in rest for mark in _MARKS.values()) else (*parts, rest)


def _common_start(first: str, *others: str) -> str:
    return first[: _shared(first, *others)]


def _common_end(first: str, *others: str) -> str:
    length = _shared(*(text[::-1] for text in (first, *others)))
    return first[len(first) - length :]


def _shared(*texts: str) -> int:
    """Characters that the texts have in common at their beginning."""
    columns = enumerate(zip(*texts, strict=False))
    return next((at for at, column in columns if len(set(column)) > 1), min(map(len, texts)))


def _conversation(*roles: str) -> tuple[Message, ...]:
    words = ("What is 2 + 2?", "It is four.\n\nIs that all?", "No: {x} and\tmore", "ありがとう。")
    return tuple({"role": role, "content": words[i % 4]} for i, role in enumerate(roles))


_PROBES = (
    _conversation("user"),
    _conversation("system", "user"),
    _conversation("user", "assistant", "user"),
    _conversation("system", "user", "assistant", "user"),
    _conversation("user", "assistant", "user", "assistant", "user"),
    _conversation("system", "user", "assistant", "user", "assistant", "user"),
)

"""Every ``so8tqc`` command in the documentation is one that the app accepts."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from blocks import PAGES, ROOT, blocks_of, commands_of
from parsing import options_of, parse
from typer.main import get_command

from so8tqc.check_guide import GUIDE
from so8tqc.cli.app import app

_GENERATED = "docs/commands.md"
_INLINE = re.compile(r"`(so8tqc [^`]+)`")
_SHELLS = ("bash", "console")


@pytest.mark.parametrize("page", [page for page in PAGES if page != _GENERATED])
def test_commands_in_blocks(page: str) -> None:
    for block in blocks_of(page):
        if block.language in _SHELLS:
            for arguments in commands_of(block):
                parse(arguments)
        else:
            first_words = [line.split()[:1] for line in block.text.splitlines()]
            assert ["so8tqc"] not in first_words, (
                f"{page}:{block.line}: fence commands as bash, transcripts as console"
            )


@pytest.mark.parametrize("page", [page for page in PAGES if page != _GENERATED])
def test_commands_in_sentences(page: str) -> None:
    for text in _INLINE.findall((ROOT / page).read_text(encoding="utf-8").replace("\n", " ")):
        _check_words(text, page)


def test_commands_in_remedies() -> None:
    commands = [
        match[1]
        for guide in GUIDE.values()
        for match in re.finditer(r"(so8tqc [a-z]+[^.;)]*)", guide.remedy)
    ]
    assert len(commands) > 10
    for text in commands:
        _check_words(text, "check_guide")


def test_examples_in_help() -> None:
    pending: list[Any] = list(get_command(app).commands.values())  # type: ignore[attr-defined]
    while pending:
        command = pending.pop()
        examples = list(_examples(command.help))
        assert examples, command.name
        for example in examples:
            parse(shlex.split(example)[1:])
        pending += getattr(command, "commands", {}).values()


def test_a_wrong_line_is_seen() -> None:
    for wrong in (["bkae", "a"], ["bake", "a", "b"], ["report", "a", "--outt", "b"], ["qc", "x"]):
        with pytest.raises(Exception, match=r"[Nn]o such|[Mm]issing"):
            parse(wrong)
    with pytest.raises(AssertionError):
        _check_words("so8tqc report --outt", "here")
    with pytest.raises(AssertionError):
        _check_words("so8tqc reprot", "here")


def _check_words(text: str, where: str) -> None:
    """A command named in prose: the command exists, and each option that it names."""
    words = [word.strip("[](),") for word in text.split()[1:]]
    if not words or not re.match(r"^[a-z]", words[0]):
        return
    try:
        known = options_of(words)
    except KeyError as error:
        raise AssertionError(f"{where}: no command {error} in {text!r}") from None
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{where}: no option {word} in {text!r}"


def _examples(text: str) -> Iterator[str]:
    """Indented command lines of a help text; more deeply indented ones go on."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        joined = " ".join(line.strip() for line in paragraph.splitlines())
        if joined.startswith("so8tqc "):
            yield joined

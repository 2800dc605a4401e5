"""Code blocks of the documentation.

A shell block is fenced as ``bash``. It is run by ``test_shell_blocks.py``, the blocks of a page in
order and in one directory, unless the line before it is ``<!-- not run: REASON -->``. A
transcript is fenced as ``console``: its commands follow ``$``. Both kinds have every ``so8tqc``
command parsed by ``test_command_lines.py``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README*.md", "docs/**/*.md", "data/**/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?")
_COMMAND = re.compile(r"^(?:!\s+|accelerate launch .*-m\s+|[A-Z0-9_]+=\S*\s+)*(so8tqc\s.*)$")


class Block(NamedTuple):
    """A fenced block; ``reason`` is why it is not run, "" if it is."""

    page: str
    line: int
    language: str
    text: str
    reason: str


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks of a page (path relative to the repository)."""
    content = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            content.count("\n", 0, match.start("text")),
            match["language"],
            match["text"],
            match["reason"] or "",
        )
        for match in _FENCE.finditer(content)
    ]


def lines_of(block: Block) -> list[str]:
    """The command lines of a shell block: continued lines joined, here-documents kept whole."""
    lines: list[str] = []
    ending = ""
    for line in block.text.splitlines():
        if ending:
            lines[-1] += "\n" + line
            if line == ending:
                ending = ""
        elif lines and lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1] + line.strip()
        elif line.strip() and not line.lstrip().startswith("#"):
            lines.append(line)
            if match := _HEREDOC.search(line):
                ending = match[1]
    assert not ending, f"{block.page}:{block.line}: a here-document does not end"
    return lines


def commands_of(block: Block) -> list[list[str]]:
    """Arguments of every ``so8tqc`` command of a block, without ``so8tqc`` itself."""
    lines = lines_of(block) if block.language == "bash" else _typed(block)
    found = []
    for line in lines:
        for part in re.split(r"\s(?:&&|\|\||\|)\s", line.split("\n")[0]):
            if match := _COMMAND.match(part.strip()):
                found.append(shlex.split(match[1], comments=True)[1:])
    return found


def _typed(block: Block) -> list[str]:
    """What follows ``$`` in a transcript."""
    return [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]

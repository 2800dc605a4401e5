"""README.md and README.ja.md say the same: commands, numbers, links, shape."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, JAPANESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md")
)
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?")

WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "seven": "7", "ten": "10"}
WORDS["half"] = "0.5"
"""What English may spell and Japanese writes in figures."""


def blocks(text: str) -> list[str]:
    """Code blocks without their comments."""
    return [re.sub(r"\s+# .*$", "", block, flags=re.MULTILINE) for block in BLOCK.findall(text)]


def sections(text: str) -> list[str]:
    """Prose and tables between headings, without code blocks and the targets of links."""
    return re.split(r"^#+ .*$", LINK.sub("]", BLOCK.sub("", text)), flags=re.MULTILINE)


def numbers(text: str) -> Counter[str]:
    return Counter(number.rstrip(",.") for number in NUMBER.findall(text))


def test_the_same_commands_in_the_same_order() -> None:
    assert len(blocks(ENGLISH)) == 5
    assert blocks(JAPANESE) == blocks(ENGLISH)


def test_the_same_numbers_in_every_section() -> None:
    english, japanese = sections(ENGLISH), sections(JAPANESE)
    assert len(english) == len(japanese) > 6
    for ours, theirs in zip(english, japanese, strict=True):
        assert numbers(ours) - numbers(theirs) == Counter(), "missing"
        words = Counter(WORDS[word] for word in re.findall(r"[a-z]+", ours) if word in WORDS)
        assert numbers(theirs) - numbers(ours) - words == Counter(), "made up"
    assert sum(sum(numbers(part).values()) for part in english) > 100


def test_the_same_options_and_names_in_code() -> None:
    """What stands between backticks is to be typed, or is a name: it has no translation."""
    prose = [BLOCK.sub("", text).replace("\n", " ") for text in (ENGLISH, JAPANESE)]
    assert set(INLINE.findall(prose[1])) == set(INLINE.findall(prose[0]))


@pytest.mark.parametrize(("text", "other"), [(ENGLISH, "README.ja.md"), (JAPANESE, "README.md")])
def test_each_links_to_the_other_and_every_link_leads_somewhere(text: str, other: str) -> None:
    targets = LINK.findall(text)
    assert other in targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_same_links() -> None:
    languages = {"README.md", "README.ja.md"}
    assert set(LINK.findall(JAPANESE)) - languages == set(LINK.findall(ENGLISH)) - languages


def test_tables_have_the_same_shape() -> None:
    shapes = [
        [line.count("|") for line in text.splitlines() if line.startswith("|")]
        for text in (ENGLISH, JAPANESE)
    ]
    assert shapes[0] == shapes[1]

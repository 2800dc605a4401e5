"""From paragraphs to passages: of sane length, prose, in one language, and each only once."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from so8tqc.corpus.manifest import Domain, Language

WORDS_EN = (60, 400)
CHARACTERS_JA = (150, 1200)
"""Least and largest length of a passage, in words and in characters."""

ENOUGH_EN = 110
ENOUGH_JA = 260
"""Length at which a passage is not made longer: many short passages say more than few long ones."""

NEAR_DUPLICATE = 0.5
"""Share of the shorter passage's shingles that also stand in an earlier one."""

_SHINGLE_WORDS = 5
_SHINGLE_CHARACTERS = 10
_COMMON_EN = frozenset(
    re.findall(
        r"\w+",
        "the of and to a in is that it as for was with be by on are which or an from this at not "
        "his have has were but their its they he had can one been into other more than",
    )
)
"""Words of which every English paragraph has some, and a list of names or of options has few."""


@dataclass(frozen=True)
class Passage:
    """One passage of the calibration set.

    Attributes:
        id: distinct and stable.
        text: the passage.
        language: ``en`` or ``ja``.
        domain: one of the ten.
        source: ``client:package``, or ``written``.
        licence: SPDX expression.
        title: name of the document it is from.
        prompt: what it answers, "" if there is none.
    """

    id: str
    text: str
    language: Language
    domain: Domain
    source: str
    licence: str
    title: str = ""
    prompt: str = ""


def length(text: str, language: Language) -> int:
    """Words of an English text, characters of a Japanese one."""
    return len(text.split()) if language == "en" else len(text)


def pack(paragraphs: Sequence[str], language: Language) -> Iterator[str]:
    """Passages of consecutive prose paragraphs, within the limits of length.

    A paragraph that is not prose ends a passage; one that is too long is cut between sentences.
    """
    least, most = WORDS_EN if language == "en" else CHARACTERS_JA
    enough = ENOUGH_EN if language == "en" else ENOUGH_JA
    current: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if not is_prose(paragraph, language):
            if size >= least:
                yield "\n\n".join(current)
            current, size = [], 0
            continue
        for piece in _cut(paragraph, language, enough):
            count = length(piece, language)
            if current and size + count > most:
                if size >= least:
                    yield "\n\n".join(current)
                current, size = [], 0
            current.append(piece)
            size += count
            if size >= enough:
                if size <= most:
                    yield "\n\n".join(current)
                current, size = [], 0
    if size >= least:
        yield "\n\n".join(current)


def _cut(paragraph: str, language: Language, enough: int) -> list[str]:
    """A paragraph as runs of whole sentences, each a passage's length at least."""
    if length(paragraph, language) < 2 * enough:
        return [paragraph]
    ends = (
        r"(?<=[.!?]) +(?=[A-Z\"'(“])"
        if language == "en"
        else r"(?<=[。．！？])(?![」』）])|(?<=[^\x00-\xff]\.) "
    )
    pieces: list[str] = []
    current = ""
    for sentence in re.split(ends, paragraph):
        glue = " " if language == "en" and current else ""
        current = f"{current}{glue}{sentence}"
        if length(current, language) >= enough:
            pieces.append(current)
            current = ""
    if current:
        if pieces and length(current, language) < enough // 2:
            pieces[-1] += (" " if language == "en" else "") + current
        else:
            pieces.append(current)
    return pieces


def is_prose(text: str, language: Language) -> bool:
    """Whether a paragraph reads as sentences of its language: no code, table, list of names."""
    text = text.strip()
    if not text or re.search(r"[{}<>\\|]|https?:|www\.|==|\$\$|\t|�|\.\.\.\.|__|\(\)", text):
        return False
    if sum(c.isdigit() for c in text) > 0.12 * len(text):
        return False
    if language == "en":
        words = re.findall(r"[a-z]+", text.lower())
        letters = sum("a" <= c <= "z" for c in text.lower())
        common = sum(word in _COMMON_EN for word in words)
        return (
            text[-1] in ".!?\"')”’:" and letters >= 0.7 * len(text) and common >= 0.2 * len(words)
        )
    if re.match(r"という|といった|など|[をへ]|[はがとにでも][、，]", text):
        return False  # goes on after something that was left out
    kana = len(re.findall(r"[ぁ-ん]", text))
    japanese = len(re.findall(r"[ぁ-んァ-ヶー一-龥々、。，．「」『』（）・！？〇]", text))
    return (
        text[-1] in "。．.！？」』）" and kana >= 0.2 * len(text) and japanese >= 0.75 * len(text)
    )


def shingles(text: str, language: Language) -> frozenset[int]:
    """Hashes of a text's runs of words (English) or characters (Japanese), normalised.

    Normalised is NFKC, lower case, letters and digits alone.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    if language == "en":
        words = re.findall(r"[^\W_]+", folded)
        runs = {
            " ".join(words[i : i + _SHINGLE_WORDS])
            for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))
        }
    else:
        letters = "".join(c for c in folded if c.isalnum())
        runs = {
            letters[i : i + _SHINGLE_CHARACTERS]
            for i in range(max(1, len(letters) - _SHINGLE_CHARACTERS + 1))
        }
    return frozenset(
        int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs
    )


def without_duplicates(passages: Iterable[Passage]) -> list[Passage]:
    """The passages, in their order, less those that repeat an earlier one.

    Compared by shingles, exactly (an inverted index; no sketch): a passage goes if at least
    ``NEAR_DUPLICATE`` of the shingles of the shorter of the two are shared. Of two equal
    passages all are.
    """
    kept: list[Passage] = []
    sizes: list[int] = []
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for passage in passages:
        runs = shingles(passage.text, passage.language)
        shared = Counter(holder for run in runs for holder in holders.get(run, ()))
        if any(
            count >= NEAR_DUPLICATE * min(len(runs), sizes[holder])
            for holder, count in shared.items()
        ):
            continue
        for run in runs:
            holders[run].append(len(kept))
        sizes.append(len(runs))
        kept.append(passage)
    return kept

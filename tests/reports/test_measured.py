"""Measured sentences in other languages: each that a service can write, its numbers untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from source_sentences import of_services, sentences

import so8tqc
from so8tqc.languages import Language
from so8tqc.reports.language import spoken
from so8tqc.reports.measured import measured
from so8tqc.reports.measured import sentences as translated

OTHERS = [language for language in Language if language is not Language.ENGLISH]
HOLE = re.compile(r"\{\d+\}")
TYPED = re.compile(
    r"so8tqc [a-z]+( [^（）。]*)?|--[a-z-]+ \w+|\b(convention|site) 7|generation config"
)
"""Commands, and what options are called."""
ENGLISH = re.compile(r"[a-z]{3,} [a-z]{2,}")


BEYOND_THE_WALK = {
    "{0} in layer {1} {2}, block {3}",
    "attention output",
    "von Neumann ratio",
    "second-difference energy {0} and high-frequency share {1}",
    "{0} is recommended: the smallest of the {1} tried that keeps {2}",
    "{0} is recommended: the lowest KL of the {1} tried within {2}",
    "None of the {0} tried keeps {1}",
    "the nearest is {0}: {1}",
    "It misses: {0}",
    "{0}, mean KL {1}, same top {2}",
    "the reference's top token in at least {0} of places",
    "the budget ({0})",
}
"""Written through lists, tables and values that are joined: test_real_measured.py meets them."""


@pytest.fixture(scope="module")
def written() -> set[str]:
    return sentences(of_services())


@pytest.mark.parametrize("language", OTHERS)
def test_every_sentence_that_can_be_written_is_translated(
    written: set[str], language: Language
) -> None:
    assert len(written) > 500
    left = []
    with spoken(language):
        for english in written:
            text = HOLE.sub("7", english)
            said = measured(text)
            if (said == text and not TYPED.fullmatch(text)) or ENGLISH.search(TYPED.sub("", said)):
                left.append((english, said))
    assert left == []


@pytest.mark.parametrize("language", OTHERS)
def test_no_translation_is_of_what_nothing_writes(written: set[str], language: Language) -> None:
    assert set(translated(language)) - written <= BEYOND_THE_WALK


@pytest.mark.parametrize("language", OTHERS)
def test_the_holes_are_the_same_and_no_sentence_is_there_twice(language: Language) -> None:
    for english, other in translated(language).items():
        assert sorted(HOLE.findall(other)) == sorted(HOLE.findall(english)), english
    folder = Path(so8tqc.__file__).parent / "reports" / "sentences"
    tree = yaml.compose((folder / f"{language}.yaml").read_text(encoding="utf-8"))
    keys = [key.value for key, _ in tree.value]
    assert len(keys) == len(set(keys))


def test_a_sentence_is_found_however_it_is_put_together() -> None:
    """What a new sentence without a translation would be missed by."""
    module = """
_WHY = "no rain has fallen"

def told(row) -> str:
    return f"row {row.index} is wet" if row.wet else _WHY

class Row:
    note: str

def checks(rows, day, more):
    detail = f"Of {len(rows)} rows, {told(rows[0])}. "
    detail += "Then it was dry"
    return [judge("a.b", 1, 2, detail=detail), skipped("a.c", reason(day)),
            Diagnosis(code="x", text=f"{day:.2f}: {', '.join(f'{n} drops' for n in more)}")]

def reason(day) -> str:
    return "the day " + named(day, "is over")

def named(day, words) -> str:
    return f"of {day} {words}"

def notices(day):
    return [f"Asked on {day}"]
"""
    assert sentences({"rain.py": module}) == {
        "Of {0} rows, {1}",
        "row {0} is wet",
        "no rain has fallen",
        "Then it was dry",
        "the day of {0} {1}",
        "is over",
        "{0} drops",
        "Asked on {0}",
    }


@pytest.mark.parametrize(
    ("english", "japanese"),
    [
        (
            "60 of 60 tensors hold the exact fold rounded once; the largest distance is in "
            "model.layers.7.self_attn.o_proj.weight.",
            "テンソル 60 個中 60 個が、正確な折り込みを 1 回だけ丸めた値です；"
            "最大の距離は model.layers.7.self_attn.o_proj.weight。",
        ),
        (
            "The transposed rotation was folded: the storage dtype cannot hold it (2 of 4 tensors "
            "of model-Q5_K_M).",
            "転置した回転が折り込まれています：the storage dtype cannot hold it"
            "（model-Q5_K_M のテンソル 4 個中 2 個）。",
        ),
        (
            "Not to be trusted: the gate was not folded. (3 more checks failed, too)",
            "信頼できません：ゲートが折り込まれていません。（ほか 3 件の検査も不合格）",
        ),
        ("its logits: so8tqc check BASE FILE", "ロジット：so8tqc check BASE FILE"),
        ("Stages whose own checks failed: none.", "自身の検査が不合格だった工程：なし。"),
        ("A sentence that nobody wrote, 3.5e-7.", "A sentence that nobody wrote, 3.5e-7."),
    ],
)
def test_sentences_are_said_with_their_numbers(english: str, japanese: str) -> None:
    assert measured(english) == english
    with spoken(Language.JAPANESE):
        assert measured(english) == japanese

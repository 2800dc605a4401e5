"""Every sentence that the stages of a real run wrote is Japanese on its pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_measured import OTHERS, TYPED

from so8tqc.languages import Language
from so8tqc.record_files import read_record
from so8tqc.reports.language import spoken
from so8tqc.reports.measured import measured

ENGLISH = re.compile(r"[a-z]{3,} [a-z]{2,}")


@pytest.mark.llama
@pytest.mark.parametrize("language", OTHERS)
def test_no_sentence_of_a_real_run_is_left_in_english(real_run: Path, language: Language) -> None:
    texts: dict[str, str] = {}
    for path in sorted(real_run.glob("*/record.json")):
        record = read_record(path)
        for check in record.checks:
            texts[check.detail] = f"{path.parent.name}, {check.id}"
        for told in (*record.notices, *(found.text for found in record.diagnosis)):
            texts[told] = path.parent.name
    assert len(texts) > 60
    with spoken(language):
        said = {text: TYPED.sub("", measured(text)) for text in texts}
    left = [(texts[text], text, other) for text, other in said.items() if ENGLISH.search(other)]
    assert left == []

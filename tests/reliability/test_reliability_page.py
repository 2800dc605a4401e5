"""The page says what the results say."""

from __future__ import annotations

from reliability_page import DOCUMENT, document


def test_the_page_is_that_of_the_results() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()

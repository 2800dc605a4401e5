"""The languages of reports. Each but English has a file in ``reports/languages``."""

from __future__ import annotations

from enum import StrEnum


class Language(StrEnum):
    """ISO 639-1 code."""

    ENGLISH = "en"
    JAPANESE = "ja"

"""Paths that say that they are paths."""

from __future__ import annotations

import os


def anchored(text: str) -> str:
    """``./x/y`` where there is no such file: made absolute, so that it stays a path.

    pathlib drops the dot, and ``x/y`` may be the name of a repository on a hub.
    """
    if text.startswith("./") and not os.path.exists(text):  # noqa: PTH110  os: no pathlib at start
        return os.path.abspath(text)  # noqa: PTH100
    return text

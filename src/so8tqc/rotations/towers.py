"""Telling a text tower's layers from those of other towers, which also count from 0."""

from __future__ import annotations

import re

_OTHER_TOWERS = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|speech\w*|encoder|mtp)\.")


def in_other_tower(prefix: str) -> bool:
    """Whether the part of a tensor's name before ``layers.N.`` names another tower."""
    return _OTHER_TOWERS.search(prefix) is not None

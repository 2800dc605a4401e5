"""Command lines that state a reading, with all that the rotations were opened with."""

from __future__ import annotations

import shlex

from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.readings import Reading

NOT_FACTS = ("key", "lora_alpha", "layers")
"""Options of a rotation source that state none of its facts."""


def shell(*parts: object) -> str:
    """One line; whatever needs quoting is quoted."""
    return shlex.join(["so8tqc", *map(str, parts)])


def reading_flags(reading: Reading, options: RotationOptions) -> list[str]:
    """All three facts, and what else the rotations were opened with."""
    flags = list(reading.flags)
    for name in NOT_FACTS:
        if (value := getattr(options, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if options.orthogonalize != "as-trained":
        flags += ["--orthogonalize", options.orthogonalize]
    return flags

"""Ranges of layers, as the command line names them."""

from __future__ import annotations

from so8tqc.errors import ConfigError


def parse_layers(text: str) -> tuple[range, ...]:
    """``"0-3,7"`` → the ranges 0..3 and 7..7.

    Raises:
        ConfigError: a range that runs backwards.
    """
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ConfigError(
                f"{part} runs backwards", where="layers", remedy=f"Write {last}-{first}."
            )
        ranges.append(range(int(first), int(last or first) + 1))
    return tuple(ranges)

"""Types of single tensors, as patterns that the quantizer understands."""

from __future__ import annotations

import re
from collections.abc import Mapping


def override_patterns(tensors: Mapping[str, str]) -> tuple[str, ...]:
    """``PATTERN=TYPE`` options that give tensors their types, one for each kind and type.

    Args:
        tensors: name → GGML type.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    alone = []
    for name, kind in tensors.items():
        if match := re.match(r"^blk\.(\d+)\.(.+)$", name):
            kinds.setdefault((match[2], kind), []).append(match[1])
        else:
            alone.append(f"^{re.escape(name)}$={kind}")
    return (
        *(
            rf"^blk\.({'|'.join(layers)})\.{re.escape(rest)}$={kind}"
            for (rest, kind), layers in kinds.items()
        ),
        *alone,
    )

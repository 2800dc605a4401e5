"""Which type each tensor gets, as patterns that the quantizer understands."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from so8tqc.gguf.file import GGUFFile
from so8tqc.services.quantize.proof import PLAIN_TYPES


def quantized_types(low: GGUFFile, high: GGUFFile, raised: Collection[str]) -> dict[str, str]:
    """Quantized tensor → its type in a mixture; those as in ``low`` are listed, too.

    libllama's recipes count the tensors of a kind whose type is not given, and give every third of
    them a larger one, say: naming the raised ones alone would move the others' types.
    """
    types = {name: (high if name in raised else low).tensors[name].type for name in low.tensors}
    return {name: kind for name, kind in types.items() if kind not in PLAIN_TYPES}


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

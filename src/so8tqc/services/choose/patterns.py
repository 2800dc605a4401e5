"""Which type each tensor gets in a mixture of two files."""

from __future__ import annotations

from collections.abc import Collection

from so8tqc.gguf.file import GGUFFile
from so8tqc.services.quantize.proof import PLAIN_TYPES


def quantized_types(low: GGUFFile, high: GGUFFile, raised: Collection[str]) -> dict[str, str]:
    """Quantized tensor → its type in a mixture; those as in ``low`` are listed, too.

    libllama's recipes count the tensors of a kind whose type is not given, and give every third of
    them a larger one, say: naming the raised ones alone would move the others' types.
    """
    types = {name: (high if name in raised else low).tensors[name].type for name in low.tensors}
    return {name: kind for name, kind in types.items() if kind not in PLAIN_TYPES}

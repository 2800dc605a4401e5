"""The process in which a new file is run for the first time: libllama may abort it, not us.

``python -P -m so8tqc.llama.logits_worker GGUF TOKENS.npy LOGITS.npy``
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from so8tqc.errors import So8tqcError
from so8tqc.llama.libllama import LlamaModel


def main(gguf: Path, tokens: Path, logits: Path) -> int:
    """Write the logits [T, V] of ``tokens`` [T]; 0 on success."""
    ids = np.load(tokens)
    try:
        model = LlamaModel(gguf, context=ids.size)
        model.begin(ids.size)
        np.save(logits, model.decode(ids, 0))
    except So8tqcError as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))

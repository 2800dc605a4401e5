"""libllama's intermediate values of some texts, seen by its evaluation callback.

libllama runs in a process of its own (``llama.values_worker``).
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ToolError
from so8tqc.llama.child import QUIET_ABORT, ending, follow, reason, remedy

Array = npt.NDArray[np.float32]

NORM, STATE = "norm:", "state:"
"""In front of the names of values: what a norm makes, by its weight; a node, by its own name."""

LOGITS = "logits"


class Product(NamedTuple):
    """What libllama makes of a weight and its inputs, beside the dequantized weight's product.

    Attributes:
        error: ‖libllama − exact‖ / ‖exact‖.
        explained: what rounding the inputs as ggml does makes of it.
    """

    error: float
    explained: float


class NodeValues(NamedTuple):
    """What was seen.

    Attributes:
        states: of each text, name → [T, n]; ``logits`` [T, V].
        products: weight → its products of all texts.
    """

    states: list[dict[str, Array]]
    products: dict[str, Product]


def can_watch() -> bool:
    """Whether libllama's bindings are installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def node_values(
    path: Path, texts: Sequence[npt.NDArray[np.int64]], threads: int | None = None
) -> NodeValues:
    """Run texts through a file.

    Raises:
        ToolError: libllama cannot run it, or dies.
    """
    with tempfile.TemporaryDirectory(prefix="so8tqc-values-") as folder:
        out = Path(folder)
        job = {
            "gguf": str(path),
            "texts": [text.tolist() for text in texts],
            "out": folder,
            "threads": threads or 0,
        }
        (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "so8tqc.llama.values_worker", str(out / "job.json")]
        status, last = follow(command, lambda _line: None, QUIET_ABORT)
        if status != 0:
            why = reason(last).removeprefix("error: ")
            raise ToolError(
                f"libllama's values cannot be seen ({ending(status)}): {why}",
                where=str(path),
                remedy=remedy(status),
            )
        states = []
        for number in range(len(texts)):
            with np.load(out / f"{number}.npz") as stored:
                states.append({name: stored[name] for name in stored.files})
        sums = json.loads((out / "products.json").read_text(encoding="utf-8"))
    return NodeValues(states, {name: _product(three) for name, three in sums.items()})


def _product(sums: Sequence[float]) -> Product:
    apart, size, coarse = sums
    if not size:
        return Product(0.0 if not apart else math.inf, 0.0)
    return Product(math.sqrt(apart / size), math.sqrt(coarse / size))


def input_names(states: Mapping[str, Array]) -> list[str]:
    """Names of what the first layer is given, the last step's first."""
    return [STATE + n for n in ("inp_scaled", "inp_embd", "embd") if STATE + n in states]


def layer_input(states: Mapping[str, Array], layer: int) -> Array | None:
    """What a layer is given, [T, D]; None if libllama names it otherwise."""
    if layer:
        return states.get(f"{STATE}l_out-{layer - 1}")
    return next((states[name] for name in input_names(states)), None)

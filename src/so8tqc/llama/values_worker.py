"""The process in which libllama runs texts, its intermediate values looked at.

``python -P -m so8tqc.llama.values_worker JOB`` (a file of JSON: gguf, texts, out, threads)

Of every product with a weight of the file the output is compared with what the weight, dequantized,
makes of the same input: once as it is, once rounded as ggml rounds activations. Sums of squares go
to ``products.json``. States (the layers' inputs and outputs, norms, attention) go to
``NUMBER.npz``, one for each text. The last line of a failure is its reason.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.errors import So8tqcError, ToolError
from so8tqc.gguf.file import GGUFTensor, open_gguf
from so8tqc.llama import ggml
from so8tqc.llama.activations import rounded
from so8tqc.llama.imatrix_worker import EXPERT_PRODUCT, FLOAT32, PRODUCT, weight_name
from so8tqc.llama.libllama import LlamaModel
from so8tqc.llama.values import LOGITS, NORM, STATE

Array = npt.NDArray[np.float32]

_SCALED = b"MUL"
_ROWS = 4096
"""Rows of a weight that are dequantized at a time."""

_STATES = re.compile(r"^(embd|inp_scaled|inp_embd|l_out-\d+|kqv_out-\d+|ffn_moe_topk-\d+)$")
_INTEGERS = 26
"""``GGML_TYPE_I32``."""


class Watch:
    """What is kept of a run.

    Args:
        tensors: of the file, by name.

    Attributes:
        states: name → [T, n], of the present text.
        products: weight → Σ‖libllama − exact‖², Σ‖exact‖², Σ‖rounded − exact‖² of all texts.
        failure: what went wrong inside the callback, where nothing can be raised.
    """

    def __init__(self, tensors: Mapping[str, GGUFTensor]) -> None:
        self.states: dict[str, Array] = {}
        self.products: dict[str, npt.NDArray[np.float64]] = {}
        self.failure: Exception | None = None
        self._tensors = tensors
        self._checked = False

    def visit(self, address: int, ask: bool, _data: object) -> bool:
        """libllama's callback: whether a node is wanted, then the node with its operands."""
        try:
            node = ggml.Tensor.from_address(address)
            if not self._checked:
                ggml.require_layout(node)
                self._checked = True
            operation = ggml.ggml().ggml_op_name(node.op)
            if ask:
                return self._is_wanted(node, operation)
            if operation in (PRODUCT, EXPERT_PRODUCT) and self._weight(node, 0):
                self._compare(node, expert=operation == EXPERT_PRODUCT)
            elif operation == _SCALED and (name := self._weight(node, 1)):
                self.states[NORM + name] = _flat(node)
            elif _STATES.match(name := node.name.decode()):
                self.states[STATE + name] = _flat(node)
        except Exception as error:  # noqa: BLE001  raised by the caller of libllama
            self.failure = error
            return False
        return True

    def _is_wanted(self, node: ggml.Tensor, operation: bytes) -> bool:
        if operation in (PRODUCT, EXPERT_PRODUCT):
            takes = bool(node.src[1]) and node.src[1].contents.type == FLOAT32
            return takes and bool(self._weight(node, 0))
        if operation == _SCALED and "norm" in self._weight(node, 1):
            return True
        return bool(_STATES.match(node.name.decode()))

    def _weight(self, node: ggml.Tensor, place: int) -> str:
        """The name of the file's tensor that is an operand; "" if it is none."""
        if not node.src[place]:
            return ""
        name = weight_name(node.src[place].contents)
        return name if name in self._tensors else ""

    def _compare(self, node: ggml.Tensor, *, expert: bool) -> None:
        name = self._weight(node, 0)
        tensor = self._tensors[name]
        given = ggml.strided(node.src[1].contents, np.float32)[0]
        made = ggml.strided(node, np.float32)[0]
        sums = self.products.setdefault(name, np.zeros(3))
        if not expert:
            x = given.reshape(-1, given.shape[-1])
            sums += _sums(tensor, 0, tensor.elements // tensor.shape[-1], x, _rows(made))
            return
        chosen = ggml.strided(node.src[2].contents, np.int32)[0, 0]
        given = np.broadcast_to(given, (*chosen.shape, given.shape[-1]))
        height = tensor.shape[1]
        for number in np.unique(chosen):
            here = chosen == number
            start = int(number) * height
            sums += _sums(tensor, start, start + height, given[here], made[here])


def _rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def _flat(node: ggml.Tensor) -> Array:
    """[T, everything else] of a node whose tokens are the last dimension that is not 1."""
    values = ggml.strided(node, np.int32 if node.type == _INTEGERS else np.float32)[0]
    return np.array(values.reshape(values.shape[0], -1) if len(values) > 1 else values[0])


def _sums(
    tensor: GGUFTensor, start: int, stop: int, given: Array, made: Array
) -> npt.NDArray[np.float64]:
    """Of rows of a weight: see :attr:`Watch.products`.

    Args:
        given: [T, n]; made: [T, stop − start].
    """
    columns = tensor.shape[-1]
    stored = tensor.raw.reshape(-1, tensor.bytes // (tensor.elements // columns))
    dequantize = ggml.dequantizer(tensor.type)
    sums = np.zeros(3)
    given = np.ascontiguousarray(given)
    coarse = rounded(given, tensor.type)
    for first in range(start, stop, _ROWS):
        last = min(first + _ROWS, stop)
        weight = np.empty((last - first, columns), np.float32)
        dequantize(np.ascontiguousarray(stored[first:last]).reshape(-1), weight.reshape(-1))
        exact = (given @ weight.T).astype(np.float64)
        found = made[:, first - start : last - start]
        sums[0] += np.square(found - exact).sum()
        sums[1] += np.square(exact).sum()
        sums[2] += np.square((coarse - given) @ weight.T, dtype=np.float64).sum()
    return sums


def main(job: Mapping[str, Any]) -> int:
    """Run the texts and write what was seen; 0 on success."""
    path, out = Path(job["gguf"]), Path(job["out"])
    try:
        watch = Watch(open_gguf(path).tensors)
        longest = max(len(text) for text in job["texts"])
        model = LlamaModel(
            path, threads=job["threads"] or None, context=longest, on_node=watch.visit
        )
        for number, text in enumerate(job["texts"]):
            watch.states = {}
            model.begin(len(text))
            logits = model.decode(np.array(text, dtype=np.int64), 0)
            if watch.failure is not None:
                raise ToolError(f"a value cannot be read: {watch.failure}", where=str(path))
            seen: dict[str, Any] = {LOGITS: logits, **watch.states}
            np.savez(out / f"{number}.npz", **seen)
    except So8tqcError as error:
        print(f"error: {watch.failure or error}", flush=True)
        return 1
    products = {name: sums.tolist() for name, sums in watch.products.items()}
    (out / "products.json").write_text(json.dumps(products), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

"""The process in which libllama runs calibration text, its inputs squared and summed.

``python -P -m so8tqc.llama.imatrix_worker JOB`` (JSON: gguf, text, out, threads, chunk, datasets)

Every matrix product of the graph whose weight is a tensor of a layer is asked for; its second
operand holds the inputs. Progress goes to the standard output as ``chunk 3/20``; the last line
of a failure is its reason.

The same text is cut into the same chunks as by ``llama-imatrix``: one text, tokenized with its
special tokens, in chunks of equal length, each beginning with the model's BOS where it has one.
What is left at the end is not used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.errors import So8tqcError, ToolError
from so8tqc.llama import ggml
from so8tqc.llama.imatrix import write_imatrix
from so8tqc.llama.libllama import LlamaModel, tokenize

Tokens = npt.NDArray[np.int64]

PRODUCT, EXPERT_PRODUCT = b"MUL_MAT", b"MUL_MAT_ID"
TOO_SHORT = 3
"""Exit status: the text has fewer tokens than a chunk."""

FLOAT32 = 0
"""``GGML_TYPE_F32``."""


class Squares:
    """Sums of squared inputs by weight, collected as libllama computes.

    Attributes:
        sums: GGUF tensor name → [matrices, columns] float64.
        counts: GGUF tensor name → [matrices] tokens; [1] for stacks that are no experts.
        failure: what went wrong inside the callback, where nothing can be raised.
    """

    def __init__(self) -> None:
        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, npt.NDArray[np.int64]] = {}
        self.failure: Exception | None = None
        self._checked = False

    def visit(self, address: int, ask: bool, _data: object) -> bool:
        """libllama's callback: whether a node is wanted, then the node with its operands."""
        try:
            node = ggml.Tensor.from_address(address)
            operation = ggml.ggml().ggml_op_name(node.op)
            if not self._checked:
                ggml.require_layout(node)
                self._checked = True
            if ask:
                return _is_wanted(node, operation)
            if operation == PRODUCT:
                self._add_product(node)
            else:
                self._add_expert_product(node)
        except Exception as error:  # noqa: BLE001  raised by the caller of libllama
            self.failure = error
            return False
        return True

    def _add_product(self, node: ggml.Tensor) -> None:
        weight, inputs = node.src[0].contents, ggml.strided(node.src[1].contents, np.float32)
        self._add(weight_name(weight), *stack_squares(inputs, int(weight.ne[3]), int(weight.ne[2])))

    def _add_expert_product(self, node: ggml.Tensor) -> None:
        weight = node.src[0].contents
        inputs = ggml.strided(node.src[1].contents, np.float32)[0]
        chosen = ggml.strided(node.src[2].contents, np.int32)[0, 0]
        self._add(weight_name(weight), *expert_squares(inputs, chosen, int(weight.ne[2])))

    def _add(
        self, name: str, squares: npt.NDArray[np.float64], count: npt.NDArray[np.int64]
    ) -> None:
        if name in self.sums:
            self.sums[name] += squares
            self.counts[name] += count
        else:
            self.sums[name], self.counts[name] = squares, count


def stack_squares(
    inputs: npt.NDArray[np.float32], outer: int, inner: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Squared inputs of every matrix of a stack [outer, inner], summed over its tokens.

    Args:
        inputs: [n · outer, m · inner, T, columns]; where n or m exceeds 1, the last matrix is
            followed by the first again in the inner dimension, the outer one likewise.
        outer, inner: the stack; both 1 for a plain matrix.

    Returns:
        [outer · inner, columns] sums and one count for all matrices.
    """
    folded = inputs.reshape(-1, outer, inputs.shape[1] // inner, inner, *inputs.shape[2:])
    sums = np.square(folded, dtype=np.float64).sum(axis=(0, 2, 4))
    count = inputs.size // (outer * inner * inputs.shape[-1])
    return sums.reshape(outer * inner, -1), np.array([count])


def expert_squares(
    inputs: npt.NDArray[np.float32], chosen: npt.NDArray[np.int32], experts: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Squared inputs of every expert, summed over the tokens that chose it.

    Args:
        inputs: [T, 1 or k, columns]; 1 where all k chosen experts share a token's input.
        chosen: [T, k] expert of each token's slots.
        experts: how many there are.

    Returns:
        [experts, columns] sums and [experts] counts.
    """
    squares = np.square(inputs, dtype=np.float64)
    squares = np.broadcast_to(squares, (*chosen.shape, inputs.shape[-1]))
    sums = np.zeros((experts, inputs.shape[-1]))
    np.add.at(sums, chosen.reshape(-1), squares.reshape(-1, inputs.shape[-1]))
    return sums, np.bincount(chosen.reshape(-1), minlength=experts)


def _is_wanted(node: ggml.Tensor, operation: bytes) -> bool:
    if operation not in (PRODUCT, EXPERT_PRODUCT):
        return False
    return (
        weight_name(node.src[0].contents).startswith("blk.")
        and node.src[1].contents.type == FLOAT32
    )


def weight_name(weight: ggml.Tensor) -> str:
    """``blk.0.attn_k.weight``, also of a copy named ``CUDA0#blk.0.attn_k.weight#0``."""
    name = str(weight.name.decode())
    return name.split("#")[1] if "#" in name else name


def main(job: Mapping[str, Any]) -> int:
    """Compute and write the importance matrix; 0 on success."""
    squares = Squares()
    try:
        model = LlamaModel(
            Path(job["gguf"]),
            threads=job["threads"] or None,
            context=int(job["chunk"]),
            on_node=squares.visit,
        )
        length = min(int(job["chunk"]), model.trained_context)
        chunks = list(cut(*tokenize(model.path, Path(job["text"]).read_bytes().decode()), length))
        if not chunks:
            print(f"error: the text has fewer tokens than one chunk of {length}", flush=True)
            return TOO_SHORT
        _run(model, chunks, squares)
    except So8tqcError as error:
        print(f"error: {squares.failure or error}", flush=True)
        return 1
    write_imatrix(
        Path(job["out"]),
        squares.sums,
        squares.counts,
        datasets=job["datasets"],
        chunks=len(chunks),
        chunk_size=length,
    )
    return 0


def cut(tokens: Tokens, bos: int | None, length: int) -> Iterator[Tokens]:
    """Consecutive chunks of ``length`` tokens, each begun with BOS where the model has one."""
    for start in range(0, tokens.size - length + 1, length):
        chunk = tokens[start : start + length].copy()
        if bos is not None:
            chunk[0] = bos
        yield chunk


def _run(model: LlamaModel, chunks: Sequence[Tokens], squares: Squares) -> None:
    for number, chunk in enumerate(chunks, start=1):
        model.begin(chunk.size)
        model.decode(chunk, 0)  # logits of every token, else the last layer sees only the last one
        if squares.failure is not None:
            raise ToolError(str(squares.failure))
        print(f"chunk {number}/{len(chunks)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

"""libllama's own values beside what the file's weights make of libllama's own inputs.

Of each product with a weight, libllama's output is compared with that of the dequantized weight on
libllama's input (``llama.values_worker``). Of norms, attention and whole layers, with what
transformers makes of the file's weights in a layer that is given libllama's state. What rounding
activations, keys and values as libllama does makes of the same is what is explained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.llama.activations import rounded
from so8tqc.llama.values import LOGITS as RUNTIME_LOGITS
from so8tqc.llama.values import NORM, STATE, NodeValues, input_names, layer_input, node_values
from so8tqc.record_kinds.locate import RuntimeRow
from so8tqc.services.locate.measure import FACTOR, UNITS, Difference
from so8tqc.services.locate.names import EMBEDDING_STATE, LOGITS, Names
from so8tqc.services.locate.sides import FileNames, Sides
from so8tqc.services.locate.walk import START, Runtime, Stage, chosen, kept, same_choices
from so8tqc.services.tensors.verdict import SIGMAS
from so8tqc.sources.operations import Trace, value_of
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch

_HALF = 2.0**-11
"""Unit roundoff of half precision: libllama sums attention, and looks activations up, in it."""

_SINGLE = 2.0**-24
_LAYER = re.compile(r"^blk\.(\d+)\.")

_WORDS = (
    (r"attn_q\.", "q"), (r"attn_k\.", "k"), (r"attn_v\.", "v"), (r"attn_qkv\.", "q, k, v"),
    (r"attn_output\.", "o"), (r"_exps\.", "experts"), (r"ffn_gate_inp\.", "router"),
    (r"ffn_", "mlp"), (r"^(output|token_embd)\.", "head"),
)  # fmt: skip
"""Pattern of a weight's name in a GGUF → the word for its product."""


class RuntimeRows:
    """Rows of libllama's values, made while the layers go by.

    Args:
        sides: the models; the candidate is a GGUF.
        path: of the file.
        texts: token ids of each text.

    Attributes:
        unseen: what libllama calls otherwise.

    Raises:
        ToolError: libllama cannot run the file.
    """

    def __init__(self, sides: Sides, path: Path, texts: Sequence[TokenIds]) -> None:
        assert sides.file is not None
        self._file: FileNames = sides.file
        self._names = Names(sides.candidate.model.module, sides.stack)
        self._stack = sides.stack
        self._count = len(sides.candidate.model.layers)
        self._seen: NodeValues = node_values(path, texts)
        self._states: list[RuntimeRow] = []
        self.unseen: dict[str, None] = {}

    @property
    def runtime(self) -> Runtime:
        """What the walk needs."""
        return Runtime(lambda text, layer: layer_input(self._seen.states[text], layer), self._round)

    def look(self, stage: Stage) -> None:
        """Add a stage's rows."""
        if 0 <= stage.index < self._count and not self._entered(stage.index):
            self.unseen[f"what layer {stage.index} is given"] = None
            return
        for node, name in self._pairs(stage):
            self._add(stage, node, name)

    def _entered(self, layer: int) -> bool:
        return layer_input(self._seen.states[0], layer) is not None

    def rows(self) -> list[RuntimeRow]:
        """All rows: each layer's products, then its states, those behind the layers last."""
        products = [self._product(name) for name in self._seen.products]
        rows = [*products, *self._states]
        return sorted(rows, key=lambda row: math.inf if row.layer is None else row.layer)

    def _product(self, name: str) -> RuntimeRow:
        found = self._seen.products[name]
        layer = _LAYER.match(name)
        limit = FACTOR * found.explained + UNITS * _SINGLE * math.sqrt(self._columns(name))
        return RuntimeRow(
            layer=int(layer[1]) if layer else None,
            operation=next((word for p, word in _WORDS if re.search(p, name)), "product"),
            node=name,
            error=found.error,
            explained=found.explained,
            limit=limit,
            wrong=not found.error <= limit,
        )

    def _columns(self, name: str) -> int:
        return self._file.columns[name]

    def _pairs(self, stage: Stage) -> Iterator[tuple[str, str]]:
        """libllama's value → the operation that makes the same in transformers."""
        index, names = stage.index, self._seen.states[0]
        if index == START:
            yield from ((n, EMBEDDING_STATE) for n in input_names(names)[:1])
            return
        if index == self._count:
            yield RUNTIME_LOGITS, LOGITS
            return
        layer = f"{self._stack}.{index}"
        attention = f"{STATE}kqv_out-{index}"
        made = list(stage.like_runtime[0].calls)
        for node in names:  # in the order in which libllama computes them
            if node == f"{STATE}ffn_moe_topk-{index}":
                self._add_choices(stage, node)
            elif node == attention:
                yield from ((node, n) for n in made if n.endswith(":attention"))
            elif node == f"{STATE}l_out-{index}":
                yield node, layer
            elif node.startswith(f"{NORM}blk.{index}.") or self._ends_with(node, index):
                path = self._file.module.get(node.removeprefix(NORM))
                if path in made and self._is_state(stage, path):
                    yield node, path

    def _ends_with(self, node: str, index: int) -> bool:
        return index == self._count - 1 and node == f"{NORM}output_norm.weight"

    def _is_state(self, stage: Stage, path: str) -> bool:
        """Whether a norm is of whole states: those of heads may have rows in another order."""
        value, whole = (
            _last(stage.like_runtime[0], name) for name in (path, f"{self._stack}.{stage.index}")
        )
        return value is not None and whole is not None and value.shape[-1] == whole.shape[-1]

    def _add(self, stage: Stage, node: str, name: str) -> None:
        """Compare one of libllama's values."""
        found, explained, inherited = Difference(), Difference(), Difference()
        for text, (mine, coarse, reference) in enumerate(
            zip(stage.like_runtime, stage.rounded, stage.recorded, strict=True)
        ):
            value = self._seen.states[text].get(node)
            exact, near = _last(mine, name), _last(coarse, name)
            if value is None or exact is None or near is None or value.size != exact.numel():
                self.unseen[node.removeprefix(STATE)] = None
                return
            there = _tensor(value, exact)
            alike = self._alike(stage, text) if node.startswith(f"{STATE}l_out") else None
            found.add(kept(there, alike), kept(exact, alike))
            explained.add(kept(near, alike), kept(exact, alike))
            if (trusted := _last(reference, name)) is not None:
                inherited.add(there, trusted)
        limit = FACTOR * explained.error + UNITS * _HALF
        self._states.append(
            RuntimeRow(
                layer=self._names.layer(name),
                operation="head" if name == LOGITS else self._names.word(name),
                node=node.partition(":")[2] or node,
                error=found.error,
                explained=explained.error,
                limit=limit,
                inherited=inherited.error,
                wrong=not found.error <= limit,
            )
        )

    def _chosen(self, stage: Stage, text: int) -> npt.NDArray[np.int64] | None:
        """[T, k] the experts that libllama chose, in order of their numbers."""
        found = self._seen.states[text].get(f"{STATE}ffn_moe_topk-{stage.index}")
        return None if found is None else np.sort(found.astype(np.int64), axis=-1)

    def _alike(self, stage: Stage, text: int) -> torch.Tensor | None:
        """[T] for which tokens libllama and both of our runs chose the same experts."""
        import torch

        mine, libllamas = chosen(stage.like_runtime[text]), self._chosen(stage, text)
        alike = same_choices(stage.like_runtime[text], stage.rounded[text])
        if alike is None or libllamas is None or mine[0].shape != libllamas.shape:
            return alike
        alike &= (mine[0] == torch.from_numpy(libllamas)).all(-1)
        return alike if int(alike.sum()) * 2 > len(alike) else None

    def _add_choices(self, stage: Stage, node: str) -> None:
        """For how many tokens libllama chose other experts, beside those that rounding moves."""
        tokens = others = moved = 0
        for text, mine in enumerate(stage.like_runtime):
            ours, coarse = chosen(mine), chosen(stage.rounded[text])
            libllamas = self._chosen(stage, text)
            if not ours or not coarse or libllamas is None or ours[0].shape != libllamas.shape:
                return
            tokens += len(libllamas)
            others += int((ours[0].numpy() != libllamas).any(-1).sum())
            moved += int((ours[0] != coarse[0]).any(-1).sum())
        limit = (FACTOR * moved + SIGMAS) / tokens
        self._states.append(
            RuntimeRow(
                layer=stage.index,
                operation="router",
                node=node.removeprefix(STATE),
                error=others / tokens,
                explained=moved / tokens,
                limit=limit,
                wrong=others / tokens > limit,
            )
        )

    def _round(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A value as libllama goes on with it: see :data:`so8tqc.sources.operations.Change`."""
        if ":" in name:
            return value.half().to(value.dtype)
        kind = self._file.type.get(name)
        if kind is None or not self._names.is_matrix(name):
            return value
        coarse: npt.NDArray[np.float32] = rounded(value.float().numpy(), kind)
        return _tensor(coarse, value)


def _last(trace: Trace, name: str) -> torch.Tensor | None:
    calls = trace.calls.get(name)
    return value_of(calls[-1].output) if calls else None


def _tensor(values: npt.NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).reshape(like.shape).to(like.dtype)

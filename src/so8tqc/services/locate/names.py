"""What operations are called: a word of the field for each module, whatever its architecture."""

from __future__ import annotations

import re
from typing import Any

from so8tqc.decoder import attention_outputs

EMBEDDING_STATE = "state behind the embedding"
LOGITS = "logits"
INTO = "into "
"""In front of an operation's name: what it would have been given."""

_FURTHER = re.compile(r"\[\d+\]$")

_LEAVES: dict[str, str] = {
    "q_proj": "q", "wq": "q", "query": "q", "q_a_proj": "q", "q_b_proj": "q",
    "k_proj": "k", "wk": "k", "key": "k", "kv_a_proj_with_mqa": "k, v", "kv_b_proj": "k, v",
    "v_proj": "v", "wv": "v", "value": "v",
    "qkv_proj": "q, k, v", "query_key_value": "q, k, v", "c_attn": "q, k, v", "Wqkv": "q, k, v",
    "qkv": "q, k, v", "att_proj": "q, k, v", "wqkv": "q, k, v",
}  # fmt: skip
_STAGES = {"query": "rope", "key": "rope", "value": "v", "attention": "attention"}
_PLAIN_STAGES = _STAGES | {"query": "q", "key": "k"}
"""Of a model without rope."""
_FEED_FORWARD = ("mlp", "ffn", "feed_forward", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h",
                 "w1", "w2", "w3", "act")  # fmt: skip


def module_name(name: str) -> str:
    """An operation's name without the number of a further value."""
    return _FURTHER.sub("", name)


class Names:
    """The words for a model's operations.

    Args:
        module: a transformers model.
        stack: dotted name of its list of decoder layers.
    """

    def __init__(self, module: Any, stack: str) -> None:
        self._module = module
        self._stack = stack
        self._head = module.get_output_embeddings()
        self._embedding = module.get_input_embeddings()
        self._turns = any("rotary" in type(part).__name__.lower() for part in module.modules())
        self._outputs = {
            f"{stack}.{i}.{name}"
            for i, layer in enumerate(module.get_submodule(stack))
            for name in attention_outputs(layer)
        }

    def layer(self, name: str) -> int | None:
        """The layer that an operation is in; None: around the layers."""
        plain = module_name(name.removeprefix(INTO))
        if not plain.startswith(self._stack + "."):
            return None
        return int(plain.removeprefix(self._stack + ".").split(".")[0])

    def short(self, name: str) -> str:
        """An operation's name below its layer."""
        layer = self.layer(name)
        into = INTO if name.startswith(INTO) else ""
        plain = name.removeprefix(INTO)
        if layer is None:
            return into + plain
        return into + (plain.removeprefix(f"{self._stack}.{layer}").lstrip(".") or "output")

    def word(self, name: str) -> str:  # noqa: PLR0911  a case each
        """norm, q, k, v, rope, attention, o, residual, mlp, router, experts, head …"""
        if name.startswith(INTO):
            return self._before(name.removeprefix(INTO))
        if name == EMBEDDING_STATE:
            return "embedding scale"
        if name == LOGITS:
            return "soft cap"
        path, _, stage = module_name(name).partition(":")
        if stage:
            return _STAGES[stage] if self._turns else _PLAIN_STAGES[stage]
        leaf = path.rpartition(".")[2]
        part = self._module.get_submodule(path)
        kind = type(part).__name__.lower()
        if part is self._head:
            return "head"
        if part is self._embedding or "embed" in kind:
            return "embedding"
        if self.layer(path) is not None and self.short(path) == "output":
            return "residual"
        if path in self._outputs:
            return "o"
        if "norm" in leaf.lower() or "norm" in kind:
            return "norm"
        return self._projection(path, leaf, kind)

    def is_product(self, name: str) -> bool:
        """Whether it is a product with a matrix, an embedding's rows among them."""
        if name.startswith(INTO) or ":" in name or name in (EMBEDDING_STATE, LOGITS):
            return False
        if name != module_name(name):
            return False
        part = self._module.get_submodule(name)
        weight = getattr(part, "weight", None)
        return weight is not None and weight.ndim == 2 and not list(part.children())

    def is_matrix(self, name: str) -> bool:
        """Whether a module multiplies what it is given with weights; an embedding looks up."""
        part = self._module.get_submodule(name)
        return part is not self._embedding and any(p.ndim > 1 for p in part.parameters())

    def _projection(self, path: str, leaf: str, kind: str) -> str:
        if leaf in _LEAVES:
            return _LEAVES[leaf]
        parent = self._module.get_submodule(path.rpartition(".")[0])
        if "router" in kind or "router" in leaf or (leaf == "gate" and hasattr(parent, "experts")):
            return "router"
        inner = self.short(path).lower()
        if "expert" in inner or "expert" in kind:
            return "experts"
        if any(word in inner for word in _FEED_FORWARD):
            return "mlp"
        return leaf

    def _before(self, name: str) -> str:
        """What lies between an operation and those before it."""
        word = self.word(name)
        return {"o": "attention", "mlp": "mlp", "experts": "router"}.get(word, "residual")

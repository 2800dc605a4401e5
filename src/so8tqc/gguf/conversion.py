"""The history of every tensor of a conversion, replayed on our own reading of the source files.

The converter says which source tensors went into a GGUF tensor, and through which operations
(``llama.conversion_trace``). What these operations make of the source's bytes, as read here, is
what the file must hold, bit by bit. So every architecture that the converter knows is known here,
and what happens to the file afterwards, or what it writes besides, shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.errors import ToolError

if TYPE_CHECKING:
    import torch

Load = Callable[[str, int], "torch.Tensor"]
"""(file, byte offset) → the stored tensor there."""

_WORDS = {
    "permute": "rows reordered",
    "swapaxes": "rows reordered",
    "transpose": "transposed",
    "attribute T": "transposed",
    "t": "transposed",
    "attribute mT": "transposed",
    "stack": "stacked",
    "cat": "joined",
    "concat": "joined",
    "concatenate": "joined",
    "split": "split",
    "chunk": "split",
    "__getitem__": "split",
    "narrow": "split",
    "unbind": "split",
    "index_select": "rows reordered",
    "tensor_split": "split",
    "__add__": "added to",
    "add": "added to",
    "__radd__": "added to",
    "__iadd__": "added to",
    "sub": "added to",
    "__sub__": "added to",
    "__rsub__": "added to",
    "__mul__": "scaled",
    "__rmul__": "scaled",
    "mul": "scaled",
    "__truediv__": "scaled",
    "__rtruediv__": "scaled",
    "div": "scaled",
    "__imul__": "scaled",
    "__neg__": "negated",
    "neg": "negated",
    "exp": "exponentiated",
    "log": "logarithm taken",
    "repeat": "repeated",
    "repeat_interleave": "repeated",
    "expand": "repeated",
    "flip": "rows reordered",
    "roll": "rows reordered",
    "pad": "padded",
    "__matmul__": "multiplied",
    "matmul": "multiplied",
    "sum": "summed",
    "mean": "averaged",
}
"""Operation → what it does, in a word; what only changes shape or type has none."""

IN_PLACE = frozenset(
    {
        "load",
        "constant",
        "numpy",
        "astype",
        "to",
        "float",
        "float32",
        "reshape",
        "view",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "ravel",
        "clone",
        "detach",
        "copy",
        "cpu",
        "reshape_as",
        "view_as",
    }
)
"""Operations that leave every value, and their order."""

_SILENT = IN_PLACE | frozenset(
    {
        "type",
        "half",
        "bfloat16",
        "double",
        "T",
        "sqrt",
        "rsqrt",
        "pow",
        "__pow__",
        "abs",
        "max",
        "min",
        "clamp",
        "round",
        "softplus",
        "sigmoid",
        "tanh",
        "zeros_like",
        "ones_like",
        "where",
        "int",
        "exp2",
        "log2",
        "floor",
        "norm",
        "sin",
        "cos",
        "arange",
        "zeros",
        "ones",
        "full",
        "tensor",
        "bitwise_and",
        "bitwise_or",
        "bitwise_right_shift",
        "bitwise_left_shift",
        "clamp_min",
        "numel",
        "argsort",
        "sort",
        "gather",
        "einsum",
        "moveaxis",
        "movedim",
    }
)
_ALLOWED = _SILENT | _WORDS.keys()
_ITEM = re.compile(r"^item (\d+) of (.+)$")


class UntraceableError(Exception):
    """A history that cannot be replayed, and why."""


@dataclass(frozen=True)
class Conversion:
    """A conversion's trace.

    Attributes:
        architecture: ``general.architecture`` of what was written.
        names: the converter's own name map, source name → GGUF name, without endings.
        nodes, outputs: see :class:`so8tqc.llama.conversion_trace.Tracer`.
        keys: key → bytes of its type and value, where the converter was asked for them.
        read: nodes whose values the converter looked at itself.
        source_names: (file name, byte offset) → the stored tensor's name.
    """

    architecture: str
    names: Mapping[str, str]
    nodes: tuple[Mapping[str, Any], ...]
    outputs: Mapping[str, Any]
    source_names: Mapping[tuple[str, int], str]
    read: tuple[int, ...] = ()
    keys: Mapping[str, bytes] | None = None

    @property
    def looked_at(self) -> frozenset[str]:
        """Source tensors whose values the converter has looked at while converting."""
        return frozenset(self._sources(self._reached_from(self.read)))

    @cached_property
    def sources(self) -> Mapping[str, tuple[str, ...]]:
        """GGUF tensor → the source tensors that went into it, in the order they did."""
        return {name: tuple(self._sources(self._reached(name))) for name in self.outputs}

    def _sources(self, nodes: Iterator[Mapping[str, Any]]) -> list[str]:
        places = [tuple(a["source"]) for n in nodes for a in n["args"] if _is(a, "source")]
        return list(
            dict.fromkeys(
                self.source_names[place]
                for file, offset in places
                if (place := (Path(file).name, offset)) in self.source_names
            )
        )

    def _reached(self, name: str) -> Iterator[Mapping[str, Any]]:
        """The operations of a tensor's history, sources first."""
        return self._reached_from(tuple(_inner(self.outputs[name])))

    def _reached_from(self, ends: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        seen: set[int] = set()
        order: list[int] = []
        stack = [(i, False) for i in ends]
        while stack:
            index, expanded = stack.pop()
            if expanded:
                order.append(index)
                continue
            if index in seen:
                continue
            seen.add(index)
            stack.append((index, True))
            node = self.nodes[index]
            for value in reversed((*node["args"], *node.get("kwargs", {}).values())):
                stack += [(i, False) for i in _inner(value) if i not in seen]
        return (self.nodes[i] for i in order)

    def done(self, name: str) -> str:
        """What was done to a tensor's sources, in words: ``unchanged``, ``stacked`` …"""
        ops = (_ITEM.sub(r"\2", str(node["op"])) for node in self._reached(name))
        words = dict.fromkeys(_WORDS[op] for op in ops if op in _WORDS)
        return ", ".join(words) or "unchanged"

    def replay(self, name: str, load: Load) -> torch.Tensor:
        """The values of a GGUF tensor before they are rounded to its type.

        Raises:
            UntraceableError: an operation or a value that the trace does not hold.
        """
        import torch

        with torch.inference_mode():
            return self.follow(name, load)

    def follow(self, name: str, load: Load) -> torch.Tensor:
        """As :meth:`replay`, in torch's mode of the moment: derivatives may be taken."""
        import torch

        values: dict[int, Any] = {}
        for node in self._reached(name):
            values[self._index[id(node)]] = _run(node, values, load)
        result = _value(self.outputs[name], values, load)
        if not isinstance(result, torch.Tensor):
            raise UntraceableError("its history ends in no tensor")
        return result

    def places(self, name: str) -> list[tuple[str, int]]:
        """(file name, byte offset) of every source tensor in a GGUF tensor's history."""
        found = [a["source"] for n in self._reached(name) for a in n["args"] if _is(a, "source")]
        return list(dict.fromkeys((Path(file).name, int(offset)) for file, offset in found))

    def operations(self, name: str) -> list[str]:
        """The names of the operations in a GGUF tensor's history, sources first."""
        return [_ITEM.sub(r"\2", str(node["op"])) for node in self._reached(name)]

    @cached_property
    def _index(self) -> Mapping[int, int]:
        return {id(node): i for i, node in enumerate(self.nodes)}


def read_conversion(path: Path, source_names: Mapping[tuple[str, int], str]) -> Conversion | None:
    """A trace that the converter's process has left; None if it left none.

    Raises:
        ToolError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Conversion(
            str(content["architecture"]),
            content["names"],
            tuple(content["nodes"]),
            content["tensors"],
            source_names,
            tuple(content["read"]),
            None if content["keys"] is None else _unhexed(content["keys"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError(f"the trace of the conversion is malformed: {error}") from None


def _unhexed(keys: Mapping[str, str]) -> dict[str, bytes]:
    return {key: bytes.fromhex(value) for key, value in keys.items()}


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, dict) and kind in value


def _inner(value: Any) -> Iterator[int]:
    """Nodes inside an argument."""
    if not isinstance(value, dict):
        return
    if "node" in value:
        yield value["node"]
    for kind in ("tuple", "list", "slice"):
        for part in value.get(kind, ()):
            yield from _inner(part)


def _run(node: Mapping[str, Any], values: Mapping[int, Any], load: Load) -> Any:
    import torch

    op = str(node["op"])
    item = _ITEM.match(op)
    name = item[2] if item else op
    if name not in _ALLOWED:
        raise UntraceableError(f"the converter used {name!r}, which is not known here")
    args = [_value(a, values, load) for a in node["args"]]
    options = {k: _value(v, values, load) for k, v in node.get("kwargs", {}).items()}
    if name in ("load", "constant"):
        return args[0]
    if name == "numpy":
        return args[0]
    if name == "astype":
        return args[0].to(args[1])
    if name.startswith("attribute "):
        return getattr(args[0], name.removeprefix("attribute "))
    method = getattr(torch.Tensor, name, None) if isinstance(args[0], torch.Tensor) else None
    function = method or getattr(torch, name, None) or getattr(torch.nn.functional, name, None)
    if function is None:
        raise UntraceableError(f"the converter used {name!r}, which torch does not have")
    try:
        result = function(*args, **options)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise UntraceableError(f"{name} cannot be repeated: {error}") from None
    return result[int(item[1])] if item else result


def _value(value: Any, values: Mapping[int, Any], load: Load) -> Any:  # noqa: PLR0911  a case each
    import torch

    if not isinstance(value, dict):
        return value
    ((kind, content), *rest) = value.items()
    match kind:
        case "node":
            return values[content]
        case "tuple":
            return tuple(_value(v, values, load) for v in content)
        case "list":
            return [_value(v, values, load) for v in content]
        case "slice":
            return slice(*(_value(v, values, load) for v in content))
        case "dtype" | "npdtype":
            return getattr(torch, content)
        case "ellipsis":
            return Ellipsis
        case "source":
            return load(*content)
        case "constant":
            details = dict(rest)
            made = torch.tensor(content, dtype=torch.float64).reshape(details["shape"])
            return made.to(getattr(torch, details["dtype"]))
    raise UntraceableError(f"a value in its history was not written down ({content})")

"""What the converter does to every tensor, read off while it does it.

Runs inside the converter's process. Its lazy tensors are built by one constructor, from a function
and arguments; that constructor is told here to note which function and which arguments, so that
every tensor that is written has a history back to byte ranges of the model's files. Nothing else of
the converter is touched. ``so8tqc.gguf.conversion`` replays the histories.

The notes hold no values but small constants, and no tensor is kept alive by them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SMALL = 4096
"""Elements of a constant that is written into the trace; larger ones were computed from weights, or
are tables that no model's file holds."""


class Tracer:
    """The histories of one conversion.

    Attributes:
        nodes: each operation: its name, its arguments, the indices of the nodes it takes.
        tensors: GGUF tensor → the node whose values it stores, and their shape.
        names: the converter's own name map: source name → GGUF name.
        architecture: ``general.architecture``.
        read: nodes whose values the converter has looked at, to write them elsewhere (keys) or to
            decide by them.
        keys: key of the GGUF → bytes of its value's type and value, hex; None: not asked for.
    """

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.tensors: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.architecture = ""
        self.read: list[int] = []
        self.keys: dict[str, str] | None = None
        self._before: dict[int, tuple[Any, Any]] = {}

    def install(self) -> None:
        """Have gguf-py's lazy tensors, its quantizer and its writer tell what they do."""
        import gguf
        import gguf.lazy
        import gguf.quants

        created = gguf.lazy.LazyBase.__init__

        def create(
            lazy: Any,
            *,
            meta: Any,
            data: Any = None,
            args: Any = (),
            kwargs: Any = None,
            func: Any = None,
        ) -> None:
            created(lazy, meta=meta, data=data, args=args, kwargs=kwargs, func=func)
            lazy._so8tqc_node = self._node(func, args, kwargs or {}, data)

        gguf.lazy.LazyBase.__init__ = create
        evaluated = gguf.lazy.LazyBase.to_eager.__func__

        def to_eager(cls: Any, value: Any) -> Any:
            self.read += _nodes(self._argument(value))
            return evaluated(cls, value)

        gguf.lazy.LazyBase.to_eager = classmethod(to_eager)
        rounding = gguf.quants.quantize

        def quantize(data: Any, qtype: Any) -> Any:
            stored = rounding(data, qtype)
            self._before[id(stored)] = (stored, self._argument(data))
            return stored

        gguf.quants.quantize = quantize
        adding = gguf.GGUFWriter.add_tensor

        def add_tensor(writer: Any, name: str, tensor: Any, *args: Any, **options: Any) -> None:
            _, unrounded = self._before.pop(id(tensor), (None, None))
            self.tensors[name] = unrounded if unrounded is not None else self._argument(tensor)
            self.architecture = str(writer.arch)
            adding(writer, name, tensor, *args, **options)

        gguf.GGUFWriter.add_tensor = add_tensor
        mapping = gguf.get_tensor_name_map

        def name_map(*args: Any, **options: Any) -> Any:
            found = mapping(*args, **options)
            self.names |= {source: name for source, (_, name) in found.mapping.items()}
            return found

        gguf.get_tensor_name_map = name_map

    def note_keys(self, writer: Any) -> None:
        """Keep the keys that a writer is about to write."""
        self.keys = {
            key: bytes(
                writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
            ).hex()
            for key, value in writer.kv_data[0].items()
        }

    def write(self, path: Path) -> None:
        """Save the trace as JSON."""
        content = {
            "architecture": self.architecture,
            "nodes": self.nodes,
            "tensors": self.tensors,
            "names": self.names,
            "read": sorted(set(self.read)),
            "keys": self.keys,
        }
        path.write_text(json.dumps(content), encoding="utf-8")

    def _node(self, func: Any, args: Any, kwargs: Any, data: Any) -> int:
        if func is None:
            node: dict[str, Any] = {"op": "constant", "args": [self._argument(data)]}
        else:
            op, args = _operation(func, args)
            node = {"op": op, "args": [self._argument(a) for a in args]}
            if kwargs:
                node["kwargs"] = {k: self._argument(v) for k, v in kwargs.items()}
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _argument(self, value: Any) -> Any:  # noqa: PLR0911  a case each
        """A value as JSON; what has no plain form is ``{"unknown": its type}``."""
        import numpy as np
        import torch

        node = vars(value).get("_so8tqc_node") if hasattr(value, "__dict__") else None
        if node is not None:
            return {"node": node}
        match value:
            case None | bool() | int() | float() | str():
                return value
            case tuple():
                return {"tuple": [self._argument(v) for v in value]}
            case list():
                return {"list": [self._argument(v) for v in value]}
            case slice():
                parts = (value.start, value.stop, value.step)
                return {"slice": [self._argument(v) for v in parts]}
            case torch.dtype():
                return {"dtype": str(value).removeprefix("torch.")}
            case torch.Tensor() | np.ndarray():
                return _constant(value)
            case np.generic():
                return value.item()
        if value is Ellipsis:
            return {"ellipsis": True}
        if (place := getattr(value, "data_range", None)) is not None:
            return {"source": [str(place.filename), int(place.offset)]}
        try:
            return {"npdtype": np.dtype(value).name}
        except TypeError:
            return {"unknown": type(value).__name__}


def _nodes(value: Any) -> list[int]:
    """Nodes inside an argument."""
    if not isinstance(value, dict):
        return []
    parts = [p for kind in ("tuple", "list", "slice") for p in value.get(kind, ())]
    return ([value["node"]] if "node" in value else []) + [n for p in parts for n in _nodes(p)]


def _constant(value: Any) -> dict[str, Any]:
    import torch

    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    if tensor.numel() > _SMALL or tensor.device.type == "meta":
        return {"unknown": f"{tensor.numel()} values"}
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"constant": tensor.double().tolist(), "dtype": kind, "shape": list(tensor.shape)}


def _operation(func: Any, args: Any) -> tuple[str, Any]:  # noqa: PLR0911  a case each
    """The name of what a lazy tensor will call, and its arguments."""
    code = getattr(func, "__code__", None)
    if code is not None and str(func.__module__).startswith("torch"):
        return str(func.__name__), args
    if code is None:  # a method of torch or numpy, or a function of torch
        if func.__name__ == "__get__":
            return f"attribute {func.__self__.__name__}", args
        return str(func.__name__), args
    place = func.__qualname__
    bound = dict(zip(code.co_freevars, func.__closure__ or (), strict=True))
    if "__getattr__" in place and "name" in bound:
        takes_more = bool(code.co_flags & 0x04)
        name = bound["name"].cell_contents
        return (str(name) if takes_more else f"attribute {name}"), args
    if place.endswith("eager_tuple_element"):
        shared, index = args
        op, inner = _operation(bound["fn"].cell_contents, shared[0])
        return f"item {index} of {op}", inner
    for known, op in (
        ("from_local_tensor", "load"),
        ("from_safetensors_slice", "load"),
        (".numpy.", "numpy"),
        (".astype.", "astype"),
    ):
        if known in place:
            return op, args
    return f"function {place}", args

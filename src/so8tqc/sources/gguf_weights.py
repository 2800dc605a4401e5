"""The weights of a GGUF file as a transformers model directory stores them.

A converter renames tensors, reorders rows, transposes, stacks, splits, adds 1. What it does to a
model directory it says while it does it (``llama.conversion_trace``), so that for every GGUF tensor
there is a function f of stored tensors x (``gguf.conversion``). A file's dequantized values g are
put back by inverting f, whatever the architecture:

    f(x) = J·x + f(0),   each element of f(x) depends on one element of x,   so
    x = Jᵀ(g − f(0)) / diag(JᵀJ),   where Jᵀ is what autograd computes.

For a mere rearrangement J has one 1 in each row, and the division is by 1: the values are g's, bit
by bit. Where f is no line (−exp of a state space model's A_log), Newton steps from the directory's
own values; the result is put through f again and must give g.

Of the directory only names, shapes and the trace are used, so one of the same architecture will do.

Use:

    checkpoint = open_checkpoint(model_directory)
    weights = GGUFWeights(open_gguf(path), checkpoint, traced(checkpoint))
    weights.names                        # stored tensors that the file has values of
    weights.gguf_names("model.layers.0.self_attn.q_proj.weight")   # ("blk.0.attn_q.weight",)
    weights.read(["model.layers.0.self_attn.q_proj.weight"])       # name → float32 tensor
    weights.bytes_read                   # of the file, so far

``read`` takes all names of a layer at once: experts that are stacked in one GGUF tensor are then
dequantized once. Nothing is kept between two calls.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.checkpoints.safetensors_index import (
    Checkpoint,
    TensorEntry,
    load_any,
)
from so8tqc.errors import ModelError
from so8tqc.gguf.conversion import IN_PLACE, Conversion, UntraceableError
from so8tqc.gguf.file import GGUFFile
from so8tqc.llama.ggml import dequantizer

if TYPE_CHECKING:
    import torch

_MOVED = frozenset(
    {
        "permute",
        "swapaxes",
        "transpose",
        "attribute T",
        "attribute mT",
        "T",
        "t",
        "moveaxis",
        "movedim",
        "stack",
        "cat",
        "concat",
        "concatenate",
        "split",
        "chunk",
        "__getitem__",
        "narrow",
        "unbind",
        "tensor_split",
        "flip",
        "roll",
    }
)
"""Operations that move values and change none."""

_STEPS = 100
"""Newton steps at most."""

_AGREEMENT = 1e-5
"""How far f(x) may lie from g, relative to its largest value: float32 leaves 1e-7."""

Place = tuple[str, int]


class GGUFWeights:
    """A GGUF file's values under the names and in the shapes of a model directory.

    Args:
        file: the file.
        checkpoint: a model directory of its architecture.
        conversion: what the converter makes of that directory.

    Attributes:
        bytes_read: of the file's tensors, so far.
    """

    def __init__(self, file: GGUFFile, checkpoint: Checkpoint, conversion: Conversion) -> None:
        self.file = file
        self.checkpoint = checkpoint
        self.conversion = conversion
        self.bytes_read = 0

    @cached_property
    def _holders(self) -> Mapping[str, tuple[str, ...]]:
        """Stored tensor → the GGUF tensors that it went into."""
        found: dict[str, list[str]] = {}
        for name in self.conversion.outputs:
            for source in self.conversion.sources[name]:
                found.setdefault(source, []).append(name)
        return {source: tuple(names) for source, names in found.items()}

    @cached_property
    def _entries(self) -> Mapping[Place, TensorEntry]:
        return {(e.file.name, e.start): e for e in self.checkpoint.tensors.values()}

    @property
    def names(self) -> frozenset[str]:
        """Stored tensors that the file has values of."""
        return frozenset(
            source
            for source, names in self._holders.items()
            if all(name in self.file.tensors for name in names)
        )

    def gguf_names(self, name: str) -> tuple[str, ...]:
        """The GGUF tensors that hold a stored tensor's values; () if there are none."""
        return self._holders.get(name, ())

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Stored tensors' values, dequantized: name → float32, in the shape the directory states.

        Raises:
            ModelError: the file has no values of one, or of another shape; or what the converter
                did to it cannot be undone.
            ToolError: libggml cannot dequantize a type.
        """
        import torch

        wanted = {name: self.checkpoint.tensors[name] for name in names}
        sums: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        for holder in self._needed(wanted):
            for source, (values, weight) in self._undone(holder).items():
                if source not in wanted:
                    continue
                if source in sums:
                    sums[source] += values
                    weights[source] += weight
                else:
                    sums[source], weights[source] = values, weight
        found = {}
        for name, entry in wanted.items():
            if bool((weights[name] == 0).any()):
                raise ModelError(
                    f"{name}: the file holds only a part of it", where=str(self.file.path)
                )
            if bool((weights[name] != 1).any()):
                sums[name] = sums[name] / weights[name]
            found[name] = sums[name].to(torch.float32).reshape(entry.shape)
        return found

    def _needed(self, wanted: Mapping[str, TensorEntry]) -> list[str]:
        """The GGUF tensors that hold what is wanted."""
        holders: dict[str, None] = {}
        for name in wanted:
            mine = self._holders.get(name, ())
            if missing := [h for h in mine if h not in self.file.tensors]:
                raise ModelError(
                    f"it lacks {missing[0]}, where {name} went", where=str(self.file.path)
                )
            if not mine:
                raise ModelError(
                    f"no tensor of it holds {name} of {self.checkpoint.directory}",
                    where=str(self.file.path),
                    remedy="Give the model directory that it was exported from.",
                )
            holders |= dict.fromkeys(mine)
        return list(holders)

    def values(self, name: str) -> torch.Tensor:
        """A GGUF tensor by libggml's own row function: float32, in the file's shape."""
        import torch

        tensor = self.file.tensors[name]
        out = np.empty(tensor.elements, np.float32)
        dequantizer(tensor.type)(tensor.read(), out)
        self.bytes_read += tensor.bytes
        return torch.from_numpy(out).reshape(tensor.shape)

    def _undone(self, holder: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Source tensor → Jᵀ(g − f(0)), and diag(JᵀJ), of one GGUF tensor."""
        import torch

        places = self.conversion.places(holder)
        sources = self.conversion.sources[holder]
        operations = frozenset(self.conversion.operations(holder))
        given = self.values(holder)
        if len(sources) == 1 and operations <= IN_PLACE:
            (entry,) = (self.checkpoint.tensors[name] for name in sources)
            self._require_size(holder, given.numel(), math.prod(entry.shape))
            return {sources[0]: (given.reshape(entry.shape), torch.ones(()))}
        inverse = _Inverse(self.conversion, holder, {p: self._entry(holder, p) for p in places})
        try:
            self._require_size(holder, given.numel(), inverse.size)
            return inverse.of(given, moved_only=operations <= IN_PLACE | _MOVED)
        except (UntraceableError, RuntimeError) as reason:
            raise ModelError(
                f"what the converter did to {holder} cannot be undone: {reason}",
                where=str(self.file.path),
            ) from None

    def _entry(self, holder: str, place: Place) -> TensorEntry:
        if place not in self._entries:
            raise ModelError(
                f"{holder} was made from {place[0]}, where no tensor begins at {place[1]}",
                where=str(self.checkpoint.directory),
            )
        return self._entries[place]

    def _require_size(self, holder: str, found: int, expected: int) -> None:
        if found != expected:
            raise ModelError(
                f"{holder} has {found} elements, not {expected}",
                where=str(self.file.path),
                remedy="Give the model directory that it was exported from.",
            )


class _Inverse:
    """The inverse of one GGUF tensor's history.

    Args:
        conversion: the history's.
        holder: the GGUF tensor.
        entries: where its sources lie.
    """

    def __init__(
        self, conversion: Conversion, holder: str, entries: Mapping[Place, TensorEntry]
    ) -> None:
        self._conversion = conversion
        self._holder = holder
        self._entries = entries

    @property
    def size(self) -> int:
        """Elements of what f gives."""
        import torch

        with torch.no_grad():
            return int(self._forward(self._leaves(0.0, torch.float32)).numel())

    def of(
        self, given: torch.Tensor, *, moved_only: bool
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Source → Jᵀ(g − f(0)) and diag(JᵀJ), where f is a line; else x and 1.

        Args:
            given: g, float32.
            moved_only: f moves values and changes none.
        """
        import torch

        with torch.inference_mode(mode=False), torch.enable_grad():
            given = given.clone()
            dtype = torch.float32 if moved_only else torch.float64
            leaves = self._leaves(0.0, dtype)
            at_zero = self._forward(leaves)
            given = given.reshape(at_zero.shape).to(dtype)
            if moved_only:
                back = self._back(at_zero, leaves, given)
                counted = self._back(at_zero, leaves, torch.ones_like(given))
                return self._named(back, counted)
            slope = self._forward(self._leaves(1.0, dtype)).detach() - at_zero.detach()
            twice = self._forward(self._leaves(2.0, dtype)).detach() - at_zero.detach()
            if torch.allclose(twice, 2 * slope, rtol=1e-9, atol=0.0):
                back = self._back(at_zero, leaves, given - at_zero.detach())
                squared = self._back(at_zero, leaves, slope)
                return self._named(back, squared)
            return self._newton(given)

    def _newton(self, given: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """x ← x + Jᵀ(g − f(x)) / (Jᵀ1)², element by element, from the directory's own values."""
        import torch

        points = {place: load_any(e).double() for place, e in self._entries.items()}
        scale = float(given.abs().max())
        for _ in range(_STEPS):
            leaves = {place: value.clone().requires_grad_() for place, value in points.items()}
            now = self._forward(leaves)
            left = given - now.detach()
            if float(left.abs().max()) <= _AGREEMENT**2 * scale:
                break
            back = self._back(now, leaves, left)
            slopes = self._back(now, leaves, torch.ones_like(given))
            points = {p: points[p] + back[p] / slopes[p].square() for p in points}
        if not float(left.abs().max()) <= _AGREEMENT * scale:
            raise UntraceableError("no values were found that the converter makes these of")
        return self._named(points, {p: torch.ones_like(v) for p, v in points.items()})

    def _leaves(self, value: float, dtype: torch.dtype) -> dict[Place, torch.Tensor]:
        import torch

        return {
            place: torch.full(entry.shape, value, dtype=dtype, requires_grad=True)
            for place, entry in self._entries.items()
        }

    def _forward(self, leaves: Mapping[Place, torch.Tensor]) -> torch.Tensor:
        result = self._conversion.follow(
            self._holder, lambda file, offset: leaves[(Path(file).name, offset)]
        )
        return result.to(next(iter(leaves.values())).dtype)

    def _back(
        self, result: torch.Tensor, leaves: Mapping[Place, torch.Tensor], given: torch.Tensor
    ) -> dict[Place, torch.Tensor]:
        import torch

        found = torch.autograd.grad(
            result, list(leaves.values()), given, retain_graph=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))

    def _named(
        self, values: Mapping[Place, torch.Tensor], weights: Mapping[Place, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            entry.name: (values[place].detach(), weights[place].detach())
            for place, entry in self._entries.items()
        }


def require_architecture(file: GGUFFile, conversion: Conversion, model: Path) -> None:
    """See that a file is of the architecture that a directory becomes.

    Raises:
        ModelError: it is of another.
    """
    if conversion.architecture != file.architecture:
        raise ModelError(
            f"its architecture is {file.architecture!r}, and {model} becomes "
            f"{conversion.architecture!r}",
            where=str(file.path),
            remedy="Give the model directory that it was exported from.",
        )

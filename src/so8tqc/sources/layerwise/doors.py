"""Each text's own forward, in a coroutine that waits at each decoder layer's door.

What a layer is given (masks, positions, ropes, keys and values that layers share, states of hybrid
models, streams) the model's own code decides, as the model's own forward runs, from the embedding
to the last norm. Only that it waits, in a pre-hook of each layer, until that layer's weights are
there; meanwhile other texts' forwards run (greenlet: a stack for each, one thread for all).
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from greenlet import getcurrent, greenlet

from so8tqc.sources.layerwise.shell import UnstreamableError
from so8tqc.sources.own_forward import (
    SeenPass,
    parts_around_layers,
    plain_options,
    states_of,
)
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch

Structure = int | None
"""What a layer returns: 0: its state; n: a tuple of n, all but the first None; None: more."""


class _FinishedError(BaseException):
    """Unwinds a forward whose hidden states are known; no model's code catches it."""


class Walker:
    """One text on its way through the layers.

    Attributes:
        ids: [T] token ids.
        door: the layer it waits at; the number of layers: it is through.
        hidden: what that layer is given, [1, T, D] or what the model has instead.
        final: [T, D] the backbone's output, once it is through.
        seen: of a text that goes on to its logits: what was seen.
    """

    def __init__(self, doors: Doors, ids: TokenIds, *, proof: bool = False) -> None:
        self.ids = ids
        self.door = -1
        self.hidden: Any = None
        self.final: torch.Tensor | None = None
        self.seen: SeenPass | None = None
        self.entered = 0
        self.skipped = 0
        self.restored: Any = None
        self.backbone = ""
        self.output: type = tuple
        self._given: list[Any] = []
        self._hashes: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._doors = doors
        self._proof = proof
        self._forward: greenlet | None = _Text(self, doors.forward)

    def go(self) -> None:
        """Run until the next door, or to the end.

        Raises:
            UnstreamableError: the model's code does between layers what the doors cannot hold.
        """
        forward = self._forward
        if forward is None:
            return
        try:
            forward.switch()
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            raise UnstreamableError(
                "its forward uses a layer's weights, or the embedding, outside of that layer"
            ) from None
        if forward.dead:
            self._forward = None
            self._given = []

    def skip_to(self, layer: int, hidden: Any) -> None:
        """Begin at a layer with a state that is known; the layers before it do nothing."""
        self.skipped, self.restored = layer, hidden

    def arrive(self, door: int, hidden: Any, given: list[Any]) -> None:
        """Wait at a door; called by the forward itself."""
        self.door, self.hidden, self._given = door, hidden, given
        self._wait()

    def _wait(self) -> None:
        assert self._forward is not None
        parent = self._forward.parent
        assert parent is not None
        parent.switch()

    def through(self, name: str, output: Any) -> None:
        """The backbone has returned; called by the forward itself."""
        import torch

        if self.entered != self._doors.count:
            raise UnstreamableError(
                f"its forward runs {self.entered} of its {self._doors.count} layers"
            )
        self.door, self.hidden, self._given = self._doors.count, None, []
        self.final = states_of(output)[0].clone(memory_format=torch.contiguous_format)
        self.backbone, self.output = name, type(output)
        if not self._proof:
            raise _FinishedError

    def wait_for_head(self) -> None:
        """The output head is about to be called; called by the forward itself."""
        if self.seen is None and self.final is not None:
            self._wait()

    def told(self, logits: torch.Tensor) -> None:
        """The whole forward has returned; called by the forward itself."""
        assert self.final is not None
        self.seen = SeenPass(self.backbone, self.output, self.final, logits)

    def digest(self) -> str | None:
        """SHA-256 of all that the layer is given but its state; None if it could be changed there.

        What a layer gives to a later one besides the state is no function of the tokens alone.
        """
        hashed = hashlib.sha256()
        for value in self._given:
            if not self._add(hashed, value):
                return None
        return hashed.hexdigest()

    def _add(self, hashed: Any, value: Any) -> bool:
        import torch

        if isinstance(value, torch.Tensor):
            hashed.update(self._hash(value).encode())
            return True
        if isinstance(value, tuple):
            return all(self._add(hashed, part) for part in value)
        if value is None or isinstance(value, bool | int | float | str):
            hashed.update(repr(value).encode())
            return True
        return False

    def _hash(self, tensor: Any) -> str:
        known = self._hashes.get(id(tensor))
        if known is None or known[0]() is not tensor:
            import torch

            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            found = hashlib.sha256(raw.data).hexdigest()
            known = (weakref.ref(tensor), f"{tuple(tensor.shape)} {tensor.dtype} {found}")
            self._hashes[id(tensor)] = known
        return known[1]


class _Text(greenlet):  # type: ignore[misc]
    """The coroutine of a walker."""

    def __init__(self, walker: Walker, run: Callable[[Walker], None]) -> None:
        super().__init__(lambda: run(walker))
        self.walker = walker


def _current() -> Walker | None:
    now = getcurrent()
    return now.walker if isinstance(now, _Text) else None


class HasLayers(Protocol):
    """A transformers model whose decoder layers are known: a shell, or one in memory.

    Attributes:
        module: the model.
        layers: the list of its decoder layers.
        head: its output head.
        path: the directory it is from.
    """

    module: Any
    layers: Any
    head: Any
    path: Path


class Doors:
    """Hooks on a model's layers, at which texts wait.

    Args:
        shell: the model.

    Attributes:
        count: number of layers.
        structures: layer → what it returns, once it has.
    """

    def __init__(self, shell: HasLayers) -> None:
        self._shell = shell
        self.count = len(shell.layers)
        self.structures: dict[int, Structure] = {}
        self._around = parts_around_layers(shell.module, shell.head, str(shell.path))

    def forward(self, walker: Walker) -> None:
        """A text's forward, inside its coroutine."""
        import torch

        module = self._shell.module
        ids = torch.from_numpy(walker.ids)[None]
        try:
            output = module(input_ids=ids, **plain_options(module))
        except _FinishedError:
            return
        walker.told(output.logits[0])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks, for the duration of a ``with``."""
        handles: list[Any] = []
        module = self._shell.module
        try:
            for index, layer in enumerate(self._shell.layers):
                handles.append(layer.register_forward_pre_hook(self._at(index), with_kwargs=True))
                handles.append(layer.register_forward_hook(self._behind(index)))
            for name in self._around:
                part = module.get_submodule(name)
                handles.append(part.register_forward_pre_hook(_entering(name)))
                handles.append(part.register_forward_hook(_leaving(name)))
            handles.append(self._shell.head.register_forward_pre_hook(_before_head))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def skipping(self, structures: Mapping[int, Structure]) -> Iterator[None]:
        """Layers before a walker's first do nothing, for the duration of a ``with``."""
        try:
            for index, layer in enumerate(self._shell.layers):
                layer.forward = _passing(layer.forward, index, structures.get(index))
            yield
        finally:
            for layer in self._shell.layers:
                vars(layer).pop("forward", None)

    def _at(self, index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, arguments: Any, named: Any) -> None:
            walker = _current()
            if walker is None:
                return
            if index != walker.entered:
                raise UnstreamableError(
                    f"its forward runs layer {index} where layer {walker.entered} is due"
                )
            walker.entered += 1
            if index < walker.skipped:
                return
            named = dict(named)
            hidden = arguments[0] if arguments else named.pop("hidden_states")
            walker.arrive(index, hidden, [*arguments[1:], *named.values()])

        return hook

    def _behind(self, index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            if _current() is not None:
                self.structures.setdefault(index, _structure(output))

        return hook


def _entering(name: str) -> Callable[[Any, Any], None]:
    def hook(_module: Any, _arguments: Any) -> None:
        walker = _current()
        if walker is not None and not walker.backbone:
            walker.backbone = name  # the outermost is entered first

    return hook


def _leaving(name: str) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, _arguments: Any, output: Any) -> None:
        walker = _current()
        if walker is not None and walker.backbone == name and walker.final is None:
            walker.through(name, output)

    return hook


def _before_head(_module: Any, _arguments: Any) -> None:
    walker = _current()
    if walker is not None:
        walker.wait_for_head()


def _structure(output: Any) -> Structure:
    if not isinstance(output, tuple):
        return 0
    return len(output) if all(part is None for part in output[1:]) else None


def _passing(forward: Any, index: int, structure: Structure) -> Any:
    def passed(*arguments: Any, **named: Any) -> Any:
        walker = _current()
        if walker is None or index >= walker.skipped:
            return forward(*arguments, **named)
        state = arguments[0] if arguments else named["hidden_states"]
        if index == walker.skipped - 1:
            state, walker.restored = walker.restored, None
        return (state, *[None] * (structure - 1)) if structure else state

    return passed


def resumable(structures: Mapping[int, Structure], layers: Sequence[int]) -> bool:
    """Whether what these layers return is their state and nothing else."""
    return all(structures.get(layer) is not None for layer in layers)

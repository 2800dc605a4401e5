"""The operations of a running model: what each is given, and what it makes of it.

An operation is a module that computes by itself (a norm, a projection, a router, all experts of a
layer), found by structure, or a stage of an attention: the queries, keys and values that it is
handed, behind rope and whatever norms there are, and what it makes of them. A layer's own output
comes last.

A stretch of a forward is *recorded*: each call with its arguments and its value. Or it is *played
against* a recording: each operation is handed what the recorded one was given, computes, and its
value is noted; then the forward goes on with the recorded value. So every operation is seen on the
same input as the recorded one, whatever those before it did, and what differs before it is replaced
is what lies between the operations: residuals, products, reshapes.

transformers lets an attention function be registered by name. Ours is the one in use, watched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from so8tqc.architectures import in_other_tower

if TYPE_CHECKING:
    import torch

STAGES = ("query", "key", "value", "attention")
"""Stages of an attention, behind the dotted name of its module and a colon."""

_NAME = "so8tqc_operations_"
_KNOWN = ("eager", "sdpa")
_SILENT = ("Dropout", "Identity")
"""Ends of the class names of modules that compute nothing."""


class Call(NamedTuple):
    """One call of an operation.

    Attributes:
        arguments, named: what it was given.
        output: what it returned.
    """

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Any


Change = Callable[[str, "torch.Tensor"], "torch.Tensor"]
"""An operation's name and a value → the value to go on with: of a module, what it is given first;
of a stage of an attention, or of a layer, what it makes."""


@dataclass
class Trace:
    """The calls of a stretch of a forward.

    Attributes:
        calls: operation → its calls; operations in the order of their first call.
        given: operation → what it would have been given, of those played against a recording.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    given: dict[str, list[Any]] = field(default_factory=dict)


class Operations:
    """The operations of a model.

    Args:
        module: a transformers model.
        layers: dotted name of its list of decoder layers.
        names: operations that are known already, of another model of its class; None: its own.

    Attributes:
        names: dotted name of each module that is an operation.
        attends: whether the stages of attentions are seen.
    """

    def __init__(self, module: Any, layers: str, names: tuple[str, ...] | None = None) -> None:
        self._module = module
        self._layers = layers
        self.names = names if names is not None else tuple(_operations(module, layers))
        self._known = {id(part): name for name, part in module.named_modules()}
        self.attends = _watch_attention(module)

    @contextmanager
    def recorded(self) -> Iterator[Trace]:
        """The calls made inside, in order."""
        with self._seen(_Seeing(self._known, None), self.names) as trace:
            yield trace

    @contextmanager
    def played(self, against: Trace) -> Iterator[Trace]:
        """The calls made inside, each on the input of the recorded one."""
        with self._seen(_Seeing(self._known, against), self.names) as trace:
            yield trace

    @contextmanager
    def changed(self, change: Change) -> Iterator[Trace]:
        """The calls made inside, what operations are given and make changed on the way."""
        with self._seen(_Seeing(self._known, None, change), self.names) as trace:
            yield trace

    @contextmanager
    def outputs(self, names: tuple[str, ...] = ()) -> Iterator[Trace]:
        """The layers' own outputs alone, and what some modules make."""
        with self._seen(_Seeing(self._known, None), names) as trace:
            yield trace

    @contextmanager
    def _seen(self, seeing: _Seeing, names: tuple[str, ...]) -> Iterator[Trace]:
        handles: list[Any] = []
        try:
            for name in names:
                part = self._module.get_submodule(name)
                before, after = partial(seeing.before, name), partial(seeing.after, name)
                handles.append(
                    part.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
                )
                handles.append(part.register_forward_hook(after, with_kwargs=True))
            for index, layer in enumerate(self._module.get_submodule(self._layers)):
                hook = partial(seeing.layer, f"{self._layers}.{index}")
                handles.append(layer.register_forward_hook(hook))
            if names == self.names:
                _active.append(seeing)
            yield seeing.trace
        finally:
            if seeing in _active:
                _active.remove(seeing)
            for handle in handles:
                handle.remove()


def values_in(output: Any) -> list[torch.Tensor]:
    """The tensors of numbers in what an operation returned, in order."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, tuple | list | Mapping):
        return [value for part in parts for value in values_in(part)]
    return []


def choices_in(output: Any) -> torch.Tensor | None:
    """The numbers of what was chosen for each token, [T, k], in what a router returned; or None."""
    import torch

    if not isinstance(output, tuple | list):
        return None
    found = (
        part.reshape(-1, part.shape[-1])
        for part in output
        if isinstance(part, torch.Tensor) and part.dtype in (torch.int32, torch.int64)
    )
    return next((part for part in found if part.ndim == 2), None)


def value_of(output: Any) -> torch.Tensor | None:
    """The first of them; None if there is none."""
    return next(iter(values_in(output)), None)


def copied(value: Any) -> Any:
    """A value whose tensors are its own, as are those in its tuples, lists and dictionaries."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(copied(part) for part in value)
    if isinstance(value, list):
        return [copied(part) for part in value]
    if type(value) is dict:
        return {key: copied(part) for key, part in value.items()}
    return value


class _Seeing:
    """What the hooks of one stretch do.

    Args:
        known: id of a module → its dotted name.
        against: a recording to play against; None: this is one.
        change: what is done to values; None: nothing.
    """

    def __init__(
        self, known: Mapping[int, str], against: Trace | None, change: Change | None = None
    ) -> None:
        self.trace = Trace()
        self._known = known
        self._against = against
        self._change = change
        self._open: dict[str, tuple[Any, Any]] = {}

    def before(self, name: str, _part: Any, arguments: Any, named: Any) -> Any:
        """Note what an operation is given, or give it what the recorded one was."""
        # a hook behind ours may change it: the recorded operation begins with that hook
        self._open[name] = copied(arguments), copied(named)
        recorded = self._recorded(name)
        if self._change is not None and arguments and values_in(arguments[0]):
            return (self._change(name, values_in(arguments[0])[0]), *arguments[1:]), named
        if recorded is None:
            return None
        given = arguments[0] if arguments else next(iter(named.values()), None)
        self.trace.given.setdefault(name, []).append(copied(given))
        return copied(recorded.arguments), copied(dict(recorded.named))

    def after(self, name: str, _part: Any, arguments: Any, named: Any, output: Any) -> Any:
        """Note what it makes of it, and go on with what the recorded one made."""
        recorded = self._recorded(name)
        self._add(name, Call(*self._open.pop(name, (arguments, named)), output))
        return None if recorded is None else copied(recorded.output)

    def layer(self, name: str, _layer: Any, _arguments: Any, output: Any) -> Any:
        """Note a layer's output, and go on with it or with what it is changed to."""
        self._add(name, Call((), {}, output))
        if self._change is None:
            return None
        if isinstance(output, tuple):
            return (self._change(name, output[0]), *output[1:])
        return self._change(name, output)

    def stage(self, module: Any, stage: str, output: Any) -> Any:
        """Note a stage of an attention, and go on with it or with what was recorded."""
        name = f"{self._known.get(id(module), type(module).__name__)}:{stage}"
        recorded = self._recorded(name)
        if self._change is not None:
            output = self._change(name, output)
        self._add(name, Call((), {}, output))
        return output if recorded is None else copied(recorded.output)

    def _recorded(self, name: str) -> Call | None:
        """The recorded call that the next one of an operation is held against."""
        if self._against is None:
            return None
        calls = self._against.calls.get(name, [])
        done = len(self.trace.calls.get(name, []))
        return calls[done] if done < len(calls) else None

    def _add(self, name: str, call: Call) -> None:
        """Note a call; models add to values in place."""
        kept = call._replace(output=copied(call.output))
        self.trace.calls.setdefault(name, []).append(kept)


_active: list[_Seeing] = []


def _operations(module: Any, layers: str) -> Iterator[str]:
    """Modules that compute by themselves, in the text model and around it."""
    inside: str | None = None
    for name, part in module.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if not name or in_other_tower(name + ".") or type(part).__name__.endswith(_SILENT):
            continue
        if "rotary" in name.rpartition(".")[2] or "rotary" in type(part).__name__.lower():
            continue  # what it makes of positions shows in queries and keys
        below = [child for child in part.children() if any(True for _ in child.parameters())]
        own = bool(part._parameters) or not list(part.children())
        if own and not below and name != layers:
            inside = name + "."
            yield name


def _watch_attention(module: Any) -> bool:
    """Let a model attend through us, in the way that it does; whether it can."""
    before = getattr(module.config, "_attn_implementation", None)
    if before is None or not getattr(module, "_supports_attention_backend", False):
        return False
    if before.startswith(_NAME):
        return True
    if before not in _KNOWN:
        return False
    _register(before)
    module.set_attn_implementation(_NAME + before)
    return True


def _register(own: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_NAME + own, partial(_attend, own))
    AttentionMaskInterface.register(_NAME + own, ALL_MASK_ATTENTION_FUNCTIONS[own])


def _attend(
    own: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[Any, Any]:
    """The model's own attention, its stages shown to whoever looks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if own == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[own]
    if not _active:
        found: tuple[Any, Any] = attend(module, query, key, value, attention_mask, **options)
        return found
    seeing = _active[-1]
    query, key, value = (
        seeing.stage(module, stage, given)
        for stage, given in zip(STAGES[:3], (query, key, value), strict=True)
    )
    output, weights = attend(module, query, key, value, attention_mask, **options)
    return seeing.stage(module, STAGES[3], output), weights

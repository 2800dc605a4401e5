"""Second moments of what enters a model's matrices, E[x xᵀ], a layer at a time.

Values are seen through attention only: their matrix' inputs are the means that queries attend to,
Σ_t a_qt x_t of every head. Keys likewise: a token's input counts by what its key moves (see
``attended``). Where a model attends otherwise, or has no matrix of its own for them, each token
counts once.

All chunks of calibration text go through layer k before layer k + 1 is begun, so that the second
moments of one layer are in memory at a time, and of the activations one state per token. Layers
are called as the model itself calls them: positions, masks and whatever else it hands to them are
taken from a run of the whole model on one chunk, and hold for every chunk of that length. That the
layers run apart give what the model gives is seen on another chunk, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ModelError
from so8tqc.progress import SILENT, Progress
from so8tqc.sources.attended import Attended, attention_told, watched
from so8tqc.sources.hf import HFModel
from so8tqc.sources.protocol import TokenIds

HELD_OUT = 8
"""Every eighth chunk is kept apart: what is fitted on the others is judged on it."""

_AGREEMENT = 1e-3
"""How far a layer's state may lie from the model's own, relative to its size: float32 leaves 1e-6,
a layer that was given the wrong mask or positions a good part of 1."""

HEAD = "head"

QUERY_STEP = 4
"""Every fourth query is looked at, with each of its heads: other ones in each chunk."""


@dataclass
class Moments:
    """Sums of x xᵀ over tokens.

    Attributes:
        kept: [n, n] float64, over the chunks that are fitted on.
        held: [n, n] float64, over those kept apart.
        tokens, held_tokens: how many.
        modules: dotted names of the linears that share this input.
    """

    kept: npt.NDArray[np.float64]
    held: npt.NDArray[np.float64]
    tokens: int = 0
    held_tokens: int = 0
    modules: list[str] = field(default_factory=list)

    def add(self, product: Any, tokens: int, *, held: bool) -> None:
        """Add a chunk's [n, n] product, a torch tensor in the model's dtype; chunks are summed in
        float64."""
        summed = product.double().cpu().numpy()
        if held:
            self.held += summed
            self.held_tokens += tokens
        else:
            self.kept += summed
            self.tokens += tokens


class LayerMoments(NamedTuple):
    """The moments of one layer, or of the output head.

    Attributes:
        name: ``0`` … , or :data:`HEAD`.
        moments: one for each input that differs.
    """

    name: str
    moments: tuple[Moments, ...]


def chunks_of(
    tokens: TokenIds, bos: int | None, length: int, count: int | None
) -> tuple[TokenIds, ...]:
    """Chunks of equal length, evenly spread over a text, each begun with BOS where there is one.

    Args:
        tokens: [T] ids of the whole text.
        bos: id of the token that begins a text, None if the model has none.
        length: tokens of a chunk; what is left at the end is not used.
        count: at most so many chunks; None: all.
    """
    whole = tokens.size // length
    wanted = whole if count is None else min(count, whole)
    chosen = []
    for index in range(wanted):
        start = index * whole // wanted * length
        chunk = tokens[start : start + length].copy()
        if bos is not None:
            chunk[0] = bos
        chosen.append(chunk)
    return tuple(chosen)


def layer_moments(
    model: HFModel,
    chunks: Sequence[TokenIds],
    *,
    wanted: Callable[[str], bool],
    progress: Progress = SILENT,
) -> Iterator[LayerMoments]:
    """The moments of every layer in turn, then those of the output head.

    Args:
        model: on the CPU, in float32.
        chunks: of equal length.
        wanted: of a layer's name, whether its moments are asked for; the others are only run.
        progress: told about layers.

    Raises:
        ModelError: the layers cannot be told apart, or do not give alone what the model gives.
    """
    import torch

    layers = _layers(model)
    with attention_told(model), torch.inference_mode():
        handed = _calls(model, layers, chunks[0])
        states = [_first_state(model, layers[0], chunk) for chunk in chunks]
        with progress.task("running layers", total=len(layers) + 1, unit="layers") as task:
            for index, (layer, call) in enumerate(zip(layers, handed, strict=True)):
                name = str(index)
                with _hooked(model, layer if wanted(name) else None) as hooks:
                    for number, state in enumerate(states):
                        output = layer(state, *call.arguments, **call.named)
                        states[number] = output[0] if isinstance(output, tuple) else output
                        hooks.end(number)
                task.advance(1, item=f"layer {index}")
                if wanted(name):
                    yield LayerMoments(name, tuple(hooks.moments.values()))
            finals = _final_states(model, layers, states, chunks)
            if wanted(HEAD):
                yield LayerMoments(HEAD, (_head(finals),))
            task.advance(1, item=HEAD)


class _Call(NamedTuple):
    """What a layer is handed besides its state."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


def _layers(model: HFModel) -> Sequence[Any]:
    import torch

    count = int(model.config.num_hidden_layers)
    for module in model.module.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise ModelError(
        f"no list of {count} layers is in the model, so that they cannot be run apart",
        where=str(model.path),
    )


def _calls(model: HFModel, layers: Sequence[Any], chunk: TokenIds) -> list[_Call]:
    calls: dict[int, _Call] = {}

    def seen(index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, arguments: Any, named: Any) -> None:
            arguments, named = tuple(arguments), dict(named)
            if arguments:
                arguments = arguments[1:]
            else:
                named.pop("hidden_states", None)
            calls[index] = _Call(arguments, named)

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(seen(index), with_kwargs=True)
            stack.callback(handle.remove)
        model.hidden(chunk)
    if len(calls) != len(layers):
        raise ModelError(
            "the model does not run all of its layers one after another", where=str(model.path)
        )
    return [calls[index] for index in range(len(layers))]


class _EnoughError(Exception):
    """The first layer was reached."""


def _first_state(model: HFModel, first: Any, chunk: TokenIds) -> Any:
    """What the first layer is given."""
    found = []

    def hook(_module: Any, arguments: Any, named: Any) -> None:
        found.append(arguments[0] if arguments else named["hidden_states"])
        raise _EnoughError

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model.hidden(chunk)
    except _EnoughError:
        pass
    finally:
        handle.remove()
    return found[0]


class _Seen(NamedTuple):
    """A linear as it was called: [T, n] inputs, and its output."""

    name: str
    inputs: Any
    output: Any


class _Hooks:
    """Sums what enters a layer's linears, once for all that share an input."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self._of: dict[str, str] = {}
        self._seen: list[_Seen] = []
        self.calls: list[Attended] = []

    def hook(self, name: str) -> Callable[[Any, Any, Any], None]:
        def take(_module: Any, arguments: Any, output: Any) -> None:
            self._seen.append(_Seen(name, arguments[0], output))

        return take

    def end(self, number: int) -> None:
        """The chunk of this number in the text has gone through."""
        held = number % HELD_OUT == HELD_OUT - 1
        apart = dict(_through_attention(self._seen, self.calls, number))
        leaders: list[_Seen] = []
        for seen in self._seen:
            inputs = seen.inputs
            tokens = inputs.numel() // inputs.shape[-1]
            if seen.name in apart:
                self._add(seen.name, apart[seen.name], tokens, held)
                continue
            leader = next((one for one in leaders if one.inputs is inputs), seen)
            if leader is seen:
                leaders.append(seen)
            # the first chunk says which linears share an input; a later one cannot change it
            if self._of.setdefault(seen.name, leader.name) == seen.name:
                flat = inputs.reshape(-1, inputs.shape[-1])
                self._add(seen.name, flat.T @ flat, tokens, held)
            elif seen.name not in self.moments[self._of[seen.name]].modules:
                self.moments[self._of[seen.name]].modules.append(seen.name)
        self._seen.clear()
        self.calls.clear()

    def _add(self, name: str, product: Any, tokens: int, held: bool) -> None:
        if name not in self.moments:
            n = len(product)
            self.moments[name] = Moments(np.zeros((n, n)), np.zeros((n, n)), modules=[name])
        self.moments[name].add(product, tokens, held=held)


def _through_attention(
    seen: Sequence[_Seen], calls: Sequence[Attended], number: int
) -> Iterator[tuple[str, Any]]:
    """The linears that make values and keys, and the [n, n] products of their inputs.

    Values are known by their memory, keys (which are turned by positions first) by their name
    beside the values'.
    """
    for call in calls:
        value = next((one for one in seen if _same_memory(one.output, call.value)), None)
        if value is None:
            continue
        inputs = value.inputs.reshape(-1, value.inputs.shape[-1])
        queries = call.weights[:, number % QUERY_STEP :: QUERY_STEP]
        means = (queries @ inputs).reshape(-1, inputs.shape[1])
        yield value.name, means.T @ means * (len(inputs) / len(means))
        key_name = f"{value.name.rpartition('.')[0]}.k_proj"
        if any(one.name == key_name and one.inputs is value.inputs for one in seen):
            costs = call.key_costs.to(inputs.dtype)
            yield key_name, inputs.T @ (inputs * costs[:, None])


def _same_memory(one: Any, other: Any) -> bool:
    if one.numel() != other.numel():
        return False
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


@contextmanager
def _hooked(model: HFModel, layer: Any) -> Iterator[_Hooks]:
    """Hooks on every linear of a layer, by its name in the model; None: on nothing."""
    hooks = _Hooks()
    with ExitStack() as stack:
        if layer is not None:
            hooks.calls = stack.enter_context(watched())
            names = {id(module): name for name, module in model.module.named_modules()}
            for module in layer.modules():
                if is_linear(module):
                    handle = module.register_forward_hook(hooks.hook(names[id(module)]))
                    stack.callback(handle.remove)
        yield hooks


def is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _final_states(
    model: HFModel, layers: Sequence[Any], states: Sequence[Any], chunks: Sequence[TokenIds]
) -> list[Any]:
    """[T, D] what the head is given, of every chunk: the model's own norm after its last layer.

    The model is run once more, on the last chunk, and the state that its last layer gives there
    must be ours.
    """
    import torch

    last = layers[-1]
    theirs: list[Any] = []

    def compare(_module: Any, _arguments: Any, output: Any) -> None:
        theirs.append(output[0] if isinstance(output, tuple) else output)

    handle = last.register_forward_hook(compare)
    try:
        model.hidden(chunks[-1])
    finally:
        handle.remove()
    difference = float(torch.linalg.vector_norm(theirs[0] - states[-1]))
    if not difference <= _AGREEMENT * float(torch.linalg.vector_norm(theirs[0])):
        raise ModelError(
            "its layers, run one at a time, do not give what the model gives",
            where=str(model.path),
            remedy="Quantize it with --solver libllama.",
        )
    finals = []
    for state, chunk in zip(states, chunks, strict=True):
        replace = last.register_forward_hook(_replacing(state))
        try:
            with _skipping(layers):
                finals.append(model.hidden(chunk))
        finally:
            replace.remove()
    return finals


def _replacing(state: Any) -> Callable[[Any, Any, Any], Any]:
    def hook(_module: Any, _arguments: Any, output: Any) -> Any:
        return (state, *output[1:]) if isinstance(output, tuple) else state

    return hook


@contextmanager
def _skipping(layers: Sequence[Any]) -> Iterator[None]:
    """The model's layers do nothing, so that only what comes after them is computed."""
    forwards: Mapping[int, Any] = {index: layer.forward for index, layer in enumerate(layers)}

    def passed_on(state: Any, *_arguments: Any, **_named: Any) -> Any:
        return state

    try:
        for layer in layers:
            layer.forward = passed_on
        yield
    finally:
        for index, layer in enumerate(layers):
            layer.forward = forwards[index]


def _head(finals: Sequence[Any]) -> Moments:
    n = finals[0].shape[-1]
    found = Moments(np.zeros((n, n)), np.zeros((n, n)), modules=[HEAD])
    for number, state in enumerate(finals):
        held = number % HELD_OUT == HELD_OUT - 1
        found.add(state.T @ state, len(state), held=held)
    return found

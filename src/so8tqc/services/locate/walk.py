"""All sides through one layer after another, on the same tokens.

Of every text there are several walks. The reference's is recorded. The candidate goes *freely*, on
what its own layers before have made (what is inherited counts), *by layer*, each layer on what the
reference's was given, and *by operation*, played against the recording. The honest side goes the
same ways, and tells what types and arithmetic explain. Variants are played. Where libllama's own
values are known, the candidate's layers are also given what libllama's were given, as they are and
with activations rounded as libllama rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ModelError
from so8tqc.progress import Progress
from so8tqc.services.locate.measure import Difference
from so8tqc.services.locate.names import EMBEDDING_STATE, INTO, LOGITS
from so8tqc.services.locate.sides import Side, Sides
from so8tqc.sources.layerwise.doors import Walker
from so8tqc.sources.layerwise.shell import AROUND, EMBEDDING, HEAD, UnstreamableError
from so8tqc.sources.operations import Call, Change, Trace, choices_in, value_of, values_in
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch

START = -1
"""The stage in front of the first layer; that behind the last has the number of layers."""


@dataclass
class Stage:
    """What was seen of one layer, or in front of the first, or behind the last.

    Attributes:
        index: of the layer; ``START`` or the number of layers.
        recorded: of each text, the reference's calls.
        played: of each text, the candidate's on the reference's inputs.
        variants: configuration key → of each text, the same of that variant.
        honest: operation → what rounding makes of it.
        free, by_layer: of the layer's output, or of the logits: the candidate's difference from
            the reference, inherited and own, and own alone.
        honest_free, honest_by_layer: the same of the honest side.
        like_runtime: of each text, the candidate's calls on what libllama's layer is given.
        rounded: the same, activations rounded.
    """

    index: int
    recorded: list[Trace] = field(default_factory=list)
    played: list[Trace] = field(default_factory=list)
    variants: dict[str, list[Trace]] = field(default_factory=dict)
    honest: dict[str, Difference] = field(default_factory=dict)
    free: Difference = field(default_factory=Difference)
    by_layer: Difference = field(default_factory=Difference)
    honest_free: Difference = field(default_factory=Difference)
    honest_by_layer: Difference = field(default_factory=Difference)
    like_runtime: list[Trace] = field(default_factory=list)
    rounded: list[Trace] = field(default_factory=list)


class Runtime(NamedTuple):
    """What is needed of libllama's run.

    Attributes:
        entering: text, layer → what the layer is given, [T, D]; None: not known.
        change: rounds activations as libllama does.
    """

    entering: Callable[[int, int], npt.NDArray[np.float32] | None]
    change: Change


Pair = tuple["torch.Tensor", "torch.Tensor"]


def values_of(played: Trace, recorded: Trace) -> Iterator[tuple[str, Pair]]:
    """Operation → its value, and the recorded one's, of each call in order.

    Where the candidate would have been given something else than the recorded operation was, that
    comes first, under ``into`` and the operation's name; further values than its first come last.
    """
    for name, calls in recorded.calls.items():
        mine = played.calls.get(name, [])
        for number, (found, known) in enumerate(zip(mine, calls, strict=False)):
            into = played.given.get(name, [])
            given = value_of(into[number]) if number < len(into) else None
            wanted = value_of(known.arguments[0]) if known.arguments else None
            if given is not None and wanted is not None:
                yield INTO + name, (given, wanted)
            pairs = zip(values_in(found.output), values_in(known.output), strict=False)
            for place, (one, other) in enumerate(pairs):
                yield (
                    (name, (one, other))
                    if not place
                    else (further(name, place), _sorted(one, other))
                )


def further(name: str, place: int) -> str:
    """What a further value of an operation is called: ``mlp.gate[1]``."""
    return f"{name}[{place}]"


def _sorted(one: torch.Tensor, other: torch.Tensor) -> Pair:
    """Values that a rounding may exchange, such as weights of chosen experts, by their size."""
    return one.sort(-1).values, other.sort(-1).values


def differences(played: Sequence[Trace], recorded: Sequence[Trace]) -> dict[str, Difference]:
    """Operation → the difference of all texts' values, in the order in which they are computed."""
    found: dict[str, Difference] = {}
    for mine, known in zip(played, recorded, strict=True):
        for name, (one, other) in values_of(mine, known):
            found.setdefault(name, Difference()).add(one, other)
    return found


def uncalled(played: Sequence[Trace], recorded: Sequence[Trace]) -> list[str]:
    """Operations that the one side has called more often than the other."""
    found: dict[str, None] = {}
    for mine, known in zip(played, recorded, strict=True):
        for name in (*known.calls, *mine.calls):
            if len(mine.calls.get(name, [])) != len(known.calls.get(name, [])):
                found[name] = None
    return list(found)


class _Walks:
    """Walkers of one side, one for each text."""

    def __init__(self, side: Side, texts: Sequence[TokenIds]) -> None:
        self.side = side
        self.walkers = [Walker(side.doors, ids, proof=True) for ids in texts]

    def go(self, number: int) -> torch.Tensor | None:
        """One text to its next door; its logits, if it is through."""
        walker = self.walkers[number]
        walker.go()
        if walker.seen is None:
            return None
        logits = walker.seen.logits
        walker.seen = None
        return logits


class Walk:
    """One pass.

    Args:
        sides: the models.
        texts: token ids of each text.
        runtime: of a GGUF candidate, libllama's values.
    """

    def __init__(
        self, sides: Sides, texts: Sequence[TokenIds], runtime: Runtime | None = None
    ) -> None:
        self._sides = sides
        self._runtime = runtime
        self._count = len(texts)
        candidate, honest = sides.candidate, sides.honest
        self._reference = _Walks(sides.reference, texts)
        self._free = _Walks(candidate, texts)
        self._by_layer = _Walks(candidate, texts)
        self._played = _Walks(candidate, texts)
        self._honest_free = _Walks(honest, texts)
        self._honest_by_layer = _Walks(honest, texts)
        self._honest_played = _Walks(honest, texts)
        self._like_runtime = _Walks(candidate, texts)
        self._rounded = _Walks(candidate, texts)
        self._variants = {key: _Walks(v.side, texts) for key, v in sides.variants.items()}

    def run(self, look: Callable[[Stage], None], progress: Progress) -> None:
        """Walk; ``look`` is told of each stage while its weights are there.

        Raises:
            ModelError: a model's code does between layers what cannot be held.
        """
        import torch

        layers = len(self._sides.candidate.model.layers)
        with ExitStack() as stack:
            task = stack.enter_context(
                progress.task("comparing layers", total=layers, unit="layers")
            )
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._sides.reference.before_head())
            for side in self._sides.all:
                stack.enter_context(side.doors.installed())
                side.put(AROUND, EMBEDDING, HEAD)
            try:
                look(self._stage(START))
                for index in range(layers):
                    for side in self._sides.all:
                        side.put(index)
                    look(self._stage(index))
                    for side in self._sides.all:
                        side.take(index)
                    task.advance(1, item=f"layer {index}")
                look(self._stage(layers))
            except UnstreamableError as reason:
                raise ModelError(
                    f"its layers cannot be held apart: {reason}",
                    where=str(self._sides.candidate.model.path),
                ) from None

    def _stage(self, index: int) -> Stage:
        stage = Stage(index)
        for number in range(self._count):
            entering = self._reference.walkers[number].hidden
            entering = None if entering is None else entering.clone()
            recorded, output = self._recorded(number, index)
            stage.recorded.append(recorded)
            stage.played.append(self._play(self._played, number, recorded, entering))
            honest = self._play(self._honest_played, number, recorded, entering)
            for name, (one, other) in values_of(honest, recorded):
                stage.honest.setdefault(name, Difference()).add(one, other)
            for key, walks in self._variants.items():
                played = self._play(walks, number, recorded, entering)
                stage.variants.setdefault(key, []).append(played)
            self._outputs(stage, number, entering, output)
            if self._runtime is not None:
                self._as_runtime(stage, number, self._runtime)
        return stage

    def _outputs(
        self, stage: Stage, number: int, entering: Any, output: torch.Tensor | None
    ) -> None:
        """Candidate and honest side, freely and by layer.

        By layer, tokens for which rounding has made a router choose otherwise are left out: a
        choice is no error of a size.
        """
        recorded = stage.recorded[number]
        routers = routers_of(recorded)
        index = stage.index
        for walks, difference in (
            (self._free, stage.free),
            (self._honest_free, stage.honest_free),
        ):
            found, _ = self._output(walks, number, index, None, ())
            if found is not None and output is not None:
                difference.add(found, output)
        made = [
            self._output(walks, number, index, entering, routers)
            for walks in (self._by_layer, self._honest_by_layer)
        ]
        alike = same_choices(recorded, *(trace for _, trace in made))
        for (found, _), difference in zip(
            made, (stage.by_layer, stage.honest_by_layer), strict=True
        ):
            if found is not None and output is not None:
                difference.add(kept(found, alike), kept(output, alike))

    def _as_runtime(self, stage: Stage, number: int, runtime: Runtime) -> None:
        """The candidate's layer on what libllama's is given, twice.

        What follows the last layer is given what libllama's makes, too.
        """
        given = runtime.entering(number, stage.index) if stage.index != START else None
        last = f"{self._sides.stack}.{len(self._sides.candidate.model.layers) - 1}"
        left = runtime.entering(number, len(self._sides.candidate.model.layers))

        def as_it_is(name: str, value: torch.Tensor) -> torch.Tensor:
            return _like(left, value) if name == last else value

        def rounded(name: str, value: torch.Tensor) -> torch.Tensor:
            return as_it_is(name, runtime.change(name, value))

        for walks, traces, change in (
            (self._like_runtime, stage.like_runtime, as_it_is),
            (self._rounded, stage.rounded, rounded),
        ):
            walker = walks.walkers[number]
            if walker.hidden is not None:
                walker.hidden.copy_(_like(given, walker.hidden))
            with self._sides.candidate.operations.changed(change) as trace:
                logits = walks.go(number)
            _note_ends(trace, walker, stage.index, logits)
            traces.append(trace)

    def _recorded(self, number: int, index: int) -> tuple[Trace, torch.Tensor | None]:
        """The reference's calls of a stage, and what the layer, or the model, made."""
        side = self._sides.reference
        with at_layer(side, index), side.operations.recorded() as trace:
            logits = self._reference.go(number)
        _note_ends(trace, self._reference.walkers[number], index, logits)
        return trace, logits if logits is not None else self._layer_output(trace, index)

    def _play(self, walks: _Walks, number: int, recorded: Trace, entering: Any) -> Trace:
        walker = walks.walkers[number]
        index = walker.door
        if entering is not None:
            walker.hidden.copy_(entering)
        with walks.side.operations.played(recorded) as trace:
            logits = walks.go(number)
        _note_ends(trace, walker, index, logits)
        return trace

    def _output(
        self, walks: _Walks, number: int, index: int, entering: Any, routers: tuple[str, ...]
    ) -> tuple[torch.Tensor | None, Trace]:
        """What a layer, or the model, makes of a text, and what its routers chose."""
        if entering is not None:
            walks.walkers[number].hidden.copy_(entering)
        with walks.side.operations.outputs(routers) as trace:
            logits = walks.go(number)
        return (logits if logits is not None else self._layer_output(trace, index)), trace

    def _layer_output(self, trace: Trace, index: int) -> torch.Tensor | None:
        calls = trace.calls.get(f"{self._sides.stack}.{index}")
        return value_of(calls[-1].output) if calls else None


def _like(values: npt.NDArray[np.float32] | None, known: torch.Tensor) -> torch.Tensor:
    """Values in the shape of a tensor; the tensor itself where they are not known or others."""
    import torch

    if values is None or values.size != known.numel():
        return known
    return torch.from_numpy(values).reshape(known.shape).to(known.dtype)


def _note_ends(trace: Trace, walker: Walker, index: int, logits: torch.Tensor | None) -> None:
    """Add what no module makes: the state in front of the first layer, and the logits."""
    if index == START:
        trace.calls[EMBEDDING_STATE] = [Call((), {}, walker.hidden.clone())]
    if logits is not None:
        trace.calls[LOGITS] = [Call((), {}, logits)]


@contextmanager
def at_layer(side: Side, index: int) -> Iterator[None]:
    """What a side changes at a layer, if the stage is one, for the duration of a ``with``."""
    if 0 <= index < len(side.model.layers):
        with side.lane.at(side.model, index):
            yield
    else:
        yield


def routers_of(trace: Trace) -> tuple[str, ...]:
    """The operations that choose."""
    return tuple(n for n, calls in trace.calls.items() if choices_in(calls[0].output) is not None)


def chosen(trace: Trace) -> list[torch.Tensor]:
    """What each router has chosen, [T, k], in order of their numbers."""
    found = (choices_in(call.output) for calls in trace.calls.values() for call in calls)
    return [choice.sort(-1).values for choice in found if choice is not None]


def same_choices(*traces: Trace) -> torch.Tensor | None:
    """[T] for which tokens all have chosen the same.

    None where nothing is chosen, or less than half of them have: what many choices make of the
    values is then the same on all sides, and all tokens are compared.
    """
    first, *others = (chosen(trace) for trace in traces)
    if not first:
        return None
    alike = None
    for one in others:
        for mine, known in zip(one, first, strict=False):
            same = (mine == known).all(-1)
            alike = same if alike is None else alike & same
    return alike if alike is not None and _most(alike) else None


def _most(tokens: torch.Tensor) -> bool:
    return int(tokens.sum()) * 2 > len(tokens)


def kept(value: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """[1, T, …] without the tokens that are not to be compared."""
    if tokens is None or value.ndim < 3 or value.shape[-2] != len(tokens):
        return value
    return value[..., tokens, :]


def named_calls(traces: Sequence[Trace], name: str) -> list[Call]:
    """All texts' calls of an operation."""
    return [call for trace in traces for call in trace.calls.get(name, [])]

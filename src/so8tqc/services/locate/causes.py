"""Which known mistake explains an operation: made on the reference, it must give the candidate's.

Each hypothesis makes a mistake on the reference's operation, on the same inputs: another key, a
bias left out, rows in another order, another layer's weights. It holds if what it gives is the
candidate's value up to rounding; the one that comes nearest is the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from so8tqc.checkpoints.skeleton import Skeleton
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.locate.measure import FACTOR, Difference, Limits
from so8tqc.services.locate.names import Names, module_name
from so8tqc.services.locate.sides import Side, Sides
from so8tqc.services.locate.walk import Stage, at_layer, named_calls, values_of
from so8tqc.sources.gated import apply_blocks, gates_of
from so8tqc.sources.operations import Call, value_of, values_in

if TYPE_CHECKING:
    import torch

_MOSTLY = 0.5
"""What a factor may leave of the difference: its product was rounded, too."""

_EXACT = 0.05
"""Of what rounding explains: a cause that leaves less need not be compared with others."""


_SHOWN = 4
_SAMPLE = 1 << 14
"""Weights of an expert that are compared with another's."""

_TINY = 1e-6
"""Of an expert's size: what float32 may make of weights that are the same."""


class Cause(NamedTuple):
    """What explains an operation.

    Attributes:
        words: what was done.
        left: the difference that is left then, of the reference's size.
    """

    words: str
    left: float


@dataclass(frozen=True)
class Case:
    """One operation of the candidate that rounding does not explain.

    Attributes:
        name: of the operation.
        stage: what was seen of its layer.
        found: its difference from the reference.
        limits: what is explained.
    """

    sides: Sides
    names: Names
    stage: Stage
    name: str
    found: Difference
    limits: Limits

    @property
    def reference(self) -> Side:
        """The side that is trusted."""
        return self.sides.reference

    @property
    def module(self) -> Any | None:
        """The reference's module; None of a stage of an attention and of what lies between."""
        known = self.reference.operations.names
        path = module_name(self.name)
        return self.reference.model.module.get_submodule(path) if path in known else None

    @property
    def place(self) -> int:
        """Which of the operation's values it is."""
        return int(self.name[:-1].rpartition("[")[2]) if self.name.endswith("]") else 0

    @property
    def calls(self) -> list[Call]:
        """The reference's calls, of all texts."""
        return named_calls(self.stage.recorded, module_name(self.name))


Outputs = Sequence[Any]
"""What an operation gives in each of its calls."""


class Hypothesis(NamedTuple):
    """A mistake.

    Attributes:
        words: what was done.
        make: what the operation then gives; None: it cannot be made here.
        share: of the difference, what it may leave.
    """

    words: str
    make: Callable[[], Outputs | None]
    share: float = 1 / 20


def cause_of(case: Case) -> Cause | None:
    """What explains an operation; None if nothing known does."""
    mine = [pair[0] for pair in _pairs(case)]
    if not all(bool(value.isfinite().all()) for value in mine):
        return Cause("its values are NaN or infinite", 0.0)
    best: Cause | None = None
    for hypothesis in _hypotheses(case):
        left = _left(case, mine, hypothesis)
        if left is None or (best is not None and left >= best.left):
            continue
        best = Cause(hypothesis.words, left)
        if left <= case.limits.error * _EXACT:
            break
    return best or _other_weights(case, mine)


def _other_weights(case: Case, mine: Sequence[torch.Tensor]) -> Cause | None:
    """Which experts are others, where nothing says how they became so."""
    for hypothesis in _some_experts(case):
        left = _left(case, mine, hypothesis)
        if left is not None:
            return Cause(hypothesis.words, left)
    return None


def _left(case: Case, mine: Sequence[torch.Tensor], hypothesis: Hypothesis) -> float | None:
    """What a hypothesis leaves, where it explains the operation."""
    values = [_value(output, case.place) for output in hypothesis.make() or ()]
    if not values or len(values) != len(mine):
        return None
    difference = Difference()
    for found, value in zip(mine, values, strict=True):
        if value is None or value.shape != found.shape:
            return None
        difference.add(found, value)
    left = 0.0
    if difference.apart:
        left = math.sqrt(difference.apart / case.found.size) if case.found.size else math.inf
    enough = max(case.limits.error, case.found.error * hypothesis.share)
    return left if math.isfinite(left) and left <= enough else None


def _value(output: Any, place: int) -> torch.Tensor | None:
    values = values_in(output)
    if place >= len(values) or not place:
        return values[0] if values else None
    return values[place].sort(-1).values


def _pairs(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        pair
        for played, recorded in zip(case.stage.played, case.stage.recorded, strict=True)
        for name, pair in values_of(played, recorded)
        if name == case.name
    ]


def _hypotheses(case: Case) -> Iterator[Hypothesis]:
    """Those that are tried, the most telling first."""
    for key, variant in case.sides.variants.items():
        yield Hypothesis(variant.words, partial(_varied, case, key))
    module = case.module
    if module is not None:
        yield from _of_gates(case, module)
        yield from _of_parameters(case, module)
        yield from _of_order(case, module)
        yield from _of_others(case, module)
    yield from _of_size(case)


def _varied(case: Case, key: str) -> Outputs:
    """What the reference gives with one of the candidate's keys."""
    return [
        pair[0]
        for played, recorded in zip(case.stage.variants[key], case.stage.recorded, strict=True)
        for name, pair in values_of(played, recorded)
        if name == case.name
    ]


def _called(case: Case, module: Any, **parameters: torch.Tensor) -> Outputs | None:
    """A module on the operation's inputs, gates in place, some of its parameters replaced."""
    with at_layer(case.reference, case.stage.index):
        return _bare(case, module, **parameters)


def _bare(case: Case, module: Any, **parameters: torch.Tensor) -> Outputs | None:
    """The same without gates."""
    from torch.func import functional_call

    try:
        return [functional_call(module, parameters, c.arguments, dict(c.named)) for c in case.calls]
    except (RuntimeError, TypeError, ValueError):  # it takes inputs of another kind
        return None


def _of_gates(case: Case, module: Any) -> Iterator[Hypothesis]:
    """The gate was not folded, or its transpose; the adapter was not merged."""
    if (base := getattr(module, "base_layer", None)) is not None:
        yield Hypothesis("the adapter was not merged", lambda: _bare(case, base))
    rotations = case.reference.rotations
    mine = None if rotations is None else _gate(case, module, rotations)
    if rotations is None or mine is None:
        return
    yield Hypothesis("the gate was not folded", lambda: _bare(case, module))

    def transposed() -> Outputs | None:
        blocks = mine.transpose(1, 2)
        if not rotations.site.is_before:
            made = _bare(case, module)
            return None if made is None else [apply_blocks(output, blocks) for output in made]
        return [module(apply_blocks(c.arguments[0], blocks), *c.arguments[1:]) for c in case.calls]

    yield Hypothesis("the transposed gate was folded", transposed)


def _gate(case: Case, module: Any, rotations: RotationSet) -> torch.Tensor | None:
    """The blocks of the gate at a module, if it has one."""
    layer = case.names.layer(case.name)
    targets = [t for t in rotations if t.is_head or t.layer == layer]
    return next(
        (b for part, b in gates_of(case.reference.model, rotations, targets) if part is module),
        None,
    )


def _of_parameters(case: Case, module: Any) -> Iterator[Hypothesis]:
    """A bias left out, a norm's 1, a square matrix the other way round."""
    import torch

    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.get("weight"), own.get("bias")
    if bias is not None:
        yield Hypothesis(
            "its bias is lost", lambda: _called(case, module, bias=torch.zeros_like(bias))
        )
        yield from _scaled_beside_bias(case, bias)
    if weight is None:
        return
    if weight.ndim == 1:
        yield Hypothesis(
            "the norm's 1 was not added", lambda: _called(case, module, weight=weight - 1)
        )
        yield Hypothesis(
            "the norm's 1 was added twice", lambda: _called(case, module, weight=weight + 1)
        )
        ones = torch.zeros_like(weight) + (1.0 if float(weight.mean()) > 0.5 else 0.0)
        yield Hypothesis(
            "its weights are lost, as those of a new model",
            lambda: _called(case, module, weight=ones),
        )
    elif weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        yield Hypothesis("its matrix is transposed", lambda: _called(case, module, weight=weight.T))


def _scaled_beside_bias(case: Case, bias: torch.Tensor) -> Iterator[Hypothesis]:
    """The weights times a factor, the bias as it is."""
    beside = Difference()
    for mine, ours in _pairs(case):
        beside.add(mine - bias, ours - bias)
    gain = beside.gain
    if math.isfinite(gain) and gain != 1:
        yield Hypothesis(
            f"its weights are {gain:.5g} times the reference's, its bias is not",
            lambda: [gain * (ours - bias) + bias for _, ours in _pairs(case)],
            _MOSTLY,
        )


def _of_order(case: Case, module: Any) -> Iterator[Hypothesis]:
    """The values, or the experts, in another order."""
    for words, order in _rope_orders(case):
        yield Hypothesis(words, partial(_reordered, case, order))
    if stacked := _stacked(module):
        yield from _of_experts(case, module, stacked)
        return
    nearest = _nearest_channels(case)
    if nearest is not None:
        moved = [f"{i} holds {int(j)}" for i, j in enumerate(nearest) if i != int(j)]
        yield Hypothesis(
            f"{len(moved)} of its output features hold others ({', '.join(moved[:_SHOWN])} …)",
            partial(_reordered, case, nearest),
        )


def _reordered(case: Case, order: torch.Tensor) -> Outputs:
    """The reference's values, their features in another order."""
    return [pair[1][..., order] for pair in _pairs(case)]


def _rope_orders(case: Case) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows of q and k in the order of the other kind of rope, if that is what the operation is."""
    import torch

    if case.names.word(case.name) not in ("q", "k"):
        return
    stage = "query" if case.names.word(case.name) == "q" else "key"
    attention = case.name.rpartition(".")[0]
    seen = named_calls(case.stage.recorded, f"{attention}:{stage}")
    value = value_of(seen[0].output) if seen else None
    width = _pairs(case)[0][0].shape[-1]
    if value is None or value.shape[1] * value.shape[3] != width or value.shape[3] % 2:
        return
    heads, size = int(value.shape[1]), int(value.shape[3])
    rows = torch.arange(width)
    pairs = rows.reshape(heads, 2, size // 2).transpose(1, 2).reshape(-1)
    halves = rows.reshape(heads, size // 2, 2).transpose(1, 2).reshape(-1)
    yield "its rows are in the order of rope over neighbours, not over halves", pairs
    yield "its rows are in the order of rope over halves, not over neighbours", halves


def _stacked(module: Any) -> list[str]:
    """Parameters of several experts in one."""
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if p.ndim == 3 and len(p) > 1]


def _of_experts(case: Case, module: Any, stacked: Sequence[str]) -> Iterator[Hypothesis]:
    """The experts are the reference's, in another order."""
    theirs = case.sides.candidate.model.module.get_submodule(module_name(case.name))
    ours, mine = module.get_parameter(stacked[0]), theirs.get_parameter(stacked[0])
    if ours.shape != mine.shape:
        return
    order = _nearest_experts(mine, ours)
    if order != list(range(len(order))):
        moved = [f"{i} holds {j}" for i, j in enumerate(order) if i != j][:_SHOWN]
        changed = {name: module.get_parameter(name)[order] for name in stacked}
        words = f"its experts are exchanged (expert {', expert '.join(moved)})"
        yield Hypothesis(words, partial(_called, case, module, **changed))


def _some_experts(case: Case) -> Iterator[Hypothesis]:
    """Some experts are others, all else is right."""
    module, path = case.module, module_name(case.name)
    stacked = [] if module is None else _stacked(module)
    if module is None or not stacked:
        return
    mine, honest = (
        side.model.module.get_submodule(path) for side in (case.sides.candidate, case.sides.honest)
    )
    mixed = {name: module.get_parameter(name).clone() for name in stacked}
    odd: set[int] = set()
    for name, ours in mixed.items():
        theirs = mine.get_parameter(name)
        if theirs.shape != ours.shape:
            return
        here = _other_experts(theirs, ours, honest.get_parameter(name))
        ours[here] = theirs[here]
        odd |= set(here)
    count = len(mixed[stacked[0]])
    if 0 < len(odd) < count:
        shown = ", ".join(map(str, sorted(odd)[:_SHOWN])) + (" …" if len(odd) > _SHOWN else "")
        words = f"other weights in {len(odd)} of its {count} experts ({shown})"
        yield Hypothesis(words, partial(_called, case, module, **mixed))


def _nearest_experts(mine: torch.Tensor, ours: torch.Tensor) -> list[int]:
    """For each expert of the candidate, the reference's that is nearest, by some weights."""
    import torch

    step = max(1, ours[0].numel() // _SAMPLE)
    one, other = (values.flatten(1)[:, ::step].double() for values in (mine, ours))
    return [int(i) for i in torch.cdist(one, other).argmin(1)]


def _other_experts(mine: torch.Tensor, ours: torch.Tensor, honest: torch.Tensor) -> list[int]:
    """The experts that are further from the reference's than rounding puts them."""
    away, rounding = (
        (values - ours).square().flatten(1).sum(1).sqrt() for values in (mine, honest)
    )
    size = ours.square().flatten(1).sum(1).sqrt()
    return [int(i) for i in (away > FACTOR * rounding + _TINY * size).nonzero()]


def _nearest_channels(case: Case) -> torch.Tensor | None:
    """For each feature of the candidate's value, the reference's that is nearest; None: its own."""
    import torch

    pairs = _pairs(case)
    width = pairs[0][0].shape[-1]
    if width > 1 << 14:
        return None
    mine, ours = (torch.cat([p[i].reshape(-1, width) for p in pairs]).double() for i in (0, 1))
    distance = ours.square().sum(0) - 2 * mine.T @ ours
    order = distance.argmin(1)
    whole = torch.arange(width, device=order.device)
    return None if bool((order == whole).all()) else order


def _of_others(case: Case, module: Any) -> Iterator[Hypothesis]:
    """The weights of another operation of the layer, or of another layer."""
    own = dict(module.named_parameters(recurse=False))
    layer = case.names.layer(case.name)
    if not own or case.reference.weights is None:
        return  # with adapters the model in memory is not the stored tensors
    shapes = {name: p.shape for name, p in own.items()}
    if layer is None:
        yield from _of_embedding(case, module, shapes)
        return
    for name in case.reference.operations.names:
        if name == case.name or case.names.layer(name) != layer:
            continue
        other = dict(case.reference.model.module.get_submodule(name).named_parameters())
        if {n: p.shape for n, p in other.items()} == shapes:
            words = f"it has the weights of {case.names.short(name)}"
            yield Hypothesis(words, partial(_called, case, module, **other))
    for number in range(len(case.reference.model.layers)):
        if number != layer:
            words = f"it has the weights of layer {number}"
            yield Hypothesis(words, partial(_of_layer, case, module, number))


def _of_embedding(
    case: Case, module: Any, shapes: Mapping[str, torch.Size]
) -> Iterator[Hypothesis]:
    """A head that is the embedding, where it has weights of its own."""
    embedding = case.reference.model.module.get_input_embeddings().weight
    if case.names.word(case.name) == "head" and embedding.shape == shapes.get("weight"):
        yield Hypothesis(
            "it has the weights of the embedding",
            lambda: _called(case, module, weight=embedding),
        )


def _of_layer(case: Case, module: Any, number: int) -> Outputs | None:
    """With the weights of another layer."""
    side = case.reference
    assert side.weights is not None
    if any(p.ndim > 2 for p in module.parameters(recurse=False)):
        return _of_loaded_layer(case, module, number)
    names = _stored(case, number)
    own = dict(module.named_parameters(recurse=False))
    if names.keys() != own.keys():
        return None
    read = side.weights.read(list(names.values()))
    values = {leaf: read[name].to(own[leaf].dtype) for leaf, name in names.items()}
    if any(values[leaf].shape != own[leaf].shape for leaf in own):
        return None
    return _bare(case, module, **values)


def _of_loaded_layer(case: Case, module: Any, number: int) -> Outputs | None:
    """The same of experts, which transformers makes of several stored tensors."""
    side, stack = case.reference, case.sides.stack
    layer = case.names.layer(case.name)
    path = module_name(case.name).replace(f"{stack}.{layer}.", f"{stack}.{number}.", 1)
    side.put(number)
    try:
        other = side.model.module.get_submodule(path)
        return _bare(case, module, **dict(other.named_parameters(recurse=False)))
    except AttributeError:  # that layer has none
        return None
    finally:
        side.take(number)


def _stored(case: Case, number: int) -> dict[str, str]:
    """The operation's parameter → the stored tensor that holds it in another layer."""
    skeleton = Skeleton(case.reference.model.module)
    stack, layer = case.sides.stack, case.names.layer(case.name)
    path = module_name(case.name).replace(f"{stack}.{layer}.", f"{stack}.{number}.", 1)
    return {
        parameter.rpartition(".")[2]: name
        for name in case.sides.checkpoint.tensors
        if (parameter := skeleton.name_in_model(name)).rpartition(".")[0] == path
    }


def _of_size(case: Case) -> Iterator[Hypothesis]:
    """All values times a factor."""
    gain = case.found.gain
    if not math.isfinite(gain) or gain == 1:
        return
    if abs(gain) < 1e-6:
        yield Hypothesis("its values are all 0", lambda: [0 * pair[1] for pair in _pairs(case)])
        return
    yield Hypothesis(
        _factor(case, gain), lambda: [gain * pair[1] for pair in _pairs(case)], _MOSTLY
    )


def _factor(case: Case, gain: float) -> str:
    """A factor in words; that of an embedding's scale by its name."""
    width = _pairs(case)[0][0].shape[-1]
    word = case.names.word(case.name)
    if word in ("embedding", "embedding scale"):
        for known, said in ((width**-0.5, "is missing"), (width**0.5, "was applied twice")):
            if math.isclose(gain, known, rel_tol=0.01):
                return f"the embedding's scale √{width} {said}"
    return f"its values are {gain:.5g} times the reference's"

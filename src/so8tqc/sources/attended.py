"""What attention makes of a change of keys and values, while a model runs.

A layer's output is o_q = Σ_t a_qt v_t for each query q and head. With v_t = V x_t, a change δ of V
moves it by δ · Σ_t a_qt x_t: what counts is the mean input that a query attends to, not each
token's own. Where much of the attention rests on one token (in most models on the first), these are
far apart. A change of one key moves, to first order, o_q by a_qt (v_t − o_q) · (q_q · δk_t).

transformers lets an attention function be registered by name. Ours is its ``sdpa``, called once
more with the identity as values, so that whatever that function masks or adds is in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from so8tqc.sources.hf import HFModel

NAME = "so8tqc_attended"
_KNOWN = "sdpa"

_watching: list[list[Attended]] = []


class Attended(NamedTuple):
    """One call of attention, of one text.

    Attributes:
        value: the tensor of values that it was handed.
        weights: [heads, queries, keys].
        key_costs: [keys] Σ over heads and queries of (a_qt ‖q_q‖ ‖v_t − o_q‖)².
    """

    value: torch.Tensor
    weights: torch.Tensor
    key_costs: torch.Tensor


@contextmanager
def attention_told(model: HFModel) -> Iterator[None]:
    """Calls of attention inside can be watched, unless the model attends otherwise."""
    before = model.config._attn_implementation
    told = before == _KNOWN and getattr(model.module, "_supports_attention_backend", False)
    if not told:
        yield
        return
    _register()
    model.module.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.module.set_attn_implementation(before)


@contextmanager
def watched() -> Iterator[list[Attended]]:
    """The calls of attention made inside, in order."""
    calls: list[Attended] = []
    _watching.append(calls)
    try:
        yield calls
    finally:
        _watching.pop()


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_KNOWN])


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own; query: [1, H, T, d]; key, value: [1, K, S, …] → [1, T, H, e]."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = ALL_ATTENTION_FUNCTIONS[_KNOWN]
    output = own(module, query, key, value, attention_mask, **options)[0]
    if _watching and len(query) == 1:
        keys = key.shape[2]
        each = torch.eye(keys, dtype=value.dtype, device=value.device)
        each = each.expand(1, value.shape[1], keys, keys)
        weights = own(module, query, key, each, attention_mask, **options)[0][0].transpose(0, 1)
        costs = _key_costs(query[0], value[0], output[0].transpose(0, 1), weights)
        _watching[-1].append(Attended(value, weights, costs))
    return output, None


def _key_costs(
    query: torch.Tensor, value: torch.Tensor, output: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[S] of [H, T, d], [K, S, e], [H, T, e] and [H, T, S]: see :class:`Attended`."""
    import torch

    shared = len(query) // len(value)
    costs = torch.zeros(value.shape[1], dtype=torch.float64, device=value.device)
    for head in range(len(query)):
        v, o = value[head // shared], output[head]
        size = query[head].square().sum(-1, keepdim=True)
        moved = weights[head].square() * size
        distance = v.square().sum(-1) - 2 * (o @ v.T) + o.square().sum(-1, keepdim=True)
        costs += (moved * distance.clamp_min(0)).sum(0).double()
    return costs

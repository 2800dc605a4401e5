"""Attention entropy while a model runs, query block by query block; no T×T tensor.

transformers lets an attention function be registered by name. Ours computes softmax
attention for a block of queries at a time and keeps, besides the output, the entropy
H = −Σ_j a_j ln a_j of every query's weights (nats).

transformers describes a mask (causal, sliding window, chunks) by a function of indices, and a
mask function registered under the same name decides what is made of it. Ours keeps the
description and evaluates it for a block of queries at a time, so that whatever the
architecture masks is masked here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ModelError

if TYPE_CHECKING:
    import torch

    from so8tqc.sources.hf import HFModel

NAME = "so8tqc_entropy"
QUERY_BLOCK = 128
_SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_UNSUPPORTED_OPTIONS = ("position_bias", "sinks", "cache")

_collectors: list[AttentionEntropy] = []


class UnsupportedAttentionError(ModelError):
    """A layer passes something to its attention that is not measured here."""


class AttentionEntropy:
    """Entropies of one forward pass, by layer.

    Attributes:
        layers: layer → [heads, T] float32, nats.
    """

    def __init__(self) -> None:
        self.layers: dict[int, torch.Tensor] = {}

    def array(self) -> npt.NDArray[np.float32]:
        """[layers, heads, T], nats."""
        import torch

        stacked: npt.NDArray[np.float32] = torch.stack(
            [self.layers[i].cpu() for i in sorted(self.layers)]
        ).numpy()
        return stacked


def supports_entropy(model: HFModel) -> bool:
    """Whether the model's attention is plain, sliding or chunked softmax attention.

    What a layer passes to its attention is known only when it runs: see
    :class:`UnsupportedAttentionError`.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ())
    return kinds <= _SUPPORTED_LAYERS and getattr(model.module, "_supports_attention_backend", True)


@contextmanager
def attention_entropy(model: HFModel) -> Iterator[AttentionEntropy]:
    """Collect entropies of every forward pass inside (the last one wins).

    Raises:
        UnsupportedAttentionError: the architecture's attention is of another kind.
    """
    if not supports_entropy(model):
        raise UnsupportedAttentionError("not a softmax attention", where=str(model.path))
    _register()
    previous = model.config._attn_implementation
    collector = AttentionEntropy()
    model.module.set_attn_implementation(NAME)
    _collectors.append(collector)
    try:
        yield collector
    finally:
        _collectors.pop()
        model.module.set_attn_implementation(previous)


@dataclass(frozen=True)
class _Mask:
    """A mask that is asked block by block.

    Attributes:
        allowed: (batch, head, query, key) indices → whether the query sees the key.
        query_offset, key_offset: index of the first query and of the first key.
    """

    allowed: Callable[..., torch.Tensor]
    query_offset: int
    key_offset: int

    def rows(self, start: int, stop: int, keys: int, device: torch.device) -> torch.Tensor:
        """[stop − start, keys], True where a query of the block sees the key."""
        import torch

        zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
        query = torch.arange(start, stop, device=device)[:, None] + self.query_offset
        key = torch.arange(keys, device=device)[None] + self.key_offset
        return self.allowed(zero, zero, query, key).expand(stop - start, keys)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _describe_mask)


def _describe_mask(
    *_args: Any,
    mask_function: Callable[..., torch.Tensor],
    q_offset: int = 0,
    kv_offset: int = 0,
    use_vmap: bool = False,
    **_options: Any,
) -> _Mask | None:
    """What transformers would build a T×T mask from.

    None for masks that are not functions of broadcast indices (``use_vmap``): they are not
    measured.
    """
    return None if use_vmap else _Mask(mask_function, int(q_offset), int(kv_offset))


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _Mask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Masked attention of one text.

    Args:
        query: [1, H, T, d]; key: [1, K, T, d] and value: [1, K, T, e] with H a multiple of
            K (grouped queries).
        attention_mask: see :func:`_describe_mask`.
        scaling: factor of the scores, default 1/√d.
        softcap: scores become c·tanh(s/c).
        s_aux: [H] attention sinks: a score that takes weight and gives no value; the entropy
            is of the weights that remain, which then sum to less than one.

    Returns:
        [1, T, H, e] and None (no weights).
    """
    import torch

    if not isinstance(attention_mask, _Mask) or any(
        options.get(name) is not None for name in _UNSUPPORTED_OPTIONS
    ):
        raise UnsupportedAttentionError(f"{type(module).__name__} attends in another way")
    heads, length, width = query.shape[1:]
    groups, keys, out_width = value.shape[1:]
    scale = scaling if scaling is not None else width**-0.5
    q = query[0].reshape(groups, heads // groups, length, width)
    k, v = key[0], value[0]
    sink = None if s_aux is None else s_aux.reshape(groups, heads // groups, 1).float()
    output = q.new_empty(groups, heads // groups, length, out_width)
    entropy = q.new_empty(groups, heads // groups, length, dtype=torch.float32)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        allowed = attention_mask.rows(start, stop, keys, query.device)
        seen = allowed.any(dim=0).nonzero()
        first, last = int(seen[0]), int(seen[-1]) + 1
        denied = _denied(allowed[:, first:last])
        for g in range(groups):  # one at a time: its scores are read again from the cache
            # the heads of a group share their keys: one product of all their queries
            block = (q[g, :, start:stop] * scale).flatten(0, 1)
            scores = (block @ k[g, first:last].T).view(-1, stop - start, last - first)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = _masked(scores.float(), denied)
            top = scores.amax(dim=2)
            if sink is not None:
                top = torch.maximum(top, sink[g])
            weights = scores.sub_(top[..., None]).exp()
            total = weights.sum(dim=2)
            # a_j = w_j / Z: −Σ a_j ln a_j = (ln Z · Σ w_j − Σ w_j s_j) / Z; a sink adds to Z alone
            normaliser = total if sink is None else total + (sink[g] - top).exp()
            mean_score = torch.linalg.vecdot(weights, scores)
            entropy[g, :, start:stop] = (normaliser.log() * total - mean_score).div_(normaliser)
            values = weights.to(v.dtype).flatten(0, 1) @ v[g, first:last]
            output[g, :, start:stop] = values.view(*total.shape, -1) / normaliser[..., None]
    if _collectors:
        _collectors[-1].layers[int(module.layer_idx)] = entropy.reshape(heads, length)
    return output.reshape(1, heads, length, out_width).transpose(1, 2).contiguous(), None


def _denied(allowed: torch.Tensor) -> tuple[slice, torch.Tensor] | None:
    """The columns from the first that a query does not see to the last, and what is denied there.

    Args:
        allowed: [t, n].
    """
    columns = (~allowed).any(dim=0).nonzero()
    if not columns.numel():
        return None
    part = slice(int(columns[0]), int(columns[-1]) + 1)
    return part, ~allowed[:, part]


def _masked(scores: torch.Tensor, denied: tuple[slice, torch.Tensor] | None) -> torch.Tensor:
    """Attention scores [..., t, n], the masked ones set far below all others.

    A large negative number rather than −∞: its weight is 0, and 0 times it is 0.
    """
    import torch

    if denied is not None:
        part, where = denied
        scores[..., part].masked_fill_(where, torch.finfo(torch.float32).min / 2)
    return scores

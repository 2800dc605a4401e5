"""Attention entropy while a model runs, query block by query block; no T×T tensor.

transformers lets an attention function be registered by name. Ours computes softmax
attention for a block of queries at a time and keeps, besides the output, the entropy
H = −Σ_j a_j ln a_j of every query's weights (nats). Causality and the sliding window are
applied here, so the mask function builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ModelError

if TYPE_CHECKING:
    import torch

    from so8tqc.sources.hf import HFModel

NAME = "so8tqc_entropy"
QUERY_BLOCK = 256
_SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})

_collectors: list[AttentionEntropy] = []


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
            [self.layers[i] for i in sorted(self.layers)]
        ).numpy()
        return stacked


def supports_entropy(model: HFModel) -> bool:
    """Whether the model's attention is plain or sliding softmax attention."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    return kinds <= _SUPPORTED_LAYERS and getattr(model.module, "_supports_attention_backend", True)


@contextmanager
def attention_entropy(model: HFModel) -> Iterator[AttentionEntropy]:
    """Collect entropies of every forward pass inside (the last one wins).

    Raises:
        ModelError: the architecture's attention is of another kind.
    """
    if not supports_entropy(model):
        raise ModelError("its attention is not plain softmax attention", where=str(model.path))
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


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_args: Any, **_options: Any) -> None:
    """Masks are applied inside :func:`_attend`."""


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  always None, see _no_mask
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one text.

    Args:
        query: [1, H, T, d]; key, value: [1, K, T, d] with H a multiple of K (grouped queries).
        scaling: factor of the scores, default 1/√d.
        softcap: scores become c·tanh(s/c).
        sliding_window: a query sees itself and the w − 1 keys before it.

    Returns:
        [1, T, H, d] and None (no weights).
    """
    import torch

    if options.get("s_aux") is not None:
        raise ModelError("attention sinks are not supported by the entropy measurement")
    heads, length, width = query.shape[1:]
    groups = key.shape[1]
    scale = scaling if scaling is not None else width**-0.5
    q = query[0].reshape(groups, heads // groups, length, width)
    k, v = key[0][:, None], value[0][:, None]
    output = torch.empty_like(q)
    entropy = torch.empty(groups, heads // groups, length, dtype=torch.float32)
    positions = torch.arange(length, device=query.device)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = max(0, start - sliding_window + 1) if sliding_window else 0
        scores = (q[:, :, start:stop] * scale) @ k[:, :, first:stop].transpose(2, 3)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        gap = positions[start:stop, None] - positions[None, first:stop]
        hidden = gap < 0
        if sliding_window:
            hidden |= gap >= sliding_window
        # a large negative number rather than −inf: its weight is 0 and 0 times it is 0
        scores = scores.float().masked_fill_(hidden, torch.finfo(torch.float32).min / 2)
        log_normaliser = scores.logsumexp(dim=3)
        weights = (scores - log_normaliser[..., None]).exp_()
        mean_score = torch.linalg.vecdot(weights, scores.masked_fill_(hidden, 0.0))
        entropy[:, :, start:stop] = (log_normaliser - mean_score).cpu()
        output[:, :, start:stop] = weights.to(v.dtype) @ v[:, :, first:stop]
    if _collectors:
        _collectors[-1].layers[int(module.layer_idx)] = entropy.reshape(heads, length)
    return output.reshape(1, heads, length, width).transpose(1, 2).contiguous(), None

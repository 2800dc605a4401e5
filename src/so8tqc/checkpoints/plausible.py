"""Whether a config.json may belong to the weights beside it, before a model is built from it.

transformers builds what the config says, layer by layer, and only then looks for the weights: a
config of 10^9 layers, or of a vocabulary of 10^12, would never be found wanting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.checkpoints.sites import layers_stored
from so8tqc.errors import ModelError

_LAYERS = frozenset({"num_hidden_layers", "n_layer", "num_layers", "n_layers"})
_WIDTHS = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "n_embd", "n_inner", "n_head", "d_model", "ffn_dim",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size",
    }
)  # fmt: skip
"""Keys of a config whose values are widths: none exceeds the longest side of all tensors."""


def require_plausible_config(checkpoint: Checkpoint) -> None:
    """Compare the config's counts and widths with the weights.

    Raises:
        ModelError: it has more layers than the weights, or a width that no tensor has.
    """
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    require_plausible(checkpoint.config, shapes, checkpoint.directory)


def require_plausible(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], directory: Path
) -> None:
    """The same for weights that are known by their shapes alone."""
    layers = layers_stored(shapes.keys())
    widest = max((max(shape, default=1) for shape in shapes.values()), default=1)
    text = config.get("text_config")
    for name, value in _numbers(text if isinstance(text, dict) else config, _LAYERS):
        if value > layers:
            raise _implausible(directory, name, value, f"{layers} layers")
    for name, value in _numbers(config, _WIDTHS):
        if value > widest:
            raise _implausible(directory, name, value, f"no side longer than {widest}")


def _numbers(config: Mapping[str, Any], names: frozenset[str]) -> Iterator[tuple[str, float]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, names)
        elif name in names and isinstance(value, int | float):
            yield name, value


def _implausible(directory: Path, name: str, value: float, weights: str) -> ModelError:
    return ModelError(
        f"{name} is {value:.6g}, but the weights have {weights}",
        where=str(directory / "config.json"),
        remedy="The config belongs to another model.",
    )

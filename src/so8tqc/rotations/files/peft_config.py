"""What ``adapter_config.json`` must say for an OFT adapter's rotations to be all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from so8tqc.disk.foreign import read_whole
from so8tqc.errors import RotationError

CONFIG_NAME = "adapter_config.json"

_UNDERSTOOD = frozenset(
    {
        "r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann",
        "num_cayley_neumann_terms", "bias", "modules_to_save", "peft_type", "peft_version",
    }
)  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "init_weights", "module_dropout", "fan_in_fan_out",
    }
)  # fmt: skip
"""Entries that say where the adapter came from, which modules it was put on (its tensors say
that too), how it was trained, or how the base weight is stored."""


def adapter_kind(directory: Path) -> str:
    """``peft_type`` of an adapter directory, e.g. OFT or LORA.

    Raises:
        RotationError: an unreadable configuration.
    """
    return str(adapter_config(directory).get("peft_type"))


def adapter_config(directory: Path) -> dict[str, Any]:
    """The configuration of any adapter, as it is.

    Raises:
        RotationError: unreadable, or no JSON object.
    """
    path = directory / CONFIG_NAME
    content = read_whole(path, RotationError)
    try:
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RotationError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise RotationError("expected a JSON object", where=str(path))
    return config


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of an OFT adapter.

    Raises:
        RotationError: unreadable; another kind of adapter; biases, whole modules, or settings
            that are not understood, by name.
    """
    config = adapter_config(directory)
    _refuse_unsupported(config, str(directory / CONFIG_NAME))
    return config


def number(config: Mapping[str, Any], key: str, default: float, directory: Path) -> float:
    """A numeric entry of the configuration, or the default if it is absent."""
    value = config.get(key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise RotationError(
            f"{key} is {value!r}, expected a number", where=str(directory / CONFIG_NAME)
        )
    return float(value)


AS_TRAINED = (
    "Such an adapter is baked as it was trained, without --convention, --parametrization, --site, "
    "--layers and --orthogonalize: so8tqc bake BASE ADAPTER --out DIR"
)
"""Remedy where only rotations can be read, and the adapter is more than these."""


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "OFT":
        raise RotationError(
            f"the adapter is {kind!r}; only OFT adapters hold block rotations",
            where=where,
            remedy="Merge other adapters with PEFT before baking.",
        )
    if config.get("bias", "none") != "none":
        raise RotationError(
            f"the adapter also trains biases (bias={config['bias']!r})",
            where=where,
            remedy=AS_TRAINED,
        )
    if config.get("modules_to_save"):
        raise RotationError(
            f"the adapter replaces whole modules (modules_to_save={config['modules_to_save']})",
            where=where,
            remedy=AS_TRAINED,
        )
    unknown = sorted(key for key in config.keys() - _UNDERSTOOD - _WITHOUT_EFFECT if config[key])
    if unknown:
        raise RotationError(
            "the adapter has settings that are not understood: "
            + ", ".join(f"{key}={config[key]!r}" for key in unknown),
            where=where,
            remedy="They may change what the rotations do: merge it with PEFT instead.",
        )
    if "oft_block_size" not in config:
        raise RotationError(
            "the adapter was saved before PEFT 0.14, whose OFT is another one", where=where
        )

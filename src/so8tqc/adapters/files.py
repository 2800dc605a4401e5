"""A PEFT directory as data: its configuration, its tensors, and what each of them belongs to.

Keys of an adapter file begin with ``base_model.model.``, then name a module of the running model,
then the part: ``….q_proj.lora_A.weight``. Older files have the adapter's name in between. Whatever
has no part of a method in its name is a whole tensor: a module that was saved, or a bias; PEFT
stores those of a wrapped module below ``base_layer``. (``peft.utils.save_and_load``.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so8tqc.disk.digests import sha256_file, sha256_json
from so8tqc.disk.foreign import read_whole, require_safetensors_header
from so8tqc.errors import RotationError
from so8tqc.rotations.files.peft_config import CONFIG_NAME
from so8tqc.rotations.files.peft_oft import is_adapter
from so8tqc.rotations.rotation_set import FloatArray

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

PARTS = frozenset(
    {
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "oft_R",
        "boft_R",
        "boft_s",
        "hra_u",
        "psoft_R",
        "road_theta",
        "road_alpha",
        "vera_lambda_b",
        "vera_lambda_d",
        "pvera_lambda_b",
        "pvera_lambda_d",
        "lora_E",
        "ia3_l",
        "miss_block",
        "shira_weight",
        "shira_indices",
        "c3a_kernel",
        "delora_A",
        "delora_B",
        "delora_lambda",
        "delora_w_norm",
        "hira_A",
        "hira_B",
        "hira_embedding_A",
        "hira_embedding_B",
        "gralora_A",
        "gralora_B",
        "gralora_A_general",
        "gralora_B_general",
        "randlora_lambda",
        "randlora_gamma",
        "fourierft_spectrum",
        "waveft_spectrum",
        "beft_bias",
        "trainable_tokens_delta",
        *(f"vblora_logits_{side}" for side in "AB"),
        *(f"vblora_logits_{side}_topk_{what}" for side in "AB" for what in ("indices", "weights")),
        *(f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"),
        *(f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")),
    }
)
"""Names of a method's tensors below the module they change."""

_LEAVES = frozenset({"weight", "bias", "vector_a", "vector_b"})
_SHARED = frozenset(
    {*(f"{name}_{side}" for name in ("vera", "pvera", "randlora") for side in "AB")}
    | {"vblora_vector_bank"}
)
_PLACES = frozenset(
    {"shira_indices", "vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"}
)
"""Parts that are whole numbers."""

_WRAPPERS = frozenset({"base_layer", "ln_tuning_layers", "token_adapter"})
_PREFIXES = ("base_model.model.", "base_model.")
_UNSUPPORTED = {
    "oft_embedding_R": "rotates an embedding",
}


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory holds.

    Attributes:
        directory: where its files are (a named sub-folder of what was given, perhaps).
        config: ``adapter_config.json``.
        parts: module → {part: tensor}, e.g. ``lora_A.weight``.
        whole: stored-like name → tensor: saved modules and biases, and wrapped modules' own
            weights (``base_layer``), under the module's name.
        shared: tensors that belong to no module, e.g. ``vera_A``.
        notices: what was found where it is not usual.
    """

    directory: Path
    config: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, torch.Tensor]]
    whole: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor]
    notices: tuple[str, ...] = field(default_factory=tuple)

    @property
    def kind(self) -> str:
        """``peft_type``."""
        return str(self.config.get("peft_type"))


def adapter_directory(path: Path) -> Path:
    """The directory that holds the adapter: the one given, or its only named sub-folder.

    Raises:
        RotationError: none, or several.
    """
    if is_adapter(path):
        return path
    inside = sorted(p for p in path.iterdir() if is_adapter(p)) if path.is_dir() else []
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise RotationError(
            f"holds several adapters: {', '.join(p.name for p in inside)}",
            where=str(path),
            remedy="Give one of these folders (and the others by --adapter, in their order).",
        )
    raise RotationError(
        "a directory without adapter_config.json is no PEFT adapter", where=str(path)
    )


def holds_adapter(path: Path) -> bool:
    """Whether a path is an adapter directory, or has one as a named sub-folder."""
    return is_adapter(path) or (path.is_dir() and any(is_adapter(p) for p in path.iterdir()))


def adapter_kind(path: Path) -> str | None:
    """``peft_type`` of what a path holds; None: it is no adapter directory.

    Raises:
        RotationError: unreadable, or several adapters.
    """
    if not holds_adapter(path):
        return None
    return str(read_json(adapter_directory(path)).get("peft_type"))


def adapter_fingerprint(directory: Path) -> str:
    """SHA-256 over what decides what an adapter computes: its configuration and its tensors.

    Raises:
        RotationError: it has no file of tensors.
    """
    files = (directory / CONFIG_NAME, tensors_file(directory))
    return sha256_json({file.name: sha256_file(file) for file in files})


def tensors_file(directory: Path) -> Path:
    """The file of an adapter's tensors; safetensors, if it has both.

    Raises:
        RotationError: there is none.
    """
    for name in (SAFETENSORS_NAME, PICKLE_NAME):
        if (directory / name).is_file():
            return directory / name
    raise RotationError(
        f"neither {SAFETENSORS_NAME} nor {PICKLE_NAME} is here", where=str(directory)
    )


def read_json(directory: Path) -> dict[str, Any]:
    """``adapter_config.json``.

    Raises:
        RotationError: it is not a JSON object.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(read_whole(path, RotationError).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RotationError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise RotationError("expected a JSON object", where=str(path))
    return config


def read_files(path: Path) -> AdapterFiles:
    """Read an adapter directory, safetensors or ``adapter_model.bin`` (as data alone).

    Raises:
        RotationError: a file is missing or malformed, a tensor is not finite, or a key cannot be
            understood.
    """
    directory = adapter_directory(path)
    config = read_json(directory)
    file, tensors = _tensors(directory)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        words = _without_prefix(key).split(".")
        if not _PLACES.intersection(words):
            _require_finite(tensor, f"{file}, {key}")
        at = next((i for i, word in enumerate(words) if word in PARTS), None)
        if bad := next((word for word in words if word in _UNSUPPORTED), None):
            raise RotationError(
                f"{key!r} {_UNSUPPORTED[bad]}, which has no fold here", where=str(file)
            )
        if at is not None and at > 0:
            leaf = words[-1] if words[-1] in _LEAVES and at < len(words) - 1 else "weight"
            name = f"{words[at]}.{leaf}"
            owner = words[: at - 1] if words[at - 1] == "token_adapter" else words[:at]
            module = parts.setdefault(".".join(owner), {})
            if name in module:
                raise RotationError(f"two tensors for {name}", where=f"{file}, {key}")
            module[name] = tensor
        elif (last := words[-1]) in _SHARED:  # PEFT may save it again below each module
            if last in shared and not torch.equal(shared[last], tensor):
                raise RotationError(f"two different tensors for {last}", where=f"{file}, {key}")
            shared[last] = tensor
        else:
            name = _whole_name(words)
            if name in whole:
                raise RotationError(f"two tensors for {name}", where=f"{file}, {key}")
            whole[name] = tensor
    if not parts and not whole:
        raise RotationError("the adapter holds no tensors", where=str(file))
    notices = [] if directory == path else [f"The adapter was found in {directory.name}/."]
    return AdapterFiles(directory, config, parts, whole, shared, tuple(notices))


def array(tensor: torch.Tensor) -> FloatArray:
    """float64; exact for every stored dtype."""
    values: FloatArray = tensor.to(torch.float64).numpy()
    return np.ascontiguousarray(values)


def number(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A numeric entry of a configuration, or the default if it is absent.

    Raises:
        RotationError: it is none.
    """
    value = config.get(key)
    if value is None:
        return default
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good:
        raise RotationError(f"{key} is {value!r}, expected a number", where=where)
    return float(value)


def _tensors(directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    file = tensors_file(directory)
    if file.name == PICKLE_NAME:
        return file, _pickled(file)
    require_safetensors_header(file, RotationError)
    try:
        with safe_open(str(file), framework="pt") as handle:
            return file, {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RotationError(f"not a readable safetensors file: {error}", where=str(file)) from None


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    from so8tqc.rotations.files.pt import load_torch

    value = load_torch(file)
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items()
    ):
        raise RotationError("expected a dictionary of tensors", where=str(file))
    for key, tensor in value.items():
        if tensor.layout != torch.strided or (
            tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise RotationError("no dense tensor of its own numbers", where=f"{file}, {key}")
    return {key: tensor.detach() for key, tensor in value.items()}


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _whole_name(words: list[str]) -> str:
    """Name of a whole tensor as the model itself would have it."""
    if "modules_to_save" in words:
        at = words.index("modules_to_save")
        after = words[at + 1 :]
        words = words[:at] + (after if len(after) == 1 else after[1:])
    return ".".join(word for word in words if word not in _WRAPPERS)


def _require_finite(tensor: torch.Tensor, where: str) -> None:
    if not tensor.is_floating_point():
        raise RotationError(f"holds {tensor.dtype}, expected floating point", where=where)
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        at = finite.logical_not().nonzero()[0].tolist()
        raise RotationError(
            f"element {at} of shape {list(tensor.shape)} is not finite",
            where=where,
            remedy="Restore an earlier checkpoint; nothing can be baked from this one.",
        )

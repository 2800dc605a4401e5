"""Whether the weights of a trained directory are those of the class that its config is given.

A training's own class says of which base it is by its name at most, and its weights may have been
wrapped in a way that nobody knows, or be incomplete. transformers would load such a directory
with random weights in place of what it does not find; so it is asked for its names beforehand.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.checkpoints.plausible import require_plausible
from so8tqc.checkpoints.sites import HEAD_NAMES
from so8tqc.errors import ModelError
from so8tqc.rotations.files.names import layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]

_BUFFERS = (r"\.inv_freq$", r"\.masked_bias$", r"\.attn\.bias$", r"\.rotary_emb\.")
"""Computed from the config when a model is built; old checkpoints hold them."""

_REMEDY = "Give the base model too: so8tqc bake BASE {} --out DIR"


def require_fitting_class(config: Mapping[str, Any], shapes: Shapes, directory: Path) -> None:
    """Compare names and shapes with those of the model that the config describes.

    Models whose weights transformers renames or fuses when it loads them are judged by the
    config's counts and widths alone.

    Args:
        config: with a model type and a class of transformers.
        shapes: name → shape of the restored weights.
        directory: for messages.

    Raises:
        ModelError: they are another model's, or incomplete; or the config describes none.
    """
    require_plausible(config, shapes, directory)
    model = _described(config, directory)
    if model is None:
        return
    prefix = f"{model.base_model_prefix}."
    here = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    places = {n.removeprefix(prefix): tuple(v.shape) for n, v in model.state_dict().items()}
    needed = [n.removeprefix(prefix) for n, _ in model.named_parameters(remove_duplicate=False)]
    if model.config.get_text_config().tie_word_embeddings:
        needed = [name for name in needed if not name.endswith(HEAD_NAMES)]
    found = {
        "weights are missing": [name for name in needed if name not in here],
        "have no place in it": [n for n in here if n not in places and _is_weight(n, model)],
        "have another shape": [n for n in here if n in places and here[n] != places[n]],
    }
    said = [f"{len(names)} {what}, first {names[0]}" for what, names in found.items() if names]
    if said:
        raise ModelError(
            f"the weights are not those of {type(model).__name__}: {'; '.join(said)}",
            where=str(directory),
            remedy=_REMEDY.format(directory),
        )


def _is_weight(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor is a layer's own and no buffer of an older version."""
    ignored = (*(model._keys_to_ignore_on_load_unexpected or ()), *_BUFFERS)
    return layer_of(name) is not None and not any(re.search(p, name) for p in ignored)


def _described(config: Mapping[str, Any], directory: Path) -> PreTrainedModel | None:
    """The model without values; None where its files have other names than it."""
    import torch
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(str(config["model_type"])):
        return None
    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with contextlib.redirect_stderr(io.StringIO()), torch.device("meta"):
            known = transformers.AutoConfig.for_model(str(config["model_type"]), **rest)
            model: PreTrainedModel = getattr(transformers, config["architectures"][0])(known)
    except Exception as error:  # noqa: BLE001  each architecture fails in its own way
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"transformers cannot build it: {reason[0] if reason else type(error).__name__}",
            where=str(directory / "config.json"),
            remedy=_REMEDY.format(directory),
        ) from None
    return model

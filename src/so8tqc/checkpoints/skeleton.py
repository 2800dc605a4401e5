"""What transformers builds for a checkpoint, without its weights: which module holds which tensor.

A file says a matrix's shape and no more. Whether a square one is stored [out, in] or [in, out],
whether two layers share it, and what it is called in the model, only the model's class knows. It is
instantiated on the meta device, where no weight takes memory, and asked.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from so8tqc.architectures import architecture
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.decoder import (
    attention_output_of,
    attention_outputs,
    decoder_stack,
    has_module,
    positions,
)
from so8tqc.errors import RotationError

_ONE_AT_A_TIME = threading.Lock()
"""A library that two threads import at once is only half there for one of them."""


@dataclass(frozen=True)
class Skeleton:
    """A model class's modules, and how a checkpoint's tensors are called in it.

    Attributes:
        model: on the meta device.
    """

    model: Any

    @cached_property
    def stack(self) -> str:
        """Dotted name of the list of decoder layers, "" where structure does not tell it."""
        try:
            return decoder_stack(self.model)[0]
        except RotationError:
            return ""

    @cached_property
    def attention_output(self) -> str:
        """Attention output projection below a layer.

        Raises:
            RotationError: layers name theirs in several ways.
        """
        return attention_output_of(self.model)

    @cached_property
    def attention_layers(self) -> frozenset[int]:
        """Layers that have self-attention."""
        if not self.stack:
            return frozenset()
        known = architecture(self.model.config.get_text_config(decoder=True).model_type)
        return frozenset(
            i
            for i, layer in enumerate(self.model.get_submodule(self.stack))
            if has_module(layer, known.attention_output) or any(attention_outputs(layer))
        )

    def name_in_model(self, tensor: str) -> str:
        """What the parameter is called that transformers loads a stored tensor into."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters, meta = self._mapping
        name, _ = rename_source_key(
            tensor, renamings, converters, self.model.base_model_prefix, meta
        )
        return str(name)

    @cached_property
    def _mapping(self) -> tuple[list[Any], list[Any], Mapping[str, Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        known = get_model_conversion_mapping(self.model)
        renamings = [k for k in known if isinstance(k, WeightRenaming)]
        converters = [k for k in known if isinstance(k, WeightConverter)]
        return renamings, converters, self.model.state_dict()

    def module_of(self, parameter: str) -> Any | None:
        """The module that a parameter belongs to; None if the model has no such parameter."""
        path, _, leaf = parameter.rpartition(".")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return None
        return module if hasattr(module, leaf) else None

    @cached_property
    def _positions(self) -> Mapping[str, tuple[str, ...]]:
        return {
            name: tuple(names)
            for names in positions(self.model).values()
            if len(names) > 1
            for name in names
        }

    def sharing(self, parameter: str) -> tuple[str, ...]:
        """All names of a parameter in the model; one alone where no module shares it."""
        return self._positions.get(parameter, (parameter,))


def skeleton(checkpoint: Checkpoint) -> Skeleton | None:
    """The model class of a checkpoint without weights; None where transformers knows none.

    No code of the model directory is run. A config that does not belong to the weights, whose
    model might be of any size, is not built.
    """
    from so8tqc.checkpoints.plausible import require_plausible_config
    from so8tqc.errors import ModelError

    try:
        require_plausible_config(checkpoint)
    except ModelError:
        return None
    with _ONE_AT_A_TIME:
        return _built(json.dumps(dict(checkpoint.config), sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _built(config_json: str) -> Skeleton | None:
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    config = json.loads(config_json)
    for key in ("quantization_config", "auto_map", "transformers_version"):
        config.pop(key, None)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with (
            warnings.catch_warnings(),
            TemporaryDirectory(prefix="so8tqc-") as folder,
            torch.device("meta"),
        ):
            warnings.simplefilter("ignore")
            # read as transformers reads it: infinity, for one, has a spelling of its own
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            known = AutoConfig.from_pretrained(folder, local_files_only=True)
            model = from_config(known, dtype=torch.float32)
            model.tie_weights()
    except Exception:  # noqa: BLE001  each architecture refuses a config in its own way
        return None
    finally:
        logging.set_verbosity(verbosity)
    return Skeleton(model)


def auto_class(config: Any) -> Any:
    """The class that loads this config: a causal language model, or a vision-language one.

    The class that the checkpoint names, if it is one of transformers' own of these kinds; else the
    Auto class that has the config. Of a vision-language model only the text tower is ever run.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    known = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    if named in known and (own := getattr(transformers, named, None)) is not None:
        return own
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def from_config(config: Any, **options: Any) -> Any:
    """A model of a configuration, as its class initialises it; options are transformers' own."""
    chosen = auto_class(config)
    make = getattr(chosen, "from_config", None) or chosen._from_config
    return make(config, **options)


def run_options(dtype: str, attention: str | None) -> dict[str, Any]:
    """What transformers is told so that a model can be run.

    Args:
        dtype: name of torch's dtype that it computes in.
        attention: transformers' attention implementation, None for its default.
    """
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if dtype == "float64":  # the grouped product of experts has none
        options["experts_implementation"] = "eager"
    return options


def materialized(module: Any) -> Any:
    """A copy of a module of the skeleton with room for weights, in float64 on the CPU."""
    import copy

    import torch

    with torch.device("cpu"):
        made: Any = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    return made

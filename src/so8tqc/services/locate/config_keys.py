"""What a model's configuration says otherwise than another's; a GGUF's keys as such a difference.

The weights of a GGUF are run by the class of a model directory. What the file's keys say otherwise
than the converter writes for that directory is put into the configuration, so that the file's own
arithmetic is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from so8tqc.errors import ModelError, first_line
from so8tqc.gguf.file import GGUFFile
from so8tqc.services.tensors.metadata import differences

Config = Mapping[str, Any]
"""A text configuration, as a dictionary of transformers' own."""

_EPS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon")
_ROPE = "rope_parameters"

_SAME: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\.attention\.layer_norm(_rms)?_epsilon$", _EPS),
    (r"\.attn_logit_softcapping$", ("attn_logit_softcapping",)),
    (r"\.final_logit_softcapping$", ("final_logit_softcapping",)),
    (r"\.attention\.sliding_window$", ("sliding_window",)),
    (r"\.expert_used_count$", ("num_experts_per_tok", "moe_topk", "top_k_experts")),
    (r"\.embedding_scale$", ("embedding_multiplier",)),
    (r"\.residual_scale$", ("residual_multiplier",)),
    (r"\.attention\.scale$", ("attention_multiplier",)),
    (r"\.logit_scale$", ("logits_scaling", "logit_scale")),
    (r"\.expert_weights_scale$", ("routed_scaling_factor",)),
)
"""Pattern of a GGUF key → the key of a configuration that says the same, the first that is there.
"""

_NONE_AT_ZERO = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")

_NOT_OF_THE_FORWARD = re.compile(
    r"^(_|architectures$|transformers_version$|d?torch_dtype$|dtype$|use_cache$|auto_map$"
    r"|initializer_range$|.*token_id$|output_|return_dict$|chunk_size_feed_forward$"
    r"|id2label$|label2id$|problem_type$|name_or_path$|is_decoder$|max_position_embeddings$"
    r"|rope_theta$|torchscript$|attn_implementation$|quantization_config$|bos_|eos_|pad_"
    r"|.*dropout|.*router_aux_loss|router_jitter_noise$|tie_word_embeddings$)"
)
"""Keys of a configuration that no forward of a text depends on."""


class FileKeys(NamedTuple):
    """What a GGUF's keys say otherwise than the directory.

    Attributes:
        changes: of the configuration's keys.
        words: configuration key → the GGUF key, with both values.
        unknown: sentences on keys that no configuration's key says.
    """

    changes: dict[str, Any]
    words: dict[str, str]
    unknown: tuple[str, ...]


def text_config(config: Any) -> Config:
    """The text configuration of a transformers model, as a dictionary."""
    found: Config = config.get_text_config(decoder=True).to_dict()
    return found


def config_of(directory: Path) -> Config:
    """The same of a model directory.

    Raises:
        ModelError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return text_config(
            AutoConfig.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        )
    except Exception as error:  # noqa: BLE001  each architecture fails in its own way
        raise ModelError(
            f"transformers cannot read its config: {first_line(error)}", where=str(directory)
        ) from None


def config_changes(reference: Config, candidate: Config) -> dict[str, Any]:
    """Keys that a forward depends on and that the candidate has another value of."""
    return {
        key: candidate.get(key)
        for key in dict.fromkeys((*reference, *candidate))
        if reference.get(key) != candidate.get(key) and not _NOT_OF_THE_FORWARD.match(key)
    }


def change_words(key: str, reference: Config, candidate: Config) -> str:
    """``rms_norm_eps is 1e-05, not 1e-06``; of rope, only what differs in its table."""
    here, there = candidate.get(key), reference.get(key)
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        parts = [
            change_words(inner, there, here)
            for inner in dict.fromkeys((*there, *here))
            if here.get(inner) != there.get(inner)
        ]
        return ", ".join(parts)
    return f"{key} is {_plain(here)}, not {_plain(there)}"


def _plain(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def changes_of_file(gguf: GGUFFile, keys: Mapping[str, bytes], config: Config) -> FileKeys:
    """A file's keys as changes of the directory's configuration.

    Args:
        gguf: the file.
        keys: what the converter writes for the directory.
        config: of the directory.
    """
    changes: dict[str, Any] = {}
    words: dict[str, str] = {}
    unknown = []
    for difference in differences(gguf, keys):
        if not difference.reaches_logits:
            continue
        value = gguf.fields.get(difference.key)
        value = value.item() if isinstance(value, np.generic) else value
        said = _in_config(difference.key, value, {**config, **changes})
        if said is None:
            unknown.append(difference.sentence)
            continue
        name, changed = said
        changes[name] = changed
        told = f"{difference.key} is {difference.here}, not {difference.expected}"
        words[name] = f"{words[name]}; {told}" if name in words else told
    return FileKeys(changes, words, tuple(unknown))


def _in_config(key: str, value: Any, config: Config) -> tuple[str, Any] | None:
    """The configuration's key that says a GGUF key, and its value; None if none is known."""
    if re.search(r"\.rope\.freq_base(_swa)?$", key):
        return _rope(config, key.endswith("_swa"), lambda table: table | {"rope_theta": value})
    if re.search(r"\.rope\.scaling\.factor$", key):
        return _rope(config, False, lambda table: table | {"factor": value}, "factor")
    for pattern, names in _SAME:
        if re.search(pattern, key):
            found = next((name for name in names if name in config), None)
            if found is None or (value is None and found not in _NONE_AT_ZERO):
                return None
            if isinstance(config[found], int) and isinstance(value, float) and value.is_integer():
                value = int(value)
            return found, None if found in _NONE_AT_ZERO and not value else value
    return None


def _rope(
    config: Config,
    sliding: bool,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    needs: str = "rope_type",
) -> tuple[str, Any] | None:
    """The table of rope with a change: of all layers, or of those of one kind.

    None where the table has not what the change needs: transformers would not look at it.
    """
    table = config.get(_ROPE)
    if not isinstance(table, Mapping):
        return None
    kind = "sliding_attention" if sliding else "full_attention"
    if isinstance(table.get(kind), Mapping):
        inner = dict(table[kind])
        return (_ROPE, {**table, kind: change(inner)}) if needs in inner else None
    return None if sliding or needs not in table else (_ROPE, change(dict(table)))

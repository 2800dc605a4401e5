"""What is known of an architecture: one table, a line for each.

What a file itself says is asked of the file (``checkpoints.sites`` finds which layers have a
projection); here stands what no file says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Layout(NamedTuple):
    """What the converter does to an architecture's tensors besides renaming.

    Attributes:
        interleaved: the rows of q and k are reordered, see
            :func:`so8tqc.gguf.tensor_map.interleave_rope`.
        norm_offset: norms are stored as offsets from 1, and 1 is added.
        conv1d: projections named as GPT-2's are stored [in, out] and are transposed.
    """

    interleaved: bool = False
    norm_offset: bool = False
    conv1d: bool = False


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers, and what becomes of it in GGUF.

    Attributes:
        attention_output: attention output projection, as a dotted name below a decoder layer.
        transposed: its projections are stored [in, out] (Conv1D) instead of [out, in].
        gguf: ``general.architecture`` that llama.cpp's converter writes for it; None: not known.
        layout: of its tensors in GGUF; None: no export of it was run that had transformers' logits.
    """

    attention_output: str = "self_attn.o_proj"
    transposed: bool = False
    gguf: str | None = None
    layout: Layout | None = None


_ROPE_PAIRS = Layout(interleaved=True)
_NORM_FROM_ONE = Layout(norm_offset=True)
_RENAMED = Layout()

ARCHITECTURES: dict[str, Architecture] = {
    "bloom": Architecture("self_attention.dense"),
    "falcon": Architecture("self_attention.dense"),
    "gemma": Architecture(gguf="gemma", layout=_NORM_FROM_ONE),
    "gemma2": Architecture(gguf="gemma2", layout=_NORM_FROM_ONE),
    "gemma3": Architecture(gguf="gemma3", layout=_NORM_FROM_ONE),
    "gemma3_text": Architecture(gguf="gemma3", layout=_NORM_FROM_ONE),
    "gpt2": Architecture("attn.c_proj", transposed=True),
    "gpt_neox": Architecture("attention.dense"),
    "gptj": Architecture("attn.out_proj"),
    "granite": Architecture(gguf="granite", layout=_ROPE_PAIRS),
    "llama": Architecture(gguf="llama", layout=_ROPE_PAIRS),
    "mistral": Architecture(gguf="llama", layout=_ROPE_PAIRS),
    "olmo2": Architecture(gguf="olmo2"),
    "opt": Architecture("self_attn.out_proj"),
    "phi": Architecture("self_attn.dense"),
    "phi3": Architecture(gguf="phi3", layout=_RENAMED),
    "qwen2": Architecture(gguf="qwen2", layout=_RENAMED),
    "qwen2_vl": Architecture(gguf="qwen2vl", layout=_RENAMED),
    "qwen2_vl_text": Architecture(gguf="qwen2vl", layout=_RENAMED),
    "qwen3": Architecture(gguf="qwen3", layout=_RENAMED),
    "smollm3": Architecture(gguf="smollm3", layout=_ROPE_PAIRS),
}
"""``model_type`` of a config → what is known of it."""

_USUAL = Architecture()
_LAYOUTS = {row.gguf: row.layout for row in ARCHITECTURES.values() if row.layout is not None}


def architecture(model_type: str) -> Architecture:
    """What is known of a model type; of one that is not in the table, what is usual."""
    return ARCHITECTURES.get(model_type, _USUAL)


def gguf_layout(name: str) -> Layout | None:
    """Layout of the files of a GGUF architecture; None if it is not known to be right."""
    return _LAYOUTS.get(name)


_OTHER_TOWERS = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|speech\w*|encoder|mtp)\.")


def in_other_tower(prefix: str) -> bool:
    """Whether the part of a tensor's name before ``layers.N.`` names another tower."""
    return _OTHER_TOWERS.search(prefix) is not None

"""Whether a file's own chat template makes of conversations what the tokenizer's does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from so8tqc.errors import ModelError
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.records import Check, judge
from so8tqc.sources.inputs.conversations import chat_template, same_rendering
from so8tqc.sources.inputs.texts import load_tokenizer, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "tokenizer.chat_template"


def template_checks(
    data: Sequence[str], tokenizer: PreTrainedTokenizerBase, files: Mapping[str, Path]
) -> list[Check]:
    """``chat.template`` of each file: conversations that its own template renders otherwise.

    Both sides are scored on the tokenizer's rendering. A runtime takes the file's own template, so
    that where it differs, what was measured is not what will be served.

    Args:
        data: of the evaluation.
        tokenizer: whose template renders the conversations.
        files: name → GGUF or model directory.

    Raises:
        DataError: the data cannot be read.
        ModelError: no chat template, or a file that cannot be read.
    """
    ours = chat_template(tokenizer)
    texts = read_texts(data).texts
    checks = []
    for name, path in files.items():
        theirs = _own(path)
        if theirs == ours:
            differing, told = 0, "It is the tokenizer's, to the letter."
        elif not theirs:
            differing, told = len(texts), "The file has no chat template: a runtime would guess."
        else:
            differing, first = same_rendering(texts, tokenizer, theirs)
            told = f"The first: {first}." if first else "It is written otherwise and renders alike."
        checks.append(
            judge(
                "chat.template",
                differing,
                0,
                subject=name,
                detail=f"Of {len(texts)} conversations, those that the file's own chat template "
                f"renders otherwise than the tokenizer's. {told}",
            )
        )
    return checks


def _own(path: Path) -> str:
    """A file's chat template, "" without one."""
    if is_gguf(path):
        return str(open_gguf(path).fields.get(_KEY) or "")
    try:
        return chat_template(load_tokenizer(path))
    except ModelError:
        return ""

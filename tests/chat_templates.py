"""Chat templates: one that marks the answers itself, the same without marks, models with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from so8tqc.sources.inputs.texts import load_tokenizer

HEAD = "{% for m in messages %}[{{ m.role }}]\n"
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def with_template(model: Path, to: Path, template: str) -> Path:
    """A copy of a model directory with a chat template."""
    shutil.copytree(model, to)
    tokenizer = load_tokenizer(to)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(to))
    return to

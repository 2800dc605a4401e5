"""``python sweep_tokenizer.py FOLDER`` makes the sweep's two tokenizers in FOLDER.

``sentencepiece`` is trained here and small. Types that the converter reads with a byte-level BPE
tokenizer alone get ``bpe``, that of SmolLM2: the converter knows a tokenizer by how it splits a
fixed text, so that no small one would do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

VOCABULARY = 512
BPE_VOCABULARY = 49_168
"""SmolLM2's 49,152 and what the converter looks for besides, rounded up to what it pads to."""

_SPECIAL = (
    *("[gMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<unk>", "<s>", "</s>", "<|startoftext|>"),
)
"""Tokens of the GLM and Solar tokenizers that the converter finds by name."""


def train(directory: Path) -> Path:
    """A sentencepiece tokenizer that transformers and the converter both read."""
    import sentencepiece
    from transformers import LlamaTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    data = Path(__file__).parents[2] / "data" / "validation_en.json"
    corpus = directory / "corpus.txt"
    texts = json.loads(data.read_text(encoding="utf-8"))["texts"]
    corpus.write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    corpus.unlink()
    (directory / "tokenizer.vocab").unlink()
    LlamaTokenizer.from_pretrained(str(directory)).save_pretrained(str(directory))
    return directory


def byte_level(directory: Path) -> Path:
    """SmolLM2's tokenizer, from the demo model, with a few more special tokens."""
    from transformers import AutoTokenizer

    from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model

    tokenizer = AutoTokenizer.from_pretrained(str(resolve_model(DEMO_MODEL)))
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    tokenizer.save_pretrained(str(directory))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    return directory


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train(folder / "sentencepiece")
    byte_level(folder / "bpe")

"""``python sweep_tokenizer.py FOLDER`` trains the sweep's tokenizer into FOLDER/tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

VOCABULARY = 512


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


if __name__ == "__main__":
    train(Path(sys.argv[1]) / "tokenizer")

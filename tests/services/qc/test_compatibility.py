"""Models that do not belong together are refused, before a number of theirs is believed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.config import ExportConfig, QCConfig
from so8tqc.errors import ModelError
from so8tqc.llama.vendor import is_vendored
from so8tqc.services.export.service import export
from so8tqc.services.qc.compatibility import ids_of, require_same_architecture, require_same_tokens
from so8tqc.services.qc.service import qc
from so8tqc.sources.gguf import GGUFSource
from tiny_gguf import write_llama


def directory(path: Path, kind: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    return path


@pytest.mark.parametrize("kind", ["llama", "mistral", "some-new-model"])
def test_what_is_or_may_be_of_the_same_architecture_is_compared(tmp_path: Path, kind: str) -> None:
    base, file = directory(tmp_path / "base", kind), write_llama(tmp_path / "file.gguf")
    require_same_architecture(base, [file, directory(tmp_path / "other", kind)])
    require_same_architecture(file, [file, base])
    require_same_architecture(base, [tmp_path / "nothing", directory(tmp_path / "odd", 7)])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    qwen, file = directory(tmp_path / "qwen", "qwen3"), write_llama(tmp_path / "file.gguf")
    mistral = directory(tmp_path / "mistral", "mistral")
    for reference, candidate, words in (
        (qwen, file, "file.gguf: a llama model, where the reference is a qwen3"),
        (file, qwen, "qwen: a qwen3 model, where the reference is a llama"),
        (mistral, qwen, "qwen: a qwen3 model, where the reference is a mistral"),
    ):
        with pytest.raises(ModelError, match=words):
            require_same_architecture(reference, [reference, candidate])


def test_qc_refuses_a_candidate_of_another_architecture(
    make_model: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="a qwen3 model, where the reference is a llama"):
        qc(
            QCConfig(
                reference=make_model("llama"),
                candidates=(make_model("qwen3"),),
                data=(str(texts_file),),
                out=tmp_path / "out",
            )
        )


def test_tokens_with_other_ids_are_named() -> None:
    pieces = [None, "a", "b", "c", "twice", "twice", "only here"]
    assert ids_of(pieces) == {"a": 1, "b": 2, "c": 3, "only here": 6}
    known = {"a": 1, "b": 2, "c": 3, "twice": 9, "<s>": 0, "only there": 6}
    require_same_tokens(Path("x.gguf"), pieces, known, "t")
    with pytest.raises(
        ModelError, match=r"2 tokens have other ids than in t, first 'b': 2 here, 3"
    ):
        require_same_tokens(Path("x.gguf"), pieces, known | {"b": 3, "c": 2}, "t")


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
@pytest.mark.parametrize("by", ["tokenizer", "file"])
def test_qc_refuses_a_file_whose_tokens_are_scrambled(
    llama: Path, texts_file: Path, tmp_path: Path, by: str
) -> None:
    """Same model, same number of tokens, another vocabulary: nothing else would show it."""
    right, scrambled = tmp_path / "right.gguf", tmp_path / "scrambled.gguf"
    export(ExportConfig(model=llama, out=right))
    source = GGUFSource(right, "right")
    first, second = [piece.encode() for piece in source.pieces() if piece and len(piece) == 4][:2]
    source.close()
    stored = right.read_bytes()
    places = [stored.index(struct.pack("<Q", len(word)) + word) + 8 for word in (first, second)]
    assert len(first) == len(second)
    changed = bytearray(stored)
    for place, word in zip(places, (second, first), strict=True):
        changed[place : place + len(word)] = word
    scrambled.write_bytes(changed)

    def judge(candidate: Path) -> str:
        reference = llama if by == "tokenizer" else right
        return qc(
            QCConfig(
                reference=reference,
                candidates=(candidate,),
                tokenizer=llama,
                data=(str(texts_file),),
                out=tmp_path / f"qc-{candidate.stem}",
            )
        ).verdict.value

    assert judge(right) == "pass"
    with pytest.raises(ModelError, match="2 tokens have other ids than in "):
        judge(scrambled)


@pytest.mark.llama
def test_a_file_without_a_vocabulary_has_no_tokens_to_compare(tmp_path: Path) -> None:
    """libllama would end the process if it were asked for one."""
    source = GGUFSource(write_llama(tmp_path / "file.gguf"), "file")
    assert set(source.pieces()) == {None}
    source.close()

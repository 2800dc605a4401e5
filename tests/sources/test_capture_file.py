"""Capture files: read back exactly, hostile and malformed ones refused in one paragraph."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from so8tqc.errors import DataError, InputError, ModelError
from so8tqc.sources.capture import (
    MAX_TOKENS,
    CaptureSource,
    RoundedSource,
    check_same_tokens,
    cut,
    open_capture,
)
from so8tqc.sources.capture_writer import capture_bytes, write_capture
from so8tqc.sources.protocol import EncodedText, LogitSource, TokenIds

V = 50
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Dreamed:
    """Logits that are a function of the tokens so far."""

    name = "dreamed"
    vocab_size = V

    def __init__(self) -> None:
        self.spoilt: dict[int, float] = {}

    def whole(self, tokens: TokenIds) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(tokens[0]))
        logits = torch.randn(512, V, generator=generator)[: tokens.size] * 8
        for position, value in self.spoilt.items():
            logits[position, 3] = value
        return logits

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        yield from self.whole(tokens)[first:].split(rows)

    def close(self) -> None:
        pass


def encoded(lengths: tuple[int, ...] = (3, 200, 129)) -> tuple[EncodedText, ...]:
    generator = np.random.default_rng(0)
    return tuple(
        EncodedText(f"日本/{i}", np.r_[i, generator.integers(0, V, n - 1)], "ja", "ethics")
        for i, n in enumerate(lengths)
    )


def recorded(path: Path, dtype: str = "F32") -> Path:
    write_capture(path, Dreamed(), encoded(), dtype, {"so8t.source": "a dream"})
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return recorded(tmp_path / "ref.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 128, 1000])
def test_what_was_written_is_read_in_blocks(dtype: str, rows: int, tmp_path: Path) -> None:
    capture = open_capture(recorded(tmp_path / "ref.safetensors", dtype))
    source = CaptureSource(capture, "ref")
    assert isinstance(source, LogitSource)
    assert (capture.vocab_size, capture.dtype, capture.source) == (V, DTYPES[dtype], "a dream")
    for text, original in zip(capture.texts, encoded(), strict=True):
        assert (text.id, text.language, text.category) == (original.id, "ja", "ethics")
        np.testing.assert_array_equal(text.tokens, original.tokens)
        blocks = list(source.logits(text.tokens, rows))
        assert [b.shape[0] for b in blocks[:-1]] == [rows] * (len(blocks) - 1)
        assert {b.dtype for b in blocks} == {torch.float32}
        expected = Dreamed().whole(text.tokens).to(DTYPES[dtype]).float()
        torch.testing.assert_close(torch.cat(blocks), expected, rtol=0, atol=0)
        rounded = torch.cat(list(RoundedSource(Dreamed(), capture.dtype).logits(text.tokens, rows)))
        torch.testing.assert_close(rounded, expected, rtol=0, atol=0)


def test_the_library_reads_what_we_write(good: Path) -> None:
    tensors = load_file(str(good))
    assert sorted(tensors) == sorted(f"{k}.{i}" for k in ("tokens", "logits") for i in range(3))
    for i, text in enumerate(encoded()):
        torch.testing.assert_close(
            tensors[f"logits.{i}"], Dreamed().whole(text.tokens), rtol=0, atol=0
        )
    assert good.stat().st_size - capture_bytes(encoded(), V, "F32") < 1000


def test_the_rounding_is_measured(tmp_path: Path) -> None:
    errors = {
        name: write_capture(tmp_path / f"{name}.safetensors", Dreamed(), encoded(), name, {})
        for name in DTYPES
    }
    whole = torch.cat([Dreamed().whole(text.tokens) for text in encoded()])
    assert errors["F32"] == 0
    for name, half_ulp in (("F16", 2.0**-11), ("BF16", 2.0**-8)):
        assert errors[name] == (whole.to(DTYPES[name]).float() - whole).abs().max()
        assert errors[name] <= half_ulp * whole.abs().max()


def test_a_beginning_of_a_text_has_the_texts_logits(good: Path) -> None:
    capture = open_capture(good)
    (_, text, _) = cut(capture.texts, 130)
    assert text.tokens.size == 130
    got = torch.cat(list(CaptureSource(capture, "ref").logits(text.tokens, 64)))
    torch.testing.assert_close(got, Dreamed().whole(text.tokens), rtol=0, atol=0)
    stranger = np.array([7, 7, 7])
    with pytest.raises(DataError, match="a text of 3 tokens was not recorded"):
        next(CaptureSource(capture, "ref").logits(stranger, 1))


@pytest.mark.parametrize("first", [0, 1, 77, 199])
def test_rows_may_be_wanted_from_a_later_one_on(first: int, tmp_path: Path) -> None:
    path = tmp_path / "ref.safetensors"
    texts = encoded()
    write_capture(path, Dreamed(), texts, "F32", {})
    tokens = texts[1].tokens
    blocks = CaptureSource(open_capture(path), "reference").logits(tokens, 50, first)
    assert torch.equal(torch.cat(list(blocks)), Dreamed().whole(tokens)[first:])


def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """16 texts of 200 rows, read with 10 rows at a time, never hold more than a few blocks."""

    class Wide(Dreamed):
        vocab_size = 20_000

        def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
            for start in range(first, tokens.size, rows):
                yield torch.zeros(min(rows, tokens.size - start), self.vocab_size)

    path = tmp_path / "ref.safetensors"
    texts = encoded((200,) * 16)
    write_capture(path, Wide(), texts, "F16", {})
    tracemalloc.start()  # counts the bytearrays we read into
    capture = open_capture(path)
    for text in capture.texts:
        for _ in CaptureSource(capture, "ref").logits(text.tokens, 10):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 100e6
    assert peak < 3e6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 150, 199])
def test_non_finite_logits_are_located_on_both_sides(
    value: float, position: int, good: Path
) -> None:
    source = Dreamed()
    source.spoilt = {position: value}
    before = good.read_bytes()
    with pytest.raises(DataError, match=rf"日本/1: .*non-finite logits at position {position}"):
        write_capture(good, source, encoded()[1:], "F32", {})
    assert good.read_bytes() == before  # atomic
    assert [p.name for p in good.parent.iterdir()] == [good.name]

    rewrite(good, lambda t, _m: t["logits.1"][position].fill_(value))
    capture = open_capture(good)
    with pytest.raises(
        DataError, match=rf"text 日本/1 has a non-finite .* position {position}, token"
    ):
        list(CaptureSource(capture, "ref").logits(capture.texts[1].tokens, 64))


def test_a_logit_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    source = Dreamed()
    source.spoilt = {150: 7e4}
    with pytest.raises(
        DataError, match=r"日本/1: the logit 70000 at position 150 does not fit .*16"
    ):
        write_capture(tmp_path / "ref.safetensors", source, encoded()[1:], "F16", {})


def rewrite(path: Path, edit: Any) -> None:
    with safe_open(str(path), framework="pt") as handle:
        metadata = dict(handle.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
    edit(tensors, metadata)
    save_file(tensors, str(path), metadata=metadata)


def put(name: str, value: torch.Tensor) -> Any:
    return lambda tensors, _metadata: tensors.__setitem__(name, value)


def head(key: str, value: object) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    return lambda _tensors, metadata: metadata.__setitem__(key, text)


FAULTS = {
    "no version": (lambda _t, m: m.pop("so8t.capture_version"), "not a capture.*capture_version"),
    "other version": (head("so8t.capture_version", "2"), "is '2', this version reads '1'"),
    "no texts": (lambda t, _m: t.clear(), "holds no text"),
    "tokens missing": (lambda t, _m: t.pop("tokens.1"), r"tensor tokens\.1 is missing"),
    "logits missing": (lambda t, _m: t.pop("logits.2"), r"tensor logits\.2 is missing"),
    "a gap": (
        lambda t, _m: t.update({"tokens.4": t.pop("tokens.1"), "logits.4": t.pop("logits.1")}),
        r"tensor tokens\.1 is missing; texts are numbered from 0",
    ),
    "extra tensor": (put("hidden.0", torch.zeros(2)), r"unexpected tensor 'hidden\.0'"),
    "leading zero": (put("tokens.01", torch.zeros(2)), r"unexpected tensor 'tokens\.01'"),
    "float tokens": (put("tokens.0", torch.zeros(3)), r"tokens\.0 is F32 of shape \[3\], expected"),
    "square tokens": (put("tokens.0", torch.zeros(1, 3, dtype=torch.int64)), r"shape \[1, 3\]"),
    "integer logits": (put("logits.0", torch.zeros(3, V, dtype=torch.int32)), "logits.0 is I32"),
    "double logits": (put("logits.0", torch.zeros(3, V, dtype=torch.float64)), "logits.0 is F64"),
    "batched logits": (put("logits.0", torch.zeros(1, 3, V)), r"shape \[1, 3, 50\], expected"),
    "rows differ": (put("logits.0", torch.zeros(4, V)), "has 3 tokens, logits.0 has 4 rows"),
    "width differs": (put("logits.2", torch.zeros(129, V + 1)), "51 vocabulary entries.* 50"),
    "dtype differs": (put("logits.2", torch.zeros(129, V).half()), "logits.2 is F16.*F32"),
    "no vocabulary": (
        lambda t, _m: t.update({f"logits.{i}": torch.zeros(n, 0) for i, n in
                                enumerate((3, 200, 129))}),
        "outside the vocabulary of 0",
    ),
    "one token": (
        lambda t, _m: t.update({"tokens.1": torch.zeros(1, dtype=torch.int64),
                                "logits.1": torch.zeros(1, V)}),
        r"tokens\.1 has 1 token\(s\); next-token statistics need at least two",
    ),
    "no token": (
        lambda t, _m: t.update({"tokens.1": torch.zeros(0, dtype=torch.int64),
                                "logits.1": torch.zeros(0, V)}),
        r"tokens\.1 has 0 token\(s\)",
    ),
    "id too large": (
        lambda t, _m: t["tokens.1"].__setitem__(9, V), "id 50 at position 9 is outside.* of 50"
    ),
    "negative id": (lambda t, _m: t["tokens.1"].__setitem__(9, -1), "id -1 at position 9"),
    "facts are no JSON": (head("so8t.texts", "[{"), "so8t.texts: Invalid JSON"),
    "facts nest too deep": (head("so8t.texts", "[" * 100_000), "so8t.texts: Invalid JSON"),
    "facts are no list": (head("so8t.texts", {"id": "x"}), "so8t.texts: Input should be a valid"),
    "an id is missing": (head("so8t.texts", [{}] * 3), r"so8t.texts\[0\]\['id'\]: Field required"),
    "an id is no text": (head("so8t.texts", [{"id": 1}] * 3), r"\[0\]\['id'\]: Input should be"),
    "an id is empty": (head("so8t.texts", [{"id": ""}] * 3), "at least 1 character"),
    "another fact": (head("so8t.texts", [{"id": "a", "b": 1}] * 3), "Extra inputs"),
    "too few facts": (head("so8t.texts", [{"id": "a"}]), "names 1 texts of 3"),
    "ids alike": (head("so8t.texts", [{"id": "a"}] * 3), "names two texts alike"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_captures_are_refused(fault: str, good: Path) -> None:
    edit, message = FAULTS[fault]
    rewrite(good, edit)
    with pytest.raises(DataError, match=message) as caught:
        open_capture(good)
    assert str(good) in str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_facts_are_optional_and_int32_ids_are_read(good: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        del metadata["so8t.texts"]
        tensors["tokens.1"] = tensors["tokens.1"].int()

    rewrite(good, edit)
    capture = open_capture(good)
    assert [text.id for text in capture.texts] == ["text-1", "text-2", "text-3"]
    np.testing.assert_array_equal(capture.texts[1].tokens, encoded()[1].tokens)
    assert capture.texts[1].tokens.dtype == np.int64


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
def test_truncated_files_are_refused(keep: int, good: Path) -> None:
    good.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a valid safetensors file"):
        open_capture(good)


def test_a_file_cut_after_it_was_opened_is_noticed(good: Path) -> None:
    capture = open_capture(good)
    good.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(DataError, match="the file ends within its logits"):
        list(CaptureSource(capture, "ref").logits(capture.texts[2].tokens, 64))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        open_capture(tmp_path / "ref.safetensors")


def header_file(path: Path, header: dict[str, object], size: int) -> None:
    """A sparse file of ``size`` data bytes behind a header of our own."""
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + size)


def lie(tokens: int, rows: int, width: int, size: int) -> dict[str, object]:
    split = min(size, tokens * 8)
    return {
        "__metadata__": {"so8t.capture_version": "1"},
        "tokens.0": {"dtype": "I64", "shape": [tokens], "data_offsets": [0, split]},
        "logits.0": {"dtype": "F32", "shape": [rows, width], "data_offsets": [split, size]},
    }


@pytest.mark.parametrize(
    ("tokens", "rows", "width", "size", "message"),
    [
        (2, 2, 1 << 60, 24, "not a valid safetensors file"),
        (1 << 61, 1 << 61, 0, 16, "not a valid safetensors file"),
        (1 << 40, 1 << 40, 2, 1 << 10, "not a valid safetensors file"),
        # honest about a sparse file: what it says is true, and still not to be allocated
        (MAX_TOKENS + 1, MAX_TOKENS + 1, 1, 12 * (MAX_TOKENS + 1), "more than 16777216"),
    ],
)
def test_a_lying_header_allocates_nothing(
    tokens: int, rows: int, width: int, size: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "ref.safetensors"
    header_file(path, lie(tokens, rows, width, size), size)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        open_capture(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_byte_of_the_header_can_do_more_than_be_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "ref.safetensors"
    content = bytearray(recorded(path).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    at = data.draw(st.integers(0, 8 + length - 1))
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(InputError):
        capture = open_capture(path)
        for text in capture.texts:
            blocks = list(CaptureSource(capture, "ref").logits(text.tokens, 64))
            assert sum(block.shape[0] for block in blocks) == text.tokens.size
            assert all(block.isfinite().all() for block in blocks)


def test_data_beside_a_capture_must_be_its_data(good: Path) -> None:
    capture = open_capture(good)
    longer = [EncodedText(t.id, np.r_[t.tokens, 1, 2]) for t in encoded()]
    check_same_tokens(capture, encoded())
    check_same_tokens(capture, longer)  # recorded up to some token
    with pytest.raises(DataError, match="holds 3 texts, the data 2"):
        check_same_tokens(capture, encoded()[:2])
    with pytest.raises(
        DataError, match=r"text 日本/2 differs from the data \(日本/2\) at token 128"
    ):
        check_same_tokens(capture, encoded((3, 200, 128)))
    other = encoded()
    other[1].tokens[77] += 1
    with pytest.raises(DataError, match=r"日本/1 .* at token 77\. Leave --data out"):
        check_same_tokens(capture, other)

"""The keys of a GGUF beside those that the converter writes for the model: what each changes."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.rewrite import key_values
from so8tqc.records import Check, judge, skipped

_ARRAY = 9
_STRING = 8
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q",
            11: "q", 12: "d"}  # fmt: skip
"""GGUF value type → struct's format."""

_NOT_OF_THE_MODEL = re.compile(
    r"^(general\.(?!architecture$)|quantize\.|split\.|so8t\.|imatrix\.|mradermacher\.|GGUF\.)"
)
"""Keys that say who made the file and how."""

_EFFECTS = (
    (r"^general\.architecture$", "another graph is run: no logit is the model's"),
    (r"\.rope\.freq_base", "positions turn queries and keys by other angles, more so far apart"),
    (r"\.rope\.scaling", "positions are stretched otherwise: long texts are read wrongly"),
    (r"\.rope\.", "other features of queries and keys are turned by their position"),
    (r"layer_norm(_rms)?_epsilon$", "norms divide by another number, most where inputs are small"),
    (r"sliding_window", "tokens at the window's edge are seen or not seen"),
    (r"softcapping$", "logits or attention scores are bounded otherwise"),
    (r"logit_scale$", "all logits are multiplied by another number"),
    (r"(embedding|residual|attention)[._]scale$", "every layer's input or output has another size"),
    (r"expert_(used_)?count$", "other experts are asked, or their outputs are weighed otherwise"),
    (r"expert", "the router weighs experts otherwise"),
    (r"head_count|key_length|value_length", "queries, keys and values are cut into other heads"),
    (r"block_count$", "layers are left out"),
    (r"context_length$", "the runtime allows texts of another length"),
    (r"vocab_size$", "the runtime expects another number of tokens"),
    (r"^tokenizer\.ggml\.(tokens|merges|scores|token_type)$", "texts become other tokens"),
    (r"^tokenizer\.ggml\.pre$", "texts are cut otherwise before they become tokens"),
    (r"^tokenizer\.ggml\.model$", "texts become other tokens"),
    (r"add_(bos|eos)_token$", "a token is put before or behind every text, or is not"),
    (r"bos_token_id$", "texts begin with another token"),
    (r"^tokenizer\.ggml\.add_space_prefix$", "texts begin with another token"),
)  # fmt: skip
"""Pattern of keys that reach logits of a text → what they do to them."""

_BESIDE = (
    (r"^tokenizer\.chat_template", "conversations are written otherwise"),
    (r"(eos|eot|eom|eog)_token_id$", "generation ends elsewhere"),
    (r"(unknown|padding|mask|sep|cls)_token_id$", "a special token has another number"),
)
"""Pattern of keys that leave the logits of a given text alone."""

_MOST = 6


class Difference(NamedTuple):
    """One key that is another.

    Attributes:
        key: which.
        here, expected: its value in the file and by the converter, in words; "missing".
        effect: what it does.
        reaches_logits: whether logits of a given text depend on it.
    """

    key: str
    here: str
    expected: str
    effect: str
    reaches_logits: bool

    @property
    def sentence(self) -> str:
        """``llama.rope.freq_base is 10500 where the model says 10000: …``"""
        return f"{self.key} is {self.here} where the model says {self.expected}: {self.effect}"


def differences(gguf: GGUFFile, keys: Mapping[str, bytes]) -> list[Difference]:
    """The keys of a file that are not what the converter writes for the model.

    Args:
        gguf: the file.
        keys: key → bytes of its type and value, as the converter packs them.
    """
    stored = key_values(gguf.path)
    here = {k: v for k, v in stored.items() if not _NOT_OF_THE_MODEL.match(k)}
    wanted = {k: v for k, v in keys.items() if not _NOT_OF_THE_MODEL.match(k)}
    found = []
    for key in dict.fromkeys((*wanted, *here)):
        one, other = here.get(key), wanted.get(key)
        if one == other or _same_number(one, other):
            continue
        if (one is None or other is None) and _is_default(key, one or other, wanted):
            continue
        effect, reaches = effect_of(key)
        if effect:
            found.append(Difference(key, _words(one), _words(other), effect, reaches))
    return found


def effect_of(key: str) -> tuple[str, bool]:
    """What another value of a key does, and whether to the logits of a text; "" if nothing."""
    for known, reaches in ((_EFFECTS, True), (_BESIDE, False)):
        for pattern, effect in known:
            if re.search(pattern, key):
                return effect, reaches and not key.endswith("context_length")
    if key.startswith("tokenizer."):
        return "", False
    return "the graph is built otherwise", True


def metadata_checks(gguf: GGUFFile, keys: Mapping[str, bytes] | None, subject: str) -> list[Check]:
    """``tensors.keys``: keys that reach logits and are others than the converter writes."""
    if keys is None:
        return [skipped("tensors.keys", "The converter did not tell its keys.", subject=subject)]
    found = differences(gguf, keys)
    wrong = [d for d in found if d.reaches_logits]
    detail = "; ".join(d.sentence for d in (wrong or found)[:_MOST])
    more = f"; {len(found) - _MOST} more" if len(found) > _MOST else ""
    beside = "" if wrong or not found else " None of them changes the logits of a text."
    return [
        judge(
            "tensors.keys",
            len(wrong),
            0,
            subject=subject,
            detail=f"Keys that are others than the converter writes: {detail or 'none'}{more}."
            + beside,
        )
    ]


_DEFAULTS = {
    ".rope.freq_base": 10000.0,
    ".rope.scaling.factor": 1.0,
    ".add_eos_token": 0.0,
    ".add_space_prefix": 1.0,
    ".attention.causal": 1.0,
}
"""What libllama takes where a key is missing (``llama-model.cpp``, ``llama-vocab.cpp``)."""

_HEAD_WIDTHS = (".attention.key_length", ".attention.value_length", ".rope.dimension_count")


def _is_default(key: str, packed: bytes | None, wanted: Mapping[str, bytes]) -> bool:
    """Whether a key says what libllama takes without it: older converters leave it out."""
    number = _number(packed)
    if number is None:
        return False
    for ending, default in _DEFAULTS.items():
        if key.endswith(ending):
            return number == default
    architecture = key.split(".", 1)[0]
    if key.endswith(".vocab_size"):
        tokens = wanted.get("tokenizer.ggml.tokens")
        return tokens is not None and number == struct.unpack_from("<Q", tokens, 8)[0]
    if key.endswith(_HEAD_WIDTHS):
        width = _number(wanted.get(f"{architecture}.embedding_length"))
        heads = _number(wanted.get(f"{architecture}.attention.head_count"))
        return width is not None and bool(heads) and number * (heads or 1) == width
    return False


def _number(packed: bytes | None) -> float | None:
    """The number that a key holds; None if it holds none."""
    if packed is None or len(packed) < 4:
        return None
    form = _FORMATS.get(struct.unpack_from("<I", packed)[0])
    if form is None or len(packed) != 4 + struct.calcsize("<" + form):
        return None
    return float(struct.unpack_from("<" + form, packed, 4)[0])


def _same_number(one: bytes | None, other: bytes | None) -> bool:
    """Whether both hold one number, whatever its type."""
    first = _number(one)
    return first is not None and first == _number(other)


def _words(packed: bytes | None) -> str:
    if packed is None:
        return "missing"
    number = _number(packed)
    if number is not None:
        return f"{number:.9g}"
    (kind,) = struct.unpack_from("<I", packed)
    if kind == _STRING:
        text = packed[12:].decode("utf-8", "replace")
        return repr(text if len(text) <= 40 else text[:37] + "…")
    if kind == _ARRAY:
        (count,) = struct.unpack_from("<Q", packed, 8)
        return f"a list of {count}"
    return "something else"

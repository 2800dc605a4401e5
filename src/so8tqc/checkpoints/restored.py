"""The model that the gates were trained on, as a plain model directory.

A training saves its weights under wrapped names, with LoRA branches, or changed; a rotation in
front of a tied output head has no matrix of its own to be folded into. What the gates are folded
into is then written out first: the base's names and config, each LoRA branch merged, the head
untied. Weights that are both merged and folded are kept in float64 here, so that they are rounded
to storage once, by the fold.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.architectures import architecture
from so8tqc.checkpoints.beside import Beside, Lora, merged, plain_name, split_lora
from so8tqc.checkpoints.copy import companion_files
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.safetensors_index import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    encode_header,
    json_object,
)
from so8tqc.checkpoints.sites import EMBEDDING_NAMES, HEAD_NAMES
from so8tqc.errors import ModelError
from so8tqc.rotations.files.names import layer_of
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.fold import to_storage

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 1 << 20
_CONFIG = "config.json"
_OUR_WORDS = ("so8t", "so8_")
"""How entries and files begin that speak of gates, which a baked directory no longer has."""

_ROOTS = frozenset(
    {
        "model",
        "lm_head",
        "embed_out",
        "transformer",
        "language_model",
        "visual",
        "vision_tower",
        "vision_model",
        "audio_tower",
        "multi_modal_projector",
        "embed_tokens",
        "norm",
        "wte",
    }
)
"""First levels of names that belong to a language model, beside that of its layers."""

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@dataclass(frozen=True)
class Piece:
    """One tensor of the restored model.

    Attributes:
        value: as it is before its LoRA branch is merged.
        lora: the branch, None without one.
        dtype: safetensors name of the dtype it is written in.
    """

    value: torch.Tensor
    lora: Lora | None
    dtype: str


def unwrapped_model(directory: Path, raw: RawRotations, beside: Beside) -> dict[str, str]:
    """What a trained directory's own weights are called in a plain one: name → file.

    Raises:
        ModelError: no config, or no weights beside the gates.
    """
    if not (directory / _CONFIG).is_file():
        raise ModelError(
            "the gates lie beside no config.json, so this is no model that could be baked",
            where=str(directory),
            remedy=f"Give the base model too: so8tqc bake BASE {directory} --out DIR",
        )
    plain = {name: plain_name(name) for name in raw.weights}
    files = {own: raw.files.get(n, "") for n, own in plain.items() if own in beside.replaced}
    if not files:
        raise ModelError(
            "there are no weights beside the gates",
            where=str(directory),
            remedy=f"Give the base model too: so8tqc bake BASE {directory} --out DIR",
        )
    return {name: _plain_file(file) for name, file in files.items()}


def own_weights(raw: RawRotations, lora_alpha: float | None, where: str) -> Beside:
    """The weights of a directory that is base and gates in one, all of them the checkpoint's.

    Raises:
        RotationError, ConfigError: see ``beside.split_lora``.
    """
    plain, lora = split_lora(raw.weights, raw.settings, lora_alpha, where)
    roots = {placed[0].split(".")[0] for name in plain if (placed := layer_of(name)) is not None}
    unknown = tuple(name for name in plain if name.split(".")[0] not in roots | _ROOTS)
    kept = {name: value for name, value in plain.items() if name not in unknown}
    return Beside(replaced=kept, lora=lora, unknown=unknown)


def write_restored(
    out: Path,
    pieces: Mapping[str, Piece],
    files: Mapping[str, str],
    config: Mapping[str, Any],
    companions: Path,
) -> None:
    """Write a plain model directory.

    Args:
        out: an empty directory.
        pieces: name → tensor.
        files: name → file that it goes to.
        config: of the model.
        companions: the directory whose tokenizer and other files come along.
    """
    transposed = architecture(_model_type(config)).transposed
    shards = sorted(set(files.values()))
    for shard in shards:
        _write_shard(
            out / shard, {n: pieces[n] for n in pieces if files[n] == shard}, transposed=transposed
        )
    if shards != [SINGLE_NAME]:
        index = {"metadata": {}, "weight_map": {name: files[name] for name in sorted(files)}}
        (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (out / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    keep, _ = companion_files(companions, ())
    for file in keep:
        relative = file.relative_to(companions)
        if _comes_along(relative):
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / relative)


def dtype_name(value: torch.Tensor) -> str:
    """safetensors name of a tensor's dtype.

    Raises:
        ModelError: it has none.
    """
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"a tensor of {name} cannot be written as safetensors")
    return _DTYPES[name]


def restored_config(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """A trained directory's config with the class of its base, and what was changed in it.

    Entries that speak of gates or of code beside the weights go; a model type or class of the
    training's own is replaced by the one of transformers whose name it contains.

    Raises:
        ModelError: no config, or a class of which no base is known.
    """
    config = json_object(directory / _CONFIG)
    dropped = [
        key
        for key in config
        if key == "auto_map"
        or key.lower().startswith(_OUR_WORDS)
        or key.lower().startswith("use_so8")
    ]
    restored = {key: value for key, value in config.items() if key not in dropped}
    model_type, classes = _known_class(restored, directory)
    changed = [f"{key} left out" for key in dropped]
    if model_type != restored.get("model_type"):
        changed.append(f"model_type {restored.get('model_type')} → {model_type}")
        restored["model_type"] = model_type
    if classes != restored.get("architectures"):
        changed.append(f"architectures {restored.get('architectures')} → {classes}")
        restored["architectures"] = classes
    return restored, changed


def base_pieces(checkpoint: Checkpoint, beside: Beside) -> dict[str, Piece]:
    """The base's tensors with what the checkpoint has instead, and its LoRA branches."""
    return {
        name: Piece(
            beside.replaced.get(name, tensor_view(entry)), beside.lora.get(name), entry.dtype
        )
        for name, entry in checkpoint.tensors.items()
    }


def own_pieces(beside: Beside, names: Collection[str]) -> dict[str, Piece]:
    """A trained directory's own tensors."""
    return {
        name: Piece(beside.replaced[name], beside.lora.get(name), dtype_name(beside.replaced[name]))
        for name in names
    }


def in_float64(pieces: Mapping[str, Piece], folded: Collection[str]) -> dict[str, Piece]:
    """Pieces of which those that are merged and then folded stay unrounded."""
    return {
        name: dataclasses.replace(piece, dtype="F64")
        if piece.lora is not None and name in folded
        else piece
        for name, piece in pieces.items()
    }


def untied(
    pieces: dict[str, Piece], files: dict[str, str], config: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], str]:
    """Give an output head that shares the embedding's matrix one of its own, in ``pieces``.

    Returns:
        The config that says so, and a notice of what it costs; the config as it is and "" where
        the head has a matrix already.

    Raises:
        ModelError: there is neither a head nor a tied embedding.
    """
    if any(name.endswith(HEAD_NAMES) for name in pieces):
        return dict(config), ""
    embedding = next((name for name in pieces if name.endswith(EMBEDDING_NAMES)), None)
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", (text or {}).get("tie_word_embeddings", True))
    if embedding is None or not tied:
        raise ModelError("the model has no output head to fold a rotation into", where=where)
    name = HEAD_NAMES[0]
    pieces[name], files[name] = pieces[embedding], files[embedding]
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(text, dict):
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    size = pieces[name].value.numel() * _item_bytes(pieces[name].dtype)
    return changed, (
        f"The output head was tied to the embedding, which must not be turned: it has a matrix of "
        f"its own now, which costs {size:,} bytes."
    )


def without_tied_head(pieces: dict[str, Piece], config: dict[str, Any]) -> None:
    """Drop a head that a training saved beside the embedding that it is tied to, in ``pieces``; of
    one that is no longer the embedding's matrix, ``config`` is made to say so."""
    import torch

    head = next((name for name in pieces if name.endswith(HEAD_NAMES)), None)
    embedding = next((name for name in pieces if name.endswith(EMBEDDING_NAMES)), None)
    if not config.get("tie_word_embeddings") or head is None or embedding is None:
        return
    if pieces[head].lora is None and torch.equal(pieces[head].value, pieces[embedding].value):
        del pieces[head]
    else:
        config["tie_word_embeddings"] = False


def _write_shard(path: Path, pieces: Mapping[str, Piece], *, transposed: bool) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, piece in pieces.items():
        size = piece.value.numel() * _item_bytes(piece.dtype)
        header[name] = {
            "dtype": piece.dtype,
            "shape": list(piece.value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    with path.open("xb") as stream:
        stream.write(encode_header(header))
        for piece in pieces.values():
            for part in _parts(piece, transposed=transposed):
                stream.write(part)


def _parts(piece: Piece, *, transposed: bool) -> Iterator[memoryview]:
    """The bytes of a tensor, some rows at a time."""
    import torch

    dtype = _torch_dtype(piece.dtype)
    value = piece.value.detach()
    rows = value.shape[0] if value.ndim else 1
    step = max(1, _CHUNK_ELEMENTS * rows // max(1, value.numel()))
    for start in range(0, rows, step):
        part = value[start : start + step] if value.ndim else value[None]
        if piece.lora is not None:
            branch = piece.lora
            branch = (
                branch._replace(a=branch.a[:, start : start + step])
                if transposed
                else branch._replace(b=branch.b[start : start + step])
            )
            part = to_storage(merged(part, branch, transposed=transposed), dtype)
        elif part.dtype != dtype:
            part = to_storage(part.double(), dtype)
        yield part.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _item_bytes(dtype: str) -> int:
    return _torch_dtype(dtype).itemsize


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    word = next((word for word, own in _DTYPES.items() if own == name), None)
    if word is None:
        raise ModelError(f"a tensor of {name} cannot be written again")
    dtype: torch.dtype = getattr(torch, word)
    return dtype


def _plain_file(name: str) -> str:
    """The safetensors file that a file's tensors go to."""
    if name in ("", "pytorch_model.bin") or not re.search(r"-\d+-of-\d+", name):
        return SINGLE_NAME
    stem = name.rsplit(".", 1)[0].replace("pytorch_model", "model")
    return f"{stem}.safetensors"


def _model_type(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    return str(inner or config.get("model_type", ""))


def _comes_along(file: Path) -> bool:
    """Whether a companion file belongs to the base: neither weights' index, nor code, nor about
    gates."""
    name = file.name.lower()
    return not (
        name == _CONFIG
        or name.endswith((".index.json", ".py"))
        or name.startswith((*_OUR_WORDS, "adapter_", "trainer_state", "training_args"))
    )


def _known_class(config: Mapping[str, Any], directory: Path) -> tuple[str, list[str]]:
    """The model type and class of transformers that a config names, or contains the name of."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    stated, told = str(config.get("model_type", "")), config.get("architectures")
    own = [str(name) for name in told] if isinstance(told, list) else []
    words = [stated, *own]
    model_type = stated if stated in CONFIG_MAPPING_NAMES else ""
    for word in words:
        if not model_type:
            plain = re.sub(r"[^a-z0-9]", "", word.lower())
            inside = [t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t.replace("_", "") in plain]
            model_type = max(inside, key=len, default="")
    if not model_type:
        raise ModelError(
            f"model_type {stated!r} is a class of the training's own, and its name does not say "
            "of which base",
            where=str(directory / _CONFIG),
            remedy=f"Give the base model too: so8tqc bake BASE {directory} --out DIR",
        )
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    classes = [
        usual if isinstance(usual, str) else "",
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, ""),
    ]
    known = [name for name in own if name in classes]
    found = known or [next((name for name in classes if name), "")]
    if not found[0]:
        raise ModelError(
            f"transformers has no language model of type {model_type!r}",
            where=str(directory / _CONFIG),
        )
    return model_type, found

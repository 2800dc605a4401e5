"""From options to libllama's recipes, and what can be seen to be wrong before any work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from so8tqc.config import QuantizeConfig
from so8tqc.disk.atomic import require_space
from so8tqc.disk.parts import model_stem
from so8tqc.errors import ConfigError, InputError, ModelError
from so8tqc.gguf.file import GGUFFile, block_layout
from so8tqc.llama.imatrix import ImportanceMatrix
from so8tqc.llama.quantizer import PlannedTensor, Recipe, resolve_tensor_type, resolve_type
from so8tqc.services.quantize.proof import PLAIN_TYPES

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
"""libllama refuses these without importance (``tensor_requires_imatrix``)."""

_NEED_IMPORTANCE_IN = {"Q2_K_S": "Q2_K"}


@dataclass(frozen=True)
class Output:
    """One file to write.

    Attributes:
        name: canonical name of its type.
        file_type: libllama's number of it.
        path: the file.
    """

    name: str
    file_type: int
    path: Path


@dataclass(frozen=True)
class Overrides:
    """What departs from the recipes, names resolved.

    Attributes:
        tensors: (pattern, type name, GGML type).
        head: type name and GGML type of the output head.
        embedding: the same of the token embedding.
    """

    tensors: tuple[tuple[str, str, int], ...]
    head: tuple[str, int] | None
    embedding: tuple[str, int] | None


def stem(gguf: Path) -> str:
    """File name without ``.gguf``, a part's number, and the suffix of its own type."""
    return re.sub(r"-(F16|BF16|F32|AUTO)$", "", model_stem(gguf), flags=re.IGNORECASE)


def outputs(config: QuantizeConfig) -> tuple[Output, ...]:
    """The files to write, each type once.

    Raises:
        InputError: libllama does not know a type.
        ConfigError: an output would replace the input.
    """
    found: dict[str, Output] = {}
    for wanted in config.types:
        name, file_type = resolve_type(wanted)
        mixed = "" if config.max_size is None else "-mixed"
        path = config.out / f"{stem(config.gguf)}-{name}{mixed}.gguf"
        if path.resolve() == config.gguf.resolve():
            raise ConfigError(
                f"{name} would replace the input",
                where=str(config.gguf),
                remedy="Give another output directory.",
            )
        found[name] = Output(name, file_type, path)
    return tuple(found.values())


def overrides(config: QuantizeConfig, source: GGUFFile) -> Overrides:
    """The types asked for single tensors.

    Raises:
        ConfigError: not PATTERN=TYPE, or no regular expression.
        InputError: libllama does not know a type, or a tensor's columns do not fit it.
    """
    found = Overrides(
        tuple(_override(text) for text in config.tensor_types),
        resolve_tensor_type(config.output_tensor_type) if config.output_tensor_type else None,
        resolve_tensor_type(config.token_embedding_type) if config.token_embedding_type else None,
    )
    # for these two libllama has no fallback: it would abort
    for name, chosen in ((HEAD, found.head), (EMBEDDING, found.embedding)):
        if chosen is not None and name in source.tensors:
            _require_fit(source, name, chosen[0])
    return found


def _override(text: str) -> tuple[str, str, int]:
    pattern, separator, type_ = text.rpartition("=")
    if not (separator and pattern and type_):
        raise ConfigError("expected PATTERN=TYPE, e.g. attn_v=Q8_0", where=f"tensor type {text}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is not a regular expression: {error}", where=f"tensor type {text}"
        ) from None
    return (pattern, *resolve_tensor_type(type_))


def _require_fit(source: GGUFFile, name: str, type_: str) -> None:
    columns = source.tensors[name].shape[-1]
    block, _ = block_layout(type_)
    if columns % block:
        raise InputError(
            f"its {columns} columns are no multiple of the {block} that {type_} packs",
            where=f"{source.path}, {name}",
            remedy="Choose a type with smaller blocks, e.g. Q8_0.",
        )


def recipe(
    config: QuantizeConfig, output: Output, chosen: Overrides, imatrix: Path | None
) -> Recipe:
    """libllama's recipe of one output."""
    return Recipe(
        output.file_type,
        tuple((pattern, number) for pattern, _, number in chosen.tensors),
        chosen.head[1] if chosen.head else None,
        chosen.embedding[1] if chosen.embedding else None,
        config.pure,
        config.allow_requantize,
        imatrix,
    )


def refuse_source(source: GGUFFile, *, allow_requantize: bool) -> frozenset[str]:
    """The quantized types of an input that may have some.

    Raises:
        ModelError: it is quantized and must not be.
    """
    quantized = frozenset(t.type for t in source.tensors.values()) - PLAIN_TYPES
    if quantized and not allow_requantize:
        raise ModelError(
            f"already quantized ({', '.join(sorted(quantized))}); quantizing it again loses more "
            "than quantizing the original",
            where=str(source.path),
            remedy="Give the F16, BF16 or F32 export (or --allow-requantize).",
        )
    return quantized


def require_effect(output: Output, chosen: Overrides, plan: Mapping[str, PlannedTensor]) -> None:
    """See that every type asked for is one that libllama will use.

    Raises:
        InputError: a choice changes nothing.
    """

    def taken(type_: str, names: list[str]) -> bool:
        return any(type_ in (plan[name].type, plan[name].wanted) for name in names)

    for pattern, type_, _ in chosen.tensors:
        names = [name for name in plan if re.search(pattern, name)]
        if not taken(type_, names):
            why = (
                "no tensor's name has it"
                if not names
                else f"{output.name} does not quantize"
                if output.name in PLAIN_TYPES
                else f"libllama gives none of {len(names)} tensors that type; norms are never "
                "quantized, and the first pattern found decides"
            )
            raise InputError(f"has no effect: {why}", where=f"tensor type {pattern}={type_}")
    head = HEAD if HEAD in plan else EMBEDDING
    for flag, choice, name in (
        ("output tensor type", chosen.head, head),
        ("token embedding type", chosen.embedding, EMBEDDING),
    ):
        if choice is not None and not (name in plan and taken(choice[0], [name])):
            raise InputError(
                f"has no effect on {output.name}: {name} will be "
                f"{plan[name].type if name in plan else 'absent'}",
                where=f"{flag} {choice[0]}",
            )


def require_importance(
    output: Output,
    plan: Mapping[str, PlannedTensor],
    source: GGUFFile,
    matrix: ImportanceMatrix | None,
) -> None:
    """See that tensors whose types need importance have it.

    Raises:
        InputError: no importance matrix.
        ModelError: it says nothing about such a tensor.
    """
    needy = {
        name: tensor.type
        for name, tensor in plan.items()
        if name not in (EMBEDDING, "per_layer_" + EMBEDDING, HEAD)
        and source.tensors[name].type != tensor.type
        and (tensor.type in _NEED_IMPORTANCE or _NEED_IMPORTANCE_IN.get(output.name) == tensor.type)
    }
    if not needy:
        return
    if matrix is None:
        raise InputError(
            f"{output.name} needs an importance matrix: it stores {len(needy)} tensors as "
            f"{', '.join(sorted(set(needy.values())))}, first {next(iter(needy))}",
            where=str(source.path),
            remedy="Give --imatrix FILE, or --imatrix auto to compute one.",
        )
    if missing := [name for name in needy if name not in matrix.means]:
        raise ModelError(
            f"no importance for {missing[0]}, which {output.name} stores as {needy[missing[0]]}",
            where=str(matrix.path),
        )


def require_room(
    directory: Path, source: GGUFFile, plans: Iterable[Mapping[str, PlannedTensor]]
) -> None:
    """See that the disk has room for every planned file.

    Raises:
        ToolError: it has not.
    """
    header = source.size - sum(t.bytes for t in source.tensors.values())
    need = 0
    for plan in plans:
        need += header
        for name, tensor in plan.items():
            block, size = block_layout(tensor.type)
            need += source.tensors[name].elements // block * size
    require_space(directory, need, "{} are needed")

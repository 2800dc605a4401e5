"""Trained tokens (``trainable_tokens/layer.py``): rows of an embedding, or of the head, as trained.

PEFT stores the trained rows themselves, no difference, and its forward writes them over the base's
(``index_copy``): W'[t_k] = D[k], t the tokens that the configuration lists, all other rows as they
are. LoRA has them beside its own (``trainable_token_indices``: a list for the embedding, or a list
a module); the method TRAINABLE_TOKENS is these alone (``token_indices`` for all its modules).

Where the base ties its head to the embedding, PEFT runs the embedding's trained rows in the head,
too, so that one stored tensor holds what was trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from so8tqc.adapters.files import AdapterFiles
from so8tqc.adapters.methods.context import Context, ModuleSteps, Parts
from so8tqc.adapters.steps import ReplaceRows
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.files.peft_config import CONFIG_NAME

TOKENS = "trainable_tokens_delta.weight"
"""The part that holds trained rows, [tokens, features]."""


def tokens(c: Context) -> ModuleSteps:
    """The step that puts trained rows in their places.

    Raises:
        RotationError: another part of the adapter changes the same weight, or the configuration
            does not tell which rows these are, or tells one twice.
        ShapeError: there are not as many rows as tokens, or a token is outside of the vocabulary.
    """
    if extra := sorted(c.parts.keys() - {TOKENS}):
        raise RotationError(
            f"single tokens of one module, and {', '.join(extra)}: PEFT does not run both",
            where=c.where,
        )
    listed = token_indices(c.files, c.module)
    delta = c.tensor(TOKENS)
    c.require("trainable_tokens_delta", tuple(delta.shape), (len(listed), c.shape.into))
    outside = [token for token in listed if not 0 <= token < c.shape.out]
    if outside:
        raise ShapeError(
            f"trainable_tokens_delta ({list(delta.shape)}) is for token {outside[0]}, but the "
            f"weight is {c.shape.out} × {c.shape.into}: tokens 0 to {c.shape.out - 1}",
            where=c.where,
            remedy="The training resized the vocabulary: give the base that was saved after that.",
        )
    places = np.array(listed, dtype=np.intp)
    order = np.argsort(places)
    rows = c.take(TOKENS)[order]
    before = c.weight()[places[order].tolist()].double().numpy()
    zero = bool(np.array_equal(before, rows))
    return ModuleSteps((ReplaceRows(places[order], rows),), zero=zero)


def token_indices(files: AdapterFiles, module: str) -> list[int]:
    """Which rows of a module an adapter has trained, in the order of its tensor.

    Raises:
        RotationError: the configuration does not tell, or tells one twice.
    """
    alone = files.kind == "TRAINABLE_TOKENS"
    key = "token_indices" if alone else "trainable_token_indices"
    where = str(files.directory / CONFIG_NAME)
    value = files.config.get(key)
    if isinstance(value, dict):
        named = {str(n): v for n, v in value.items() if f".{module}".endswith(f".{n}")}
        if not named:
            raise RotationError(
                f"{key} lists {', '.join(map(str, value)) or 'nothing'}, but the adapter holds "
                f"trained tokens of {module}",
                where=where,
            )
        value = next(iter(named.values()))
        if any(other != value for other in named.values()):
            raise RotationError(f"{key}: {', '.join(named)} all name {module}", where=where)
    whole = isinstance(value, list) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in value
    )
    if not isinstance(value, list) or not whole or not value:
        raise RotationError(f"{key} is {value!r}, expected whole numbers", where=where)
    if len(set(value)) != len(value):
        twice = next(token for token in value if value.count(token) > 1)
        raise RotationError(
            f"{key} lists token {twice} twice: which of its rows is meant is not told ({module})",
            where=where,
        )
    return value


def trains_tokens(parts: Parts) -> bool:
    """Whether these are a module's trained rows."""
    return TOKENS in parts


def require_apart(group: Sequence[AdapterFiles]) -> None:
    """Refuse adapters, active together, whose trained tokens PEFT's forward does not run.

    Raises:
        RotationError: two train one token, or tokens beside LoRAs (of such PEFT activates one
            alone), or another changes the module in another way.
    """
    for i, files in enumerate(group):
        for module, parts in files.parts.items():
            for other in group[:i]:
                theirs = other.parts.get(module)
                if theirs is None or not (trains_tokens(parts) or trains_tokens(theirs)):
                    continue
                where = f"{other.directory} and {files.directory}"
                if not (trains_tokens(parts) and trains_tokens(theirs)):
                    raise RotationError(
                        f"one adapter trains single tokens of {module}, another changes all of it: "
                        "PEFT's forward does not run both",
                        where=where,
                        remedy="Bake them one after the other.",
                    )
                both = set(token_indices(files, module)) & set(token_indices(other, module))
                if both or files.kind != "TRAINABLE_TOKENS":
                    which = f"token {min(both)}" if both else "single tokens"
                    raise RotationError(
                        f"both train {which} of {module}, which PEFT does not run together",
                        where=where,
                        remedy="Bake them one after the other: the later one's rows stand then.",
                    )

"""Which tensors of an export stay unrounded, and their values as the GGUF file orders them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

from so8tqc.checkpoints.provenance import PROVENANCE_NAME, Provenance
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import ConfigError, ModelError
from so8tqc.gguf.conversion import Conversion, UntraceableError
from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.rewrite import Float32Chunks
from so8tqc.gguf.tensor_map import FloatArray
from so8tqc.records import Check, judge
from so8tqc.services.export.proof import explain, tensors_by_name
from so8tqc.services.export.traced import Replay

BAKED = "baked"
"""The word that stands in place of a pattern for every tensor that the bake changed."""

Kept = Mapping[str, tuple[str, ...]]
"""GGUF tensor → its source tensors: one, or the experts of a layer in order."""


def refuse_unbaked(patterns: Sequence[str], checkpoint: Checkpoint, baked: bool) -> None:
    """Refuse ``baked`` for a directory that does not say what was baked.

    Raises:
        ConfigError: it has no provenance.
    """
    if BAKED in patterns and not baked:
        raise ConfigError(
            f"keep_f32 is {BAKED!r}, but {PROVENANCE_NAME} is missing: nothing says what was baked",
            where=str(checkpoint.directory),
            remedy="Export a directory that `so8tqc bake` wrote, or name tensors by a pattern.",
        )


def sources_in(checkpoint: Checkpoint, gguf: GGUFFile, conversion: Conversion | None) -> Kept:
    """GGUF tensor → its source tensors, by the conversion's history where there is one."""
    if conversion is None:
        return tensors_by_name(checkpoint, gguf)
    return {n: s for n, s in conversion.sources.items() if n in gguf.tensors and s}


def choose(
    patterns: Sequence[str],
    checkpoint: Checkpoint,
    provenance: Provenance | None,
    gguf: GGUFFile,
    conversion: Conversion | None = None,
) -> Kept:
    """The tensors of a converted file that any of the patterns means.

    Args:
        patterns: globs of safetensors or GGUF names, or ``baked``.
        checkpoint: the source.
        provenance: what was baked.
        gguf: the converted file.
        conversion: its history, where the converter told it.

    Raises:
        ConfigError: a pattern means no tensor of the file.
        ModelError: a baked tensor is not in the file under a known name.
    """
    sources = sources_in(checkpoint, gguf, conversion)
    chosen: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        if pattern == BAKED and provenance is not None:
            wanted = {tensor.name for tensor in provenance.tensors}
            found = {n: s for n, s in sources.items() if wanted.intersection(s)}
            if lost := sorted(wanted.difference(*found.values())):
                raise ModelError(
                    f"the baked tensor {lost[0]} has no known counterpart in the GGUF file, so it "
                    "cannot be kept",
                    where=str(checkpoint.directory),
                )
        else:
            found = {
                n: s for n, s in sources.items() if any(fnmatchcase(x, pattern) for x in (n, *s))
            }
        if not found:
            raise ConfigError(
                f"keep_f32: {pattern!r} means no tensor of the file",
                remedy=f"It has names such as {', '.join(sorted(sources)[:3])}.",
            )
        chosen |= found
    return chosen


def float32_values(
    chosen: Kept, checkpoint: Checkpoint, gguf: GGUFFile, conversion: Conversion | None = None
) -> dict[str, Float32Chunks]:
    """GGUF tensor → its unrounded values, for the chosen tensors that are not F32 already.

    The order of the values is that which explains the bytes of the converted file.

    Args:
        chosen: see :func:`choose`.
        checkpoint: the source of the values.
        gguf: the converted file.
        conversion: its history, where the converter told it.
    """
    replay = None if conversion is None else Replay(conversion, checkpoint)

    def replayed(name: str) -> Iterator[FloatArray]:
        assert replay is not None  # the caller's condition
        try:
            yield replay.values(name)
        except UntraceableError as reason:
            raise ModelError(
                f"{name} cannot be kept unrounded: {reason}", where=str(checkpoint.directory)
            ) from None

    def chunks(name: str) -> Iterator[FloatArray]:
        for source in chosen[name]:
            explained = explain(checkpoint, source, gguf, name, len(chosen[name]))
            if explained is None:
                raise ModelError(
                    f"{name} is not {source} rounded, so its values cannot be taken from there",
                    where=str(checkpoint.directory),
                )
            yield explained.values

    make = chunks if replay is None else replayed
    return {name: partial(make, name) for name in chosen if gguf.tensors[name].type != "F32"}


def kept_checks(chosen: Kept, gguf: GGUFFile) -> list[Check]:
    """``export.kept``: the chosen tensors are stored as F32; ``export.tensors`` compares values."""
    if not chosen:
        return []
    rounded = [name for name in chosen if gguf.tensors[name].type != "F32"]
    size = sum(gguf.tensors[name].bytes for name in chosen)
    return [
        judge(
            "export.kept",
            len(rounded),
            0,
            detail=f"{len(chosen)} tensors were to stay F32 ({size / 1e6:.1f} MB); rounded: "
            + (", ".join(rounded[:5]) or "none")
            + ".",
        )
    ]


def kept_notices(chosen: Kept, checkpoint: Checkpoint) -> list[str]:
    """A sentence where keeping F32 keeps nothing, since the source has 16 bits itself."""
    narrow = sorted(
        {
            checkpoint.tensors[source].dtype
            for sources in chosen.values()
            for source in sources
            if checkpoint.tensors[source].dtype not in ("F32", "F64")
        }
    )
    if not narrow:
        return []
    return [
        f"Tensors kept as F32 are stored as {', '.join(narrow)} in the model directory: F32 holds "
        "no more. Bake with --baked-dtype float32 to keep what the bake computed."
    ]

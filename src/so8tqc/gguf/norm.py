"""A temperature in the weights: the final norm of a GGUF file scaled by 1/T.

llama.cpp ends every decoder it can run with

    h = norm(x) ⊙ g + c,    z = s · (W h + b)

(g ``output_norm.weight``, c ``output_norm.bias``, W the output head, b ``output.bias``, s a fixed
scale of some architectures). z is linear and homogeneous in (g, c, b), so that dividing these three
by T divides z by T; W, usually the largest tensor and perhaps shared with the embedding, stays.
With soft-capping, z = k · tanh(W h / k), the last step is not homogeneous, and no such g exists.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from so8tqc.errors import ModelError
from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, Float32Chunks, changed_copy
from so8tqc.progress import SILENT, Progress

NORM_TEMPERATURE = "so8t.calibration.norm_temperature"
"""The key of the temperature that a file's final norm carries, so that it is not applied again."""

_NORM = "output_norm.weight"
_SCALED = (_NORM, "output_norm.bias", "output.bias")


def require_scalable_norm(gguf: GGUFFile) -> None:
    """Refuse a file whose logits cannot be divided by T in its final norm.

    Raises:
        ModelError: it soft-caps its logits, has no final norm, or stores it in another type
            than F32.
    """
    where = str(gguf.path)
    cap = gguf.fields.get(f"{gguf.architecture}.final_logit_softcapping")
    if cap:
        raise ModelError(
            f"the model soft-caps its logits, z = {cap:g}·tanh(z'/{cap:g}): scaling its final norm "
            "would bend them, not divide them by T",
            where=where,
            remedy="Use --apply metadata.",
        )
    if _NORM not in gguf.tensors:
        raise ModelError(
            f"the model has no final norm to scale ({_NORM})",
            where=where,
            remedy="Use --apply metadata.",
        )
    for name in _scaled(gguf):
        if gguf.tensors[name].type != "F32":
            raise ModelError(
                f"{name} is stored as {gguf.tensors[name].type}; only F32 is scaled",
                where=where,
                remedy="Use --apply metadata.",
            )


def scale_norm(
    source: Path, destination: Path, temperature: float, progress: Progress = SILENT
) -> None:
    """Copy a GGUF file with its final norm divided by a temperature: logits z become z/T.

    Every scaled element is g/T, computed in float64 and rounded once. The new file says so in
    ``so8t.calibration.norm_temperature`` (times what the source carries already); a temperature
    that the source asks its reader to apply is set to 1. Tensors but these stay bit-identical.

    Args:
        source: any GGUF file; of a model in several, the first part.
        destination: another path; appears complete or not at all.
        temperature: T > 0.
        progress: told about bytes.

    Raises:
        ModelError: see :func:`require_scalable_norm`; or the source is the destination.
        ToolError: the disk has no room.
    """
    gguf = open_gguf(source)
    require_scalable_norm(gguf)
    keys = {NORM_TEMPERATURE: temperature * float(gguf.fields.get(NORM_TEMPERATURE, 1.0))}
    if CALIBRATION_TEMPERATURE in gguf.fields:
        keys[CALIBRATION_TEMPERATURE] = 1.0
    divided = {name: _divided(gguf.tensors[name], temperature) for name in _scaled(gguf)}
    changed_copy(source, destination, keys, progress, tensors=divided)


def _scaled(gguf: GGUFFile) -> tuple[str, ...]:
    return tuple(name for name in _SCALED if name in gguf.tensors)


def _divided(tensor: GGUFTensor, temperature: float) -> Float32Chunks:
    values = (tensor.data.astype(np.float64) / temperature).astype(np.float32)
    return lambda: [values]

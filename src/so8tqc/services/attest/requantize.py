"""A quantized file made again by its recipe, and compared with it tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.config import QuantizeConfig
from so8tqc.gguf.file import GGUFFile, GGUFTensor, block_layout
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, SAMPLING_TEMPERATURE, key_values
from so8tqc.progress import Progress
from so8tqc.record_kinds.attest import ComparedTensor, Likeness
from so8tqc.services.quantize.derivation import tensor_digests
from so8tqc.services.quantize.service import quantize

SET_LATER = frozenset({CALIBRATION_TEMPERATURE, SAMPLING_TEMPERATURE})
"""Keys that ``calibrate`` may set in a file after it was quantized."""

ROUNDING_SLACK = 1.1
"""How much farther from the unquantized weights a block may lie than the one made here. Builds
round ties and reorder sums differently, which hardly moves a block's error; changing one weight of
a block of 32 by a single step adds a third or more to its squared error."""


def make_again(
    type_: str,
    options: Mapping[str, Any],
    places: Mapping[str, Path],
    scratch: Path,
    progress: Progress,
) -> Path:
    """Run a recipe again; returns the file it makes.

    Args:
        type_: the recipe, e.g. ``Q5_K_M``.
        options: of ``quantize``, as they were; where its files were does not matter.
        places: where they are now: ``gguf`` and, if there were such, ``imatrix`` and ``hessians``.
        scratch: the directory to write to.
        progress: told about the work.
    """
    config = {**options, **places, "out": scratch, "types": [type_]}
    record = quantize(QuantizeConfig.model_validate(config), progress)
    return Path(record.outputs[type_].path)


def compare_tensors(
    file: GGUFFile,
    digests: Mapping[str, str],
    made: GGUFFile,
    source: GGUFFile,
    recorded: Mapping[str, str],
    same_build: bool,
) -> dict[str, ComparedTensor]:
    """Every tensor that is not identical to the one made again.

    Args:
        file: the file in question.
        digests: tensor → SHA-256 of its bytes.
        made: the file made again.
        source: what both were quantized from.
        recorded: tensor → the digest that was recorded when the file was made.
        same_build: whether it was made by the build of libllama that is here.
    """
    made_digests = tensor_digests(made)
    found: dict[str, ComparedTensor] = {}
    for name in sorted(file.tensors.keys() | made.tensors.keys()):
        theirs, ours = file.tensors.get(name), made.tensors.get(name)
        if theirs is None or ours is None or _layout(theirs) != _layout(ours):
            found[name] = {"link": Likeness.DIFFERENT, "blocks": None}
        elif digests[name] != made_digests[name]:
            differ = _differing_blocks(theirs, ours)
            excused = (
                not same_build
                and digests[name] == recorded.get(name)
                and _within_rounding(theirs, ours, source.tensors[name], differ)
            )
            link = Likeness.WITHIN_ROUNDING if excused else Likeness.DIFFERENT
            found[name] = {"link": link, "blocks": int(differ.size)}
    return found


def _layout(tensor: GGUFTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.type, tensor.shape


def _differing_blocks(a: GGUFTensor, b: GGUFTensor) -> npt.NDArray[np.intp]:
    """Indices of the blocks whose bytes differ."""
    _, size = block_layout(a.type)
    blocks: npt.NDArray[np.intp] = np.flatnonzero(
        (a.raw.reshape(-1, size) != b.raw.reshape(-1, size)).any(axis=1)
    )
    return blocks


def _within_rounding(
    theirs: GGUFTensor, ours: GGUFTensor, source: GGUFTensor, blocks: npt.NDArray[np.intp]
) -> bool:
    """Whether their blocks lie about as near to the unquantized weights as ours."""
    width, _ = block_layout(theirs.type)
    exact, a, b = (
        tensor.values().reshape(-1, width)[blocks].astype(np.float64)
        for tensor in (source, theirs, ours)
    )
    error, own = (np.linalg.norm(x - exact, axis=1) for x in (a, b))
    return bool((error <= ROUNDING_SLACK * own).all())


def other_keys(file: Path, made: Path) -> list[str]:
    """Keys that one file lacks or has with another value, but for those that come later."""
    theirs, ours = key_values(file), key_values(made)
    return sorted(
        key for key in (theirs.keys() | ours.keys()) - SET_LATER if theirs.get(key) != ours.get(key)
    )

"""A quantized file beside the file it was made from: what it is, and the verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.gguf.file import QUANTIZED_COLUMNS, GGUFFile, GGUFTensor
from so8tqc.llama.ggml import dequantizer
from so8tqc.llama.quantizer import PlannedTensor
from so8tqc.record_kinds.quantize import Fallback, QuantizedFile, QuantizedTensor
from so8tqc.records import Check, judge

PLAIN_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
_WEIGHTS_AT_ONCE = 1 << 17
"""Half a MiB of float32 in each of two buffers: they stay in a core's cache."""

_RECIPE_OF_SUPER_BLOCKS = re.compile(r"_K|^IQ(?!4_NL)|^TQ")
_LAYER = re.compile(r"^blk\.(\d+)\.")
_ATTENTION_OUTPUT = re.compile(r"^blk\.(\d+)\.attn_output\.weight$")


class SquaredError(NamedTuple):
    """Σ (Q − W)² and Σ W² over the weights of a tensor; not finite if any weight is not."""

    error: float
    norm: float

    @property
    def relative(self) -> float | None:
        """‖Q − W‖/‖W‖; None where W is zero."""
        return math.sqrt(self.error / self.norm) if self.norm else None


def squared_error(before: GGUFTensor, after: GGUFTensor) -> SquaredError:
    """Compare the weights of two tensors of the same shape, both dequantized by libggml.

    Args:
        before, after: [rows, columns] tensors of any type.
    """
    columns = before.shape[-1]
    rows = before.elements // columns
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    stored_before, stored_after = (tensor.raw.reshape(rows, -1) for tensor in (before, after))
    convert_before, convert_after = dequantizer(before.type), dequantizer(after.type)
    buffers = np.empty((2, step * columns), dtype=np.float32)
    error = norm = 0.0
    for start in range(0, rows, step):
        count = min(step, rows - start) * columns
        w, q = buffers[0, :count], buffers[1, :count]
        convert_before(stored_before[start : start + step], w)
        convert_after(stored_after[start : start + step], q)
        with np.errstate(all="ignore"):  # what is not finite is for the caller to judge
            np.subtract(q, w, out=q)
            error += _sum_of_squares(q)
            norm += _sum_of_squares(w)
    return SquaredError(error, norm)


def _sum_of_squares(values: npt.NDArray[np.float32]) -> float:
    """Σ v²; in float64 where float32 has no room for a square (a weight of 1e30 is finite)."""
    total = float(values @ values)
    if math.isfinite(total):
        return total
    wide = values.astype(np.float64)
    return float(wide @ wide)


def describe(
    recipe: str,
    result: GGUFFile,
    found: Mapping[str, SquaredError],
    fell: Mapping[str, Fallback],
    size: int,
) -> QuantizedFile:
    """Sizes, types and errors of a quantized file of ``size`` bytes."""
    return QuantizedFile(
        type=recipe,
        path=str(result.path),
        bytes=size,
        bits_per_weight=result.bits_per_weight,
        types=result.types,
        fallbacks={name: fallback.stored for name, fallback in fell.items()},
        tensors={
            name: QuantizedTensor(
                type=tensor.type,
                bits_per_weight=8.0 * tensor.bytes / tensor.elements,
                relative_error=found[name].relative if name in found else None,
                fallback=fell.get(name),
            )
            for name, tensor in result.tensors.items()
        },
        layer_error=_by_layer(found, _LAYER),
        attention_output_error=_by_layer(found, _ATTENTION_OUTPUT),
    )


def _by_layer(found: Mapping[str, SquaredError], pattern: re.Pattern[str]) -> dict[int, float]:
    """Layer → relative Frobenius error of its tensors together."""
    sums: dict[int, SquaredError] = {}
    for name, value in found.items():
        if match := pattern.match(name):
            before = sums.get(int(match[1]), SquaredError(0.0, 0.0))
            sums[int(match[1])] = SquaredError(before.error + value.error, before.norm + value.norm)
    relative = {layer: total.relative for layer, total in sorted(sums.items())}
    return {layer: value for layer, value in relative.items() if value is not None}


def fallbacks(
    planned: Mapping[str, PlannedTensor], source: GGUFFile, recipe: str, head_type: str | None
) -> dict[str, Fallback]:
    """Tensors stored in another type than the recipe's, since their width forbids it.

    K- and I-quants pack super-blocks of 256 columns; for other widths libllama falls back to a
    type with blocks of 32, and where those do not fit either, to F16.

    Args:
        planned: what libllama says.
        source: the input.
        recipe: name of the file type.
        head_type: type that was asked for the output head, None for the recipe's.
    """
    found: dict[str, Fallback] = {}
    head = "output.weight" if "output.weight" in planned else "token_embd.weight"
    for name, tensor in planned.items():
        columns = source.tensors[name].shape[-1]
        if tensor.wanted is not None:
            found[name] = Fallback(
                wanted=tensor.wanted, stored=tensor.type, columns=columns, block=tensor.block or 0
            )
        elif (  # for the head libllama chooses Q8_0 without a word
            name == head
            and head_type is None
            and tensor.type == "Q8_0"
            and columns % QUANTIZED_COLUMNS
            and _RECIPE_OF_SUPER_BLOCKS.search(recipe)
        ):
            found[name] = Fallback(
                wanted=None, stored=tensor.type, columns=columns, block=QUANTIZED_COLUMNS
            )
    return found


def fallback_notices(files: Mapping[str, QuantizedFile]) -> list[str]:
    """One sentence for each file in which tensors fell back."""
    notices = []
    for name, entry in files.items():
        fell = [t.fallback for t in entry.tensors.values() if t.fallback is not None]
        if fell:
            kinds = ", ".join(sorted({f.stored for f in fell}))
            blocks = " or ".join(str(block) for block in sorted({f.block for f in fell}))
            notices.append(
                f"{name}: {len(fell)} of {len(entry.tensors)} tensors fell back to {kinds}, "
                f"since their columns are no multiple of {blocks}."
            )
    return notices


def proof_checks(
    source: GGUFFile,
    result: GGUFFile,
    planned: Mapping[str, PlannedTensor],
    found: Mapping[str, SquaredError],
    subject: str,
) -> list[Check]:
    """Same tensors and shapes as the source, the types planned, and finite when dequantized."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    wrong = sorted(
        name
        for name in shapes.keys() | result.tensors.keys()
        if name not in result.tensors
        or name not in shapes
        or as_stored(shapes[name]) != as_stored(result.tensors[name].shape)
    )
    other = sorted(
        name
        for name, tensor in result.tensors.items()
        if name in planned and planned[name].type != tensor.type
    )
    broken = sorted(name for name, value in found.items() if not math.isfinite(sum(value)))
    return [
        _count("quantize.readable", wrong, subject, "Same tensors and shapes as the input.",
               "Missing, added or reshaped"),
        _count("quantize.types", other, subject, "Every tensor has the type that was planned.",
               "Another type than planned"),
        _count("quantize.finite", broken, subject, "Every weight is finite when dequantized.",
               "Non-finite weights"),
    ]  # fmt: skip


def as_stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading dimensions of 1, which libllama does not write."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _count(check_id: str, names: list[str], subject: str, right: str, wrong: str) -> Check:
    return judge(
        check_id,
        len(names),
        0,
        subject=subject,
        detail=f"{wrong}: {', '.join(names[:5])}." if names else right,
    )

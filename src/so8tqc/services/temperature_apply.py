"""The file that carries a temperature: written, run again, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.config import CalibrateConfig
from so8tqc.llama.gguf_file import open_gguf
from so8tqc.llama.gguf_norm import scale_norm
from so8tqc.llama.gguf_rewrite import (
    CALIBRATION_TEMPERATURE,
    SAMPLING_TEMPERATURE,
    set_float_values,
)
from so8tqc.metrics.temperature import TemperatureTable
from so8tqc.metrics.temperature_fit import Scored, scored
from so8tqc.progress import Progress
from so8tqc.records import Check, judge
from so8tqc.services.temperature_verdict import Calibration, chosen_classes
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.temperatures import BLOCK_BYTES, frequent_tokens, walk_temperatures

PROOF_TEXTS = 8
"""Held-out texts, the beginnings of which are compared logit by logit."""

TOLERANCE = 2.0**-10
"""Of ‖T·z' − z‖ / ‖z − mean z‖ in a row. Scaling the final norm changes no rounding but that of
what the output head reads: libllama keeps the scale of a block of activations in half precision
(Q8_0), which rounds by up to 2⁻¹¹ on either side."""

FloatRows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Applied:
    """A file that carries a temperature, as measured.

    Attributes:
        path: the file.
        reader_temperature: what its reader is to divide the logits by: 1 once the norm does.
        scored: held-out tokens at that temperature, from running the file.
        deviation: largest relative RMS deviation of a row of its logits from z/T.
        rows: that were compared.
    """

    path: Path
    reader_temperature: float
    scored: Scored
    deviation: float
    rows: int


def applied_path(config: CalibrateConfig) -> Path:
    """Where the file goes."""
    return config.out / f"{config.gguf.stem}-calibrated.gguf"


def proof_logits(source: LogitSource, texts: Sequence[EncodedText]) -> list[FloatRows]:
    """Logits of the beginnings of some held-out texts, in all at most BLOCK_BYTES.

    Args:
        source: the model.
        texts: the held-out texts.
    """
    chosen = texts[:PROOF_TEXTS]
    rows = max(1, BLOCK_BYTES // (4 * source.vocab_size * len(chosen)))
    return [
        np.concatenate(
            [
                block.numpy().astype(np.float32)
                for block in source.logits(text.tokens[:rows], min(rows, text.tokens.size))
            ]
        )
        for text in chosen
    ]


def write_applied(config: CalibrateConfig, temperature: float, progress: Progress) -> Path:
    """Write the copy that carries a temperature, as ``config.apply`` says.

    Raises:
        ModelError: the final norm cannot be scaled.
        ToolError: the disk has no room.
    """
    path = applied_path(config)
    if config.apply == "norm":
        scale_norm(config.gguf, path, temperature, progress)
    else:
        keys = {CALIBRATION_TEMPERATURE: temperature}
        if config.sampling_temp:
            keys[SAMPLING_TEMPERATURE] = temperature
        set_float_values(config.gguf, path, keys, progress)
    return path


def measure_applied(
    path: Path,
    open_source: Callable[[Path], LogitSource],
    texts: Sequence[EncodedText],
    held_out: Sequence[EncodedText],
    calibration: Calibration,
    originals: Sequence[FloatRows],
    progress: Progress,
) -> Applied:
    """Run the file that ships over the held-out texts.

    Args:
        path: the file.
        open_source: opens it.
        texts: all texts, from which the classes were chosen.
        held_out: those to run it over.
        calibration: of the file it was made from.
        originals: :func:`proof_logits` of that file.
        progress: told about tokens.
    """
    reader = float(open_gguf(path).fields.get(CALIBRATION_TEMPERATURE, 1.0))
    classes = frequent_tokens(texts, chosen_classes(calibration.holdout_table))
    source = open_source(path)
    try:
        logits = proof_logits(source, held_out)
        table: TemperatureTable = walk_temperatures(
            source, held_out, (reader, reader), progress, f"measuring {path.name}", classes
        )
    finally:
        source.close()
    factor = calibration.temperature / reader
    deviations = [
        _deviation(before, after, factor) for before, after in zip(originals, logits, strict=True)
    ]
    return Applied(
        path=path,
        reader_temperature=reader,
        scored=scored(table, reader),
        deviation=max(deviations),
        rows=sum(rows.shape[0] for rows in originals),
    )


def _deviation(before: FloatRows, after: FloatRows, factor: float) -> float:
    """Largest ‖factor·after − before‖ / ‖before − its mean‖ of a row."""
    z = before.astype(np.float64)
    apart = np.linalg.norm(factor * after - z, axis=1)
    size = np.linalg.norm(z - z.mean(axis=1, keepdims=True), axis=1)
    return float((apart / size).max())


def applied_check(applied: Applied, temperature: float) -> Check:
    """``calibration.applied``: what the file's reader sees is z/T."""
    how = (
        "the final norm carries T"
        if applied.reader_temperature == 1.0
        else "the reader divides by the T that the file declares"
    )
    return judge(
        "calibration.applied",
        applied.deviation,
        TOLERANCE,
        detail=f"{applied.path.name} was run again: its logits ({how}) against the original's "
        f"divided by {temperature:.4f}, largest relative RMS deviation of {applied.rows} rows.",
    )

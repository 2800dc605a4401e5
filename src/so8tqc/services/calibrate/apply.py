"""The file that carries a temperature: written, run again, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.config import CalibrateConfig
from so8tqc.disk.parts import model_stem
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.norm import scale_norm
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, SAMPLING_TEMPERATURE, changed_copy
from so8tqc.metrics.temperature.fit import Scored, scored
from so8tqc.metrics.temperature.table import FloatArray, TemperatureTable
from so8tqc.progress import Progress
from so8tqc.records import Check, judge
from so8tqc.services.calibrate.verdict import Calibration, chosen_classes
from so8tqc.sources.placement import on_cpu
from so8tqc.sources.protocol import EncodedText, LogitSource, TokenIds
from so8tqc.sources.seen import images_of
from so8tqc.sources.temperatures import BLOCK_BYTES, frequent_tokens, walk_temperatures

PROOF_TEXTS = 8
"""Held-out texts, the beginnings of which are compared logit by logit."""

SCALE_LIMIT = 1e-4
"""Limit of |s − 1|, where s is the scale that takes the file's logits to z/T. Rounding averages out
in it: 2e-6 on the demo's Q5_K_M."""

KL_LIMIT = 1e-5
"""nats, mean of KL(softmax(z/T) ‖ the file's). A scaled norm is rounded anew where the output head
reads it: libllama keeps the scale of a block of 8-bit activations in half precision, and large
blocks that cancel leave single logits 1e-3 off. The limit is what storing a 135M model in bfloat16
costs; the demo's Q5_K_M shows 7e-7."""

FloatRows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Applied:
    """A file that carries a temperature, as measured.

    Attributes:
        path: the file.
        reader_temperature: what its reader is to divide the logits by: 1 once the norm does.
        scored: held-out tokens at that temperature, from running the file.
        scale: s that minimises ‖z/T − s·z'‖ over the rows compared, z' as its reader sees it.
        kl: mean KL of its predictions from softmax(z/T) over these rows, nats.
        rows: how many.
    """

    path: Path
    reader_temperature: float
    scored: Scored
    scale: float
    kl: float
    rows: int


def applied_path(config: CalibrateConfig) -> Path:
    """Path of the copy that has the temperature applied."""
    return config.out / f"{model_stem(config.gguf)}-calibrated.gguf"


def proof_logits(source: LogitSource, texts: Sequence[EncodedText]) -> list[FloatRows]:
    """Logits of the beginnings of some held-out texts, in all at most BLOCK_BYTES.

    Args:
        source: the model.
        texts: the held-out texts.
    """
    chosen = [text.tokens for text in texts[:PROOF_TEXTS]]
    rows = max(1, BLOCK_BYTES // (4 * source.vocab_size * len(chosen)))
    return [
        np.concatenate(
            [
                on_cpu(block).numpy().astype(np.float32)
                for block in source.logits(_beginning(tokens, rows), min(rows, tokens.size))
            ]
        )
        for tokens in chosen
    ]


def _beginning(tokens: TokenIds, rows: int) -> TokenIds:
    """The first tokens of a text; of one with pictures all, since a part would lack them."""
    return tokens[:rows] if images_of(tokens) is None else tokens


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
        changed_copy(config.gguf, path, keys, progress)
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
    pairs = _rows(originals, logits, calibration.temperature, reader)
    products, squares, divergences = zip(*(_compared(*pair) for pair in pairs), strict=True)
    return Applied(
        path=path,
        reader_temperature=reader,
        scored=scored(table, reader),
        scale=float(np.sum(products) / np.sum(squares)),
        kl=float(np.mean(divergences)),
        rows=len(divergences),
    )


def _rows(
    originals: Sequence[FloatRows], logits: Sequence[FloatRows], temperature: float, reader: float
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """(z/T, what the file's reader sees) row by row in float64: all rows would be gigabytes."""
    for before, after in zip(originals, logits, strict=True):
        for z, w in zip(before, after, strict=True):
            yield z.astype(np.float64) / temperature, w.astype(np.float64) / reader


def _compared(wanted: FloatArray, found: FloatArray) -> tuple[float, float, float]:
    """Products and squares for the scale s of wanted = s · found, and the KL, of one row.

    Both are centred first: a constant added to a row changes no prediction.
    """
    z, w = wanted - wanted.mean(), found - found.mean()
    return float(z @ w), float(w @ w), _kl(wanted, found)


def _kl(z: FloatArray, w: FloatArray) -> float:
    """KL(softmax(z) ‖ softmax(w)) of one row, nats."""
    from scipy.special import log_softmax, rel_entr

    return float(rel_entr(np.exp(log_softmax(z)), np.exp(log_softmax(w))).sum())


def applied_checks(applied: Applied, temperature: float) -> list[Check]:
    """``calibration.applied_scale``, ``.applied_kl``: what the file's reader sees is z/T."""
    how = (
        "its final norm carries T"
        if applied.reader_temperature == 1.0
        else "its reader divides by the T that it declares"
    )
    ran = f"{applied.path.name} was run again ({how}); {applied.rows} rows"
    return [
        judge(
            "calibration.applied_scale",
            abs(applied.scale - 1.0),
            SCALE_LIMIT,
            detail=f"{ran}: how far its logits are from the original's over {temperature:.4f} in "
            "scale.",
        ),
        judge(
            "calibration.applied_kl",
            applied.kl,
            KL_LIMIT,
            unit="nats",
            detail=f"{ran}: mean KL of its predictions from the original's at T = "
            f"{temperature:.4f}.",
        ),
    ]

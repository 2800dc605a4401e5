"""Quantized files: size, types, and the tensors that fell back to another type."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from so8tqc.record_kinds.quantize import Chosen, QuantizedFile, QuantizeMetrics, SolvedFile
from so8tqc.records import Record
from so8tqc.reports.language import say
from so8tqc.reports.tables import (
    Column,
    Table,
    counted_types,
    number_of,
    signed_percent_of,
    size_of,
    tabulate,
)


def file_table(record: Record) -> Table | None:
    """Quantized files with the types that their tensors really have."""
    return table_of(QuantizeMetrics.of(record).files)


def table_of(files: Mapping[str, QuantizedFile]) -> Table | None:
    """The same of files by name."""
    columns: list[Column[QuantizedFile]] = [
        (say("size"), size_of(lambda row: row.bytes)),
        (say("bits per weight"), number_of(lambda row: row.bits_per_weight)),
        (say("tensors by type"), lambda row: counted_types(row.types)),
        (say("fell back to"), _fallbacks),
    ]
    return tabulate(say("Files"), say("file"), columns, files)


def solved_table(record: Record) -> Table | None:
    """Of each file what was solved for, and how far outputs move with and without.

    Errors are the root mean squares over tensors of ‖(W − Q) x‖ / ‖W x‖.
    """
    solver = QuantizeMetrics.of(record).solver
    if solver is None:
        return None
    columns: list[Column[SolvedFile]] = [
        (say("tensors solved for"), lambda row: str(len(row.tensors))),
        (say("output error, libllama"), number_of(lambda row: _error(row, "libllama"))),
        (say("output error, solved"), number_of(lambda row: _error(row, "solved"))),
        (say("left to libllama"), lambda row: counted_types(Counter(row.left.values()))),
    ]
    return tabulate(say("Second moments"), say("file"), columns, solver.files)


def chosen_table(record: Record) -> Table | None:
    """Of each kind of matrix the types that were chosen, with their layers, and what they cost."""
    mixture = QuantizeMetrics.of(record).mixture
    if mixture is None:
        return None
    kinds: dict[str, dict[str, Chosen]] = {}
    for name, chosen in mixture.tensors.items():
        layer, kind = _place(name)
        kinds.setdefault(kind, {})[layer] = chosen
    columns: list[Column[dict[str, Chosen]]] = [
        (say("types chosen"), _types_by_layers),
        (say("predicted KL"), number_of(lambda row: sum(c.kl[c.type] for c in row.values()))),
    ]
    return tabulate(say("Types chosen by curvature"), say("tensor"), columns, kinds)


def prediction_table(record: Record) -> Table | None:
    """What the choice was made by: the probes of each family, and the file itself."""
    mixture = QuantizeMetrics.of(record).mixture
    if mixture is None:
        return None
    rows = {name: (one.predicted_kl, one.measured_kl) for name, one in mixture.families.items()}
    rows[say("the file")] = (mixture.predicted_kl, mixture.measured_kl)
    columns: list[Column[tuple[float, float]]] = [
        (say("predicted KL"), number_of(lambda row: row[0])),
        (say("measured KL"), number_of(lambda row: row[1])),
        (
            say("prediction off by"),
            signed_percent_of(lambda row: row[0] / row[1] - 1 if row[1] else None),
        ),
    ]
    return tabulate(say("Prediction of the KL"), say("probe"), columns, rows)


def _place(name: str) -> tuple[str, str]:
    """A tensor's layer, "" if it is in none, and its kind."""
    match = re.match(r"^blk\.(\d+)\.(.+?)(?:\.weight)?$", name)
    return ("", name.removesuffix(".weight")) if match is None else (match[1], match[2])


def _types_by_layers(row: Mapping[str, Chosen]) -> str:
    """``Q5_0: 0–3, 7; Q8_0: 4–6``, the type of the most layers first."""
    layers: dict[str, list[str]] = {}
    for layer, chosen in row.items():
        layers.setdefault(chosen.type, []).append(layer)
    ordered = sorted(layers.items(), key=lambda item: (-len(item[1]), item[0]))
    if len(ordered) == 1:
        return ordered[0][0]
    return "; ".join(f"{type_}: {_spans(sorted(map(int, some)))}" for type_, some in ordered)


def _spans(numbers: Sequence[int]) -> str:
    """``0–3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _error(row: SolvedFile, whose: Literal["libllama", "solved"]) -> float | None:
    squares = [float(getattr(tensor, whose)) ** 2 for tensor in row.tensors.values()]
    return math.sqrt(sum(squares) / len(squares)) if squares else None


def _fallbacks(row: QuantizedFile) -> str:
    if row.fallbacks is None:
        return ""
    return counted_types(Counter(row.fallbacks.values())) or say("none")

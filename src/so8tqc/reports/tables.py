"""Tables of records, as strings: the same ones in HTML and Markdown.

Each function takes what the record holds and leaves out what it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.language import say


class Table(NamedTuple):
    """A title, column names, and rows of text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def entries(record: Record, key: str) -> dict[str, dict[str, Any]]:
    """A metric that maps names to mappings; entries of another shape are left out."""
    found = record.metrics.get(key)
    if not isinstance(found, dict):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)}


def layers(record: Record) -> list[dict[str, Any]]:
    """Rows of ``metrics.layers``."""
    rows = record.metrics.get("layers")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def layer_table(record: Record) -> Table | None:
    """A bake's folded tensors."""
    columns: list[Column] = [
        (say("blocks"), _number("blocks")),
        (say("drift, largest"), _scientific("orthogonality_max")),
        (say("angle, mean (rad)"), _number("angle_mean")),
        (say("angle, largest"), _number("angle_max")),
        (say("effect"), _number("effect")),
        (say("rounding"), _number("relative_error")),
        (say("ulp, largest"), _number("max_ulp")),
        (say("sha256 after"), lambda row: str(row.get("sha256_after", ""))[:12]),
    ]
    rows = {f"{row.get('layer', '')}": row for row in layers(record)}
    return _table(say("Layers"), say("layer"), columns, rows)


def export_table(record: Record) -> Table | None:
    """The exported file."""
    columns: list[Column] = [
        (say("type"), lambda row: str(row.get("file_type", ""))),
        (say("tensors"), _types),
        (say("size"), lambda row: fmt.size(row["bytes"]) if "bytes" in row else ""),
        (say("bits per weight"), _number("bits_per_weight")),
        (say("rearranged"), lambda row: _counts(row.get("rearranged"))),
    ]
    name = str(record.metrics.get("architecture", ""))
    return _table(say("File"), say("architecture"), columns, {name: record.metrics} if name else {})


def file_table(record: Record) -> Table | None:
    """Quantized files with the types that their tensors really have."""
    columns: list[Column] = [
        (say("size"), lambda row: fmt.size(row["bytes"]) if "bytes" in row else ""),
        (say("bits per weight"), _number("bits_per_weight")),
        (say("tensors by type"), _types),
        (say("fell back to"), _fallbacks),
    ]
    return _table(say("Files"), say("file"), columns, entries(record, "files"))


def candidate_table(record: Record) -> Table | None:
    """A qc's candidates side by side, the noise floor and the gate's own effect for scale."""
    columns: list[Column] = [
        (say("KL mean"), _number("kl_mean")),
        (say("KL 99 %"), lambda row: fmt.number(row.get("kl_percentiles", {}).get("99"))),
        (say("KL max"), _number("kl_max")),
        (say("same top"), _percent("top1")),
        (say("ln PPL ratio"), _number("ln_ppl_ratio")),
        (say("Δp rms"), _percent("dp_rms")),
        (say("max |Δz|"), _number("max_abs")),
        (say("ECE"), _number("ece_candidate")),
        (say("Brier"), _number("brier_candidate")),
    ]
    rows: dict[str, Mapping[str, Any]] = dict(entries(record, "candidates"))
    if rows:
        for key, name in (
            ("noise_floor", say("(rounding alone)")),
            ("arithmetic", say("(arithmetic alone)")),
            ("effect", say("(the gates' own effect)")),
        ):
            extra = record.metrics.get(key)
            if isinstance(extra, dict):
                rows[name] = extra
    return _table(say("Candidates"), say("candidate"), columns, rows)


def split_table(record: Record) -> Table | None:
    """What an error is made of: the fold itself, how it is stored, what it is computed in."""

    def alone(key: str) -> Callable[[Mapping[str, Any]], str]:
        found: Any = record.metrics.get(key) or {}
        return lambda _: fmt.number(found.get("kl_mean"))

    columns: list[Column] = [
        (say("algebra: distance from the exact fold"), _scientific("algebra_relative_error")),
        (say("stored as"), lambda row: str(row.get("storage", ""))),
        (say("KL of storage alone, largest"), alone("noise_floor")),
        (say("KL of arithmetic alone"), alone("arithmetic")),
    ]
    return _table(
        say("What the error is made of"), say("candidate"), columns, entries(record, "split")
    )


def survival_tables(record: Record) -> list[Table]:
    """Layer by layer, whether what a gate changes is larger than what quantization does."""
    columns: list[Column] = [
        (say("type"), lambda row: str(row.get("type", ""))),
        (say("changed by quantization"), _percent("error")),
        (say("changed by the gate"), _percent("rotation")),
        (
            say("the gate is larger"),
            lambda row: say("yes") if row["rotation"] > row["error"] else say("no"),
        ),
    ]
    found = (
        _table(say("Survival of the gates in {name}", name=name), say("layer"), columns, rows)
        for name, rows in entries(record, "survival").items()
    )
    return [table for table in found if table is not None]


def case_table(record: Record) -> Table | None:
    """Long texts: divergence, oscillation, smoothness, repetition."""
    columns: list[Column] = [
        (say("tokens"), _number("tokens")),
        (say("KL mean"), _number("kl_mean")),
        (say("oscillation index"), _pair("indices", "max_logit", "index")),
        (say("von Neumann"), _pair("indices", "max_logit", "von_neumann")),
        (say("high-frequency power"), _pair("indices", "max_logit", "high_frequency")),
        (say("Δ² energy vs base"), _signed_percent("energy_relative_to_base")),
        (say("periodic dips"), _periods),
        (say("repeated 4-grams"), _pair("generation", "repeated")),
    ]
    return _table(say("Cases"), say("text"), columns, entries(record, "cases"))


def worst_token_tables(record: Record) -> list[Table]:
    """Where each candidate is furthest from the reference, the worst candidate first.

    The token that really follows stands in ⟦ ⟧ behind what the models had read.
    """
    header = [say("where"), say("read so far ⟦next token⟧"), "KL", say("its probability"),
              say("same top")]  # fmt: skip
    candidates = entries(record, "candidates")
    ordered = sorted(candidates, key=lambda name: -float(candidates[name].get("kl_mean", 0.0)))
    return [
        Table(say("Worst tokens of {name}", name=name), header, [_token(row) for row in rows])
        for name in ordered
        if (rows := candidates[name].get("worst_tokens"))
    ]


def _token(row: Mapping[str, Any]) -> list[str]:
    words = f"{row['before']}⟦{row['token']}⟧" if row["token"] else ""
    return [
        f"{row['text']}, {row['position']:,}",
        words.replace("\n", "↵"),
        fmt.number(row["kl"]),
        f"{row['p_reference']:.2g} → {row['p_candidate']:.2g}",
        say("yes") if row["same_top"] else say("no"),
    ]


def generic_tables(record: Record) -> list[Table]:
    """Metrics of a stage that has no tables of its own: numbers first, then mappings of them."""
    tables = []
    plain = {k: v for k, v in record.metrics.items() if isinstance(v, (int, float, str, bool))}
    if plain:
        rows = [[name, _plain(value)] for name, value in plain.items()]
        tables.append(Table(say("Measured"), ["", say("value")], rows))
    for key in record.metrics:
        group = entries(record, key)
        names = dict.fromkeys(
            name
            for entry in group.values()
            for name, value in entry.items()
            if isinstance(value, (int, float, str, bool))
        )
        if names:
            rows = [
                [label, *(_plain(entry.get(name, "")) for name in names)]
                for label, entry in group.items()
            ]
            tables.append(Table(key.replace("_", " "), ["", *names], rows))
    return tables


def _table(
    title: str, first: str, columns: Iterable[Column], rows: Mapping[str, Mapping[str, Any]]
) -> Table | None:
    """None without rows; a column that stays empty is left out."""
    if not rows:
        return None
    cells = {name: [render(row) for row in rows.values()] for name, render in columns}
    used = {name: texts for name, texts in cells.items() if set(texts) - {"", "–"}}
    body = [[label, *(texts[i] for texts in used.values())] for i, label in enumerate(rows)]
    return Table(title, [first, *used], body)


def _plain(value: object) -> str:
    return fmt.number(value) if isinstance(value, float) else str(value)


def _number(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: fmt.number(row.get(key))


def _scientific(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[key]:.1e}" if key in row else ""


def _percent(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: fmt.percent(row[key]) if key in row else ""


def _signed_percent(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{100 * row[key]:+.2f} %" if key in row else ""


def _pair(group: str, *path: str) -> Callable[[Mapping[str, Any]], str]:
    """``reference → candidate``, or the candidate alone."""

    def render(row: Mapping[str, Any]) -> str:
        values = []
        for side in ("reference", "candidate"):
            value: Any = row.get(group, {}).get(side)
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            values += [] if value is None else [fmt.number(value)]
        return " → ".join(values)

    return render


def _periods(row: Mapping[str, Any]) -> str:
    """Periods of significant entropy dips, tokens."""
    if "significant_periods" not in row:
        return ""
    return ", ".join(
        fmt.counted(round(period), "token") for period in row["significant_periods"]
    ) or say("none")


def _types(row: Mapping[str, Any]) -> str:
    return _counts(row.get("types"))


def _fallbacks(row: Mapping[str, Any]) -> str:
    fallbacks = row.get("fallbacks")
    if not isinstance(fallbacks, dict):
        return ""
    counts: dict[str, int] = {}
    for kind in fallbacks.values():
        counts[str(kind)] = counts.get(str(kind), 0) + 1
    return _counts(counts) or say("none")


def _counts(counts: object) -> str:
    """``166 Q5_1, 61 F32``, the most frequent first."""
    if not isinstance(counts, dict):
        return ""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in ordered)

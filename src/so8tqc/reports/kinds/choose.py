"""Candidates side by side: which file to ship, and which of two is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from so8tqc.record_kinds.base import Interval
from so8tqc.record_kinds.choose import (
    ChooseMeasured,
    ChooseMetrics,
    DescribedRow,
    Rate,
)
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.figures import BLUE, GREY, ORANGE, style
from so8tqc.reports.html import Plot, deciding, drawn
from so8tqc.reports.kinds.calibrate import held_out_table
from so8tqc.reports.kinds.identify import reading_table
from so8tqc.reports.kinds.quantize import table_of
from so8tqc.reports.language import message, say
from so8tqc.reports.pairs import narrow_pairs, pair_table
from so8tqc.reports.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PURPOSES = {
    "type": message("type"),
    "sensitivity": message("sensitivity"),
    "mixture": message("mixture"),
}
_RECOMMENDED = "→ "


def row_table(record: Record) -> Table | None:
    """The files compared, the smallest first; the recommended one is marked."""
    found = ChooseMetrics.of(record)
    rows = found.rows
    if not rows:
        return None
    header = [
        say("file"),
        say("size"),
        say("bits/weight"),
        say("KL mean"),
        "KL 99 %",
        say("same top"),
        say("PPL ratio"),
    ]
    gates = any("survives" in row for row in rows.values())
    body = []
    for name, row in rows.items():
        mark = _RECOMMENDED if name == found.recommended else ""
        cells = [
            mark + name,
            fmt.size(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            _with_interval(row["kl_mean"], row["kl_ci95"], _three),
            _with_interval(row["kl_99"], row["kl_99_ci95"], _three),
            _with_interval(row["top1"], row["top1_ci95"], _share),
            _with_interval(row["ppl_ratio"], row["ppl_ratio_ci95"], _four),
        ]
        if gates:
            cells.append(say("yes") if row.get("survives") else say("no"))
        body.append(cells)
    return Table(say("Files compared"), [*header, *([say("gate survives")] if gates else [])], body)


def speed_table(record: Record) -> Table | None:
    """Tokens per second: median, and slowest to fastest repeat."""
    speed = ChooseMeasured.of(record).speed
    if speed is None:
        return None
    threads = speed["threads"] or say("libllama's default")
    title = say(
        "Tokens per second on this machine (prompt of {prompt}, {new} generated; median of "
        "{repeats}, slowest … fastest; threads: {threads} of {cores} cores)",
        prompt=speed["prompt_tokens"],
        new=speed["new_tokens"],
        repeats=speed["repeats"],
        threads=threads,
        cores=speed["cores"],
    )
    files = speed["files"]
    rows = [
        [name, _rate(files[name]["prompt"]), _rate(files[name]["generation"])]
        for name in ChooseMetrics.of(record).rows
        if name in files
    ]
    return Table(title, [say("file"), say("prompt"), say("generation")], rows)


def tried_table(record: Record) -> Table | None:
    """What a search evaluated."""
    found = ChooseMetrics.of(record)
    if found.search is None or not found.search["tried"]:
        return None
    rows = [
        [
            row["recipe"],
            say(_PURPOSES.get(row["purpose"], row["purpose"])),
            fmt.size(row["bytes"]),
            _three(row["kl_mean"]),
            _share(row["top1"]),
            "; ".join(row["missed"]) or say("meets the budget"),
        ]
        for row in found.search["tried"]
    ]
    title = say("Search: {budget}", budget=found.budget or "")
    return Table(
        title,
        [
            say("recipe"),
            say("tried as"),
            say("size"),
            say("KL mean"),
            say("same top"),
            say("verdict"),
        ],
        rows,
    )


def sensitivity_table(record: Record) -> Table | None:
    """Groups of tensors: what storing them in the lower type costs, the most sensitive first."""
    search = ChooseMetrics.of(record).search
    if search is None or not search["sensitivity"]:
        return None
    rows = [
        [
            row["group"],
            str(row["tensors"]),
            fmt.size(row["bytes_saved"]),
            f"{row['kl_cost']:+.3g}",
            f"{1e6 * row['kl_cost'] / row['bytes_saved']:+.3g}",
        ]
        for row in search["sensitivity"]
    ]
    title = say(
        "Sensitivity: {low} in one group of tensors, {high} elsewhere",
        low=search["low"],
        high=search["high"],
    )
    return Table(
        title,
        [say("group"), say("tensors"), say("saves"), say("KL cost"), say("KL cost per MB")],
        rows,
    )


def terminal_tables(record: Record) -> list[Table]:
    """The tables that a terminal shows, too: narrow ones."""
    if record.kind == "qc":
        return [table for table in (narrow_pairs(record),) if table is not None]
    if record.kind == "identify":
        return [table for table in (reading_table(record, narrow=True),) if table is not None]
    if record.kind == "calibrate":
        return [table for table in (held_out_table(record),) if table is not None]
    if record.kind != "choose":
        return []
    found = [_narrow_rows(record), narrow_pairs(record), _narrow_tried(record)]
    return [table for table in found if table is not None]


def quality_by_size(record: Record) -> go.Figure | None:
    """Mean KL against file size."""
    found = ChooseMetrics.of(record)
    sizes = {name: row["bytes"] / 1e6 for name, row in found.rows.items()}
    return _quality(
        found, {name: (size, size, size) for name, size in sizes.items()}, say("size, MB")
    )


def quality_by_speed(record: Record) -> go.Figure | None:
    """Mean KL against tokens generated per second."""
    speed = ChooseMeasured.of(record).speed
    rates = {
        name: (r["generation"]["low"], r["generation"]["median"], r["generation"]["high"])
        for name, r in (speed["files"] if speed else {}).items()
    }
    return _quality(ChooseMetrics.of(record), rates, say("tokens generated per second"))


def _quality(
    found: ChooseMetrics, across: Mapping[str, tuple[float, float, float]], title: str
) -> go.Figure | None:
    """Points at (middle, KL) with both intervals; ``across`` is (low, middle, high)."""
    import plotly.graph_objects as go

    rows = {n: r for n, r in found.rows.items() if n in across and r["kl_mean"] > 0}
    if not rows:
        return None
    best = found.recommended
    x = [across[name] for name in rows]
    y = [_span(row) for row in rows.values()]
    bar = {"type": "data", "symmetric": False, "color": GREY, "thickness": 1.2}
    figure = go.Figure(
        go.Scatter(
            x=[middle for _, middle, _ in x],
            y=[middle for _, middle, _ in y],
            text=list(rows),
            mode="markers+text",
            textposition="middle right",
            cliponaxis=False,
            marker={"size": 10, "color": [ORANGE if name == best else BLUE for name in rows]},
            error_x={
                **bar,
                "array": [h - m for _, m, h in x],
                "arrayminus": [m - l for l, m, _ in x],
            },
            error_y={
                **bar,
                "array": [h - m for _, m, h in y],
                "arrayminus": [m - l for l, m, _ in y],
            },
            hovertemplate="%{text}<br>%{x:.1f}, KL %{y:.3g}<extra></extra>",
        )
    )
    ends = [value for low, _, high in x for value in (low, high)]
    margin = 0.15 * (max(ends) - min(ends)) or 1.0
    figure.update_xaxes(title=title, range=[min(ends) - margin, max(ends) + margin])
    figure.update_yaxes(title=say("mean KL, nats"), type="log", dtick=1, exponentformat="power")
    return style(figure)


def _span(row: DescribedRow) -> tuple[float, float, float]:
    middle = row["kl_mean"]
    low, high = row["kl_ci95"] or (middle, middle)
    return low, middle, high


def _narrow_rows(record: Record) -> Table | None:
    found = ChooseMetrics.of(record)
    rows = found.rows
    if not rows:
        return None
    speed = ChooseMeasured.of(record).speed
    body = []
    for name, row in rows.items():
        mark = _RECOMMENDED if name == found.recommended else ""
        rates = speed["files"].get(name) if speed else None
        body.append(
            [
                mark + name,
                fmt.size(row["bytes"]),
                f"{row['bits_per_weight']:.2f}",
                _three(row["kl_mean"]),
                "" if row["kl_ci95"] is None else " … ".join(_three(v) for v in row["kl_ci95"]),
                _share(row["top1"]),
                _four(row["ppl_ratio"]),
                {True: say("yes"), False: say("no"), None: ""}[row.get("survives")],
                f"{rates['prompt']['median']:.0f}" if rates else "",
                f"{rates['generation']['median']:.1f}" if rates else "",
            ]
        )
    header = [
        say("file"),
        say("size"),
        "bpw",
        "KL",
        "95 %",
        say("top"),
        "PPL ×",
        say("gate"),
        "pp/s",
        "tg/s",
    ]
    kept = [i for i in range(len(header)) if any(row[i] for row in body)]
    return Table(
        say("Files compared"), [header[i] for i in kept], [[row[i] for i in kept] for row in body]
    )


def _narrow_tried(record: Record) -> Table | None:
    """The search without its sensitivity files, which a report shows."""
    found = tried_table(record)
    if found is None:
        return None
    rows = [[row[0], *row[2:]] for row in found.rows if row[1] != say(_PURPOSES["sensitivity"])]
    return Table(found.title, [found.header[0], *found.header[2:]], rows)


def _with_interval(value: float, interval: Interval | None, write: Callable[[float], str]) -> str:
    """``0.122 (0.103 … 0.140)``."""
    text = write(value)
    return text if interval is None else f"{text} ({write(interval[0])} … {write(interval[1])})"


def _rate(rate: Rate) -> str:
    return f"{rate['median']:.1f} ({rate['low']:.1f} … {rate['high']:.1f})"


def _three(value: float) -> str:
    return f"{value:.3g}"


def _four(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def plots(record: Record) -> list[Plot]:
    found = drawn(
        (
            say("Quality against size"),
            say("Mean KL to the reference with its 95 % interval; the recommended file is orange."),
            quality_by_size(record),
        ),
        (
            say("Quality against speed"),
            say(
                "Tokens generated per second on this machine: the median, slowest and fastest "
                "repeat. Better is to the right and below."
            ),
            quality_by_speed(record),
        ),
    )
    return deciding(found)


def tables(record: Record) -> list[Table | None]:
    """The files, pairs of them, their speed, and what a search tried."""
    return [
        row_table(record),
        pair_table(record),
        speed_table(record),
        tried_table(record),
        sensitivity_table(record),
        table_of(ChooseMetrics.of(record).files),
    ]

"""Candidates side by side: which file to ship, and which of two is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.figures import BLUE, GREY, ORANGE, style
from so8tqc.reports.html import Plot, drawn
from so8tqc.reports.kinds.quantize import file_table
from so8tqc.reports.language import message, say
from so8tqc.reports.pairs import narrow_pairs, pair_table
from so8tqc.reports.tables import Table, entries

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
    rows = entries(record, "rows")
    if not rows:
        return None
    header = [say("file"), say("size"), say("bits/weight"), say("KL mean"), "KL 99 %",
              say("same top"), say("PPL ratio")]  # fmt: skip
    gates = any("survives" in row for row in rows.values())
    body = []
    for name, row in rows.items():
        mark = _RECOMMENDED if name == record.metrics.get("recommended") else ""
        cells = [
            mark + name,
            fmt.size(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            _with_interval(row, "kl_mean", _three),
            _with_interval(row, "kl_99", _three),
            _with_interval(row, "top1", _share),
            _with_interval(row, "ppl_ratio", _four),
        ]
        if gates:
            cells.append(say("yes") if row.get("survives") else say("no"))
        body.append(cells)
    return Table(say("Files compared"), [*header, *([say("gate survives")] if gates else [])], body)


def speed_table(record: Record) -> Table | None:
    """Tokens per second: median, and slowest to fastest repeat."""
    speed = _speed(record)
    if not speed:
        return None
    threads = speed["threads"] or say("libllama's default")
    title = say(
        "Tokens per second on this machine (prompt of {prompt}, {new} generated; median of "
        "{repeats}, slowest … fastest; threads: {threads} of {cores} cores)",
        prompt=speed["prompt_tokens"], new=speed["new_tokens"], repeats=speed["repeats"],
        threads=threads, cores=speed["cores"],
    )  # fmt: skip
    rows = [
        [name, *(_rate(rates[kind]) for kind in ("prompt", "generation"))]
        for name, rates in _by_rows(record, speed["files"]).items()
    ]
    return Table(title, [say("file"), say("prompt"), say("generation")], rows)


def tried_table(record: Record) -> Table | None:
    """What a search evaluated."""
    tried: Any = _search(record).get("tried")
    if not tried:
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
        for row in tried
    ]
    title = say("Search: {budget}", budget=record.metrics.get("budget", ""))
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
    search = _search(record)
    groups: Any = search.get("sensitivity")
    if not groups:
        return None
    rows = [
        [
            row["group"],
            str(row["tensors"]),
            fmt.size(row["bytes_saved"]),
            f"{row['kl_cost']:+.3g}",
            f"{1e6 * row['kl_cost'] / row['bytes_saved']:+.3g}",
        ]
        for row in groups
    ]
    title = say(
        "Sensitivity: {low} in one group of tensors, {high} elsewhere",
        low=search["low"], high=search["high"],
    )  # fmt: skip
    return Table(
        title,
        [say("group"), say("tensors"), say("saves"), say("KL cost"), say("KL cost per MB")],
        rows,
    )


def terminal_tables(record: Record) -> list[Table]:
    """The tables that a terminal shows, too: narrow ones."""
    if record.kind == "qc":
        return [table for table in (narrow_pairs(record),) if table is not None]
    if record.kind == "calibrate" and "change" in record.metrics:
        from so8tqc.reports.kinds.calibrate import held_out_table

        return [Table(*held_out_table(record))]
    if record.kind != "choose":
        return []
    found = [_narrow_rows(record), narrow_pairs(record), _narrow_tried(record)]
    return [table for table in found if table is not None]


def quality_by_size(record: Record) -> go.Figure | None:
    """Mean KL against file size."""
    sizes = {name: row["bytes"] / 1e6 for name, row in entries(record, "rows").items()}
    return _quality(
        record, {name: (size, size, size) for name, size in sizes.items()}, say("size, MB")
    )


def quality_by_speed(record: Record) -> go.Figure | None:
    """Mean KL against tokens generated per second."""
    files: Any = _speed(record).get("files", {})
    rates = {
        name: (r["generation"]["low"], r["generation"]["median"], r["generation"]["high"])
        for name, r in files.items()
    }
    return _quality(record, rates, say("tokens generated per second"))


def _quality(
    record: Record, across: Mapping[str, tuple[float, float, float]], title: str
) -> go.Figure | None:
    """Points at (middle, KL) with both intervals; ``across`` is (low, middle, high)."""
    import plotly.graph_objects as go

    rows = {n: r for n, r in entries(record, "rows").items() if n in across and r["kl_mean"] > 0}
    if not rows:
        return None
    best = record.metrics.get("recommended")
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


def _span(row: Mapping[str, Any]) -> tuple[float, float, float]:
    middle = row["kl_mean"]
    low, high = row["kl_ci95"] or (middle, middle)
    return low, middle, high


def _narrow_rows(record: Record) -> Table | None:
    rows = entries(record, "rows")
    if not rows:
        return None
    speed: Any = _speed(record).get("files", {})
    body = []
    for name, row in rows.items():
        mark = _RECOMMENDED if name == record.metrics.get("recommended") else ""
        rates = speed.get(name)
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
    header = [say("file"), say("size"), "bpw", "KL", "95 %", say("top"), "PPL ×", say("gate"),
              "pp/s", "tg/s"]  # fmt: skip
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


def _with_interval(row: Mapping[str, Any], key: str, write: Callable[[float], str]) -> str:
    """``0.122 (0.103 … 0.140)``."""
    interval = row.get(f"{key.removesuffix('_mean')}_ci95")
    text = write(row[key])
    return text if interval is None else f"{text} ({write(interval[0])} … {write(interval[1])})"


def _rate(rate: Mapping[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['low']:.1f} … {rate['high']:.1f})"


# a record writes a number that is not finite as text


def _three(value: float | str) -> str:
    return f"{float(value):.3g}"


def _four(value: float | str) -> str:
    return f"{float(value):.4f}"


def _share(value: float | str) -> str:
    return f"{100 * float(value):.1f} %"


def _speed(record: Record) -> Mapping[str, Any]:
    speed = record.run.measured.get("speed")
    return speed if isinstance(speed, dict) else {}


def _search(record: Record) -> Mapping[str, Any]:
    search = record.metrics.get("search")
    return search if isinstance(search, dict) else {}


def _by_rows(record: Record, rates: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of the rows."""
    return {name: rates[name] for name in entries(record, "rows") if name in rates}


def plots(record: Record) -> list[Plot]:
    return drawn(
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


def tables(record: Record) -> list[Table | None]:
    """The files, pairs of them, their speed, and what a search tried."""
    return [
        row_table(record), pair_table(record), speed_table(record), tried_table(record),
        sensitivity_table(record), file_table(record),
    ]  # fmt: skip

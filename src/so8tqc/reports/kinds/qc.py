"""A quality control: candidates, what their error is made of, whether the gates survive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from so8tqc.record_kinds.base import Interval
from so8tqc.record_kinds.qc import (
    Bucket,
    Candidate,
    GGUFReading,
    LayerWeight,
    QCMetrics,
    Split,
    Statistics,
    WorstToken,
)
from so8tqc.record_kinds.tensors import TensorRow
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.figures import BLUE, GREY, SERIES, legend_below, style
from so8tqc.reports.html import Plot, deciding, drawn
from so8tqc.reports.language import say
from so8tqc.reports.measured import measured
from so8tqc.reports.pairs import pair_table
from so8tqc.reports.tables import (
    Column,
    Table,
    number_of,
    percent_of,
    scientific_of,
    tabulate,
)
from so8tqc.wording import percent

if TYPE_CHECKING:
    import plotly.graph_objects as go


def candidate_table(record: Record) -> Table | None:
    """A qc's candidates side by side, the noise floor and the gate's own effect for scale."""
    columns: list[Column[Statistics]] = [
        (say("KL mean"), number_of(lambda row: row.kl_mean)),
        (say("KL 99 %"), number_of(lambda row: row.kl_percentiles.get("99"))),
        (say("KL max"), number_of(lambda row: row.kl_max)),
        (say("same top"), percent_of(lambda row: row.top1)),
        (say("ln PPL ratio"), number_of(lambda row: row.ln_ppl_ratio)),
        (say("Δp rms"), percent_of(lambda row: row.dp_rms)),
        (say("max |Δz|"), number_of(lambda row: row.max_abs)),
        (
            say("ECE"),
            number_of(lambda row: row.ece_candidate if isinstance(row, Candidate) else None),
        ),
        (
            say("Brier"),
            number_of(lambda row: row.brier_candidate if isinstance(row, Candidate) else None),
        ),
    ]
    found = QCMetrics.of(record)
    rows: dict[str, Statistics] = dict(found.candidates)
    if rows:
        for extra, name in (
            (found.noise_floor, say("(rounding alone)")),
            (found.arithmetic, say("(arithmetic alone)")),
            (found.effect, say("(the gates' own effect)")),
        ):
            if extra is not None:
                rows[name] = extra
    return tabulate(say("Candidates"), say("candidate"), columns, rows)


def apart_table(record: Record) -> Table | None:
    """Tokens that no picture conditions beside those that one does, candidate by candidate."""
    columns: list[Column[Statistics]] = [
        (say("tokens"), number_of(lambda row: row.tokens)),
        (say("KL mean"), number_of(lambda row: row.kl_mean)),
        (say("KL max"), number_of(lambda row: row.kl_max)),
        (say("same top"), percent_of(lambda row: row.top1)),
        (say("max |Δz|"), number_of(lambda row: row.max_abs)),
    ]
    rows: dict[str, Statistics] = {}
    for name, row in QCMetrics.of(record).candidates.items():
        if row.apart is None:
            continue
        if row.apart.text is not None:
            rows[say("{name}, text alone", name=name)] = row.apart.text
        rows[say("{name}, after pictures", name=name)] = row.apart.images
    return tabulate(say("Pictures"), say("candidate"), columns, rows)


def routing_table(record: Record) -> Table | None:
    """Tokens whose experts rounding may choose otherwise beside the others."""
    columns: list[Column[Statistics]] = [
        (say("tokens"), number_of(lambda row: row.tokens)),
        (say("KL mean"), number_of(lambda row: row.kl_mean)),
        (say("KL max"), number_of(lambda row: row.kl_max)),
        (say("same top"), percent_of(lambda row: row.top1)),
        (say("max |Δz|"), number_of(lambda row: row.max_abs)),
    ]
    rows: dict[str, Statistics] = {}
    for name, row in QCMetrics.of(record).candidates.items():
        if row.routing is None:
            continue
        if row.routing.others is not None:
            rows[say("{name}, experts certain", name=name)] = row.routing.others
        rows[say("{name}, experts at a tie", name=name)] = row.routing.ties
    return tabulate(
        say("Choices of experts that rounding may turn"), say("candidate"), columns, rows
    )


def confidence_table(record: Record) -> Table | None:
    """KL and kept top tokens where the reference is sure of its next token, and where it is not."""
    rows = []
    for name, candidate in QCMetrics.of(record).candidates.items():
        for bucket in candidate.confidence:
            rows.append(
                [
                    name,
                    _span(bucket),
                    f"{bucket.tokens:,} ({percent(bucket.share)})",
                    _measured(bucket.kl_mean, bucket.kl_ci95, fmt.number),
                    _measured(bucket.top1, bucket.top1_ci95, percent),
                ]
            )
    if not rows:
        return None
    header = [
        say("candidate"),
        say("reference's largest probability"),
        say("tokens"),
        say("KL mean"),
        say("same top"),
    ]
    return Table(say("Where the reference is sure, and where it is not"), header, rows)


def _span(bucket: Bucket) -> str:
    if bucket.low == 0:
        return say("below {high}", high=f"{bucket.high:g}")
    if bucket.high == 1:
        return say("from {low}", low=f"{bucket.low:g}")
    return f"{bucket.low:g} … {bucket.high:g}"


def _measured(value: float | None, interval: Interval | None, write: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    if interval is None:
        return write(value)
    return f"{write(value)} ({write(interval[0])} … {write(interval[1])})"


def readings_table(record: Record) -> Table | None:
    """What of a GGUF file's error its weights are, and what the runtime adds."""
    columns: list[Column[GGUFReading]] = [
        (say("KL of its weights"), number_of(lambda row: row.weights)),
        (say("KL as libllama runs it"), number_of(lambda row: row.libllama)),
        (say("KL of the runtime alone"), number_of(lambda row: row.runtime)),
    ]
    found = QCMetrics.of(record).readings
    return tabulate(say("Weights and runtime"), say("candidate"), columns, found)


def split_table(record: Record) -> Table | None:
    """What an error is made of: the fold itself, how it is stored, what it is computed in."""
    found = QCMetrics.of(record)
    columns: list[Column[Split]] = [
        (
            say("algebra: distance from the exact fold"),
            scientific_of(lambda row: row.algebra_relative_error),
        ),
        (say("stored as"), lambda row: row.storage or ""),
        (say("KL of storage alone, largest"), number_of(lambda _: _kl_mean(found.noise_floor))),
        (say("KL of arithmetic alone"), number_of(lambda _: _kl_mean(found.arithmetic))),
    ]
    return tabulate(say("What the error is made of"), say("candidate"), columns, found.split)


def _kl_mean(alone: Statistics | None) -> float | None:
    return None if alone is None else alone.kl_mean


def survival_tables(record: Record) -> list[Table]:
    """:func:`survival_table` of every GGUF."""
    found = QCMetrics.of(record).survival
    return [table for name, its in found.items() if (table := survival_table(name, its))]


def survival_table(name: str, rows: Mapping[str, LayerWeight]) -> Table | None:
    """Layer by layer, whether what a gate changes is larger than what quantization does."""
    columns: list[Column[LayerWeight]] = [
        (say("type"), lambda row: row["type"]),
        (say("changed by quantization"), percent_of(lambda row: row["error"])),
        (say("changed by the gate"), percent_of(lambda row: row["rotation"])),
        (
            say("the gate is larger"),
            lambda row: say("yes") if row["rotation"] > row["error"] else say("no"),
        ),
    ]
    return tabulate(say("Survival of the gates in {name}", name=name), say("layer"), columns, rows)


def tensor_tables(record: Record) -> list[Table]:
    """:func:`tensor_table` of every GGUF."""
    found = QCMetrics.of(record).tensors
    return [table for name, rows in found.items() if (table := tensor_table(name, rows))]


def tensor_table(name: str, rows: Sequence[TensorRow]) -> Table | None:
    """Every tensor of a GGUF, those that no honest encoder explains first."""
    columns: list[Column[TensorRow]] = [
        (say("type"), lambda row: row.type),
        (say("bits"), lambda row: f"{row.bits:.2f}"),
        (say("verdict"), lambda row: row.verdict),
        (say("distance"), percent_of(lambda row: row.error)),
        (say("error over the grid's"), number_of(lambda row: row.over_grid)),
        (say("found"), lambda row: measured(row.detail)),
    ]
    ordered = {row.name: row for row in sorted(rows, key=lambda row: row.honest)}
    return tabulate(say("Tensors of {name}", name=name), say("tensor"), columns, ordered)


def tensor_map(name: str, rows: Sequence[TensorRow]) -> go.Figure | None:
    """Layer × tensor: the error over the grid's; what no honest encoder explains is crossed."""
    import plotly.graph_objects as go

    inside = [row for row in rows if row.layer is not None]
    roles = list(dict.fromkeys(row.role for row in inside))
    layers = sorted({row.layer for row in inside if row.layer is not None})
    at = {(row.layer, row.role): row for row in inside}
    values = [[_over_grid(at.get((layer, role))) for layer in layers] for role in roles]
    wrong = [row for row in inside if not row.honest and row.verdict != "not looked at"]
    if not wrong and all(value is None for row in values for value in row):
        return None  # types without a grid, and nothing amiss: an empty frame
    figure = go.Figure(go.Heatmap(z=values, x=layers, y=roles, colorscale="Blues"))
    if wrong:
        figure.add_scatter(
            x=[row.layer for row in wrong],
            y=[row.role for row in wrong],
            text=[f"{name}: {row.name}, {row.verdict}" for row in wrong],
            mode="markers",
            marker={"symbol": "x", "size": 9, "color": "#c0392b"},
            showlegend=False,
        )
    figure.update_xaxes(title=say("layer"))
    return style(figure)


def _over_grid(row: TensorRow | None) -> float | None:
    return None if row is None else row.over_grid


def tensor_plots(qc: Record) -> list[Plot]:
    found = QCMetrics.of(qc).tensors
    return [plot for name, rows in found.items() for plot in tensor_plot(name, rows)]


def tensor_plot(name: str, rows: Sequence[TensorRow]) -> list[Plot]:
    """:func:`tensor_map`, with its title, where it shows anything."""
    note = say("Mean square error over that of rounding; crosses: no honest encoder explains it.")
    title = say("Tensors of {name}, layer by layer", name=name)
    return drawn((title, note, tensor_map(name, rows)))


def worst_token_tables(record: Record) -> list[Table]:
    """Where each candidate is furthest from the reference, the worst candidate first.

    The token that really follows stands in ⟦ ⟧ behind what the models had read. Records of
    another kind have none.
    """
    if record.kind != "qc":
        return []
    header = [
        say("where"),
        say("read so far ⟦next token⟧"),
        "KL",
        say("its probability"),
        say("same top"),
    ]
    candidates = QCMetrics.of(record).candidates
    ordered = sorted(candidates, key=lambda name: -(candidates[name].kl_mean or 0.0))
    return [
        Table(say("Worst tokens of {name}", name=name), header, [_token(row) for row in rows])
        for name in ordered
        if (rows := candidates[name].worst_tokens)
    ]


def _token(row: WorstToken) -> list[str]:
    words = f"{row['before']}⟦{row['token']}⟧" if row["token"] else ""
    return [
        f"{row['text']}, {row['position']:,}",
        words.replace("\n", "↵"),
        fmt.number(row["kl"]),
        f"{row['p_reference']:.2g} → {row['p_candidate']:.2g}",
        say("yes") if row["same_top"] else say("no"),
    ]


def quality_by_size(qc: Record, quantize: Record | None, export: Record | None) -> go.Figure | None:
    """Mean KL against file size of every GGUF whose size is known."""
    import plotly.graph_objects as go

    if quantize is None:
        return None
    sizes = _sizes(quantize, export)
    points = sorted(
        (sizes[check.subject], check.value, check.subject, check.ci95 or (check.value, check.value))
        for check in qc.checks
        if check.id == "kl.mean" and check.subject in sizes and check.value
    )
    if not points:
        return None
    figure = go.Figure(
        go.Scatter(
            x=[size / 1e6 for size, *_ in points],
            y=[kl for _, kl, *_ in points],
            text=[name.removesuffix(".gguf").rpartition("-")[2] for _, _, name, _ in points],
            customdata=[name for _, _, name, _ in points],
            mode="markers+text",
            textposition="middle right",
            cliponaxis=False,
            marker={"size": 10, "color": BLUE},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - kl for _, kl, _, (_, high) in points],
                "arrayminus": [kl - low for _, kl, _, (low, _) in points],
                "color": GREY,
                "thickness": 1.2,
            },
            hovertemplate="%{customdata}<br>%{x:.1f} MB, KL %{y:.3g}<extra></extra>",
        )
    )
    # room on the right for the last point's name
    figure.update_xaxes(title=say("file size, MB"), range=[0, points[-1][0] / 1e6 * 1.2])
    figure.update_yaxes(title=say("mean KL, nats"), type="log", dtick=1, exponentformat="power")
    return style(figure)


def kl_histogram(qc: Record) -> go.Figure | None:
    """Distribution of per-token KL (log scale) of every candidate."""
    import plotly.graph_objects as go

    figure, used = go.Figure(), list[float]()
    for i, (name, candidate) in enumerate(QCMetrics.of(qc).candidates.items()):
        histogram = candidate.kl_histogram
        if histogram is not None:
            pairs = zip(histogram.log10_centres, histogram.counts, strict=True)
            used += [centre for centre, count in pairs if count]
            figure.add_scatter(
                x=histogram.log10_centres,
                y=histogram.counts,
                name=name,
                mode="lines",
                line={"shape": "hvh", "width": 2, "color": SERIES[i % len(SERIES)]},
            )
    if not used:
        return None
    figure.update_xaxes(
        title=say("KL of one token, log₁₀ nats"), range=[min(used) - 0.5, max(used) + 0.5]
    )
    figure.update_yaxes(title=say("tokens"))
    return legend_below(style(figure))


def _sizes(quantize: Record, export: Record | None) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for record in (quantize, export):
        for output in record.outputs.values() if record else ():
            sizes[Path(output.path).name] = float(output.bytes)
    return sizes


def kl_plots(qc: Record) -> list[Plot]:
    return drawn(
        (
            say("KL of single tokens"),
            say("How the divergence is spread: a tail on the right is a few tokens gone wrong."),
            kl_histogram(qc),
        )
    )


def size_plots(records: Mapping[str, Record]) -> list[Plot]:
    if "qc" not in records:
        return []
    found = quality_by_size(records["qc"], records.get("quantize"), records.get("export"))
    note = say("Mean KL to the reference with its 95 % interval.")
    return deciding(drawn((say("Quality against size"), note, found)))


def tables(record: Record) -> list[Table | None]:
    """Candidates, pairs of them, what the error is made of, the gates' survival."""
    return [
        candidate_table(record),
        apart_table(record),
        pair_table(record),
        routing_table(record),
        confidence_table(record),
        split_table(record),
        readings_table(record),
        *survival_tables(record),
        *tensor_tables(record),
    ]

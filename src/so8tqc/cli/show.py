"""Records on a terminal: checks, tables, diagnosis, verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from so8tqc.cli.checks_table import mark, print_checks
from so8tqc.cli.progress import scaled
from so8tqc.record_kinds.attest import VerifyMetrics
from so8tqc.record_kinds.bake import PlanMetrics
from so8tqc.record_kinds.run import RunMetrics, StageRow
from so8tqc.records import Record, Verdict
from so8tqc.reports import format as fmt
from so8tqc.reports.checks import explained_by
from so8tqc.reports.diagnoses import finding, remedy
from so8tqc.reports.kinds.batch import batch_tables
from so8tqc.reports.kinds.check import answer
from so8tqc.reports.kinds.choose import terminal_tables
from so8tqc.reports.kinds.comparison import comparison_tables
from so8tqc.reports.kinds.comparison import sentence as comparison_sentence
from so8tqc.reports.kinds.identify import sentence as identify_sentence
from so8tqc.reports.kinds.verify import link_tables
from so8tqc.reports.language import message, say
from so8tqc.reports.measured import measured
from so8tqc.reports.tables import Table as ReportTable

_TABLES = {"batch": batch_tables, "comparison": comparison_tables, "verify": link_tables}
"""Records that are tables all through; of others, ``terminal_tables`` has the narrow ones."""
_OF_STAGES = ("run", "report")
"""Records of several stages, each of which has a row."""
_STAGE_COLUMNS = (
    message("stage"),
    message("verdict"),
    message("passed"),
    message("failed"),
    message("skipped"),
    message("seconds"),
)
_STAGE_WORDS = 2
"""Columns that are words; the others are numbers and stand right."""


@contextmanager
def trimmed() -> Iterator[Console]:
    """A console on stdout; a line ends with its last letter, not with a table's padding."""
    console = Console()
    with console.capture() as captured:
        yield console
    for line in captured.get().removesuffix("\n").split("\n"):
        console.file.write(f"{line.rstrip()}\n")


def show(record: Record, path: Path | None = None) -> None:
    """Print a record for people: checks, notices, diagnosis, verdict."""
    with trimmed() as console:
        if record.kind == "check":
            _show_answer(console, record)
        else:
            _show(console, record, path)


def _show(console: Console, record: Record, path: Path | None) -> None:
    if record.kind == "comparison":
        console.print(escape(comparison_sentence(record)))
    if record.kind == "identify" and record.verdict is Verdict.PASS:  # else the check tells it
        console.print(escape(identify_sentence(record)))
    stages = RunMetrics.of(record).stages if record.kind in _OF_STAGES else {}
    if stages:
        _show_stages(console, stages)
        failed = [check for check in record.checks if check.failed]
        if failed:
            print_checks(console, failed, say("Failed checks"))
    elif record.checks:
        told = record.kind == "verify" and VerifyMetrics.of(record).links is not None
        checks = [c for c in record.checks if not told or not c.subject or c.failed]
        print_checks(console, checks, record.kind)
    for shown in _TABLES.get(record.kind, terminal_tables)(record):
        _show_table(console, shown)
    for notice in record.notices:
        console.print(f"[yellow]·[/] {escape(measured(notice))}")
    _show_diagnosis(console, record)
    for name, output in record.outputs.items():
        label = "" if Path(output.path).name == name else f"[dim]{escape(name)}:[/] "
        console.print(f"{label}{escape(output.path)}", soft_wrap=True)
    if path is not None:
        kind = say("record") if path.suffix == ".json" else say("report")
        console.print(f"[dim]{kind}:[/] {escape(str(path))}", soft_wrap=True)
    console.print(f"\n{record.kind}: {mark(record.verdict)}")


def _show_answer(console: Console, record: Record) -> None:
    """What ``check`` says; the checks that failed, and their diagnosis, below it."""
    for label, text in answer(record):
        console.print((f"[bold]{label}:[/] " if label else "") + escape(text), soft_wrap=True)
    if failed := [check for check in record.checks if check.failed]:
        print_checks(console, failed, say("Failed checks"))
    _show_diagnosis(console, record)
    console.print(f"\n{record.kind}: {mark(record.verdict)}")


def _show_diagnosis(console: Console, record: Record) -> None:
    for diagnosis in record.diagnosis:
        console.print(f"\n[bold red]{say(diagnosis.code)}[/]  {escape(finding(diagnosis))}")
        if diagnosis.layers:
            console.print("  " + say("layers {layers}", layers=fmt.ranges(diagnosis.layers)))
        console.print(f"  [bold]{escape(remedy(diagnosis))}[/]")
    if command := explained_by(record):
        console.print("\n" + say("What this means: {command}", command=escape(command)))


def _show_table(console: Console, shown: ReportTable) -> None:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for i, name in enumerate(shown.header):
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(f"\n[bold]{escape(shown.title)}[/]")
    console.print(table)
    console.print()


def show_plan(record: Record) -> None:
    """Print what a bake would do: its tensors, drift, bytes, disk and memory."""
    with trimmed() as console:
        _show_plan(console, record)


def _show_plan(console: Console, record: Record) -> None:
    metrics = PlanMetrics.of(record)
    tensors = Table(box=None, pad_edge=False)
    for column in ("tensor", "shape", "dtype", "bytes"):
        tensors.add_column(column, justify="right" if column == "bytes" else "left")
    for row in metrics.tensors:
        same = row.dtype == row.baked_dtype
        dtype = row.dtype if same else f"{row.dtype} → {row.baked_dtype}"
        tensors.add_row(row.name, str(row.shape), dtype, scaled(row.bytes))
    console.print(tensors)
    drift = Table(box=None, pad_edge=False)
    for column in ("layer", "blocks", "largest ‖RᵀR − I‖", "mean", "largest angle", "mean angle"):
        drift.add_column(column, justify="right")
    for layer in metrics.layers:
        drift.add_row(
            str(layer.layer),
            str(layer.blocks),
            f"{layer.orthogonality_max:.1e}",
            f"{layer.orthogonality_mean:.1e}",
            f"{layer.angle_max:.3f}",
            f"{layer.angle_mean:.3f}",
        )
    console.print(drift)
    console.print(
        f"disk: {scaled(metrics.bytes_written)}B to write, "
        f"{scaled(metrics.disk_free_bytes)}B free; "
        f"memory: at most {scaled(metrics.memory_bytes)}B beyond the libraries\n"
    )


def _show_stages(console: Console, stages: Mapping[str, StageRow]) -> None:
    console.print(f"[bold]{say('Stages')}[/]")
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(_STAGE_COLUMNS):
        table.add_column(say(column), justify="left" if i < _STAGE_WORDS else "right")
    for name, row in stages.items():
        seconds = say("reused") if row["reused"] else f"{row['seconds']:.1f}"
        counts = map(str, (row["passed"], row["failed"], row["skipped"]))
        table.add_row(name, mark(Verdict(row["verdict"])), *counts, seconds)
    console.print(table)

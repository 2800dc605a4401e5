"""Report: from the records of a run to one HTML page, Markdown, JSON and JUnit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from so8tqc.artifacts import file_ref, read_record, write_text
from so8tqc.config import STAGES
from so8tqc.errors import InputError
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Record, Stopwatch, versions
from so8tqc.reports import figures
from so8tqc.reports import format as fmt
from so8tqc.reports.html import Plot, Section, page
from so8tqc.reports.junit import junit_xml
from so8tqc.reports.markdown import run_markdown, stage_markdown
from so8tqc.reports.reliability import reliability_figure
from so8tqc.reports.summary import summarise_run


def report(directory: Path, progress: Progress = SILENT) -> Record:
    """Write ``report/report.{html,md,json}`` and ``report/junit.xml`` of a run directory.

    Raises:
        InputError: the directory holds no stage's record.
    """
    watch = Stopwatch()
    records = read_stages(directory)
    name = _name(directory)
    out = directory / "report"
    with progress.task("writing the report", total=4) as task:
        summary = summarise_run(name, records)
        paths = {
            "html": out / "report.html",
            "markdown": out / "report.md",
            "json": out / "report.json",
            "junit": out / "junit.xml",
        }
        for kind, text in (
            ("html", page(summary, _sections(records, directory))),
            ("markdown", run_markdown(records, summary)),
            ("json", _json(summary, records)),
            ("junit", junit_xml(list(records.values()))),
        ):
            write_text(paths[kind], text)
            task.advance(1, item=paths[kind].name)
    checks = tuple(check for record in records.values() for check in record.checks)
    return Record(
        kind="report",
        verdict=summary["verdict"],
        checks=checks,
        outputs={kind: file_ref(path) for kind, path in paths.items()},
        versions=versions("plotly", "jinja2"),
        run=watch.info(),
    )


def write_stage_reports(record: Record, out: Path) -> None:
    """``report.md``, ``report.html`` and ``junit.xml`` of one stage, beside its record."""
    records = {record.kind: record}
    summary = summarise_run(record.kind, records)
    write_text(out / "report.md", stage_markdown(record))
    write_text(out / "report.html", page(summary, _sections(records, out.parent, inside=True)))
    write_text(out / "junit.xml", junit_xml([record]))


def read_stages(directory: Path) -> dict[str, Record]:
    """Stage → record, in the pipeline's order.

    Raises:
        InputError: there is none.
    """
    records = {
        stage: read_record(directory / stage / "record.json")
        for stage in STAGES
        if (directory / stage / "record.json").is_file()
    }
    if not records:
        raise InputError(
            "no stage has left a record here",
            where=str(directory),
            remedy="Give the run directory of so8tqc run.",
        )
    return records


def _name(directory: Path) -> str:
    """The run's name from its own record, else the directory's."""
    path = directory / "record.json"
    if path.is_file():
        return str(read_record(path).metrics.get("name", directory.name))
    return directory.resolve().name


def _json(summary: Mapping[str, Any], records: Mapping[str, Record]) -> str:
    content = {
        "schema_version": 1,
        "kind": "report",
        "verdict": summary["verdict"],
        "summary": summary,
        "stages": {name: record.model_dump(mode="json") for name, record in records.items()},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _sections(
    records: Mapping[str, Record], directory: Path, *, inside: bool = False
) -> list[Section]:
    """Sections of the page; ``inside``: it lies in the stage's own folder."""
    prefix = "" if inside else "../{}/"
    sections = []
    for name, record in records.items():
        match name:
            case "bake":
                sections.append(Section(name, record, plots=_bake_plots(record)))
            case "quantize":
                sections.append(Section(name, record, tables=[_file_table(record)]))
            case "calibrate":
                sections.append(Section(name, record, plots=_calibrate_plots(record)))
            case "qc":
                plots = _qc_plots(record, records)
                sections.append(Section(name, record, plots=plots, tables=[_qc_table(record)]))
            case "longtext":
                links = _long_links(directory / name, prefix.format(name))
                sections.append(Section(name, record, links=links))
            case _:
                sections.append(Section(name, record))
    return sections


def _plots(*candidates: tuple[str, str, Any]) -> list[Plot]:
    return [Plot(title, note, figure) for title, note, figure in candidates if figure is not None]


def _bake_plots(record: Record) -> list[Plot]:
    return _plots(
        (
            "Effect and fidelity by layer",
            "Bars: what the rotation changed. Line: what rounding to the storage dtype cost.",
            figures.layer_fidelity(record),
        ),
        (
            "Drift of every block",
            "log₁₀ ‖RᵀR − I‖_F: how far each block is from a rotation; the limit is −3.",
            figures.drift_heatmap(record),
        ),
    )


def _qc_plots(record: Record, records: Mapping[str, Record]) -> list[Plot]:
    quantize, export = records.get("quantize"), records.get("export")
    size = figures.quality_by_size(record, quantize, export) if quantize else None
    return _plots(
        ("Quality against size", "Mean KL to the gated model with its 95 % interval.", size),
        (
            "KL of single tokens",
            "How the divergence is spread: a tail on the right is a few tokens gone wrong.",
            figures.kl_histogram(record),
        ),
    )


def _calibrate_plots(record: Record) -> list[Plot]:
    return _plots(
        (
            "Reliability",
            "On the diagonal, confidence equals accuracy; held-out text.",
            reliability_figure(record),
        )
    )


def _qc_table(record: Record) -> tuple[str, list[str], list[list[str]]]:
    """Candidates side by side."""
    header = ["candidate", "KL mean", "KL 99 %", "KL max", "same top", "ln PPL ratio", "Δp rms",
              "max |Δz|", "ECE", "Brier"]  # fmt: skip
    rows = []
    candidates = record.metrics.get("candidates")
    for name, m in candidates.items() if isinstance(candidates, dict) else ():
        assert isinstance(m, dict)
        values: dict[str, Any] = m
        rows.append(
            [
                name,
                fmt.number(values["kl_mean"]),
                fmt.number(values["kl_percentiles"]["99"]),
                fmt.number(values["kl_max"]),
                fmt.percent(values["top1"]),
                fmt.number(values["ln_ppl_ratio"]),
                fmt.percent(values["dp_rms"]),
                fmt.number(values["max_abs"]),
                f"{values['ece_reference']:.4f} → {values['ece_candidate']:.4f}",
                f"{values['brier_reference']:.4f} → {values['brier_candidate']:.4f}",
            ]
        )
    return "Candidates", header, rows


def _file_table(record: Record) -> tuple[str, list[str], list[list[str]]]:
    """Quantized files with their real types."""
    header = ["file", "size", "bits per weight", "tensors by type", "fell back"]
    rows = []
    files = record.metrics.get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        assert isinstance(entry, dict)
        values: dict[str, Any] = entry
        kinds = ", ".join(f"{kind} × {count}" for kind, count in values["types"].items())
        rows.append(
            [
                name,
                fmt.size(values["bytes"]),
                f"{values['bits_per_weight']:.2f}",
                kinds,
                str(len(values["fallbacks"])),
            ]
        )
    return "Files", header, rows


def _long_links(folder: Path, prefix: str) -> list[tuple[str, str]]:
    return [(path.stem.replace("_", " "), prefix + path.name) for path in sorted(
        folder.glob("*_*.html"))]  # fmt: skip

"""Two run directories side by side: what changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from so8tqc.closure import versions_of
from so8tqc.disk.atomic import write_text
from so8tqc.disk.digests import file_ref
from so8tqc.languages import Language
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import write_record
from so8tqc.record_kinds.comparison import (
    Change,
    ComparisonMetrics,
    FileChange,
    FileSide,
    Side,
)
from so8tqc.records import FileRef, Record, Stopwatch, Verdict
from so8tqc.reports.kinds.comparison import comparison_html, comparison_markdown
from so8tqc.reports.language import spoken
from so8tqc.services.compare.run import Run, read_run
from so8tqc.services.compare.values import (
    changed_verdicts,
    compare_tables,
    compared_values,
    named_checks,
    new_failures,
)
from so8tqc.services.report import configured_language


def compare_runs(
    a: Path,
    b: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    language: Language | None = None,
) -> Record:
    """Compare run B with run A; writes ``comparison.{html,md,json}`` to ``out``.

    Each is the directory of a ``run``, or of one stage such as ``qc``. Where both have a token
    table over the same tokens, mean KL, NLL and share of top tokens are compared by the paired
    bootstrap of :mod:`so8tqc.services.qc.pairwise`, all candidates together. Other values are
    told apart only if their 95 % intervals do not meet. ``language``: of the pages; None: that of
    run B.

    Returns:
        Record of kind ``comparison``. It fails if a check fails in B that did not fail in A.
        Metrics: :class:`so8tqc.record_kinds.comparison.ComparisonMetrics`; of each kind of thing
        only what differs.

    Raises:
        InputError: a directory holds no record, or one that cannot be read.
    """
    watch = Stopwatch()
    first, second = read_run(a), read_run(b)
    with progress.task("comparing the runs", total=2) as task:
        paired = compare_tables(first, second)
        checks = named_checks(first), named_checks(second)
        values = compared_values(*checks, paired)
        changed_config = _changes(*_config(first, second))
        changed_versions = _changes(_versions(first), _versions(second))
        files, verdicts = _files(first, second), changed_verdicts(*checks)
        differing = [value for value in values if value["outcome"] != "equal"]
        task.advance(1)
        new = new_failures(*checks)
        record = Record(
            kind="comparison",
            verdict=new.verdict,
            checks=(new,),
            metrics=ComparisonMetrics(
                a=_about(first),
                b=_about(second),
                changed=any((changed_config, changed_versions, files, verdicts, differing)),
                config=changed_config,
                versions=changed_versions,
                files=files,
                verdicts=verdicts,
                values=differing,
                same={
                    "values": len(values) - len(differing),
                    "files": sum(_same(*refs) for refs in _references(first, second).values()),
                },
                paired={
                    "reason": paired.reason,
                    "note": paired.note,
                    "comparisons": paired.comparisons,
                },
            ).as_json(),
            inputs={"a": _fingerprint(first), "b": _fingerprint(second)},
            versions=versions_of(__name__),
            run=watch.info(),
        )
        with spoken(language or configured_language(second.whole)):
            write_text(out / "comparison.html", comparison_html(record))
            write_text(out / "comparison.md", comparison_markdown(record))
        write_record(out / "comparison.json", record)
        task.advance(1)
    return record


def _about(run: Run) -> Side:
    records = [run.whole] if run.whole else list(run.stages.values())
    return {
        "directory": str(run.directory),
        "verdict": str(max((r.verdict for r in records), key=lambda v: v is Verdict.FAIL)),
        "started": min(r.run.started for r in records).strftime("%Y-%m-%d %H:%M UTC"),
        "stages": list(run.stages),
    }


def _fingerprint(run: Run) -> FileRef:
    """Digest of the run's record, or of its only stage's."""
    own = run.directory / "record.json"
    return file_ref(
        own if own.is_file() else next(iter(sorted(run.directory.glob("*/record.json"))))
    )


def _config(a: Run, b: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both configs, dotted: the runs' own, or those of the stages where one has none."""
    if a.whole and b.whole:
        found = [dict(_flat(run.whole.config, run)) for run in (a, b) if run.whole]
    else:
        found = [
            {
                f"{stage}.{key}": value
                for stage, record in run.stages.items()
                for key, value in _flat(record.config, run)
            }
            for run in (a, b)
        ]
    for config in found:
        config.pop("out", None)
    return found[0], found[1]


def _flat(value: Any, run: Run, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, run, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        yield key, [run.plain(item) if isinstance(item, str) else item for item in value]
    else:
        yield key, run.plain(value) if isinstance(value, str) and key != "name" else value


def _versions(run: Run) -> dict[str, str]:
    """Every version that a record of the run names."""
    return {name: v for record in run.stages.values() for name, v in record.versions.items()}


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    names = dict.fromkeys([*a, *b])
    return [
        {"name": name, "a": a.get(name), "b": b.get(name)}
        for name in names
        if a.get(name) != b.get(name)
    ]


def _references(
    a: Run, b: Run
) -> dict[tuple[str, str, str], tuple[FileRef | None, FileRef | None]]:
    """(role, stage, name) → the file of both runs."""
    sides = [
        {
            (role, stage, run.plain(name)): ref
            for role in ("input", "output")
            for stage, record in run.stages.items()
            for name, ref in getattr(record, f"{role}s").items()
        }
        for run in (a, b)
    ]
    keys = dict.fromkeys([*sides[0], *sides[1]])
    return {key: (sides[0].get(key), sides[1].get(key)) for key in keys}


def _files(a: Run, b: Run) -> list[FileChange]:
    """Files whose digests differ, one row for each, whatever number of stages reads it."""
    found: dict[tuple[object, ...], FileChange] = {}
    for (role, stage, name), (left, right) in _references(a, b).items():
        if _same(left, right):
            continue
        key = (role, left and left.sha256, right and right.sha256)
        row = found.setdefault(
            key,
            {"role": role, "name": name, "stages": [], "a": _shown(left, a), "b": _shown(right, b)},
        )
        row["stages"].append(stage)
    return sorted(found.values(), key=lambda row: row["role"])


def _same(a: FileRef | None, b: FileRef | None) -> bool:
    return a is not None and b is not None and a.sha256 == b.sha256


def _shown(ref: FileRef | None, run: Run) -> FileSide | None:
    if ref is None:
        return None
    return {"path": run.plain(ref.path), "sha256": ref.sha256, "bytes": ref.bytes}

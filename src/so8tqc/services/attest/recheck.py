"""Every file of a run, hashed again and compared with the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from so8tqc.closure import versions_of
from so8tqc.disk.digests import file_ref
from so8tqc.errors import InputError
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.attest import RecheckMetrics
from so8tqc.records import FileRef, Record, Stopwatch, judge, overall
from so8tqc.services.run.directory import Manifest, read_manifest


def recheck(directory: Path, progress: Progress = SILENT) -> Record:
    """Hash all that the stages of a run wrote; nothing is taken from the manifest's cache.

    Record metrics: ``files`` (path → ``unchanged``, ``changed`` or ``missing``).

    Raises:
        InputError: the directory has no manifest, or it names no finished stage.
    """
    watch = Stopwatch()
    found: dict[str, str] = {}
    seen: dict[str, FileRef] = {}
    recorded = list(_recorded(read_manifest(directory), directory))
    with progress.task("hashing", total=len(recorded), unit="files") as task:
        for path, reference in recorded:
            name = path.relative_to(directory).as_posix()
            try:
                seen[name] = file_ref(path)
                same = seen[name].sha256 == reference.sha256
                found[name] = "unchanged" if same else "changed"
            except InputError:
                found[name] = "missing"
            task.advance(1, item=name)
    changed, missing = (
        [name for name, value in found.items() if value == state]
        for state in ("changed", "missing")
    )
    made = f"Of {len(found)} files and directories that the run made"
    checks = [
        judge("files.changed", len(changed), 0, detail=f"{made}, changed: {_names(changed)}."),
        judge("files.missing", len(missing), 0, detail=f"{made}, missing: {_names(missing)}."),
    ]
    return Record(
        kind="recheck",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=RecheckMetrics(files=found).as_json(),
        outputs=seen,
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _recorded(manifest: Manifest, directory: Path) -> Iterator[tuple[Path, FileRef]]:
    """The outputs of a run: where each one is now, and its entry in the manifest."""
    if not manifest.stages:
        raise InputError(
            "no stage was finished here",
            where=str(directory),
            remedy="Give the run directory of so8tqc run.",
        )
    for stage, entry in manifest.stages.items():
        for written in entry.outputs.values():
            yield _here(Path(written.path), stage, directory), written


def _here(path: Path, stage: str, directory: Path) -> Path:
    """The place of an output in a run directory that may have been moved: DIR/STAGE/…"""
    parts = path.parts
    last = len(parts) - 1 - parts[::-1].index(stage)
    return directory.joinpath(*parts[last:])


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"
